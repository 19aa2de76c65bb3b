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

constexpr int kMaxThreads = 256;  // more would wait longer for each other's sums than they save
// A thread's scores in registers: the first kHeld * threads of an item. The others' numbers are made again each time.
constexpr int kHeld = 16;
constexpr unsigned kAll = 0xffffffffu;

struct Arguments {
  const int64_t* cu_visual;
  int64_t visual;
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

// What the warps of a block tell each other.
struct Exchange {
  // Twice, so that one barrier is enough: while some still read, others write to the second, and nobody returns to the
  // first before all have passed the next barrier.
  double sums[2][kMaxThreads / 32][3];
  int2 counts[kHeld * kMaxThreads / 32], all;
};

// The block's sums, for every thread; `turn` alternates between 0 and 1. Sums of steps are exact: whichever way they
// are added, every thread has the same.
template <int N>
__device__ __forceinline__ void add_up(double (&own)[N], Exchange& exchange, int turn) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) own[i] += __shfl_xor_sync(kAll, own[i], step);
  }
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) exchange.sums[turn][threadIdx.x / 32][i] = own[i];
  }
  __syncthreads();
  constexpr int kWarps = kMaxThreads / 32;
  const int warp = lane % kWarps;
#pragma unroll
  for (int i = 0; i < N; ++i) own[i] = warp < (int)blockDim.x / 32 ? exchange.sums[turn][warp][i] : 0.;
#pragma unroll
  for (int step = kWarps / 2; step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) own[i] += __shfl_xor_sync(kAll, own[i], step);
  }
}

// kHeld of a thread's scores: the item's [first + j * threads + thread] for each j.
struct Group {
  unsigned order[kHeld];
  double steps[kHeld];
  bool exists[kHeld];
};

template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1) select_kernel(const Arguments a, const T* __restrict__ all_scores) {
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
  const int threads = blockDim.x, lane = threadIdx.x % 32, own_warp = threadIdx.x / 32;

  // How many to keep if that needs no sum, else -1.
  long long wanted = -1;
  if (a.keep >= 0)
    wanted = min(a.keep, length);
  else if (a.gamma <= 0.)
    wanted = min(int64_t(1), length);
  else if (!(a.gamma < 1.))
    wanted = length;

  float held[kHeld];
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    const int64_t i = threadIdx.x + j * threads;
    held[j] = i < length ? to_float(scores[i]) : 0.f;
  }
  double largest = 0.;
  bool uncountable = false;  // a NaN or infinity: no share exceeds anything
  const auto look_at = [&](float score) {
    uncountable |= !(score < INFINITY);
    largest = score > largest ? score : largest;
  };
#pragma unroll
  for (int j = 0; j < kHeld; ++j) look_at(held[j]);
  for (int64_t i = kHeld * threads + threadIdx.x; i < length; i += threads) look_at(to_float(scores[i]));
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const double other = __shfl_xor_sync(kAll, largest, step);
    largest = other > largest ? other : largest;
  }
  if (lane == 0) exchange.sums[0][own_warp][0] = largest;
  uncountable = __syncthreads_or(uncountable);
  for (int warp = 0; warp < threads / 32; ++warp)
    largest = exchange.sums[0][warp][0] > largest ? exchange.sums[0][warp][0] : largest;
  if (wanted < 0 && (uncountable || largest == 0.)) wanted = length;

  const int bits = 64 - __clzll(length);
  const double finest = ldexp(1., 52 - bits);
  const auto set = [&](Group& group, int j, bool exists, float score) {
    group.exists[j] = exists;
    group.order[j] = order_of(score);
    // Where a number of scores is wanted, each counts as one step.
    group.steps[j] = !exists ? 0. : wanted >= 0 ? 1. : !(score > 0.f) ? 0. : rint(double(score) / largest * finest);
  };
  Group in_registers;
