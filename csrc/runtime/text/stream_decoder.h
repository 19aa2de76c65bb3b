// Text while tokens are generated.
#pragma once

#include <string>
#include <vector>

#include "tokenizer.h"

namespace minifocus {

// The texts of `push` and the last one of `flush` join to what Tokenizer::decode makes of all ids. Equal to tokenizer.py's class of
// this name. `tokenizer` has to live longer.
class StreamDecoder {
 public:
  explicit StreamDecoder(const Tokenizer& tokenizer, bool skip_special = true)
      : tokenizer_(tokenizer), skip_special_(skip_special) {}

  // The text that this token makes final; "" while a character may still be incomplete.
  std::string push(int64_t id);

  // The rest of the text, when no more tokens will come. The decoder then starts anew.
  std::string flush();

 private:
  const Tokenizer& tokenizer_;
  bool skip_special_;
  std::vector<int64_t> ids_;  // what is not out yet, behind the last token that is: a first token loses its space
  std::string out_;           // the part of the text of ids_ that is out
};

}  // namespace minifocus
