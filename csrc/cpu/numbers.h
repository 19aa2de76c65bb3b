// Numbers as they lie in memory: get() reads one as the type it is computed in, set() rounds to nearest, ties to even.
//
// The structs are packed, so that the compiler assumes no alignment, and free of branches, so that loops over them
// vectorise. bfloat16 is the upper half of a float; float16 has 5 bits of exponent (bias 15) and 10 of mantissa.
#pragma once
#include <cstdint>
#include <cstring>

#include "../operators.h"
#include "simd.h"

namespace minifocus::cpu {

MINIFOCUS_INLINE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

MINIFOCUS_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Whether v replaces the maximum m so far. The first of equal numbers stays. A NaN is larger than everything, and the first
// NaN stays.
template <typename Real>
MINIFOCUS_INLINE bool is_larger(Real v, Real m) {
  return !(v <= m) & (m == m);
}

struct __attribute__((packed)) F32 {
  using Real = float;  // the type that computes
  using Wide = F32;    // how a Real lies in memory
  float value;
  MINIFOCUS_INLINE Real get() const { return value; }
  MINIFOCUS_INLINE void set(Real v) { value = v; }
};

struct __attribute__((packed)) F64 {
  using Real = double;
  using Wide = F64;
  double value;
  MINIFOCUS_INLINE Real get() const { return value; }
  MINIFOCUS_INLINE void set(Real v) { value = v; }
};

struct __attribute__((packed)) BF16 {
  using Real = float;
  using Wide = F32;
  uint16_t bits;
  MINIFOCUS_INLINE Real get() const { return float_of(uint32_t{bits} << 16); }
  MINIFOCUS_INLINE void set(Real v) {
    const uint32_t u = bits_of(v);
    const uint32_t rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
    bits = static_cast<uint16_t>(v == v ? rounded : 0x7fc0u);
  }
};

struct __attribute__((packed)) F16 {
  using Real = float;
  using Wide = F32;
  uint16_t bits;
  MINIFOCUS_INLINE Real get() const {
    const uint32_t magnitude = bits & 0x7fffu, sign = (bits & 0x8000u) << 16;
    const uint32_t normal = (magnitude << 13) + ((127 - 15) << 23);
    const uint32_t infinite = (magnitude << 13) + ((255 - 31) << 23);  // or NaN
    const uint32_t subnormal = bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
    return float_of(sign | (magnitude < 0x0400 ? subnormal : magnitude < 0x7c00 ? normal : infinite));
  }
  MINIFOCUS_INLINE void set(Real v) {
    const uint32_t u = bits_of(v), magnitude = u & 0x7fffffffu, sign = u >> 16 & 0x8000u;
    const uint32_t normal = (magnitude - ((127 - 15) << 23) + 0x0fff + (magnitude >> 13 & 1)) >> 13;
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);  // 0.5f's last bit is 2^-24
    const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;              // NaN; infinity from 2^16 on
    const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;           // below 2^-14 it is subnormal
    bits = static_cast<uint16_t>(sign | (magnitude < (143u << 23) ? finite : large));
  }
};

// Calls f with a number of the type that dtype names.
template <typename F>
void with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32: return f(F32{});
    case DType::bf16: return f(BF16{});
    case DType::f16: return f(F16{});
    case DType::f64: return f(F64{});
  }
}

}  // namespace minifocus::cpu
