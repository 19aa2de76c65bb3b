// The emulator's own test: kernels with one planted bug each, which it must report, and right ones, which it must not.
//
// tests/emulator/test_emulator.py says for each what has to be found. Where lines are marked "// reported", the message has to
// name one of them. Every kernel takes an input x [n], an output y [n] (float) and a counter; most expect blocks of 256
// threads.
#include "planted_bugs.h"

#include "../../csrc/cuda/gpu.h"

namespace {

constexpr unsigned kAll = 0xffffffffu;

__device__ int global_index() { return blockIdx.x * blockDim.x + threadIdx.x; }

// ---- Right ---------------------------------------------------------------------------------------------------------

// y[block] = the sum of the block's part of x.
__device__ void sum_of_block(const float* x, float* y, int n) {
  __shared__ float sums[256];
  const int i = global_index(), tid = threadIdx.x;
  sums[tid] = i < n ? x[i] : 0.f;
  __syncthreads();
  for (int half = 128; half > 0; half /= 2) {
    if (tid < half) sums[tid] += sums[tid + half];
    __syncthreads();
  }
  if (tid == 0) y[blockIdx.x] = sums[0];
}

__global__ void block_sum(const float* x, float* y, int*, int n) { sum_of_block(x, y, n); }

// Each lane passes a number to its neighbour through shared memory, with __syncwarp between.
__global__ void warp_exchange(const float* x, float* y, int*, int n) {
  __shared__ float values[256];
  const int i = global_index(), tid = threadIdx.x;
  for (int round = 0; round < 3; round++) {
    values[tid] = i < n ? x[i] + round : 0.f;
    __syncwarp();
    const float neighbour = values[tid ^ 1];
    __syncwarp();
    if (i < n) y[i] = neighbour;
  }
}

// y[0] = the sum of x: every block leaves its part in y, and the last one to finish adds the parts up.
__global__ void last_block_adds(const float* x, float* y, int* counter, int n) {
  __shared__ bool last;
  sum_of_block(x, y, n);
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(counter, 1) == int(gridDim.x) - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last || threadIdx.x > 0) return;
  float sum = 0.f;
  for (int b = 0; b < int(gridDim.x); b++) sum += y[b];
  y[0] = sum;
}

// y[ticket] = how many blocks came before, each having waited for the one before it. y begins as zeros.
__global__ void chain_of_blocks(const float*, float* y, int* counter, int) {
  if (threadIdx.x > 0) return;
  const int ticket = atomicAdd(counter, 1);
  unsigned long long* const passed_on = reinterpret_cast<unsigned long long*>(y);
  unsigned long long before = 0;
  while (ticket > 0 && before == 0) before = gpu::load_acquire(&passed_on[ticket - 1]);
  gpu::store_release(&passed_on[ticket], before + 1);
}

// The warp operations, one result after another in y as whole numbers below 2^24: see test_warp_operations.
__global__ void warp_operations(const float* x, float* y, int*, int n) {
  const int lane = threadIdx.x % 32, i = threadIdx.x, value = int(x[i]);
  int at = 0;
  const auto put = [&](double result) { y[n / 16 * at++ + i] = float(result); };
  put(__shfl_sync(kAll, value, 5));
  put(__shfl_sync(kAll, double(value), lane * 3, 8));
  put(__shfl_up_sync(kAll, value * (1ll << 40), 2) / (1ll << 40));
  put(__bfloat162float(__shfl_down_sync(kAll, __float2bfloat16(float(value)), 4, 16)));
  put(__shfl_xor_sync(kAll, float(value), 9));
  put(__popc(__ballot_sync(kAll, value % 3 == 0)));
  put(__any_sync(kAll, value < -90) + 2 * __all_sync(kAll, value < 200));
  put(__reduce_add_sync(kAll, value));
  put(__reduce_min_sync(kAll, value));
  put(__reduce_max_sync(kAll, value));
  put(__reduce_and_sync(kAll, unsigned(value & 1023) | 64u));
  put(__reduce_or_sync(kAll, unsigned(value & 1023)) + __reduce_xor_sync(kAll, unsigned(value & 1023)));
  put(__ffs(int(__match_any_sync(kAll, value % 5))));
  put(__syncthreads_count(value > 0));
  put(__syncthreads_and(value > -200) + 2 * __syncthreads_or(value > 200));
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;  // the halves of a warp apart
  if (lane < 16) put(__reduce_max_sync(half, value));
  else put(__reduce_min_sync(half, value));
}

