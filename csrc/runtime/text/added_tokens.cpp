#include "added_tokens.h"

#include <algorithm>
#include <numeric>

namespace minifocus {
namespace {

// A part of `piece` without a token, where it is not empty, and one with a token.
void add(const Piece& piece, size_t done, size_t begin, size_t end, int64_t token, Pieces& parts) {
  if (done < begin) parts.push_back(piece.part(done, begin));
  parts.push_back(piece.part(begin, end));
  parts.back().token = token;
}

void add_rest(const Piece& piece, size_t done, Pieces& parts) {
  if (done < piece.text.size()) parts.push_back(piece.part(done, piece.text.size()));
}

}  // namespace

AddedTokens::AddedTokens(std::vector<AddedToken> tokens, CharacterSet space, CharacterSet word)
    : tokens_(std::move(tokens)), by_text_(tokens_.size()), space_(std::move(space)), word_(std::move(word)) {
  std::iota(by_text_.begin(), by_text_.end(), 0);
  std::stable_sort(by_text_.begin(), by_text_.end(),
                   [&](uint32_t a, uint32_t b) { return tokens_[a].text < tokens_[b].text; });
}

const AddedToken* AddedTokens::longest(const std::u32string& text, size_t at, bool takes_left) const {
  const AddedToken* best = nullptr;
  auto low = by_text_.begin(), high = by_text_.end();
  // Those that agree with the text in their first `depth` characters are [low, high). The ones that end there come first.
  for (size_t depth = 0;; ++depth) {
    bool is_new = true;
    for (; low != high && tokens_[*low].text.size() == depth; ++low) {
      if (takes_left && !tokens_[*low].takes_left) continue;
      if (is_new) best = &tokens_[*low];
      is_new = false;
    }
    if (low == high || at + depth == text.size()) return best;
    const char32_t character = text[at + depth];
    low = std::lower_bound(low, high, character, [&](uint32_t i, char32_t c) { return tokens_[i].text[depth] < c; });
    high = std::upper_bound(low, high, character, [&](char32_t c, uint32_t i) { return c < tokens_[i].text[depth]; });
  }
}

void AddedTokens::split(const Piece& piece, Pieces& parts) const {
  const std::u32string& text = piece.text;
  size_t done = 0;
  for (size_t at = 0; at < text.size();) {
    const AddedToken* token = longest(text, at, false);
    if (token == nullptr) {
      ++at;
      continue;
    }
    size_t begin = at, end = at + token->text.size();
    at = end;  // one that is passed over for want of space around it hides what begins inside it all the same
    if (token->single_word &&
        ((begin > 0 && word_.contains(text[begin - 1])) || (end < text.size() && word_.contains(text[end])))) {
      continue;
    }
    while (token->takes_left && begin > done && space_.contains(text[begin - 1])) --begin;
    while (token->takes_right && end < text.size() && space_.contains(text[end])) ++end;
    add(piece, done, begin, end, token->id, parts);
    done = end;
  }
  add_rest(piece, done, parts);
}

void AddedTokens::split_by_expression(const Piece& piece, Pieces& parts) const {
  const std::u32string& text = piece.text;
  size_t done = 0, word = 0;  // `word`: where the white space that begins at `at`, or before it, ends
  for (size_t at = 0; at < text.size();) {
    word = std::max(word, at);
    while (word < text.size() && space_.contains(text[word])) ++word;
    const AddedToken* token = longest(text, at, false);
    size_t end = token ? at + token->text.size() : at;
    if (word > at) {
      const AddedToken* later = longest(text, word, true);
      const auto order = [&](const AddedToken* t) {
        return std::pair(-static_cast<int64_t>(t->text.size()), t - tokens_.data());
      };
      if (later && (!token || order(later) < order(token))) {
        token = later;
        end = word + token->text.size();
      }
    }
    if (token == nullptr) {
      ++at;
      continue;
    }
    while (token->takes_right && end < text.size() && space_.contains(text[end])) ++end;
    add(piece, done, at, end, token->id, parts);
    done = at = end;
  }
  add_rest(piece, done, parts);
}

}  // namespace minifocus
