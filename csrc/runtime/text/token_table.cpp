#include "token_table.h"

#include <algorithm>
#include <bit>
#include <cctype>
#include <cstring>
#include <fstream>
#include <type_traits>

#include "../error.h"
#include "utf8.h"

namespace minifocus {
namespace {

static_assert(std::endian::native == std::endian::little, "tables are little-endian, and read as they lie");

constexpr std::string_view kMagic = "minifocus tokens";
constexpr uint32_t kVersion = 1;
constexpr uint64_t kMostBytes = uint64_t(1) << 30;
constexpr uint32_t kLastCharacter = 0x10FFFF;

// Fields one behind the other. No field makes it read, or allocate, more than the file holds.
class Fields {
 public:
  Fields(std::string bytes, std::string file) : bytes_(std::move(bytes)), file_(std::move(file)) {}

  template <class... Parts>
  void check(bool holds, const Parts&... parts) const {
    expect(holds, file_, ": ", parts...);
  }

  template <class T>
  T number() {
    static_assert(std::is_trivially_copyable_v<T>);
    T value;
    std::memcpy(&value, take(sizeof(T)), sizeof(T));
    return value;
  }

  template <class T>
  std::vector<T> array() {
    static_assert(std::is_trivially_copyable_v<T>);
    const auto size = number<uint64_t>();
    check(size <= left() / sizeof(T), "expected ", size, " more elements of ", sizeof(T), " bytes, found ", left(),
          " bytes");
    std::vector<T> values(size);
    if (size) std::memcpy(values.data(), take(size * sizeof(T)), size * sizeof(T));
    return values;
  }

  std::string text() {
    const auto size = number<uint64_t>();
    return std::string(take(size), size);
  }

  template <class Enum>
  Enum choice(Enum last, const char* what) {
    const auto value = number<uint8_t>();
    check(value <= static_cast<uint8_t>(last), what, ": expected at most ", int(last), ", found ", int(value));
    return static_cast<Enum>(value);
  }

  const char* take(uint64_t size) {
    check(size <= left(), "expected ", size, " more bytes, found ", left(), ": it is cut off or damaged");
    at_ += size;
    return bytes_.data() + at_ - size;
  }

  uint64_t left() const { return bytes_.size() - at_; }
  const std::string& file() const { return file_; }

 private:
  std::string bytes_, file_;
  uint64_t at_ = 0;
};

std::string content_of(const std::filesystem::path& file) {
  std::error_code error;
  expect(std::filesystem::is_regular_file(file, error), file.string(),
         ": expected a tokenizer's table, found no such file");
  std::ifstream stream(file, std::ios::binary | std::ios::ate);
  expect(stream.is_open(), file.string(), ": cannot be read");
  const auto size = static_cast<uint64_t>(stream.tellg());
  expect(size <= kMostBytes, file.string(), ": expected at most ", kMostBytes, " bytes, found ", size);
  std::string bytes(size, '\0');
  stream.seekg(0);
  expect(bool(stream.read(bytes.data(), size)), file.string(), ": cannot be read");
  return bytes;
}

CharacterSet read_set(Fields& fields) {
  auto ranges = fields.array<CharacterSet::Range>();
  int64_t last = -1;
  for (const auto& range : ranges) {
    fields.check(range.first > last && range.first <= range.last && range.last <= kLastCharacter,
                 "expected a class of characters as ascending ranges, found ", range.first, " to ", range.last);
    last = range.last;
  }
  return CharacterSet(std::move(ranges));
}

bool is_byte(std::string_view text) {  // <0x0A>
  return text.size() == 6 && text.starts_with("<0x") && text.ends_with('>') &&
         std::isxdigit(static_cast<unsigned char>(text[3])) && std::isxdigit(static_cast<unsigned char>(text[4]));
}

struct Reader {
  Fields& fields;
  size_t num_tokens = 0;

  void check_id(uint32_t id, const char* what) const {
    fields.check(id < num_tokens, what, ": expected a number below ", num_tokens, ", found ", id);
  }

  std::vector<uint32_t> ids(const char* what) {
    auto found = fields.array<uint32_t>();
    for (const uint32_t id : found) check_id(id, what);
    return found;
  }

  void read_tokens(TokenTable& table) {
    table.flags = fields.array<uint8_t>();
    table.ends = fields.array<uint32_t>();
    table.texts = fields.text();
    num_tokens = table.flags.size();
    const bool fits = table.ends.size() == num_tokens && (num_tokens ? table.ends.back() : 0) == table.texts.size();
    fields.check(fits && std::is_sorted(table.ends.begin(), table.ends.end()), "expected a text for each of ",
                 num_tokens, " tokens");
    for (size_t id = 0; id < num_tokens; ++id) {
      const auto text = table.text(id);
      fields.check(is_utf8(text), "token ", id, ": expected text in UTF-8");
      fields.check(!(table.flags[id] & kIsByte) || is_byte(text), "token ", id, ": expected a byte, found ", text);
    }
  }

