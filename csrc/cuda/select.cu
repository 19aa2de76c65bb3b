// select_top_p (Eq. 9): the shortest prefix of an item's scores, in descending order, whose share of their sum is above
// γ; or its first `keep`.
//
// Nothing is sorted. One block works on one item. Whatever its length, the prefix is all scores above some value v, and
// the first few of those that equal v. v is found two bits at a time, from the highest of an order-preserving number:
// among the scores that agree with v so far, those whose next two bits are larger come first. The largest two bits with
// which they and all scores known to be above are enough are v's; those with larger bits are above v. Then indices are
// written in ascending order.
//
// Sums must not depend on the order of additions, or backends would cut at different tokens. So scores are made whole
// numbers first ("steps"), small enough that every sum of them is exact in double (reference.py's select_top_p).
#include "vectors.h"

namespace minifocus::cuda {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kThreads = 256;  // of a block: with more, adding up over the block would take longer than what it adds up
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

// Larger for a larger score, equal for +0 and -0, largest for NaN.
__device__ __forceinline__ unsigned order_of(float score) {
  if (score != score) return 0xffffffffu;
  const unsigned bits = __float_as_uint(score == 0.f ? 0.f : score);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// What the warps of a block tell each other. Twice, so that one barrier is enough: while some still read, others write to
// the second, and nobody returns to the first before all have passed the next barrier.
struct Exchange {
  double sums[2][kMaxThreads / 32][3];
  int2 counts[2][kMaxThreads / 32];
};

// The block's sums, for every thread; `turn` alternates between 0 and 1. Sums of steps are exact: whichever way they are
// added, every thread has the same.
template <int N>
__device__ __forceinline__ void add_up(double (&own)[N], Exchange& exchange, int turn) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) own[i] += __shfl_xor_sync(kAll, own[i], step);
  }
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) exchange.sums[turn][threadIdx.x / 32][i] = own[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) own[i] = exchange.sums[turn][0][i];
  for (int warp = 1; warp < (int)blockDim.x / 32; ++warp) {
#pragma unroll
    for (int i = 0; i < N; ++i) own[i] += exchange.sums[turn][warp][i];
  }
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads) select_kernel(const Arguments a, const T* __restrict__ all_scores) {
  DYN_SHARED(double, cached_steps);  // [cached], and then the orders
  unsigned* const cached_orders = reinterpret_cast<unsigned*>(cached_steps + a.cached);
  __shared__ Exchange exchange;
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
  if (threadIdx.x % 32 == 0) exchange.sums[0][threadIdx.x / 32][0] = largest;
  uncountable = __syncthreads_or(uncountable);
  for (int warp = 0; warp < (int)blockDim.x / 32; ++warp)
    largest = exchange.sums[0][warp][0] > largest ? exchange.sums[0][warp][0] : largest;
  if (wanted < 0 && (uncountable || largest == 0.)) wanted = length;

  const int bits = 64 - __clzll(length);
  const double finest = ldexp(1., 52 - bits);
  // Where a number of scores is wanted, each counts as one step.
  const auto steps_of = [&](float score) {
    return wanted >= 0 ? 1. : !(score > 0.f) ? 0. : rint(double(score) / largest * finest);
  };
  const auto order_at = [&](int64_t i) { return i < a.cached ? cached_orders[i] : order_of(to_float(scores[i])); };
  const auto steps_at = [&](int64_t i) { return i < a.cached ? cached_steps[i] : steps_of(to_float(scores[i])); };

  double total[1] = {};
  for (int64_t i = threadIdx.x; i < length; i += blockDim.x) {  // each thread reads only what it wrote here
    const float score = to_float(scores[i]);
    const double steps = steps_of(score);
    if (i < a.cached) {
      cached_orders[i] = order_of(score);
      cached_steps[i] = steps;
    }
    total[0] += steps;
  }
  int turn = 1;  // the largest score went by the other
  add_up(total, exchange, turn);
  const double target = wanted >= 0 ? double(wanted) - 0.5 : a.gamma * total[0];  // more than it is enough

  unsigned v = 0;
  double above = 0.;  // the steps of all scores above v
  for (int shift = 30; shift >= 0; shift -= 2) {
    double with[3] = {};  // the steps of those that agree with v above these two bits, which are 1, 2 or 3
    for (int64_t i = threadIdx.x; i < length; i += blockDim.x) {
      const unsigned bits = (order_at(i) ^ v) >> shift;  // v's own are 0 as yet
      if (1 <= bits && bits <= 3) {
        const double steps = steps_at(i);
#pragma unroll
        for (unsigned digit = 1; digit <= 3; ++digit) with[digit - 1] += bits == digit ? steps : 0.;
      }
    }
    add_up(with, exchange, turn ^= 1);
#pragma unroll
    for (int digit = 3; digit >= 0; --digit) {
      if (digit == 0 || above + with[digit - 1] > target) {
        v |= unsigned(digit) << shift;
        break;
      }
      above += with[digit - 1];
    }
  }

  // Of those that equal v, and so have equally many steps, the fewest that are enough.
  double equal[2] = {};  // their steps and their number
  for (int64_t i = threadIdx.x; i < length; i += blockDim.x) {
    if (order_at(i) == v) {
      equal[0] += steps_at(i);
      equal[1] += 1.;
    }
  }
  add_up(equal, exchange, turn ^= 1);
  long long ties = (long long)equal[1];
  if (equal[1] > 0. && above + equal[0] > target) {
    const double each = equal[0] / equal[1];
    ties = 1 + (long long)floor((target - above) / each);  // up to a rounding
    while (ties > 1 && above + double(ties - 1) * each > target) --ties;
    // All that equal v are enough, unless another stream has written other scores: that must not make it endless.
    while (ties < (long long)equal[1] && !(above + double(ties) * each > target)) ++ties;
  }

  const int lane = threadIdx.x % 32, own_warp = threadIdx.x / 32;
  const unsigned lanes_before = (1u << lane) - 1;
  long long ties_before = 0, above_before = 0;
  for (int64_t base = 0; base < length; base += blockDim.x) {
    const int64_t i = base + threadIdx.x;
    const unsigned order = i < length ? order_at(i) : 0;
    const bool is_tie = i < length && order == v, is_above = i < length && order > v;
    const unsigned tie_votes = __ballot_sync(kAll, is_tie), above_votes = __ballot_sync(kAll, is_above);
    turn ^= 1;
    if (lane == 0) exchange.counts[turn][own_warp] = {__popc(tie_votes), __popc(above_votes)};
    __syncthreads();
    long long tie = ties_before + __popc(tie_votes & lanes_before);
    long long place = above_before + __popc(above_votes & lanes_before);
    for (int warp = 0; warp < (int)blockDim.x / 32; ++warp) {
      const int2 of_warp = exchange.counts[turn][warp];
      if (warp < own_warp) {
        tie += of_warp.x;
        place += of_warp.y;
      }
      ties_before += of_warp.x;
      above_before += of_warp.y;
    }
    if (is_above || (is_tie && tie < ties)) a.index[begin + place + min(tie, ties)] = begin + i;
  }
  const long long kept = above_before + min(ties_before, ties);
  for (int64_t i = kept + threadIdx.x; i < length; i += blockDim.x) a.index[begin + i] = -1;
  if (threadIdx.x == 0) a.count[blockIdx.x] = kept;
}

}  // namespace

int select_top_p(const SelectArgs& args, void* stream) {
  if (args.items == 0) return 0;
  const int64_t cached = min(args.visual, min(kCached, gpu::max_shared_bytes() / kCachedBytes));
  const Arguments arguments{args.cu_visual, args.visual, cached, args.gamma, args.keep, args.index, args.count};
  const int threads = args.visual <= 128 ? 128 : args.visual / args.items <= 4 * kCached ? kThreads : kMaxThreads;
  return dispatch(args.dtype, [&](auto element) -> int {
    using T = decltype(element);
    return gpu::launch(select_kernel<T>, dim3(gpu::dimension(args.items)), dim3(threads),
                       size_t(cached * kCachedBytes), static_cast<cudaStream_t>(stream), arguments,
                       static_cast<const T*>(args.scores));
  });
}

}  // namespace minifocus::cuda
