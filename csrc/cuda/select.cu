// select_top_p (Eq. 9): the shortest prefix of an item's scores, in descending order, whose share of their sum is above
// γ; or its first `keep`.
//
// Nothing is sorted. One block works on one item. Whatever its length, the prefix is all scores above some value v, and
// the first few of those that equal v. v is found bit by bit, from the highest bit of an order-preserving number: among
// the scores that agree with v so far, those with the next bit set come first. If they and all scores known to be above
// are enough, v has the bit; if not, they are above v. Then indices are written in ascending order.
//
// Sums must not depend on the order of additions, or backends would cut at different tokens. So scores are made whole
// numbers first ("steps"), small enough that every sum of them is exact in double (reference.py's select_top_p).
#include "vectors.h"

namespace minifocus::cuda {
namespace {

constexpr int kMaxThreads = 1024;
// How many of an item's scores keep their numbers in shared memory. The others' numbers are made again.
constexpr int64_t kCached = 4096, kCachedBytes = sizeof(double) + sizeof(unsigned);
constexpr unsigned kAll = 0xffffffffu;

struct Arguments {
  const int64_t* cu_visual;
  int64_t visual, cached;
  double gamma;
  int64_t keep;  // -1: by gamma
  int64_t* index;
  int64_t* count;
};

struct Tally {
  double steps;
  long long count;
};

// Larger for a larger score, equal for +0 and -0, largest for NaN.
__device__ __forceinline__ unsigned order_of(float score) {
  if (score != score) return 0xffffffffu;
  const unsigned bits = __float_as_uint(score == 0.f ? 0.f : score);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The block's sums, for every thread.
__device__ __forceinline__ Tally block_tally(Tally own, Tally* scratch) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    own.steps += __shfl_xor_sync(kAll, own.steps, step);
    own.count += __shfl_xor_sync(kAll, own.count, step);
  }
  __syncthreads();  // the last call's sums have been read
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = own;
  __syncthreads();
  // Sums of steps are exact: whichever way they are added, every thread has the same.
  const int lane = threadIdx.x % 32;
  Tally sum = lane < (int)blockDim.x / 32 ? scratch[lane] : Tally{0., 0};
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    sum.steps += __shfl_xor_sync(kAll, sum.steps, step);
    sum.count += __shfl_xor_sync(kAll, sum.count, step);
  }
  return sum;
}