// 1024 threads and 225 KB of dynamic shared memory.
__global__ void large_block(const float* x, float* y, int*, int n) {
  DYN_SHARED(float, values);
  const int size = 225 * 1024 / 4;
  for (int i = threadIdx.x; i < size; i += blockDim.x) values[i] = float(i);
  __syncthreads();
  if (int(threadIdx.x) < n) y[threadIdx.x] = values[size - 1 - threadIdx.x] + x[threadIdx.x];
}

// ---- Wrong: barriers and warp operations ---------------------------------------------------------------------------

__global__ void exit_before_barrier(const float* x, float* y, int*, int n) {
  __shared__ float values[256];
  const int i = global_index();
  if (i >= n) return;
  values[threadIdx.x] = x[i];
  __syncthreads();  // reported
  y[i] = values[threadIdx.x];
}

__global__ void divergent_barriers(const float*, float* y, int*, int n) {
  const int i = global_index();
  if (threadIdx.x % 2 == 0) {
    __syncthreads();  // reported
  } else {
    __syncthreads();  // reported
  }
  if (i < n) y[i] = 1.f;
}

__global__ void barrier_in_uneven_loop(const float* x, float* y, int*, int n) {
  const int i = global_index(), rounds = i < n && x[i] > 0.f ? 2 : 1;
  for (int round = 0; round < rounds; round++) __syncthreads();  // reported
  if (i < n) y[i] = 1.f;
}

__global__ void barrier_against_warp(const float*, float* y, int*, int n) {
  const int i = global_index();
  if (threadIdx.x % 32 < 16) __syncthreads();  // reported
  else __syncwarp();                           // reported
  if (i < n) y[i] = 1.f;
}

__global__ void half_warp_shuffle(const float* x, float* y, int*, int n) {
  const int i = global_index();
  float value = i < n ? x[i] : 0.f;
  if (threadIdx.x % 32 < 16) value += __shfl_xor_sync(kAll, value, 1);  // reported
  __syncwarp();                                                        // reported
  if (i < n) y[i] = value;
}

__global__ void shuffle_from_exited(const float* x, float* y, int*, int n) {
  const int i = global_index();
  if (i >= n) return;
  y[i] = __shfl_sync(kAll, x[i], 31);  // reported
}

__global__ void lane_outside_its_mask(const float* x, float* y, int*, int n) {
  const int i = global_index();
  if (i < n) y[i] = __shfl_sync(0x0000ffffu, x[i], 0);  // reported
}

__global__ void failing_check(const float*, float* y, int*, int n) {
  const int i = global_index();
  DEVICE_CHECK(i < n);  // reported
  y[i] = 1.f;
}

// ---- Wrong: memory -------------------------------------------------------------------------------------------------

__global__ void static_shared_overrun(const float*, float* y, int*, int n) {
  __shared__ float values[256];
  const int i = global_index();
  values[threadIdx.x] = 1.f;
  __syncthreads();
  if (i < n) y[i] = values[threadIdx.x + 1];  // reported
}

__global__ void dynamic_shared_overrun(const float*, float* y, int*, int n) {
  DYN_SHARED(float, values);
  const int i = global_index();
  values[threadIdx.x] = 1.f;
  __syncthreads();
  if (i < n) y[i] = values[threadIdx.x + 1];  // reported
}

__global__ void vector_tail(const float* x, float* y, int*, int n) {
  const int i = global_index();
  if (i >= n) return;
  const float4 four = __ldg(reinterpret_cast<const float4*>(x) + i / 4);  // reported
  y[i] = four.x + four.y + four.z + four.w;
}

