// CUDA for a kernel file: the real one under nvcc, else the emulator, so that the same .cu file also runs on a computer
// without a GPU. tests/emulator/cuda_on_cpu.h says what that shows and what it does not.
//
//   DYN_SHARED(float, tile);              dynamic shared memory, 16-byte aligned; a kernel has one
//   gpu::launch(kernel, grid, block, shared_bytes, stream, arguments...)     instead of <<<...>>>, which is not C++
//   gpu::store_release, gpu::load_acquire      pass a word, and all that was written before it, to another block
//   gpu::dimension(n)                     a number of blocks, as dim3 takes it
//   gpu::has_tensor_cores()
//   gpu::max_shared_bytes()               dynamic shared memory that one block may have on the current device
//   DEVICE_CHECK(condition)               stops the launch where the condition does not hold
#pragma once

#include <cstdint>
#include <utility>

#ifndef __CUDACC__

#include "cuda_on_cpu.h"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define DYN_SHARED(T, name)                                              \
  extern __shared__ __align__(16) unsigned char dynamic_shared_memory[]; \
  T* const name = reinterpret_cast<T*>(dynamic_shared_memory)

#define DEVICE_CHECK(condition) \
  do {                          \
    if (!(condition)) __trap(); \
  } while (false)

namespace gpu {

inline int64_t max_shared_bytes() {
  int device = 0, bytes = 48 * 1024;
  if (cudaGetDevice(&device) == cudaSuccess) {
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  return bytes - 2048;  // a kernel's own __shared__ variables
}

// Whether the current device has mma.m16n8k16 for bfloat16 and half.
inline bool has_tensor_cores() {
  int device = 0, major = 0;
  if (cudaGetDevice(&device) == cudaSuccess) cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major >= 8;
}

inline cudaError_t allow_shared(const void* kernel, int64_t bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
}

template <class... Parameters, class... Arguments>
cudaError_t start(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                  Arguments&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  const cudaError_t last = cudaGetLastError();  // which also clears it, so that no later call is blamed for it
  return error != cudaSuccess ? error : last;
}

__device__ __forceinline__ void store_release(unsigned long long* address, unsigned long long value) {
  asm volatile("st.release.gpu.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

__device__ __forceinline__ unsigned long long load_acquire(const unsigned long long* address) {
  unsigned long long value;
  asm volatile("ld.acquire.gpu.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
}

}  // namespace gpu

#endif

namespace gpu {

// CUDA refuses numbers of blocks that do not fit into 32 bits: they stay too large.
inline unsigned dimension(int64_t n) { return unsigned(n < int64_t(0xffffffff) ? n : int64_t(0xffffffff)); }

// Arguments are converted to the kernel's parameter types, as in a call. Returns the error of the launch itself.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Arguments&&... arguments) {
  // Beyond 48 KB, __shared__ variables included, a kernel needs permission. It asks for all there is each time: the
  // permission belongs to the kernel, and another thread's smaller number could replace it before this launch.
  if (shared_bytes > 40 * 1024) {
    const cudaError_t error = allow_shared(reinterpret_cast<const void*>(kernel), max_shared_bytes());
    if (error != cudaSuccess) return error;
  }
  return start(kernel, grid, block, shared_bytes, stream, std::forward<Arguments>(arguments)...);
}

}  // namespace gpu
