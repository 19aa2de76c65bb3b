#include "split.h"

#include <algorithm>

namespace minifocus {
namespace {

// What the two expressions have in common. Each function but is_… says where the match of a part that begins at `at` ends: at
// `at` again where nothing matches.
struct Scan {
  std::u32string_view text;
  const CharacterClasses& classes;

  bool is_letter(size_t at) const { return at < text.size() && classes.letters.contains(text[at]); }
  bool is_number(size_t at) const { return at < text.size() && classes.numbers.contains(text[at]); }
  bool is_space(size_t at) const { return at < text.size() && classes.space.contains(text[at]); }
  bool is_other(size_t at) const { return at < text.size() && !is_space(at) && !is_letter(at) && !is_number(at); }
  bool is_line_end(size_t at) const { return at < text.size() && (text[at] == U'\r' || text[at] == U'\n'); }

  bool is_folded(size_t at, char32_t letter) const {
    return at < text.size() && classes.folded[kFolded.find(letter)].contains(text[at]);
  }

  size_t contraction(size_t at, bool folds) const {
    if (text[at] != U'\'') return at;
    for (const std::u32string_view word : {U"s", U"t", U"re", U"ve", U"m", U"ll", U"d"}) {
      bool fits = true;
      for (size_t i = 0; fits && i < word.size(); ++i) {
        const size_t place = at + 1 + i;
        fits = folds ? is_folded(place, word[i]) : place < text.size() && text[place] == word[i];
      }
      if (fits) return at + 1 + word.size();
    }
    return at;
  }

  // One or more of a kind, with a space before them if there is one.
  size_t run(size_t at, bool (Scan::*is)(size_t) const) const {
    const size_t begin = text[at] == U' ' ? at + 1 : at;
    size_t end = begin;
    while ((this->*is)(end)) ++end;
    return end == begin ? at : end;
  }

  // \s+(?!\S)|\s+: the last white space is left to the word behind it, unless it is all there is.
  size_t space(size_t at) const {
    size_t end = at;
    while (is_space(end)) ++end;
    return end < text.size() && end > at + 1 ? end - 1 : end;
  }

  size_t gpt2(size_t at) const {
    size_t end = contraction(at, false);
    if (end == at) end = run(at, &Scan::is_letter);
    if (end == at) end = run(at, &Scan::is_number);
    if (end == at) end = run(at, &Scan::is_other);
    return end == at ? space(at) : end;
  }

  size_t llama3(size_t at, size_t numbers) const {
    size_t end = contraction(at, true);
    if (end != at) return end;
    const bool takes_one = !is_line_end(at) && !is_letter(at) && !is_number(at);
    end = at + takes_one;
    while (is_letter(end)) ++end;
    if (end != at + takes_one) return end;
    for (end = at; end < at + numbers && is_number(end);) ++end;
    if (end != at) return end;
    end = run(at, &Scan::is_other);
    if (end != at) {
      while (is_line_end(end)) ++end;
      return end;
    }
    size_t last = at;  // behind the last line end in the white space
    for (end = at; is_space(end); ++end) {
      if (is_line_end(end)) last = end + 1;
    }
    return last != at ? last : space(at);
  }
};

template <class Next>
Ranges split(size_t size, const Next& next) {
  Ranges words;
  for (size_t at = 0; at < size;) {
    const size_t end = std::max(next(at), at + 1);  // a table may be damaged, but this has to end
    words.emplace_back(at, end);
    at = end;
  }
  return words;
}

}  // namespace

Ranges split_gpt2(std::u32string_view text, const CharacterClasses& classes) {
  const Scan scan{text, classes};
  return split(text.size(), [&](size_t at) { return scan.gpt2(at); });
}

Ranges split_llama3(std::u32string_view text, const CharacterClasses& classes, size_t numbers) {
  const Scan scan{text, classes};
  return split(text.size(), [&](size_t at) { return scan.llama3(at, numbers); });
}

}  // namespace minifocus
