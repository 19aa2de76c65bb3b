// A text on its way to tokens.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace minifocus {

// Characters of the text that was given, by their numbers: from `begin` up to, but without, `end`.
struct Span {
  uint32_t begin, end;
};

// Some characters of a text, perhaps changed, and for each the characters of the given text that it stands for. Where the piece
// is an added token, `token` is its id; of others -1.
struct Piece {
  std::u32string text;
  std::vector<Span> origin;
  int64_t token = -1;

  Piece part(size_t begin, size_t end) const {
    return {text.substr(begin, end - begin), {origin.begin() + begin, origin.begin() + end}};
  }
};
using Pieces = std::vector<Piece>;

}  // namespace minifocus
