// tokenizer.bin: what minifocus/export/token_table.py writes of a folder's tokenizer, field by field in the order of this struct.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "added_tokens.h"
#include "merges.h"
#include "split.h"

namespace minifocus {

enum class Library : uint8_t { tokenizers, sentencepiece };  // whose rules it follows

enum class StepKind : uint8_t {
  prepend,         // "▁" before the piece
  replace_spaces,  // each " " by "▁"
  prefix_space,    // " " before the piece, unless it begins with one
  metaspace,       // both of the first two; `option` is when to prepend (kNever, kFirst, kAlways), plus kSplits
  digits,          // digits apart from the rest; `option`: 1 for each by itself
  split_gpt2,
  split_llama3,  // `option`: numbers to a word
  bytes,         // each byte as a visible character, as GPT-2 has it
};
constexpr uint8_t kNever = 0, kFirst = 1, kAlways = 2, kSplits = 4;

struct Step {
  StepKind kind;
  uint8_t option;
};

enum class Unknown : uint8_t {
  dropped,  // a character without a token is left out
  each,     // the unknown token for each
  fused,    // one for a run of them
  bytes,    // a token for each of its bytes
};

enum class Decoding : uint8_t {
  bytes,           // a token's characters stand for bytes
  spaces,          // "▁" is a space, and some tokens are a byte
  stripped_spaces  // the same, without the space that the text begins with
};

// By a token's number.
constexpr uint8_t kIsToken = 1;  // or else the number has none
constexpr uint8_t kIsSpecial = 2;
constexpr uint8_t kIsByte = 4;  // written <0x0A>

struct TokenTable {
  Library library;
  std::vector<uint8_t> flags;
  std::vector<uint32_t> ends;  // where each token's text ends in `texts`
  std::string texts;
  // The model's own vocabulary, by its texts in ascending order. Only where a whole word may be a token without any merge.
  std::vector<uint32_t> words;
  struct Character {
    uint32_t character, id;
  };
  std::vector<Character> characters;  // tokens of one character, ascending
  std::vector<Merge> merges;
  Unknown unknown;
  std::vector<uint32_t> unknown_ids;            // none, the unknown token, or one for each of the 256 bytes
  std::vector<uint32_t> before_ids, after_ids;  // what it adds at either end
  int64_t bos_id;                               // -1 for none
  Decoding decoding;
  std::vector<AddedToken> added, normalized_added;  // found in the text as it is, and after `normalizer`
  std::vector<Step> normalizer, pre_tokenizer;
  // Of sentencepiece alone: tokens that are taken whole, and whether "▁" goes before the text's beginning, and before each
  // stretch of text between added tokens.
  std::vector<uint32_t> whole;
  bool prefix, prefix_everywhere;
  CharacterClasses classes;

  // Throws Error, which names the file, for one that is cut off, damaged or of another version.
  static TokenTable read(const std::filesystem::path& file);

  std::string_view text(size_t id) const {
    const size_t begin = id == 0 ? 0 : ends[id - 1];
    return std::string_view(texts).substr(begin, ends[id] - begin);
  }
};

}  // namespace minifocus