// How many threads before this one hold `flag`, plus `before`, which then grows by all that do.
__device__ __forceinline__ long long rank_in_block(bool flag, long long& before, int* scratch) {
  const unsigned votes = __ballot_sync(kAll, flag);
  const int lane = threadIdx.x % 32, own_warp = threadIdx.x / 32;
  __syncthreads();  // the last call's counts have been read
  if (lane == 0) scratch[own_warp] = __popc(votes);
  __syncthreads();
  long long rank = before + __popc(votes & ((1u << lane) - 1));
  for (int warp = 0; warp < (int)blockDim.x / 32; ++warp) {
    if (warp < own_warp) rank += scratch[warp];
    before += scratch[warp];
  }
  return rank;
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads) select_kernel(const Arguments a, const T* __restrict__ all_scores) {
  DYN_SHARED(double, cached_steps);  // [cached], and then the orders
  unsigned* const cached_orders = reinterpret_cast<unsigned*>(cached_steps + a.cached);
  __shared__ Tally tallies[kMaxThreads / 32];
  __shared__ int counts[kMaxThreads / 32];
  __shared__ int64_t ends[2];
  // One thread reads for all: another stream may write other offsets meanwhile, and threads with different lengths
  // would wait for each other at different barriers.
  if (threadIdx.x == 0) {
    ends[0] = a.cu_visual[blockIdx.x];
    ends[1] = a.cu_visual[blockIdx.x + 1];
  }
  __syncthreads();
  DEVICE_CHECK(0 <= ends[0] && ends[0] <= ends[1] && ends[1] <= a.visual);  // the host has not looked at them
  DEVICE_CHECK((blockIdx.x > 0 || ends[0] == 0) && (blockIdx.x + 1 < gridDim.x || ends[1] == a.visual));
  const int64_t begin = ends[0], length = ends[1] - begin;
  const T* scores = all_scores + begin;

  // How many to keep if that needs no sum, else -1.
  long long wanted = -1;
  if (a.keep >= 0)
    wanted = min(a.keep, length);
  else if (a.gamma <= 0.)
    wanted = min(int64_t(1), length);
  else if (!(a.gamma < 1.))
    wanted = length;

  double largest = 0.;
  bool uncountable = false;  // a NaN or infinity: no share exceeds anything
  for (int64_t i = threadIdx.x; i < length; i += blockDim.x) {
    const float score = to_float(scores[i]);
    uncountable |= !(score < INFINITY);
    largest = score > largest ? score : largest;
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const double other = __shfl_xor_sync(kAll, largest, step);
    largest = other > largest ? other : largest;
  }
  if (threadIdx.x % 32 == 0) tallies[threadIdx.x / 32].steps = largest;
  uncountable = __syncthreads_or(uncountable);
  for (int warp = 0; warp < (int)blockDim.x / 32; ++warp)
    largest = tallies[warp].steps > largest ? tallies[warp].steps : largest;
  if (wanted < 0 && (uncountable || largest == 0.)) wanted = length;

  const int bits = 64 - __clzll(length);
  const double finest = ldexp(1., 52 - bits);
  const auto steps_of = [&](float score) {
    return wanted >= 0 || !(score > 0.f) ? 0. : rint(double(score) / largest * finest);
  };
  const auto order_at = [&](int64_t i) { return i < a.cached ? cached_orders[i] : order_of(to_float(scores[i])); };
  const auto steps_at = [&](int64_t i) { return i < a.cached ? cached_steps[i] : steps_of(to_float(scores[i])); };

  Tally own{0., 0};
  for (int64_t i = threadIdx.x; i < length; i += blockDim.x) {  // each thread reads only what it wrote here
    const float score = to_float(scores[i]);
    const double steps = steps_of(score);
    if (i < a.cached) {
      cached_orders[i] = order_of(score);
      cached_steps[i] = steps;
    }
    own.steps += steps;
  }
  const double target = a.gamma * block_tally(own, tallies).steps;
  const auto enough = [&](double steps, long long count) { return wanted >= 0 ? count >= wanted : steps > target; };

  unsigned v = 0;
  Tally above{0., 0};
  for (int bit = 31; bit >= 0; --bit) {
    const unsigned higher = v | 1u << bit;
    own = {0., 0};
    for (int64_t i = threadIdx.x; i < length; i += blockDim.x) {
      if (order_at(i) >> bit == higher >> bit) {
        own.steps += steps_at(i);
        own.count += 1;
      }
    }
    const Tally next = block_tally(own, tallies);
    if (enough(above.steps + next.steps, above.count + next.count)) {
      v = higher;
    } else {
      above.steps += next.steps;
      above.count += next.count;
    }
  }

  // Of those that equal v, and so have equally many steps, the fewest that are enough.
  own = {0., 0};
  for (int64_t i = threadIdx.x; i < length; i += blockDim.x) {
    if (order_at(i) == v) {
      own.steps += steps_at(i);
      own.count += 1;
    }
  }
  const Tally equal = block_tally(own, tallies);
  long long ties = equal.count;
  if (wanted >= 0) {
    ties = wanted - above.count;
  } else if (above.steps + equal.steps > target) {
    const double each = equal.steps / double(equal.count);
    ties = 1 + (long long)((target - above.steps) / each);  // up to a rounding
    while (ties > 1 && above.steps + double(ties - 1) * each > target) --ties;
    // All that equal v are enough, unless another stream has written other scores: that must not make it endless.
    while (ties < equal.count && !(above.steps + double(ties) * each > target)) ++ties;
  }

  long long ties_before = 0, kept_before = 0;
  for (int64_t base = 0; base < length; base += blockDim.x) {
    const int64_t i = base + threadIdx.x;
    const unsigned order = i < length ? order_at(i) : 0;
    const bool tie = i < length && order == v;
    const long long rank = rank_in_block(tie, ties_before, counts);
    const bool kept = i < length && (tie ? rank < ties : order > v);
    const long long place = rank_in_block(kept, kept_before, counts);
    if (kept) a.index[begin + place] = begin + i;
  }
  for (int64_t i = kept_before + threadIdx.x; i < length; i += blockDim.x) a.index[begin + i] = -1;
  if (threadIdx.x == 0) a.count[blockIdx.x] = kept_before;
}

}  // namespace

int select_top_p(const SelectArgs& args, void* stream) {
  if (args.items == 0) return 0;
  const int64_t cached = min(args.visual, min(kCached, gpu::max_shared_bytes() / kCachedBytes));
  const Arguments arguments{args.cu_visual, args.visual, cached, args.gamma, args.keep, args.index, args.count};
  const int threads = args.visual <= 128 ? 128 : args.visual <= 512 ? 512 : kMaxThreads;
  return dispatch(args.dtype, [&](auto element) -> int {
    using T = decltype(element);
    return gpu::launch(select_kernel<T>, dim3(gpu::dimension(args.items)), dim3(threads),
                       size_t(cached * kCachedBytes), static_cast<cudaStream_t>(stream), arguments,
                       static_cast<const T*>(args.scores));
  });
}

}  // namespace minifocus::cuda
