#include "stream_decoder.h"

#include "utf8.h"

namespace minifocus {

std::string StreamDecoder::push(int64_t id) {
  if (!tokenizer_.is_text(id, skip_special_)) return "";
  ids_.push_back(id);
  // A run of byte tokens is decoded together: until it has ended, a bad byte can turn all of it into U+FFFD.
  if (tokenizer_.is_byte(id)) return "";
  const std::string text = tokenizer_.decode(ids_, skip_special_);
  if (text.ends_with("\xEF\xBF\xBD")) return "";  // U+FFFD
  const std::string final(skip_characters(text, count_characters(out_)));
  ids_ = {id};
  out_ = tokenizer_.decode(ids_, skip_special_);
  return final;
}

std::string StreamDecoder::flush() {
  const std::string text = tokenizer_.decode(ids_, skip_special_);
  const std::string final(skip_characters(text, count_characters(out_)));
  ids_.clear();
  out_.clear();
  return final;
}

}  // namespace minifocus
