// Text ↔ token ids, equal to minifocus/inputs/tokenizer.py.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "added_tokens.h"
#include "merges.h"
#include "pieces.h"
#include "token_table.h"

namespace minifocus {

class Tokenizer {
 public:
  // From a file that minifocus/export/token_table.py wrote. Throws Error, which names the file.
  static Tokenizer read(const std::filesystem::path& file);

  // Token ids, and for each the characters (code points) of the text that it stands for: from the first number up to, but
  // without, the second. A token that the tokenizer added has (0, 0).
  struct Encoding {
    std::vector<int64_t> ids;
    std::vector<std::pair<int64_t, int64_t>> offsets;
  };

  // A special token that is written out in the text becomes that token. Without `special`, the tokenizer adds none of its own at
  // either end. Throws Error for text that is not UTF-8.
  Encoding encode(std::string_view text, bool special = true) const;

  // Ids → text. Ids without a token are left out.
  std::string decode(const std::vector<int64_t>& ids, bool skip_special = true) const;

  int64_t vocab_size() const { return static_cast<int64_t>(table_.flags.size()); }

  // Whether a token is a part of the text, and whether it is a byte written as <0x0A>: StreamDecoder asks.
  bool is_text(int64_t id, bool skip_special) const;
  bool is_byte(int64_t id) const { return table_.flags[id] & kIsByte; }

 private:
  explicit Tokenizer(TokenTable table);

  Pieces split(Piece text) const;
  Pieces split_for_sentencepiece(const Piece& text) const;
  void take(const Step& step, Pieces& pieces) const;
  void take(const Step& step, Piece& piece, Pieces& taken) const;
  void encode_piece(const Piece& piece, Encoding& encoding) const;
  int64_t id_of(char32_t character) const;
  int64_t id_of_word(std::u32string_view word) const;
  std::string decode_bytes(const std::vector<int64_t>& ids) const;
  std::string decode_spaces(const std::vector<int64_t>& ids) const;

  TokenTable table_;
  Merges merges_;
  AddedTokens added_, normalized_added_, whole_;
  std::array<char32_t, 256> visible_;  // the character for each byte
};

}  // namespace minifocus
