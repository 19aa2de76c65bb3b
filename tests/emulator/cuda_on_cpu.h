// CUDA on the CPU: what a .cu file of ../cuda needs of CUDA, for an ordinary C++ compiler. For tests only.
//
// A kernel is compiled as a plain function. The threads of a block are fibers (fibers.h): each runs until it reaches a
// barrier or a warp operation, where the next takes over. runtime.cpp schedules them in a chosen order and finds
// barriers that not all threads reach, shuffles from lanes that are not there, deadlocks; with the kernel file compiled
// for checking (-fsanitize=thread,alignment,bounds,...: the compiler announces every memory access) checks.cpp finds
// accesses out of bounds, reads of unwritten memory and data races.
//
// What it shows: that the kernel's logic is right, for any order of threads tried. What it does not show: that a GPU
// agrees. Speed, registers, rounding of the fast maths (__expf, ...), launch bounds and the memory model below barriers
// and fences are the GPU's own; the same tests have to pass there too.
//
// What there is not: CUB, cooperative groups, tensor cores, TMA, mbarriers, PTX. A kernel that uses them guards that
// with __CUDA_ARCH__ and keeps a plain path that does the same. No device function may come from the C++ library's
// containers or algorithms, and no memcpy of more than 16 bytes: their accesses would go unseen.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

// ---- Qualifiers ---------------------------------------------------------------------------------------------------
// `static thread_local` puts all __shared__ variables, those in templates too, into one piece of memory per module,
// whose bounds are known while running: the emulator can fill it with garbage before each block and watch it.

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static thread_local
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#ifndef __noinline__
#define __noinline__ __attribute__((noinline))
#endif

// ---- Vector types -------------------------------------------------------------------------------------------------

#define EMULATOR_VECTORS(T, name)                                                            \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                         \
  struct name##3 { T x, y, z; };                                                             \
  struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; };         \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                 \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                         \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

EMULATOR_VECTORS(signed char, char)
EMULATOR_VECTORS(unsigned char, uchar)
EMULATOR_VECTORS(short, short)
EMULATOR_VECTORS(unsigned short, ushort)
EMULATOR_VECTORS(int, int)
EMULATOR_VECTORS(unsigned, uint)
EMULATOR_VECTORS(long long, longlong)
EMULATOR_VECTORS(unsigned long long, ulonglong)
EMULATOR_VECTORS(float, float)
EMULATOR_VECTORS(double, double)
#undef EMULATOR_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// ---- Runtime: errors, streams, the calls that are no kernels ------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};
typedef void* cudaStream_t;  // everything happens at once, in order

cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t stream = nullptr);

// ---- Bits, loads and stores, maths --------------------------------------------------------------------------------

namespace emulator {
template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace emulator

inline float __uint_as_float(unsigned bits) { return emulator::bit_cast<float>(bits); }
inline float __int_as_float(int bits) { return emulator::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return emulator::bit_cast<unsigned>(value); }
inline int __float_as_int(float value) { return emulator::bit_cast<int>(value); }
inline double __longlong_as_double(long long bits) { return emulator::bit_cast<double>(bits); }
inline long long __double_as_longlong(double value) { return emulator::bit_cast<long long>(value); }

template <class T> __forceinline__ T __ldg(const T* address) { return *address; }
template <class T> __forceinline__ T __ldcs(const T* address) { return *address; }
template <class T> __forceinline__ T __ldcg(const T* address) { return *address; }
template <class T> __forceinline__ void __stcs(T* address, T value) { *address = value; }
template <class T> __forceinline__ void __stcg(T* address, T value) { *address = value; }

#define EMULATOR_MIN_MAX(T)                       \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
EMULATOR_MIN_MAX(int)
EMULATOR_MIN_MAX(unsigned)
EMULATOR_MIN_MAX(long)
EMULATOR_MIN_MAX(unsigned long)
EMULATOR_MIN_MAX(long long)
EMULATOR_MIN_MAX(unsigned long long)
#undef EMULATOR_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return powf(10.0f, x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }

// ---- bfloat16 and half: round to nearest even; a NaN becomes 0x7fff, as on a GPU ----------------------------------
// Conversions only, and explicit ones: CUDA's own operators round after every step, which is easily overlooked. Kernels
// compute in float.

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float value) {
    const unsigned u = __float_as_uint(value);
    bits = value != value ? 0x7fff : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
  explicit operator float() const { return __uint_as_float(unsigned(bits) << 16); }
};