__global__ void half_outside(const float* x, float* y, int*, int n) {
  const int i = global_index();
  if (i >= n) return;
  const unsigned long long two = __ldg(reinterpret_cast<const unsigned long long*>(x) + i / 2);  // reported
  y[i] = __uint_as_float(unsigned(two) ^ unsigned(two >> 32));
}

__global__ void far_outside(const float* x, float* y, int*, int n) {
  const int i = global_index();
  if (i < n) y[i] = x[i + 100'000'000];  // reported
}

__global__ void write_to_input(const float* x, float* y, int*, int n) {
  const int i = global_index();
  if (i >= n) return;
  const_cast<float*>(x)[i] = 0.f;  // reported
  y[i] = 1.f;
}

__global__ void another_threads_stack(const float*, float* y, int*, int n) {
  __shared__ float* pointer;
  float local = float(threadIdx.x);
  if (threadIdx.x == 0) pointer = &local;
  __syncthreads();
  const int i = global_index();
  if (i < n && threadIdx.x == 1) local = *pointer;  // reported
  if (i < n) y[i] = local;
}

__global__ void misaligned_vector(const float* x, float* y, int*, int n) {
  const int i = global_index();
  if (i >= n) return;
  y[i] = 4 * i + 5 < n ? reinterpret_cast<const float4*>(x + 4 * i + 1)->x : 0.f;  // reported
}

__global__ void unwritten_shared(const float*, float* y, int*, int n) {
  __shared__ float values[256];
  const int i = global_index();
  if (threadIdx.x < 200) values[threadIdx.x] = 1.f;
  __syncthreads();
  if (i < n) y[i] = values[threadIdx.x];  // reported
}

__global__ void shared_of_the_last_block(const float*, float* y, int*, int n) {
  __shared__ float values[256];
  const int i = global_index();
  if (blockIdx.x == 0) values[threadIdx.x] = 1.f;
  __syncthreads();
  if (i < n) y[i] = values[threadIdx.x];  // reported
}

__global__ void last_unwritten(const float* x, float* y, int*, int n) {
  const int i = global_index();
  if (i < n - 1) y[i] = x[i];
}

__global__ void integer_overflow(const float*, float* y, int*, int n) {
  const int i = global_index();
  if (i < n) y[i] = float((i + 1) * 2000000000);  // reported
}

// ---- Wrong: races --------------------------------------------------------------------------------------------------

__global__ void missing_barrier(const float* x, float* y, int*, int n) {
  __shared__ float sums[256];
  const int i = global_index(), tid = threadIdx.x;
  sums[tid] = i < n ? x[i] : 0.f;
  __syncthreads();
  for (int half = 128; half > 0; half /= 2)
    if (tid < half) sums[tid] += sums[tid + half];  // reported
  __syncthreads();
  if (tid == 0) y[blockIdx.x] = sums[0];
}

__global__ void early_reuse(const float* x, float* y, int*, int n) {
  __shared__ float values[256];
  const int i = global_index();
  float sum = 0.f;
  for (int round = 0; round < 2; round++) {
    values[threadIdx.x] = i < n ? x[i] * float(round) : 0.f;  // reported
    __syncthreads();
    sum += values[255 - threadIdx.x];  // reported
  }
  if (i < n) y[i] = sum;
}

__global__ void missing_syncwarp(const float* x, float* y, int*, int n) {
  __shared__ float values[256];
  const int i = global_index();
  volatile float* const own = values;
  own[threadIdx.x] = i < n ? x[i] : 0.f;  // reported
  const float neighbour = own[threadIdx.x ^ 1];  // reported
  if (i < n) y[i] = neighbour;
}

__global__ void plain_accumulation(const float* x, float* y, int*, int) {
  if (threadIdx.x == 0) y[0] += x[blockIdx.x];  // reported
}

__global__ void atomic_against_plain(const float*, float* y, int* counter, int n) {
  const int i = global_index();
  atomicAdd(counter, 1);                // reported
  if (i < n) y[i] = float(*counter);  // reported
}

