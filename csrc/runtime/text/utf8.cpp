#include "utf8.h"

#include "../error.h"

namespace minifocus {
namespace {

constexpr char32_t kReplacement = 0xFFFD;

// The character at the beginning of `bytes`, which are not empty, and how many of them it takes. Where there is none: false,
// and the number of bytes that could have begun one, at least 1.
struct Read {
  bool valid;
  char32_t character;
  size_t length;
};

Read read_character(std::string_view bytes) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(bytes[i]); };
  const unsigned first = byte(0);
  if (first < 0x80) return {true, first, 1};
  const size_t length = first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : 2;
  if (first < 0xC2 || first > 0xF4) return {false, kReplacement, 1};
  char32_t character = first & (0x7F >> length);
  for (size_t i = 1; i < length; ++i) {
    // The second byte's range keeps out what is written longer than it need be, surrogates, and what is above U+10FFFF.
    const unsigned low = i > 1 ? 0x80 : first == 0xE0 ? 0xA0 : first == 0xF0 ? 0x90 : 0x80;
    const unsigned high = i > 1 ? 0xBF : first == 0xED ? 0x9F : first == 0xF4 ? 0x8F : 0xBF;
    if (i == bytes.size() || byte(i) < low || byte(i) > high) return {false, kReplacement, i};
    character = character << 6 | (byte(i) & 0x3F);
  }
  return {true, character, length};
}

bool begins_character(char byte) { return (static_cast<unsigned char>(byte) & 0xC0) != 0x80; }

}  // namespace

std::u32string characters_of(std::string_view text, std::string_view what) {
  std::u32string characters;
  characters.reserve(text.size());
  for (size_t at = 0; at < text.size();) {
    const Read read = read_character(text.substr(at));
    expect(read.valid, what, ": expected text in UTF-8, got a byte that is not, number ", at);
    characters += read.character;
    at += read.length;
  }
  return characters;
}

void append_utf8(std::string& text, char32_t character) {
  const size_t length = utf8_length(character);
  if (length == 1) {
    text += static_cast<char>(character);
    return;
  }
  text += static_cast<char>(0xF0 << (4 - length) | character >> 6 * (length - 1));
  for (size_t left = length - 1; left-- > 0;) text += static_cast<char>(0x80 | (character >> 6 * left & 0x3F));
}

std::string utf8_of(std::u32string_view characters) {
  std::string text;
  for (const char32_t character : characters) append_utf8(text, character);
  return text;
}

size_t utf8_length(char32_t character) {
  return character < 0x80 ? 1 : character < 0x800 ? 2 : character < 0x10000 ? 3 : 4;
}

std::string_view skip_characters(std::string_view text, size_t count) {
  size_t at = 0;
  for (; at < text.size(); ++at) {
    if (begins_character(text[at]) && count-- == 0) break;
  }
  return text.substr(at);
}

size_t count_characters(std::string_view text) {
  size_t count = 0;
  for (const char byte : text) count += begins_character(byte);
  return count;
}

std::string lossy_utf8(std::string_view bytes) {
  std::string text;
  text.reserve(bytes.size());
  for (size_t at = 0; at < bytes.size();) {
    const Read read = read_character(bytes.substr(at));
    append_utf8(text, read.character);
    at += read.length;
  }
  return text;
}

bool is_utf8(std::string_view bytes) {
  for (size_t at = 0; at < bytes.size();) {
    const Read read = read_character(bytes.substr(at));
    if (!read.valid) return false;
    at += read.length;
  }
  return true;
}

}  // namespace minifocus