struct __half {
  uint16_t bits;
  __half() = default;
  explicit __half(float value) { bits = value != value ? 0x7fff : emulator::bit_cast<uint16_t>(_Float16(value)); }
  explicit operator float() const { return float(emulator::bit_cast<_Float16>(bits)); }
};

struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
struct alignas(4) __half2 { __half x, y; };
typedef __nv_bfloat16 nv_bfloat16;
typedef __nv_bfloat162 nv_bfloat162;
typedef __half half;
typedef __half2 half2;

inline float __bfloat162float(__nv_bfloat16 value) { return float(value); }
inline __nv_bfloat16 __float2bfloat16(float value) { return __nv_bfloat16(value); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return __nv_bfloat16(value); }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return emulator::bit_cast<__nv_bfloat16>(bits); }
inline float2 __bfloat1622float2(__nv_bfloat162 pair) { return {float(pair.x), float(pair.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }

inline float __half2float(__half value) { return float(value); }
inline __half __float2half(float value) { return __half(value); }
inline __half __float2half_rn(float value) { return __half(value); }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline __half __ushort_as_half(unsigned short bits) { return emulator::bit_cast<__half>(bits); }
inline float2 __half22float2(__half2 pair) { return {float(pair.x), float(pair.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }

// ---- Which thread this is -----------------------------------------------------------------------------------------

namespace emulator {
struct Builtins {
  uint3 thread_index, block_index;
  dim3 block_size, grid_size;
};
extern Builtins builtins;  // set at every change of thread
}  // namespace emulator

#define threadIdx emulator::builtins.thread_index
#define blockIdx emulator::builtins.block_index
#define blockDim emulator::builtins.block_size
#define gridDim emulator::builtins.grid_size
constexpr int warpSize = 32;

// ---- Barriers, votes, shuffles ------------------------------------------------------------------------------------
// Every call carries the file and line that it stands in, for messages.

namespace emulator {

enum class Vote { none, count, all, any };
enum class WarpOp { sync, shuffle, ballot, match, add, min, max, bit_and, bit_or, bit_xor };

int block_barrier(Vote vote, int predicate, const char* file, int line);
uint64_t warp_collective(WarpOp op, unsigned mask, uint64_t value, int source_lane, const char* file, int line);
int lane();

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle carries at most 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T shuffle(unsigned mask, T value, int source_lane, const char* file, int line) {
  const uint64_t bits = warp_collective(WarpOp::shuffle, mask, to_bits(value), source_lane, file, line);
  T result;
  memcpy(&result, &bits, sizeof result);
  return result;
}

}  // namespace emulator

#define EMULATOR_CALL_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EMULATOR_CALL_SITE) { emulator::block_barrier(emulator::Vote::none, 0, file, line); }
inline int __syncthreads_count(int predicate, EMULATOR_CALL_SITE) {
  return emulator::block_barrier(emulator::Vote::count, predicate, file, line);
}
inline int __syncthreads_and(int predicate, EMULATOR_CALL_SITE) {
  return emulator::block_barrier(emulator::Vote::all, predicate, file, line);
}
inline int __syncthreads_or(int predicate, EMULATOR_CALL_SITE) {
  return emulator::block_barrier(emulator::Vote::any, predicate, file, line);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATOR_CALL_SITE) {
  emulator::warp_collective(emulator::WarpOp::sync, mask, 0, 0, file, line);
}

// A shuffle works inside segments of `width` lanes; a source beyond the segment's end gives the lane its own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATOR_CALL_SITE) {
  const int segment = emulator::lane() & ~(width - 1);
  return emulator::shuffle(mask, value, segment | (source & (width - 1)), file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, EMULATOR_CALL_SITE) {
  const int lane = emulator::lane(), source = lane ^ lane_mask, end = (lane & ~(width - 1)) + width;
  return emulator::shuffle(mask, value, source < end ? source : lane, file, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_CALL_SITE) {
  const int lane = emulator::lane(), source = lane + int(delta), end = (lane & ~(width - 1)) + width;
  return emulator::shuffle(mask, value, source < end ? source : lane, file, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_CALL_SITE) {
  const int lane = emulator::lane(), source = lane - int(delta), begin = lane & ~(width - 1);
  return emulator::shuffle(mask, value, source >= begin ? source : lane, file, line);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_CALL_SITE) {
  return unsigned(emulator::warp_collective(emulator::WarpOp::ballot, mask, predicate != 0, 0, file, line));
}
inline int __any_sync(unsigned mask, int predicate, EMULATOR_CALL_SITE) {
  return emulator::warp_collective(emulator::WarpOp::ballot, mask, predicate != 0, 0, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, EMULATOR_CALL_SITE) {
  return emulator::warp_collective(emulator::WarpOp::ballot, mask, predicate == 0, 0, file, line) == 0;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, EMULATOR_CALL_SITE) {
  return unsigned(emulator::warp_collective(emulator::WarpOp::match, mask, emulator::to_bits(value), 0, file, line));
}

// Signed numbers are shifted up by 2^31, which keeps their order and makes them unsigned.
#define EMULATOR_REDUCE(name, op)                                                                           \
  inline unsigned __reduce_##name##_sync(unsigned mask, unsigned value, EMULATOR_CALL_SITE) {               \
    return unsigned(emulator::warp_collective(emulator::WarpOp::op, mask, value, 0, file, line));           \
  }
EMULATOR_REDUCE(add, add)
EMULATOR_REDUCE(min, min)
EMULATOR_REDUCE(max, max)
EMULATOR_REDUCE(and, bit_and)
EMULATOR_REDUCE(or, bit_or)
EMULATOR_REDUCE(xor, bit_xor)
#undef EMULATOR_REDUCE
inline int __reduce_add_sync(unsigned mask, int value, EMULATOR_CALL_SITE) {
  return int(__reduce_add_sync(mask, unsigned(value), file, line));
}
inline int __reduce_min_sync(unsigned mask, int value, EMULATOR_CALL_SITE) {
  return int(__reduce_min_sync(mask, unsigned(value) ^ 0x80000000u, file, line) ^ 0x80000000u);
}
inline int __reduce_max_sync(unsigned mask, int value, EMULATOR_CALL_SITE) {
  return int(__reduce_max_sync(mask, unsigned(value) ^ 0x80000000u, file, line) ^ 0x80000000u);
}
#undef EMULATOR_CALL_SITE

// ---- Atomics and fences (atomics.cpp) -----------------------------------------------------------------------------

#define EMULATOR_ATOMICS(T)  \
  T atomicAdd(T*, T);        \
  T atomicMin(T*, T);        \
  T atomicMax(T*, T);        \
  T atomicExch(T*, T);       \
  T atomicCAS(T*, T, T);     \
  T atomicAnd(T*, T);        \
  T atomicOr(T*, T);         \
  T atomicXor(T*, T);
EMULATOR_ATOMICS(int)
EMULATOR_ATOMICS(unsigned)
EMULATOR_ATOMICS(unsigned long long)
#undef EMULATOR_ATOMICS
long long atomicMin(long long*, long long);
long long atomicMax(long long*, long long);
float atomicAdd(float*, float);
float atomicExch(float*, float);
double atomicAdd(double*, double);

// Between blocks, what one thread wrote before its fence and its atomic is there for another that meets the atomic's
// value and then passes a fence. Within a block only the barriers order memory here.
void __threadfence();
inline void __threadfence_block() {}
void __nanosleep(unsigned nanoseconds);

// ---- Launching ----------------------------------------------------------------------------------------------------

namespace emulator {
unsigned char* dynamic_shared();
int64_t shared_bytes_option();
void allow_shared(const void* kernel, int64_t bytes);
void check_failed(const char* condition, const char* file, int line);
cudaError_t run(dim3 grid, dim3 block, size_t shared_bytes, void (*call)(void*), void* arguments,
                size_t arguments_size, const void* kernel);
}  // namespace emulator

#define DYN_SHARED(T, name) T* const name = reinterpret_cast<T*>(emulator::dynamic_shared())

#define DEVICE_CHECK(condition)                                                    \
  do {                                                                             \
    if (!(condition)) emulator::check_failed(#condition, __FILE__, __LINE__);      \
  } while (false)

namespace gpu {

inline bool has_tensor_cores() { return true; }  // kernels do by hand what those do

inline int64_t max_shared_bytes() { return emulator::shared_bytes_option(); }

inline cudaError_t allow_shared(const void* kernel, int64_t bytes) {
  emulator::allow_shared(kernel, bytes);
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t start(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
                   Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::decay_t<Parameters>...> arguments;
  } call{kernel, {std::forward<Arguments>(arguments)...}};
  static_assert(sizeof call.arguments <= 4096, "a kernel takes at most 4 KB of arguments");
  const auto thread = [](void* data) {
    Call* call = static_cast<Call*>(data);
    std::apply(call->kernel, call->arguments);
  };
  return emulator::run(grid, block, shared_bytes, thread, &call, sizeof call, reinterpret_cast<const void*>(kernel));
}

void store_release(unsigned long long* address, unsigned long long value);
unsigned long long load_acquire(const unsigned long long* address);

}  // namespace gpu