  void read_model(TokenTable& table) {
    table.words = ids("words");
    table.characters = fields.array<TokenTable::Character>();
    int64_t last = -1;
    for (const auto& [character, id] : table.characters) {
      fields.check(character > last && character <= kLastCharacter, "characters: expected ascending ones, found ",
                   character);
      check_id(id, "characters");
      last = character;
    }
    table.merges = fields.array<Merge>();
    const auto pair = [](const Merge& merge) { return std::pair(merge.left, merge.right); };
    for (size_t i = 0; i < table.merges.size(); ++i) {
      const Merge& merge = table.merges[i];
      for (const uint32_t id : {merge.left, merge.right, merge.result}) check_id(id, "merges");
      fields.check(i == 0 || pair(table.merges[i - 1]) < pair(merge), "merges: expected ascending ones");
    }
    table.unknown = fields.choice(Unknown::bytes, "unknown characters");
    table.unknown_ids = ids("unknown characters");
    const size_t expected = table.unknown == Unknown::dropped ? 0 : table.unknown == Unknown::bytes ? 256 : 1;
    fields.check(table.unknown_ids.size() == expected, "unknown characters: expected ", expected, " tokens, found ",
                 table.unknown_ids.size());
  }

  void read_ends(TokenTable& table) {
    table.before_ids = ids("tokens before a text");
    table.after_ids = ids("tokens behind a text");
    table.bos_id = fields.number<int64_t>();
    table.decoding = fields.choice(Decoding::stripped_spaces, "decoding");
  }

  std::vector<AddedToken> read_added() {
    std::vector<AddedToken> tokens;
    for (auto count = fields.number<uint64_t>(); count > 0; --count) {
      const auto id = fields.number<uint32_t>();
      check_id(id, "added tokens");
      const auto flags = fields.number<uint8_t>();
      auto text = characters_of(fields.text(), fields.file() + ": an added token");
      fields.check(!text.empty(), "added tokens: expected texts, found an empty one");
      tokens.push_back({id, std::move(text), bool(flags & 1), bool(flags & 2), bool(flags & 4)});
    }
    return tokens;
  }

  std::vector<Step> read_steps() {
    auto steps = fields.array<Step>();
    for (const Step& step : steps) {
      fields.check(step.kind <= StepKind::bytes, "steps: expected at most ", int(StepKind::bytes), ", found ",
                   int(step.kind));
      fields.check(step.kind != StepKind::split_llama3 || step.option > 0,
                   "steps: expected at least one number to a word");
    }
    return steps;
  }

  void read_classes(CharacterClasses& classes) {
    for (CharacterSet* set :
         {&classes.letters, &classes.numbers, &classes.space, &classes.digits, &classes.added_space, &classes.word}) {
      *set = read_set(fields);
    }
    for (CharacterSet& set : classes.folded) set = read_set(fields);
  }
};

}  // namespace

TokenTable TokenTable::read(const std::filesystem::path& file) {
  Fields fields(content_of(file), file.string());
  fields.check(fields.left() >= kMagic.size() && std::string_view(fields.take(kMagic.size()), kMagic.size()) == kMagic,
               "expected a tokenizer's table, which begins with \"", kMagic, "\"");
  const auto version = fields.number<uint32_t>();
  fields.check(version == kVersion, "expected version ", kVersion, " of a tokenizer's table, found ", version,
               ": export the model again");
  TokenTable table;
  table.library = fields.choice(Library::sentencepiece, "library");
  Reader reader{fields};
  reader.read_tokens(table);
  reader.read_model(table);
  reader.read_ends(table);
  table.added = reader.read_added();
  table.normalized_added = reader.read_added();
  table.normalizer = reader.read_steps();
  table.pre_tokenizer = reader.read_steps();
  table.whole = reader.ids("whole tokens");
  for (const uint32_t id : table.whole)
    fields.check(!table.text(id).empty(), "whole tokens: expected texts, found an empty one");
  table.prefix = fields.choice(uint8_t(1), "prefix");
  table.prefix_everywhere = fields.choice(uint8_t(1), "prefix everywhere");
  reader.read_classes(table.classes);
  fields.check(fields.left() == 0, "expected its end, found ", fields.left(), " bytes more");
  return table;
}

}  // namespace minifocus
