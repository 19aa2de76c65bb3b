// Byte-pair encoding: which neighbours become one token, and in which order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace minifocus {

// A token on its way. A character that has no token is `kNoToken`, which takes part in no merge.
struct Symbol {
  int64_t id;
  uint32_t bytes;  // of UTF-8 that it stands for, at least 1
};
constexpr int64_t kNoToken = -1;

struct Merge {
  uint32_t left, right, rank, result;
};

class Merges {
 public:
  Merges() = default;
  // Ascending by (left, right), no two alike; all of them below `num_tokens`.
  Merges(std::vector<Merge> merges, size_t num_tokens);

  // Joins neighbours until none are left to join: always those of the lowest rank, and of these the leftmost.
  // n symbols take O(n log n).
  void apply(std::vector<Symbol>& symbols) const;

 private:
  const Merge* find(int64_t left, int64_t right) const;

  std::vector<Merge> merges_;
  std::vector<uint32_t> first_;  // by left: where its merges begin; one more at the end
};

}  // namespace minifocus
