// region_pool and region_route: the chosen max-pool of every region, packed in order (Eq. 1), in one launch.
//
// One block works on one region, in four steps:
//   1. it takes the next region's number (a ticket), so that all regions before it have been begun by some block. One
//      thread reads for all what decides on their way from there, a choice or the biases: another stream may write to
//      it meanwhile, and the threads must not go different ways;
//   2. region_route only: it reads the region's cells, keeps them in shared memory as far as they fit, takes their
//      maximum channel by channel, multiplies it with each branch's context vector and takes the largest sum's branch;
//   3. it learns how many tokens the regions before it leave, by decoupled look-back: each block publishes its own
//      number of tokens at once, and the sum up to and with its own as soon as it knows that; a block adds up what its
//      predecessors published until it meets such a sum;
//   4. it writes its tokens there: maxima over windows of the cells, from shared memory or from x.
// So tokens are written once, and x is read once. (region_pool reads the windows only; region_route reads what does not
// fit into shared memory again, mostly from the L2 cache.)
#include "regions.h"

namespace minifocus::cuda {
namespace {

constexpr int kThreads = 512;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr int kAhead = 8;  // cells that a thread of region_route waits for at a time
#else
constexpr int kAhead = 4;  // older GPUs compare bfloat16 in more registers
#endif
constexpr unsigned long long kOwn = 1ull << 62;   // the low bits: this region's tokens
constexpr unsigned long long kUpTo = 1ull << 63;  // the low bits: tokens of all regions up to and with this one
constexpr unsigned long long kNumber = kOwn - 1;

struct Workspace {
  unsigned long long* ticket;
  unsigned long long* published;  // [regions], 0 until a block has published
};

// Tokens of all regions before `region`, for all lanes of the first warp, which alone may call it.
__device__ unsigned long long look_back(unsigned long long* published, int64_t region, unsigned long long own) {
  const int lane = threadIdx.x;
  if (lane == 0) gpu::store_release(&published[region], (region == 0 ? kUpTo : kOwn) | own);
  unsigned long long before = 0;
  for (int64_t last = region - 1; last >= 0; last -= 32) {
    unsigned long long seen = kUpTo;  // of lanes that reach beyond the first region
    if (last - lane >= 0) {
      do seen = gpu::load_acquire(&published[last - lane]);
      while (seen == 0);
    }
    const unsigned sums = __ballot_sync(0xffffffffu, (seen & kUpTo) != 0);
    const int nearest = sums ? __ffs(sums) - 1 : 31;
    unsigned long long tokens = lane <= nearest ? seen & kNumber : 0;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) tokens += __shfl_xor_sync(0xffffffffu, tokens, step);
    before += tokens;
    if (sums) break;
  }
  if (lane == 0 && region > 0) gpu::store_release(&published[region], kUpTo | (before + own));
  return before;
}

struct Kernel {
  Pictures pictures;
  Branches branches;
  int64_t channels, regions;
  const int64_t* choice;  // region_pool
  const float* weight;    // region_pool; may be null
  const float* context;   // region_route
  const float* bias;      // region_route
  int64_t* chosen;        // region_route
  int64_t* source;
  int64_t* offsets;
  Workspace workspace;
  int64_t cached;  // region_route: how many vectors of each cell are kept in shared memory
};

// Step 2. Cells [y, x] of the region, vector by vector, are kept at cache[(y * width + x) * cached + vector]. `bias` is
// the block's own copy.
template <class T, int V>
__device__ int choose(const Kernel& k, const Region& region, const T* x, const float* bias, Vec<T, V>* cache) {
  __shared__ float sums[kMaxBranches][kThreads / 32];  // of each warp
  const int cells = region.height * region.width;
  float logit[kMaxBranches] = {};
  for (int64_t column = threadIdx.x; column < k.channels / V; column += kThreads) {
    const bool kept = column < k.cached;
    const T* from = x + region.row_of(0, 0) * k.channels + column * V;
    int across = 0;
    Vec<T, V> pooled;
#pragma unroll kAhead
    for (int cell = 0; cell < cells; ++cell) {
      const Vec<T, V> value = load<V>(from);
      from += k.channels;
      if (++across == region.width) {
        across = 0;
        from += int64_t(region.map_width - region.width) * k.channels;
      }
      if (kept) cache[cell * k.cached + column] = value;
      if (cell == 0) pooled = value;
      keep_first_max(pooled, value);
    }
    const float* context = k.context + region.picture * k.branches.count * k.channels + column * V;
#pragma unroll
    for (int s = 0; s < kMaxBranches; ++s) {
      if (s < k.branches.count) {
#pragma unroll
        for (int j = 0; j < V; ++j) logit[s] = fmaf(to_float(pooled.v[j]), context[s * k.channels + j], logit[s]);
      }
    }
  }
#pragma unroll
  for (int s = 0; s < kMaxBranches; ++s) {
    if (s < k.branches.count) {
#pragma unroll
      for (int step = 16; step > 0; step /= 2) logit[s] += __shfl_xor_sync(0xffffffffu, logit[s], step);
      if (threadIdx.x % 32 == 0) sums[s][threadIdx.x / 32] = logit[s];
    }
  }
  __syncthreads();
  int best = 0;
  float largest = 0.f;
  for (int s = 0; s < k.branches.count; ++s) {
    float z = 0.f;
    for (int warp = 0; warp < kThreads / 32; ++warp) z += sums[s][warp];
    z += bias[s];
    if (s == 0) largest = z;
    if (s > 0 && keep_first_max(largest, z)) best = s;
  }
  return best;
}

template <class T, int V, bool kRoute>
__global__ void __launch_bounds__(kThreads, 2)
    region_kernel(const __grid_constant__ Kernel k, const T* __restrict__ x, T* __restrict__ tokens) {
  DYN_SHARED(unsigned char, shared);
  Vec<T, V>* const cache = reinterpret_cast<Vec<T, V>*>(shared);
  __shared__ unsigned long long number, first_token;
  __shared__ int64_t chosen;
  __shared__ float bias[kMaxBranches];

  if (threadIdx.x == 0) {
    number = atomicAdd(k.workspace.ticket, 1ull);
    if constexpr (!kRoute) chosen = k.choice[number];
  }
  if (kRoute && threadIdx.x < k.branches.count) bias[threadIdx.x] = k.bias[threadIdx.x];
  __syncthreads();
  const int64_t r = int64_t(number);
  const Region region = find_region(k.pictures, k.branches.window, r);

  int branch;
  if constexpr (kRoute) {
    branch = choose<T, V>(k, region, x, bias, cache);
    if (threadIdx.x == 0) k.chosen[r] = branch;
  } else {
    DEVICE_CHECK(0 <= chosen && chosen < k.branches.count);
    branch = int(chosen);
  }

  const Windows windows(region, k.branches, branch);
  if (threadIdx.x < 32) {
    const unsigned long long before = look_back(k.workspace.published, r, windows.count);
    if (threadIdx.x == 0) {
      first_token = before;
      k.offsets[r] = int64_t(before);
      if (r == k.regions - 1) k.offsets[k.regions] = int64_t(before) + windows.count;
    }
  }
  __syncthreads();  // first_token; and of region_route the cache
  const int64_t first = int64_t(first_token);

  float factor = 1.f;
  if constexpr (!kRoute) {
    if (k.weight) factor = to_float(from_float<T>(k.weight[r]));
  }
  const int64_t vectors = k.channels / V;
  const Share share(vectors, kThreads);
  int down = 0, along = share.token < windows.count ? share.token : 0;  // of the window
  for (; along >= windows.across && windows.across > 0; along -= windows.across) ++down;
  for (int token = share.token; token < windows.count; token += share.tokens) {
    const int top = down * windows.height, left = along * windows.width;
    const int bottom = min(top + windows.height, region.height), right = min(left + windows.width, region.width);
    for (along += share.tokens; along >= windows.across; along -= windows.across) ++down;
    for (int64_t column = share.column; column < vectors; column += share.columns) {
      const int wide = right - left, cells = (bottom - top) * wide;
      const auto maximum = [&](const Vec<T, V>* from, auto step, auto skip) {  // to the next cell, over a row's rest
        Vec<T, V> pooled = *from;
        int across = 0;
#pragma unroll kAhead / 2
        for (int i = 0; i < cells; ++i) {
          const Vec<T, V> value = *from;
          from += step;
          if (++across == wide) {
            across = 0;
            from += skip;
          }
          keep_first_max(pooled, value);
        }
        return pooled;
      };
      Vec<T, V> pooled;
      if (kRoute && column < k.cached) {
        const int step = int(k.cached);
        pooled = maximum(cache + (top * region.width + left) * step + column, step, (region.width - wide) * step);
      } else {
        const Vec<T, V>* const from = reinterpret_cast<const Vec<T, V>*>(x);
        pooled = maximum(from + region.row_of(top, left) * vectors + column, vectors,
                         (region.map_width - wide) * vectors);
      }
      if (!kRoute && k.weight) {
#pragma unroll
        for (int j = 0; j < V; ++j) pooled.v[j] = from_float<T>(to_float(pooled.v[j]) * factor);
      }
      store<V>(tokens + (first + token) * k.channels + column * V, pooled);
    }
  }
  for (int token = threadIdx.x; token < windows.count; token += kThreads) {
    const int top = token / windows.across * windows.height, left = token % windows.across * windows.width;
    k.source[first + token] = region.row_of(top, left) - region.first_cell;
  }
}

template <bool kRoute>
int launch(const RegionArgs& args, Kernel k, void* stream_pointer) {
  cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  k.branches = branches_of(args);
  k.channels = args.channels;
  k.regions = args.regions;
  k.source = args.source;
  k.offsets = args.offsets;
  k.workspace = {static_cast<unsigned long long*>(args.workspace),
                 static_cast<unsigned long long*>(args.workspace) + 1};
  int error = cudaMemsetAsync(args.source, 0xff, args.cells * sizeof(int64_t), stream);  // -1 past the last token
  if (!error) error = cudaMemsetAsync(args.workspace, 0, region_workspace_bytes(args.regions), stream);
  if (!error && args.regions == 0) error = cudaMemsetAsync(args.offsets, 0, sizeof(int64_t), stream);
  if (error) return error;
  return dispatch(args.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kWide = 16 / sizeof(T);
    const bool wide = aligned16(args.x) && aligned16(args.tokens) && args.channels % kWide == 0;
    return for_each_group(args, [&](const Pictures& pictures, int64_t regions) -> int {
      k.pictures = pictures;
      const auto run = [&](auto kernel, int64_t vector) -> int {
        const int64_t cells = args.window * args.window;
        const int64_t vector_bytes = vector * sizeof(T);
        // Half of the shared memory, so that one block reads while another writes.
        const int64_t room = (gpu::max_shared_bytes() - 2048) / 2;
        k.cached = kRoute ? max(int64_t(0), min(args.channels / vector, room / (cells * vector_bytes))) : 0;
        return gpu::launch(kernel, dim3(gpu::dimension(regions)), dim3(kThreads),
                           size_t(k.cached * cells * vector_bytes), stream, k, static_cast<const T*>(args.x),
                           static_cast<T*>(args.tokens));
      };
      return wide ? run(region_kernel<T, kWide, kRoute>, kWide) : run(region_kernel<T, 1, kRoute>, 1);
    });
  });
}

}  // namespace

size_t region_workspace_bytes(int64_t regions) { return size_t(regions + 1) * sizeof(unsigned long long); }

int region_pool(const RegionArgs& args, void* stream) {
  Kernel k{};
  k.choice = args.choice;
  k.weight = static_cast<const float*>(args.weight);
  return launch<false>(args, k, stream);
}

int region_route(const RouteArgs& args, void* stream) {
  Kernel k{};
  k.context = static_cast<const float*>(args.context);
  k.bias = static_cast<const float*>(args.bias);
  k.chosen = args.choice;
  return launch<true>(args.region, k, stream);
}

}  // namespace minifocus::cuda
