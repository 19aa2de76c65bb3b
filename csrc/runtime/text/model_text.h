// A question → what the model reads of it.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "../manifest.h"
#include "prompt.h"
#include "tokenizer.h"

namespace minifocus {

// A prompt's tokens, with one image token for each picture, and for each token whether it is of the question's own words.
struct ModelText {
  std::vector<int64_t> ids;
  std::vector<bool> instruction;
};

class TextReader {
 public:
  // `tokenizer` has to live longer. Throws Error, which names file and key.
  TextReader(const Tokenizer& tokenizer, const Manifest& manifest);

  // Equal to minifocus/inputs/processor.py's, before it repeats the image tokens. Throws Error for a question that cannot be
  // asked, and for a prompt that is longer than the context.
  ModelText read(std::string_view question, int64_t num_pictures) const;

  // Without the white space at either end, as an answer is given.
  std::string stripped(std::string_view text) const { return prompts_.stripped(text); }

  int64_t image_token() const { return image_token_; }
  int64_t context_length() const { return context_length_; }
  const std::vector<int64_t>& stop_ids() const { return stop_ids_; }

 private:
  const Tokenizer& tokenizer_;
  Prompts prompts_;
  std::string bos_;  // a text that begins with it gets no special tokens; "" for none
  int64_t image_token_, context_length_, vocab_size_;
  std::vector<int64_t> stop_ids_;
};

}  // namespace minifocus
