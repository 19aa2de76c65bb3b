// A set of characters, as ranges: a class such as the letters, which the tokenizer's table holds as its library has it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace minifocus {

class CharacterSet {
 public:
  struct Range {
    uint32_t first, last;  // both are in the set
  };

  CharacterSet() = default;
  // Ascending ranges, with a gap between any two.
  explicit CharacterSet(std::vector<Range> ranges) : ranges_(std::move(ranges)) {}

  bool contains(char32_t character) const {
    auto after = std::upper_bound(ranges_.begin(), ranges_.end(), character,
                                  [](char32_t c, const Range& range) { return c < range.first; });
    return after != ranges_.begin() && character <= std::prev(after)->last;
  }

 private:
  std::vector<Range> ranges_;
};

}  // namespace minifocus
