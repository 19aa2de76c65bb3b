// region_pool's backward: one block takes one region and writes the gradient of each of its cells once. Within a window
// it finds, channel by channel, the first maximum, which gets the token's gradient (times the region's weight); the
// window's other cells get 0. The weight's own gradient is the sum of gradient times unweighted token over the region.
#include "regions.h"

namespace minifocus::cuda {
namespace {

constexpr int kThreads = 256;

struct Kernel {
  Pictures pictures;
  Branches branches;
  int64_t channels, rows, first_region;
  const int64_t* choice;
  const int64_t* offsets;
  const float* weight;  // may be null, and then so is grad_weight
  float* grad_weight;
};

template <class T, int V>
__global__ void __launch_bounds__(kThreads, 1)
    region_backward_kernel(const __grid_constant__ Kernel k, const T* __restrict__ grad_tokens, const T* __restrict__ x,
                           T* __restrict__ grad_x) {
  __shared__ float scratch[kThreads / 32];
  __shared__ int64_t chosen, first_token;
  const int64_t r = k.first_region + blockIdx.x;
  if (threadIdx.x == 0) {  // for all threads, which must agree though another stream may write to them meanwhile
    chosen = k.choice[r];
    first_token = k.offsets[r];
  }
  __syncthreads();
  const Region region = find_region(k.pictures, k.branches.window, r);
  DEVICE_CHECK(0 <= chosen && chosen < k.branches.count);
  const Windows windows(region, k.branches, int(chosen));
  const int64_t first = first_token;
  DEVICE_CHECK(0 <= first && first <= k.rows - windows.count);
  const float factor = k.weight ? to_float(from_float<T>(k.weight[r])) : 1.f;
  const int64_t vectors = k.channels / V;

  const Share share(vectors, kThreads);

  Vec<T, V> zero;
#pragma unroll
  for (int j = 0; j < V; ++j) zero.v[j] = from_float<T>(0.f);
  if (windows.count == 0) {  // a branch that drops the region
    for (int cell = share.token; cell < region.height * region.width; cell += share.tokens) {
      T* to = grad_x + region.row_of(cell / region.width, cell % region.width) * k.channels;
      for (int64_t column = share.column; column < vectors; column += share.columns) store<V>(to + column * V, zero);
    }
  }

  float sum = 0.f;
  for (int token = share.token; token < windows.count; token += share.tokens) {
    const int top = token / windows.across * windows.height, left = token % windows.across * windows.width;
    const int bottom = min(top + windows.height, region.height), right = min(left + windows.width, region.width);
    for (int64_t column = share.column; column < vectors; column += share.columns) {
      Vec<T, V> pooled;
      int winner[V];
      for (int y = top; y < bottom; ++y) {
        for (int across = left; across < right; ++across) {
          const Vec<T, V> value = load<V>(x + region.row_of(y, across) * k.channels + column * V);
          const int cell = y * region.width + across;
#pragma unroll
          for (int j = 0; j < V; ++j) {
            if (y == top && across == left) {
              pooled.v[j] = value.v[j];
              winner[j] = cell;
            } else if (keep_first_max(pooled.v[j], value.v[j])) {
              winner[j] = cell;
            }
          }
        }
      }
      const Vec<T, V> grad = load<V>(grad_tokens + (first + token) * k.channels + column * V);
      Vec<T, V> weighed;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        sum = fmaf(to_float(grad.v[j]), to_float(pooled.v[j]), sum);
        weighed.v[j] = k.weight ? from_float<T>(to_float(grad.v[j]) * factor) : grad.v[j];
      }
      for (int y = top; y < bottom; ++y) {
        for (int across = left; across < right; ++across) {
          Vec<T, V> value;
#pragma unroll
          for (int j = 0; j < V; ++j) value.v[j] = winner[j] == y * region.width + across ? weighed.v[j] : zero.v[j];
          store<V>(grad_x + region.row_of(y, across) * k.channels + column * V, value);
        }
      }
    }
  }
  if (k.grad_weight) {
    // In a fixed order: of a warp's lanes, then of the warps.
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      sum = 0.f;
      for (int warp = 0; warp < (int)blockDim.x / 32; ++warp) sum += scratch[warp];
      k.grad_weight[r] = sum;
    }
  }
}

}  // namespace

int region_pool_backward(const RegionBackwardArgs& args, void* stream) {
  const RegionArgs& region = args.region;
  Kernel k{};
  k.branches = branches_of(region);
  k.channels = region.channels;
  k.rows = args.rows;
  k.choice = region.choice;
  k.offsets = region.offsets;
  k.weight = static_cast<const float*>(region.weight);
  k.grad_weight = static_cast<float*>(args.grad_weight);
  return dispatch(region.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kWide = 16 / sizeof(T);
    const bool wide =
        aligned16(region.x) && aligned16(args.grad_tokens) && aligned16(args.grad_x) && region.channels % kWide == 0;
    return for_each_group(region, [&](const Pictures& pictures, int64_t regions) -> int {
      k.pictures = pictures;
      k.first_region = pictures.first_region[0];
      const auto run = [&](auto kernel) -> int {
        return gpu::launch(kernel, dim3(gpu::dimension(regions)), dim3(kThreads), 0, static_cast<cudaStream_t>(stream),
                           k, static_cast<const T*>(args.grad_tokens), static_cast<const T*>(region.x),
                           static_cast<T*>(args.grad_x));
      };
      return wide ? run(region_backward_kernel<T, kWide>) : run(region_backward_kernel<T, 1>);
    });
  });
}

}  // namespace minifocus::cuda
