// importance (Eq. 7 and 8): how much an item's text attends to each of its visual tokens.
//
// Softmax of scale * q.k over the visual tokens, the maximum over heads, the mean over text tokens. The work of an item
// is cut into tasks: one key head and a block of text tokens. The queries of a task, those of all heads that share the
// key head, are the lanes of vectors: `queries` and `scores` hold one column per query, so that softmax over the keys
// runs down the columns without ever adding across a vector. A task computes all its scores, then merges its
// probabilities into `best`, the maximum so far for every pair of text and visual token. A maximum does not depend on
// the order it is taken in, so any number of threads gives the same bits. Extra memory: best, and each thread's scores,
// together a small part of the heads x text x visual numbers of the plain formula.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <mutex>
#include <vector>

#include "numbers.h"
#include "../launchers.h"
#include "threads.h"

namespace minifocus::cpu {
namespace {

constexpr int64_t kQueries = 32;  // a task's columns are a multiple of this: two vectors of the widest registers
constexpr int64_t kKeys = 6;      // keys that are multiplied at once; their 12 sums stay in registers

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// exp(x) for x <= 0, within 2 units in the last place: 2^n * exp(r) with x = n log(2) + r, exp(r) by its Taylor series.
// Results below 2^-126 become 0: such numbers are slow, and vanish beside the row's largest, which is 1. NaN stays NaN.
MINIFOCUS_INLINE float exp_of(float x) {
  const float to_integer = 0x1.8p23f;  // adding it leaves the integer in the lowest bits
  const float shifted = x * 1.44269504f + to_integer;
  const float n = shifted - to_integer;
  const float r = (x - n * 0x1.62e4p-1f) - n * 1.42860682e-6f;  // log(2) in two parts, the first times n exact
  float sum = 1 / 5040.f;
  for (const float factor : {1 / 720.f, 1 / 120.f, 1 / 24.f, 1 / 6.f, 1 / 2.f, 1.f, 1.f}) sum = sum * r + factor;
  const float power = float_of((bits_of(shifted) + 127) << 23);
  return x < -87.3f ? 0 : sum * power;
}

MINIFOCUS_INLINE double exp_of(double x) { return std::exp(x); }

template <typename Real>
struct alignas(64) CacheLine {
  static constexpr int64_t kNumbers = 64 / sizeof(Real);
  Real numbers[kNumbers];
};

// An array of zeros that begins at a cache line.
template <typename Real>
class Buffer {
 public:
  explicit Buffer(int64_t size) : lines_(size / CacheLine<Real>::kNumbers + 1) {}
  Real* data() { return lines_[0].numbers; }

 private:
  std::vector<CacheLine<Real>> lines_;
};

// One thread's memory.
template <typename Real>
struct Workspace {
  Workspace(int64_t visual, int64_t columns, int64_t dim)
      : queries(dim * columns),
        keys(kKeys * dim),
        scores(round_up(visual, kKeys) * columns),
        largest(columns),
        total(columns) {}
  Buffer<Real> queries;         // [dim, columns]
  Buffer<Real> keys;            // [kKeys, dim]
  Buffer<Real> scores;          // [visual, columns]
  Buffer<Real> largest, total;  // [columns], over the visual tokens
};

// scores[key][column] = scale * keys[key] . queries[column] for kKeys keys; largest[column] = their maximum.
template <typename Real, int kLanes>
MINIFOCUS_INLINE void multiply_tile(const Real* queries, const Real* keys, int64_t dim, int64_t columns, Real scale,
                                    Real* scores, Real* largest) {
  using Vector __attribute__((vector_size(kLanes * sizeof(Real)), may_alias)) = Real;
  for (int64_t column = 0; column < columns; column += 2 * kLanes) {
    Vector sums[kKeys][2] = {};
    for (int64_t d = 0; d < dim; ++d) {
      const Vector* query = reinterpret_cast<const Vector*>(queries + d * columns + column);
#pragma GCC unroll 6
      for (int64_t key = 0; key < kKeys; ++key) {
        sums[key][0] += query[0] * keys[key * dim + d];
        sums[key][1] += query[1] * keys[key * dim + d];
      }
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      Vector* top = reinterpret_cast<Vector*>(largest + column) + half;
#pragma GCC unroll 6
      for (int64_t key = 0; key < kKeys; ++key) {
        const Vector score = sums[key][half] * scale;
        reinterpret_cast<Vector*>(scores + key * columns + column)[half] = score;
        *top = score > *top ? score : *top;
      }
    }
  }
}

template <typename Real>
MINIFOCUS_MULTIVERSION void multiply(const Real* queries, const Real* keys, int64_t dim, int64_t columns, Real scale,
                                     Real* scores, Real* largest) {
  switch (vector_bytes()) {
    case 64: return multiply_tile<Real, 64 / sizeof(Real)>(queries, keys, dim, columns, scale, scores, largest);
    case 32: return multiply_tile<Real, 32 / sizeof(Real)>(queries, keys, dim, columns, scale, scores, largest);
    default: return multiply_tile<Real, 16 / sizeof(Real)>(queries, keys, dim, columns, scale, scores, largest);
  }
}

template <typename T>
MINIFOCUS_MULTIVERSION void load_key(const T* key, int64_t dim, typename T::Real* row) {
  for (int64_t d = 0; d < dim; ++d) row[d] = key[d].get();
}

// Turns every column of scores into exp(score - largest), and leaves one over their sum in total. Sums of 64 are added
// up, as that rounds less often than one long sum.
template <typename Real>
MINIFOCUS_MULTIVERSION void exponentiate(Real* scores, const Real* largest, int64_t visual, int64_t columns,
                                         Real* total) {
  Real sums[kQueries];
  for (int64_t column = 0; column < columns; column += kQueries) {
    for (int64_t begin = 0; begin < visual; begin += 64) {
      std::fill_n(sums, kQueries, Real{0});
      for (int64_t n = begin; n < std::min(begin + 64, visual); ++n) {
        Real* row = scores + n * columns + column;
        for (int64_t i = 0; i < kQueries; ++i) {
          row[i] = exp_of(row[i] - largest[column + i]);
          sums[i] += row[i];
        }
      }
      for (int64_t i = 0; i < kQueries; ++i) total[column + i] += sums[i];
    }
    for (int64_t i = 0; i < kQueries; ++i) total[column + i] = 1 / total[column + i];
  }
}

// best[n][t] = the maximum of itself and of the probabilities of the group's heads. A NaN is larger than everything.
template <typename Real>
MINIFOCUS_MULTIVERSION void merge(const Real* scores, const Real* inverse, int64_t visual, int64_t columns,
                                  int64_t group, int64_t block, Real* best, int64_t text) {
  for (int64_t n = 0; n < visual; ++n)
    for (int64_t head = 0; head < group; ++head)
      for (int64_t t = 0; t < block; ++t) {
        const Real probability = scores[n * columns + head * block + t] * inverse[head * block + t];
        Real& so_far = best[n * text + t];
        so_far = is_larger(probability, so_far) ? probability : so_far;
      }
}

// One item: text tokens q[text, heads, dim] against visual tokens k[visual, kv_heads, dim].
template <typename T>
class Item {
  using Real = typename T::Real;

