// UTF-8. Text is checked once, where it comes in; all else takes it as valid.
#pragma once

#include <string>
#include <string_view>

namespace minifocus {

// The characters (code points) of a text. Throws Error, which begins with `what` and names the first byte that is not UTF-8.
std::u32string characters_of(std::string_view text, std::string_view what);

void append_utf8(std::string& text, char32_t character);
std::string utf8_of(std::u32string_view characters);
size_t utf8_length(char32_t character);  // in bytes

// Of valid UTF-8: the rest behind its first `count` characters.
std::string_view skip_characters(std::string_view text, size_t count);
size_t count_characters(std::string_view text);

// Bytes as text. What is not UTF-8 becomes U+FFFD, one for each longest part that could begin a character (Unicode §3.9).
std::string lossy_utf8(std::string_view bytes);

bool is_utf8(std::string_view bytes);

}  // namespace minifocus
