#include "prompt.h"

#include <charconv>

#include "../error.h"
#include "utf8.h"

namespace minifocus {
namespace {

constexpr std::u32string_view kImage = U"<image>";
constexpr int64_t kMostPictures = 1 << 16;

int64_t count_images(std::u32string_view text) {
  int64_t count = 0;
  for (size_t at = text.find(kImage); at != text.npos; at = text.find(kImage, at + kImage.size())) ++count;
  return count;
}

// Spaces in place of each <image>, or nothing.
std::u32string without_images(std::u32string_view text, bool spaces) {
  std::u32string left;
  for (size_t at = 0; at < text.size();) {
    const bool is_image = text.substr(at).starts_with(kImage);
    if (!is_image) left += text[at];
    if (is_image && spaces) left.append(kImage.size(), U' ');
    at += is_image ? kImage.size() : 1;
  }
  return left;
}

// The texts between <image>s. The end of an <image>'s line goes with it.
std::vector<std::u32string> split_at_images(std::u32string_view text) {
  std::vector<std::u32string> texts;
  for (;;) {
    const size_t at = text.find(kImage);
    texts.emplace_back(text.substr(0, at));
    if (at == text.npos) return texts;
    text.remove_prefix(at + kImage.size());
    const size_t end = text.find_first_not_of(U" \t");
    if (end != text.npos && text[end] == U'\n') text.remove_prefix(end + 1);
  }
}

}  // namespace

std::string unquoted(const std::string& word, const std::string& what) {
  const auto wrong = [&] { fail(what, ": expected a text in quotes, got ", word); };
  if (word.size() < 2 || word.front() != '"' || word.back() != '"') wrong();
  std::string text;
  for (size_t at = 1; at + 1 < word.size(); ++at) {
    if (word[at] != '%') {
      text += word[at];
      continue;
    }
    unsigned char byte = 0;
    const char* begin = word.data() + at + 1;
    if (at + 3 >= word.size() || std::from_chars(begin, begin + 2, byte, 16).ptr != begin + 2) wrong();
    text += static_cast<char>(byte);
    at += 2;
  }
  if (!is_utf8(text)) wrong();
  return text;
}

Prompts Prompts::from(const Manifest& manifest) {
  const auto place = [&](const std::string& key) { return manifest.file().string() + ": " + key; };
  const auto choice = [&](const std::string& key, const std::vector<std::string>& allowed) {
    const std::string& value = manifest.word(key);
    for (size_t i = 0; i < allowed.size(); ++i) {
      if (value == allowed[i]) return i;
    }
    fail(place(key), ": expected ", allowed.front(), " or the like, got ", value);
  };
  const auto text = [&](const std::string& key, const std::string& word) {
    return characters_of(unquoted(word, place(key)), key);
  };
  const auto gap = [&](const std::string& key) {
    const auto& words = manifest.words(key);
    expect(words.size() == 2, place(key), ": expected two texts, got ", words.size());
    return Gap{text(key, words[0]), text(key, words[1])};
  };
  Prompts prompts;
  prompts.places_ = static_cast<Places>(choice("text.prompt.places", {"kept", "first", "in_order"}));
  prompts.raw_ = manifest.flag("text.prompt.raw");
  const size_t strips = choice("text.prompt.strips", {"none", "left", "right", "both"});
  prompts.strips_left_ = strips & 1;
  prompts.strips_right_ = strips & 2;
  prompts.picture_ = text("text.prompt.picture", manifest.word("text.prompt.picture"));
  prompts.start_ = gap("text.prompt.start");
  prompts.between_ = gap("text.prompt.between");
  prompts.end_ = gap("text.prompt.end");

  const std::string key = "text.white_space";
  const auto numbers = manifest.integers(key);
  std::vector<CharacterSet::Range> ranges;
  int64_t last = -1;
  for (size_t i = 0; i < numbers.size(); i += 2) {
    const bool fits =
        i + 1 < numbers.size() && numbers[i] > last && numbers[i + 1] >= numbers[i] && numbers[i + 1] <= 0x10FFFF;
    expect(fits, place(key), ": expected ascending ranges of characters, got ", numbers[i]);
    last = numbers[i + 1];
    ranges.push_back({static_cast<uint32_t>(numbers[i]), static_cast<uint32_t>(last)});
  }
  prompts.white_space_ = CharacterSet(std::move(ranges));
  return prompts;
}

std::u32string_view Prompts::stripped(std::u32string_view text, bool left, bool right) const {
  while (left && !text.empty() && white_space_.contains(text.front())) text.remove_prefix(1);
  while (right && !text.empty() && white_space_.contains(text.back())) text.remove_suffix(1);
  return text;
}

std::string Prompts::stripped(std::string_view text) const {
  const std::u32string characters = characters_of(text, "text");
  return utf8_of(stripped(characters, true, true));
}

Prompts::Content Prompts::content(const std::u32string& question, int64_t num_pictures) const {
  expect(num_pictures >= 0 && num_pictures <= kMostPictures, "pictures: expected 0 to ", kMostPictures, ", got ",
         num_pictures);
  const bool has_words = !stripped(without_images(question, false), true, true).empty();
  expect(!question.empty() && (has_words || raw_), "prompt: expected a question, got one without words");
  const int64_t places = count_images(question);
  expect(places == num_pictures || (places == 0 && !raw_), "prompt: expected one <image> for each of ", num_pictures,
         " pictures, got ", places, " of them");
  if (places_ == Places::kept) {
    std::u32string text;
    for (int64_t i = 0; places == 0 && i < num_pictures; ++i) text += picture_;
    return {{text + question}, {0, 0}};
  }
  if (places == 0) return {{question}, {num_pictures, 0}};
  Content content{{}, {-1}};  // each text but the first has a picture before it
  for (auto& text : split_at_images(question)) {
    ++content.pictures.back();
    if (stripped(text, true, true).empty()) continue;
    content.texts.push_back(std::move(text));
    content.pictures.push_back(0);
  }
  if (places_ == Places::first) {
    content.pictures.assign(content.pictures.size(), 0);
    content.pictures.front() = num_pictures;
  }
  return content;
}

Prompt Prompts::write(std::string_view question, int64_t num_pictures) const {
  const Content content = this->content(characters_of(question, "prompt"), num_pictures);
  std::u32string text;
  const auto add_gap = [&](const Gap& gap, int64_t pictures) {
    text += gap.left;
    while (pictures-- > 0) text += picture_;
    text += gap.right;
  };
  size_t begin = 0, end = 0;
  for (size_t i = 0; i < content.texts.size(); ++i) {
    add_gap(i == 0 ? start_ : between_, content.pictures[i]);
    if (i == 0) begin = text.size();
    text += stripped(content.texts[i], strips_left_, strips_right_);
    end = text.size();
  }
  add_gap(end_, content.pictures.back());
  // A question's texts may make one that was not there when they are put together.
  const int64_t places = count_images(text);
  expect(places == num_pictures, "template: has ", places, " places for pictures, expected ", num_pictures, " of them");

  const std::u32string words = without_images(std::u32string_view(text).substr(begin, end - begin), true);
  const auto last = static_cast<int64_t>(stripped(words, false, true).size());
  const auto first = std::min(static_cast<int64_t>(words.size() - stripped(words, true, false).size()), last);
  const auto from = static_cast<int64_t>(begin);
  return {utf8_of(text), from + first, from + last};
}

}  // namespace minifocus
