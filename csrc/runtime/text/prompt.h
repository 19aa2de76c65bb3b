// A question → the prompt to answer, equal to minifocus/inputs/prompt.py's build_prompt with the exported model's template.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "../manifest.h"
#include "character_set.h"

namespace minifocus {

// A text, and the span of the question's words in it, in characters (code points): from `begin` up to, but without, `end`.
// The span has no white space or <image> at either end.
struct Prompt {
  std::string text;
  int64_t begin, end;
};

// What minifocus/export/prompt_table.py found out about the template. A prompt is gaps and the question's texts in turn, first
// and last a gap; a gap is two texts of the template's with pictures between them.
class Prompts {
 public:
  // From the lines whose keys begin with `text.`. Throws Error, which names file and key.
  static Prompts from(const Manifest& manifest);

  // A question without <image> gets the pictures in front, one that has some keeps their places, as far as the template keeps
  // them. Throws Error for a question without words, and when there are not as many places as pictures.
  Prompt write(std::string_view question, int64_t num_pictures) const;

  // Valid UTF-8 without the white space at either end, as Python's str.strip leaves it.
  std::string stripped(std::string_view text) const;

 private:
  struct Gap {
    std::u32string left, right;
  };
  enum class Places { kept, first, in_order };
  // The question's texts, and the number of pictures in the gap before each and behind the last.
  struct Content {
    std::vector<std::u32string> texts;
    std::vector<int64_t> pictures;
  };

  Content content(const std::u32string& question, int64_t num_pictures) const;
  std::u32string_view stripped(std::u32string_view text, bool left, bool right) const;

  Places places_;
  bool raw_, strips_left_, strips_right_;
  std::u32string picture_;
  Gap start_, between_, end_;
  CharacterSet white_space_;
};

// A word of the manifest that stands for a text: in quotes, with %20 for what cannot stand there.
std::string unquoted(const std::string& word, const std::string& what);

}  // namespace minifocus
