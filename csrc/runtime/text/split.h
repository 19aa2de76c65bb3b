// The regular expressions by which byte-level vocabularies split a text into words, written out by hand.
#pragma once

#include <array>
#include <string_view>
#include <utility>
#include <vector>

#include "character_set.h"

namespace minifocus {

struct CharacterClasses {
  CharacterSet letters, numbers, space;  // \p{L}, \p{N} and \s of the tokenizers' expressions
  CharacterSet digits;                   // what Digits takes for one
  CharacterSet added_space, word;        // what added tokens take, and what may not stand beside some of them
  std::array<CharacterSet, 8> folded;    // for each of kFolded, what equals it where case does not count
};
constexpr std::u32string_view kFolded = U"strevmld";

using Ranges = std::vector<std::pair<size_t, size_t>>;  // [begin, end) of words, which cover a text

// GPT-2's:
//   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
Ranges split_gpt2(std::u32string_view text, const CharacterClasses& classes);

// Llama 3's, with 3 numbers to a word, and Qwen 2's, with 1:
//   (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
Ranges split_llama3(std::u32string_view text, const CharacterClasses& classes, size_t numbers);

}  // namespace minifocus
