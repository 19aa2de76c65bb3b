// select_top_p (Eq. 9): the most important tokens of each item, by their share of the total or by a fixed count.
//
// Each item is sorted in its own part of the output, and the kept prefix stays there. The GPU adds in another order. To
// agree with it bit for bit, shares are compared as whole numbers: scores are scaled so that no sum of them needs more than
// 52 bits. A double holds such sums exactly, so their order does not matter.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "numbers.h"
#include "../launchers.h"
#include "threads.h"

namespace minifocus::cpu {
namespace {

int bit_length(int64_t n) {
  int length = 0;
  for (; n > 0; n >>= 1) ++length;
  return length;
}

// Descending by score, NaN first, equal scores (and -0 and +0) by index.
template <typename T>
void sort_descending(const T* scores, int64_t* begin, int64_t* end) {
  std::sort(begin, end, [scores](int64_t i, int64_t j) {
    const auto a = scores[i].get(), b = scores[j].get();
    const bool a_nan = a != a, b_nan = b != b;
    if (a_nan != b_nan) return a_nan;
    return a == b || a_nan ? i < j : a > b;
  });
}

// The length of the shortest prefix of the sorted item whose share exceeds gamma, or of the whole item if none does.
template <typename T>
int64_t shortest_prefix(const T* scores, const int64_t* begin, const int64_t* end, double gamma) {
  const int64_t length = end - begin;
  if (gamma <= 0) return std::min<int64_t>(1, length);
  double largest = 0;
  for (const int64_t* i = begin; i != end; ++i) {
    const double score = scores[*i].get();
    if (!(score < std::numeric_limits<double>::infinity())) return length;
    largest = std::max(largest, score);
  }
  if (!(gamma < 1) || largest == 0) return length;

  const double unit = std::ldexp(1.0, 52 - bit_length(length));
  const auto whole = [=](int64_t i) {
    return std::rint(std::max<double>(0, scores[i].get()) / largest * unit);  // a negative score has no share
  };
  double total = 0, prefix = 0;
  for (const int64_t* i = begin; i != end; ++i) total += whole(*i);
  for (const int64_t* i = begin; i != end; ++i) {
    prefix += whole(*i);
    if (prefix > gamma * total) return i - begin + 1;
  }
  return length;
}

template <typename T>
void select_item(const SelectArgs& args, int64_t item) {
  int64_t* begin = args.index + args.cu_visual[item];
  int64_t* end = args.index + args.cu_visual[item + 1];
  const T* scores = static_cast<const T*>(args.scores);
  std::iota(begin, end, args.cu_visual[item]);
  sort_descending(scores, begin, end);
  const int64_t count =
      args.keep >= 0 ? std::min<int64_t>(args.keep, end - begin) : shortest_prefix(scores, begin, end, args.gamma);
  std::sort(begin, begin + count);
  std::fill(begin + count, end, -1);
  args.count[item] = count;
}

}  // namespace

int select_top_p(const SelectArgs& args, void*) {
  with_dtype(args.dtype, [&](auto number) {
    parallel_for(args.items, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) select_item<decltype(number)>(args, item);
    });
  });
  return 0;
}

}  // namespace minifocus::cpu