 public:
  Item(const ImportanceArgs& args, int64_t item)
      : args_(args),
        q_(static_cast<const T*>(args.q) + args.cu_text[item] * args.heads * args.dim),
        k_(static_cast<const T*>(args.k) + args.cu_visual[item] * args.kv_heads * args.dim),
        scores_(static_cast<typename T::Wide*>(args.scores) + args.cu_visual[item]),
        text_(args.cu_text[item + 1] - args.cu_text[item]),
        visual_(args.cu_visual[item + 1] - args.cu_visual[item]),
        group_(args.heads / args.kv_heads),
        block_(std::min(text_, std::max<int64_t>(1, kQueries / group_))),
        columns_(round_up(group_ * block_, kQueries)) {}

  void run() {
    if (text_ == 0 || visual_ == 0) {
      for (int64_t n = 0; n < visual_; ++n) scores_[n].set(0);
      return;
    }
    const int64_t blocks = round_up(text_, block_) / block_, tasks = args_.kv_heads * blocks;
    std::vector<Real> best(visual_ * text_);  // [visual, text]
    std::vector<std::mutex> mutexes(blocks);  // of a block's columns of best
    std::vector<Workspace<Real>> workspaces;
    for (int64_t i = 0; i < std::min(num_threads(), tasks); ++i) workspaces.emplace_back(visual_, columns_, args_.dim);
    std::atomic<int64_t> next_task{0};
    parallel_for(workspaces.size(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker)
        for (int64_t task; (task = next_task++) < tasks;) {
          const int64_t block = task % blocks;
          run_task(task / blocks, block * block_, workspaces[worker], mutexes[block], best.data());
        }
    });
    parallel_for(visual_, 1 + (1 << 16) / text_, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        double sum = 0;
        for (int64_t t = 0; t < text_; ++t) sum += best[n * text_ + t];
        scores_[n].set(static_cast<Real>(sum / text_));
      }
    });
  }

 private:
  // One key head and the text tokens from first_text on.
  void run_task(int64_t kv_head, int64_t first_text, Workspace<Real>& work, std::mutex& mutex, Real* best) const {
    const int64_t dim = args_.dim, block = std::min(block_, text_ - first_text);
    Real *queries = work.queries.data(), *keys = work.keys.data(), *scores = work.scores.data();
    Real *largest = work.largest.data(), *total = work.total.data();
    for (int64_t head = 0; head < group_; ++head)
      for (int64_t t = 0; t < block; ++t) {
        const T* query = q_ + ((first_text + t) * args_.heads + kv_head * group_ + head) * dim;
        for (int64_t d = 0; d < dim; ++d) queries[d * columns_ + head * block + t] = query[d].get();
      }
    std::fill_n(largest, columns_, -std::numeric_limits<Real>::infinity());
    std::fill_n(total, columns_, Real{0});
    for (int64_t n = 0; n < visual_; n += kKeys) {
      for (int64_t i = 0; i < kKeys; ++i) {  // beyond the last key take that key again: it changes no maximum
        const int64_t key = std::min(n + i, visual_ - 1);
        load_key(k_ + (key * args_.kv_heads + kv_head) * dim, dim, keys + i * dim);
      }
      multiply(queries, keys, dim, columns_, static_cast<Real>(args_.scale), scores + n * columns_, largest);
    }
    exponentiate(scores, largest, visual_, columns_, total);
    const std::lock_guard<std::mutex> lock(mutex);
    merge(scores, total, visual_, columns_, group_, block, best + first_text, text_);
  }

  const ImportanceArgs& args_;
  const T *q_, *k_;
  typename T::Wide* scores_;
  int64_t text_, visual_;
  int64_t group_;    // query heads that share a key head
  int64_t block_;    // text tokens of a task
  int64_t columns_;  // group * block, rounded up
};

}  // namespace

int importance(const ImportanceArgs& args, void*) {
  with_dtype(args.dtype, [&](auto number) {
    for (int64_t item = 0; item < args.items; ++item) Item<decltype(number)>(args, item).run();
  });
  return 0;
}

size_t importance_workspace_bytes(int64_t, int64_t, int64_t) { return 0; }

}  // namespace minifocus::cpu