__global__ void missing_fence(const float* x, float* y, int* counter, int n) {
  __shared__ bool last;
  sum_of_block(x, y, n);
  if (threadIdx.x == 0) last = atomicAdd(counter, 1) == int(gridDim.x) - 1;
  __syncthreads();
  if (!last || threadIdx.x > 0) return;
  float sum = 0.f;
  for (int b = 0; b < int(gridDim.x); b++) sum += y[b];  // reported
  y[0] = sum;
}

// ---- Wrong: waiting for what need not come --------------------------------------------------------------------------

__global__ void spin_wait(const float*, float* y, int* counter, int) {
  if (threadIdx.x == 0) {
    while (atomicAdd(counter, 0) == 0) {  // reported
    }
    y[0] = 1.f;
  } else if (threadIdx.x == 1) {
    atomicExch(counter, 1);
  }
}

// As chain_of_blocks, but blocks wait in the order of their index, in which they need not start.
__global__ void chain_by_index(const float*, float* y, int*, int) {
  if (threadIdx.x > 0) return;
  unsigned long long* const passed_on = reinterpret_cast<unsigned long long*>(y);
  unsigned long long before = 0;
  while (blockIdx.x > 0 && before == 0) before = gpu::load_acquire(&passed_on[blockIdx.x - 1]);  // reported
  gpu::store_release(&passed_on[blockIdx.x], before + 1);
}

// ---- Wrong, and seen only by comparing orders of threads ------------------------------------------------------------

__global__ void append_in_any_order(const float* x, float* y, int* counter, int n) {
  const int i = global_index();
  if (i < n && x[i] > 0.f) y[atomicAdd(counter, 1)] = float(i);
}

__global__ void add_in_any_order(const float* x, float* y, int*, int n) {
  const int i = global_index();
  if (i < n) atomicAdd(y, x[i]);
}

// At most 10 may count themselves; between a thread's look and its count others count.
__global__ void check_then_act(const float*, float*, int* counter, int) {
  if (atomicAdd(counter, 0) < 10) atomicAdd(counter, 1);
}

}  // namespace

#define KERNEL(name) {#name, name}
const PlantedBug kPlantedBugs[] = {
    KERNEL(block_sum), KERNEL(warp_exchange), KERNEL(last_block_adds), KERNEL(chain_of_blocks), KERNEL(warp_operations),
    KERNEL(large_block), KERNEL(exit_before_barrier), KERNEL(divergent_barriers), KERNEL(barrier_in_uneven_loop),
    KERNEL(barrier_against_warp), KERNEL(half_warp_shuffle), KERNEL(shuffle_from_exited),
    KERNEL(lane_outside_its_mask), KERNEL(failing_check), KERNEL(static_shared_overrun),
    KERNEL(dynamic_shared_overrun), KERNEL(vector_tail), KERNEL(half_outside), KERNEL(far_outside),
    KERNEL(write_to_input), KERNEL(another_threads_stack), KERNEL(misaligned_vector), KERNEL(unwritten_shared),
    KERNEL(shared_of_the_last_block), KERNEL(last_unwritten), KERNEL(integer_overflow), KERNEL(missing_barrier),
    KERNEL(early_reuse), KERNEL(missing_syncwarp), KERNEL(plain_accumulation), KERNEL(atomic_against_plain),
    KERNEL(missing_fence), KERNEL(spin_wait), KERNEL(chain_by_index), KERNEL(append_in_any_order),
    KERNEL(add_in_any_order), KERNEL(check_then_act),
};
const int kNumPlantedBugs = sizeof kPlantedBugs / sizeof *kPlantedBugs;

int launch_planted_bug(PlantedKernel kernel, const float* x, float* y, int* counter, int n, const unsigned* grid,
                       const unsigned* block, size_t shared_bytes) {
  return gpu::launch(kernel, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), shared_bytes,
                     nullptr, x, y, counter, n);
}

int planted_memset(void* memory, size_t bytes) { return cudaMemsetAsync(memory, 0, bytes, nullptr); }
