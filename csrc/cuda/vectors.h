// Numbers and small vectors of them, as every kernel here reads and writes them: arithmetic is in float, memory is
// touched 16 bytes at a time where addresses allow (Vec<T, 16 / sizeof(T)>) and one element at a time elsewhere (Vec<T,
// 1>).
#pragma once
#include <cstring>
#include <type_traits>

#include "../launchers.h"
#include "gpu.h"

namespace minifocus::cuda {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float(float v) {
  return v;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float(float v) {
  return __float2bfloat16(v);
}
template <>
__device__ __forceinline__ __half from_float(float v) {
  return __float2half(v);
}

template <class T, int V>
struct alignas(V * sizeof(T)) Vec {
  static_assert(V == 1 || V * sizeof(T) == 16, "one element or 16 bytes");
  T v[V];
};

template <int V, class T>
__device__ __forceinline__ Vec<T, V> load(const T* from) {
  return *reinterpret_cast<const Vec<T, V>*>(from);
}

// To global memory. The intrinsic keeps the compiler from taking the 16 bytes apart, as it does with an assignment.
template <int V, class T>
__device__ __forceinline__ void store(T* to, const Vec<T, V>& value) {
  if constexpr (V == 1) {
    *to = value.v[0];
  } else {
    uint4 word;
    memcpy(&word, &value, sizeof(word));
    __stcg(reinterpret_cast<uint4*>(to), word);
  }
}

// The first maximum wins, and the first NaN over everything. Returns whether `value` took the place of `best`.
template <class T>
__device__ __forceinline__ bool keep_first_max(T& best, T value) {
  const float a = to_float(best), b = to_float(value);
  const bool taken = b > a || (b != b && a == a);
  if (taken) best = value;
  return taken;
}

// keep_first_max, element by element: 16-bit numbers two at a time where the GPU compares them so, which takes a quarter
// of the instructions. (Its maximum of two would not do: of -0 and +0 it gives +0, whichever came first.)
template <class T, int V>
__device__ __forceinline__ void keep_first_max(Vec<T, V>& best, const Vec<T, V>& value) {
#if defined(__CUDA_ARCH__)
  constexpr bool kPairs = V > 1 && (std::is_same_v<T, __half> || (__CUDA_ARCH__ >= 900 && sizeof(T) == 2));
#else
  constexpr bool kPairs = false;
#endif
  if constexpr (kPairs) {
    using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
#pragma unroll
    for (int j = 0; j < V; j += 2) {
      Pair a, b;
      memcpy(&a, best.v + j, sizeof a);
      memcpy(&b, value.v + j, sizeof b);
      // Not less or equal, so larger or NaN; and the best so far is no NaN.
      const unsigned taken = __hgtu2_mask(b, a) & __heq2_mask(a, a);
      unsigned words[2];
      memcpy(words, &a, sizeof a);
      memcpy(words + 1, &b, sizeof b);
      words[0] = (words[1] & taken) | (words[0] & ~taken);
      memcpy(best.v + j, words, sizeof a);
    }
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) keep_first_max(best.v[j], value.v[j]);
  }
}

inline bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Calls launch(T{}) with the element type of `dtype`.
template <class Launch>
int dispatch(DType dtype, Launch&& launch) {
  switch (dtype) {
    case DType::f32: return launch(float{});
    case DType::bf16: return launch(__nv_bfloat16{});
    case DType::f16: return launch(__half{});
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace minifocus::cuda