#pragma unroll
  for (int j = 0; j < kHeld; ++j) set(in_registers, j, int64_t(threadIdx.x) + j * threads < length, held[j]);
  // Calls body(group, the number of its first score) for all of the item's scores, kHeld * threads at a time.
  const auto for_each_group = [&](auto&& body) {
    body(in_registers, int64_t(0));
    for (int64_t first = kHeld * threads; first < length; first += kHeld * threads) {
      Group group;
#pragma unroll
      for (int j = 0; j < kHeld; ++j) {
        const int64_t i = first + threadIdx.x + j * threads;
        set(group, j, i < length, i < length ? to_float(scores[i]) : 0.f);
      }
      body(group, first);
    }
  };

  double total[1] = {};
  for_each_group([&](const Group& group, int64_t) {
#pragma unroll
    for (int j = 0; j < kHeld; ++j) total[0] += group.steps[j];
  });
  int turn = 1;  // the largest score went by the other
  add_up(total, exchange, turn);
  const double target = wanted >= 0 ? double(wanted) - 0.5 : a.gamma * total[0];  // more than it is enough

  unsigned v = 0;
  double above = 0.;  // the steps of all scores above v
  for (int shift = 30; shift >= 0; shift -= 2) {
    double with[3] = {};  // the steps of those that agree with v above these two bits, which are 1, 2 or 3
    for_each_group([&](const Group& group, int64_t) {
#pragma unroll
      for (int j = 0; j < kHeld; ++j) {
        const unsigned own_bits = (group.order[j] ^ v) >> shift;  // v's own are 0 as yet
#pragma unroll
        for (unsigned digit = 1; digit <= 3; ++digit) with[digit - 1] += own_bits == digit ? group.steps[j] : 0.;
      }
    });
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
  for_each_group([&](const Group& group, int64_t) {
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      if (group.exists[j] && group.order[j] == v) {
        equal[0] += group.steps[j];
        equal[1] += 1.;
      }
    }
  });
  add_up(equal, exchange, turn ^= 1);
  long long ties = (long long)equal[1];
  if (equal[1] > 0. && above + equal[0] > target) {
    const double each = equal[0] / equal[1];
    ties = 1 + (long long)floor((target - above) / each);  // up to a rounding
    while (ties > 1 && above + double(ties - 1) * each > target) --ties;
    // All that equal v are enough, unless another stream has written other scores: that must not make it endless.
    while (ties < (long long)equal[1] && !(above + double(ties) * each > target)) ++ties;
  }

  long long ties_before = 0, above_before = 0;  // in the groups before
  for_each_group([&](const Group& group, int64_t first) {
    const int warps = threads / 32, entries = kHeld * warps;
    unsigned tie_votes[kHeld], above_votes[kHeld];
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      tie_votes[j] = __ballot_sync(kAll, group.exists[j] && group.order[j] == v);
      above_votes[j] = __ballot_sync(kAll, group.exists[j] && group.order[j] > v);
      if (lane == 0) exchange.counts[j * warps + own_warp] = {__popc(tie_votes[j]), __popc(above_votes[j])};
    }
    __syncthreads();
    int2 all = {0, 0};
    if (own_warp == 0) {  // each count becomes the sum of those before it
      for (int entry = 0; entry < entries; entry += 32) {
        const int2 own = exchange.counts[entry + lane];
        int2 sum = own;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
          const int x = __shfl_up_sync(kAll, sum.x, step), y = __shfl_up_sync(kAll, sum.y, step);
          if (lane >= step) sum = {sum.x + x, sum.y + y};
        }
        exchange.counts[entry + lane] = {all.x + sum.x - own.x, all.y + sum.y - own.y};
        all = {all.x + __shfl_sync(kAll, sum.x, 31), all.y + __shfl_sync(kAll, sum.y, 31)};
      }
      if (lane == 0) exchange.all = all;
    }
    __syncthreads();
    const unsigned lanes_before = (1u << lane) - 1;
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      const int2 before = exchange.counts[j * warps + own_warp];
      const long long tie = ties_before + before.x + __popc(tie_votes[j] & lanes_before);
      const long long place = above_before + before.y + __popc(above_votes[j] & lanes_before) + min(tie, ties);
      const bool is_above = above_votes[j] >> lane & 1, is_tie = tie_votes[j] >> lane & 1;
      if (is_above || (is_tie && tie < ties)) a.index[begin + place] = begin + first + threadIdx.x + j * threads;
    }
    ties_before += exchange.all.x;
    above_before += exchange.all.y;
    __syncthreads();  // all have read, before the next group's are written
  });
  const long long kept = above_before + min(ties_before, ties);
  for (int64_t i = kept + threadIdx.x; i < length; i += threads) a.index[begin + i] = -1;
  if (threadIdx.x == 0) a.count[blockIdx.x] = kept;
}

}  // namespace

int select_top_p(const SelectArgs& args, void* stream) {
  if (args.items == 0) return 0;
  const Arguments arguments{args.cu_visual, args.visual, args.gamma, args.keep, args.index, args.count};
  const int threads = args.visual <= 128 * kHeld ? 128 : kMaxThreads;
  return dispatch(args.dtype, [&](auto element) -> int {
    using T = decltype(element);
    return gpu::launch(select_kernel<T>, dim3(gpu::dimension(args.items)), dim3(threads), 0,
                       static_cast<cudaStream_t>(stream), arguments, static_cast<const T*>(args.scores));
  });
}

}  // namespace minifocus::cuda
