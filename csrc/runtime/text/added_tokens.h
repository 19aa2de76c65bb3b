// Tokens beside the vocabulary, such as <image>: they are found in the text as they are written, before anything else is.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "character_set.h"
#include "pieces.h"

namespace minifocus {

struct AddedToken {
  int64_t id;
  std::u32string text;           // what is looked for; at least one character
  bool takes_left, takes_right;  // the white space before it, behind it
  bool single_word;              // not where a letter, number or the like stands beside it
};

class AddedTokens {
 public:
  AddedTokens() = default;
  // Of two that could be taken, the longer is, and of equally long ones the first in the list. `space` is the white space that
  // tokens take, `word` what may not stand beside a single word.
  AddedTokens(std::vector<AddedToken> tokens, CharacterSet space, CharacterSet word);

  // The piece in parts, the tokens found among them, as the package `tokenizers` splits: the leftmost and longest are found,
  // then take white space.
  void split(const Piece& piece, Pieces& parts) const;

  // The same as sentencepiece's tokenizers split, by a regular expression: white space before a token is a part of the match,
  // so that of two matches the one whose white space begins earlier is the leftmost. No token may begin with white space and
  // take some before it, too.
  void split_by_expression(const Piece& piece, Pieces& parts) const;

 private:
  const AddedToken* longest(const std::u32string& text, size_t at, bool takes_left) const;

  std::vector<AddedToken> tokens_;  // as they were given
  std::vector<uint32_t> by_text_;   // their numbers, ascending by text
  CharacterSet space_, word_;
};

}  // namespace minifocus
