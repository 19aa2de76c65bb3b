#include "tokenizer.h"

#include <algorithm>

#include "../error.h"
#include "utf8.h"

namespace minifocus {
namespace {

constexpr char32_t kSpace = U'▁';
constexpr size_t kLongestText = size_t(1) << 28;  // of a text: no context is nearly as long

// GPT-2's: what can be seen in Latin-1 stands for itself, the rest for the characters from 256 on, in order.
std::array<char32_t, 256> visible_characters() {
  std::array<char32_t, 256> visible;
  char32_t next = 256;
  for (char32_t byte = 0; byte < 256; ++byte) {
    const bool seen = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    visible[byte] = seen ? byte : next++;
  }
  return visible;
}

void prepend(Piece& piece, char32_t character) {
  piece.origin.insert(piece.origin.begin(), piece.origin.front());
  piece.text.insert(piece.text.begin(), character);
}

void replace_spaces(Piece& piece) { std::replace(piece.text.begin(), piece.text.end(), U' ', kSpace); }

bool begins_with(const Piece& piece, char32_t character) { return piece.text.front() == character; }

// The piece cut in two wherever `cuts`(i) says that a part begins at character i.
template <class Cuts>
void cut(const Piece& piece, const Cuts& cuts, Pieces& parts) {
  size_t begin = 0;
  for (size_t at = 1; at <= piece.text.size(); ++at) {
    if (at < piece.text.size() && !cuts(at)) continue;
    parts.push_back(piece.part(begin, at));
    begin = at;
  }
}

AddedTokens whole_tokens(const TokenTable& table) {
  std::vector<AddedToken> tokens;
  for (const uint32_t id : table.whole)
    tokens.push_back({id, characters_of(table.text(id), "a token"), false, false, false});
  return AddedTokens(std::move(tokens), {}, {});
}

}  // namespace

Tokenizer Tokenizer::read(const std::filesystem::path& file) { return Tokenizer(TokenTable::read(file)); }

Tokenizer::Tokenizer(TokenTable table)
    : table_(std::move(table)),
      merges_(std::move(table_.merges), table_.flags.size()),
      added_(std::move(table_.added), table_.classes.added_space, table_.classes.word),
      normalized_added_(std::move(table_.normalized_added), table_.classes.added_space, table_.classes.word),
      whole_(whole_tokens(table_)),
      visible_(visible_characters()) {}

Tokenizer::Encoding Tokenizer::encode(std::string_view text, bool special) const {
  expect(text.size() <= kLongestText, "text: expected at most ", kLongestText, " bytes, got ", text.size());
  Piece whole{characters_of(text, "text"), {}};
  whole.origin.resize(whole.text.size());
  for (uint32_t i = 0; i < whole.text.size(); ++i) whole.origin[i] = {i, i + 1};

  Encoding encoding;
  const auto add = [&](const std::vector<uint32_t>& ids) {
    encoding.ids.insert(encoding.ids.end(), ids.begin(), ids.end());
    encoding.offsets.resize(encoding.ids.size());
  };
  if (special) add(table_.before_ids);
  for (const Piece& piece : split(std::move(whole))) {
    if (piece.token < 0) {
      encode_piece(piece, encoding);
    } else {
      encoding.ids.push_back(piece.token);
      encoding.offsets.emplace_back(piece.origin.front().begin, piece.origin.back().end);
    }
  }
  if (special) add(table_.after_ids);

  auto& [ids, offsets] = encoding;
  if (ids.size() > 1 && ids[0] == table_.bos_id && ids[1] == table_.bos_id &&
      offsets[0] == std::pair<int64_t, int64_t>()) {
    ids.erase(ids.begin());
    offsets.erase(offsets.begin());
  }
  return encoding;
}

Pieces Tokenizer::split(Piece text) const {
  if (text.text.empty()) return {};
  if (table_.library == Library::sentencepiece) return split_for_sentencepiece(text);
  Pieces found, pieces;
  added_.split(text, found);
  for (Piece& piece : found) {
    if (piece.token >= 0) {
      pieces.push_back(std::move(piece));
      continue;
    }
    Pieces normal{std::move(piece)};
    for (const Step& step : table_.normalizer) take(step, normal);
    for (const Piece& one : normal) normalized_added_.split(one, pieces);
  }
  for (const Step& step : table_.pre_tokenizer) take(step, pieces);
  return pieces;
}

Pieces Tokenizer::split_for_sentencepiece(const Piece& text) const {
  Pieces found, pieces;
  added_.split_by_expression(text, found);
  for (Piece& piece : found) {
    if (piece.token >= 0) {
      pieces.push_back(std::move(piece));
      continue;
    }
    const uint32_t begin = piece.origin.front().begin;
    const bool is_first = begin == 0 && !begins_with(piece, U' ') && !begins_with(piece, kSpace);
    replace_spaces(piece);
    if (table_.prefix && (table_.prefix_everywhere || is_first)) {
      prepend(piece, kSpace);
      piece.origin.front() = {begin, begin};
    }
    whole_.split(piece, pieces);
  }
  return pieces;
}

void Tokenizer::take(const Step& step, Pieces& pieces) const {
  Pieces taken;
  taken.reserve(pieces.size());
  for (Piece& piece : pieces) {
    if (piece.token >= 0) {
      taken.push_back(std::move(piece));
    } else {
      take(step, piece, taken);
    }
  }
  pieces = std::move(taken);
}

void Tokenizer::take(const Step& step, Piece& piece, Pieces& taken) const {
  const auto split = [&](const Ranges& words) {
    for (const auto& [begin, end] : words) taken.push_back(piece.part(begin, end));
  };
  switch (step.kind) {
    case StepKind::prepend: prepend(piece, kSpace); break;
    case StepKind::replace_spaces: replace_spaces(piece); break;
    case StepKind::prefix_space:
      if (!begins_with(piece, U' ')) prepend(piece, U' ');
      break;
    case StepKind::metaspace: {
      replace_spaces(piece);
      const int scheme = step.option & ~kSplits;
      const bool wanted = scheme == kAlways || (scheme == kFirst && piece.origin.front().begin == 0);
      if (wanted && !begins_with(piece, kSpace)) prepend(piece, kSpace);
      if (step.option & kSplits) return cut(piece, [&](size_t at) { return piece.text[at] == kSpace; }, taken);
      break;
    }
    case StepKind::digits: {
      const auto is_digit = [&](size_t at) { return table_.classes.digits.contains(piece.text[at]); };
      return cut(
          piece, [&](size_t at) { return is_digit(at) ? step.option == 1 || !is_digit(at - 1) : is_digit(at - 1); },
          taken);
    }
    case StepKind::split_gpt2: return split(split_gpt2(piece.text, table_.classes));
    case StepKind::split_llama3: return split(split_llama3(piece.text, table_.classes, step.option));
    case StepKind::bytes: {
      Piece bytes;
      std::string character;
      for (size_t at = 0; at < piece.text.size(); ++at) {
        character.clear();
        append_utf8(character, piece.text[at]);
        for (const unsigned char byte : character) bytes.text += visible_[byte];
        bytes.origin.resize(bytes.text.size(), piece.origin[at]);
      }
      piece = std::move(bytes);
      break;
    }
  }
  taken.push_back(std::move(piece));
}

int64_t Tokenizer::id_of(char32_t character) const {
  const auto found = std::lower_bound(table_.characters.begin(), table_.characters.end(), character,
                                      [](const auto& entry, char32_t c) { return entry.character < c; });
  return found != table_.characters.end() && found->character == character ? found->id : kNoToken;
}

int64_t Tokenizer::id_of_word(std::u32string_view word) const {
  if (table_.words.empty()) return kNoToken;
  const std::string text = utf8_of(word);
  const auto found = std::lower_bound(table_.words.begin(), table_.words.end(), text,
                                      [&](uint32_t id, const std::string& t) { return table_.text(id) < t; });
  return found != table_.words.end() && table_.text(*found) == text ? *found : kNoToken;
}

void Tokenizer::encode_piece(const Piece& piece, Encoding& encoding) const {
  const auto add = [&](int64_t id, Span first, Span last) {
    encoding.ids.push_back(id);
    encoding.offsets.emplace_back(first.begin, last.end);
  };
  if (const int64_t id = id_of_word(piece.text); id != kNoToken)
    return add(id, piece.origin.front(), piece.origin.back());

  std::vector<Symbol> symbols;
  std::vector<Span> origin;  // by byte of `text`
  symbols.reserve(piece.text.size());
  for (size_t at = 0; at < piece.text.size(); ++at) {
    const int64_t id = id_of(piece.text[at]);
    const auto length = static_cast<uint32_t>(utf8_length(piece.text[at]));
    origin.insert(origin.end(), length, piece.origin[at]);
    if (id != kNoToken || table_.unknown != Unknown::dropped) symbols.push_back({id, length});
  }
  merges_.apply(symbols);

  // Where characters were dropped, the spans behind them are too far left: the package `tokenizers` counts like this.
  const std::string text = utf8_of(piece.text);
  size_t begin = 0;
  bool was_unknown = false;
  for (const Symbol& symbol : symbols) {
    const size_t end = begin + symbol.bytes;
    const bool is_unknown = symbol.id == kNoToken;
    if (!is_unknown) {
      add(symbol.id, origin[begin], origin[end - 1]);
    } else if (table_.unknown == Unknown::bytes) {
      for (size_t at = begin; at < end; ++at) {
        add(table_.unknown_ids[static_cast<unsigned char>(text[at])], origin[begin], origin[end - 1]);
      }
    } else if (table_.unknown == Unknown::fused && was_unknown) {
      encoding.offsets.back().second = origin[end - 1].end;
    } else {
      add(table_.unknown_ids.front(), origin[begin], origin[end - 1]);
    }
    was_unknown = is_unknown;
    begin = end;
  }
}

bool Tokenizer::is_text(int64_t id, bool skip_special) const {
  if (id < 0 || id >= vocab_size()) return false;
  const uint8_t flags = table_.flags[id];
  return (flags & kIsToken) && !(skip_special && (flags & kIsSpecial));
}

std::string Tokenizer::decode(const std::vector<int64_t>& ids, bool skip_special) const {
  std::vector<int64_t> tokens;
  for (const int64_t id : ids) {
    if (is_text(id, skip_special)) tokens.push_back(id);
  }
  return table_.decoding == Decoding::bytes ? decode_bytes(tokens) : decode_spaces(tokens);
}

std::string Tokenizer::decode_bytes(const std::vector<int64_t>& ids) const {
  std::string bytes;
  for (const int64_t id : ids) {
    const size_t before = bytes.size();
    for (const char32_t character : characters_of(table_.text(id), "a token")) {
      const auto found = std::find(visible_.begin(), visible_.end(), character);
      if (found == visible_.end()) {  // an added token, which stands for itself
        bytes.resize(before);
        bytes += table_.text(id);
        break;
      }
      bytes += static_cast<char>(found - visible_.begin());
    }
  }
  return lossy_utf8(bytes);
}

std::string Tokenizer::decode_spaces(const std::vector<int64_t>& ids) const {
  std::string text, run;
  const auto end_run = [&] {  // of bytes: if they are not UTF-8 together, each becomes one U+FFFD
    const bool valid = is_utf8(run);
    for (size_t i = 0; !valid && i < run.size(); ++i) append_utf8(text, 0xFFFD);
    if (valid) text += run;
    run.clear();
  };
  for (const int64_t id : ids) {
    const std::string_view token = table_.text(id);
    if (is_byte(id)) {
      run += static_cast<char>(std::stoi(std::string(token.substr(3, 2)), nullptr, 16));
      continue;
    }
    end_run();
    for (const char32_t character : characters_of(token, "a token"))
      append_utf8(text, character == kSpace ? U' ' : character);
  }
  end_run();
  const bool strips = table_.decoding == Decoding::stripped_spaces && text.starts_with(' ');
  return strips ? text.substr(1) : text;
}

}  // namespace minifocus
