#include "png_text.h"

#include <algorithm>

#include <zlib.h>

namespace minifocus {
namespace {

constexpr uLongf kLongest = 1 << 20;  // Pillow's limit: a few bytes can be deflated gigabytes

std::optional<std::string> inflated(std::string_view data) {
  std::string text(kLongest, '\0');
  uLongf size = kLongest;
  const auto* from = reinterpret_cast<const Bytef*>(data.data());
  if (uncompress(reinterpret_cast<Bytef*>(text.data()), &size, from, data.size()) != Z_OK) return std::nullopt;
  text.resize(size);
  return text;
}

// What is before the next zero byte, which is taken off `data` with it; all of it where there is none.
std::string_view take_word(std::string_view& data) {
  const std::string_view word = data.substr(0, data.find('\0'));
  data.remove_prefix(std::min(word.size() + 1, data.size()));
  return word;
}

}  // namespace

std::optional<std::string_view> png_keyword(std::string_view type, std::string_view data) {
  if (type != "tEXt" && type != "zTXt" && type != "iTXt") return std::nullopt;
  return take_word(data);
}

std::optional<std::string> png_text(std::string_view type, std::string_view data) {
  take_word(data);  // the keyword
  bool compressed = type == "zTXt";
  if (type == "iTXt") {
    if (data.size() < 2) return std::nullopt;
    compressed = data[0] != 0;
    data.remove_prefix(1);
  }
  if (type != "tEXt") {
    if (data.empty() || (compressed && data[0] != 0)) return std::nullopt;  // the method: 0 is deflate
    data.remove_prefix(1);
  }
  if (type == "iTXt") take_word(data), take_word(data);  // the language, and the keyword in it
  return compressed ? inflated(data) : std::optional<std::string>(data);
}

}  // namespace minifocus
