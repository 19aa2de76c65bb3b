#include "model_text.h"

#include <algorithm>

#include "../error.h"

namespace minifocus {

TextReader::TextReader(const Tokenizer& tokenizer, const Manifest& manifest)
    : tokenizer_(tokenizer),
      prompts_(Prompts::from(manifest)),
      bos_(unquoted(manifest.word("text.bos"), manifest.file().string() + ": text.bos")),
      image_token_(manifest.integer("text.image_token")),
      context_length_(manifest.integer("text.context_length")),
      vocab_size_(manifest.integer("text.vocab_size")),
      stop_ids_(manifest.integers("text.stop")) {}

ModelText TextReader::read(std::string_view question, int64_t num_pictures) const {
  const Prompt prompt = prompts_.write(question, num_pictures);
  const bool special = bos_.empty() || !prompt.text.starts_with(bos_);
  auto [ids, offsets] = tokenizer_.encode(prompt.text, special);
  const auto size = static_cast<int64_t>(ids.size());
  expect(size > 0, "prompt: expected a question, got one that has no tokens");
  expect(size <= context_length_, "prompt: takes ", size, " tokens, more than the context length of ", context_length_);
  const int64_t largest = *std::max_element(ids.begin(), ids.end());
  expect(largest < vocab_size_, "text.vocab_size: the tokenizer gives token ", largest, ", but the model has ",
         vocab_size_);
  const int64_t images = std::count(ids.begin(), ids.end(), image_token_);
  expect(num_pictures == 0 || images == num_pictures, "text.image_token: the tokenizer's <image> is not token ",
         image_token_);

  ModelText text{std::move(ids), {}};
  for (size_t i = 0; i < text.ids.size(); ++i) {
    const auto [begin, end] = offsets[i];
    const bool is_image = num_pictures > 0 && text.ids[i] == image_token_;
    text.instruction.push_back(!is_image && begin < end && begin < prompt.end && end > prompt.begin);
  }
  return text;
}

}  // namespace minifocus
