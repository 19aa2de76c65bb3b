#include "manifest.h"

#include <charconv>
#include <fstream>

#include "error.h"

namespace minifocus {

Manifest Manifest::read(const std::filesystem::path& file) {
  std::ifstream stream(file, std::ios::binary);
  expect(stream.is_open(), file.string(), ": expected the manifest of an exported package, found no file that can be read");
  Manifest manifest;
  manifest.file_ = file;
  for (std::string line; std::getline(stream, line);) {
    std::istringstream parts(line);
    std::string key, value;
    expect(bool(parts >> key), file.string(), ": expected a key in every line, found an empty one");
    auto [place, is_new] = manifest.lines_.try_emplace(key);
    expect(is_new, file.string(), ": ", key, ": expected one line with this key, found two");
    while (parts >> value) place->second.push_back(value);
  }
  return manifest;
}

const std::vector<std::string>& Manifest::words(const std::string& key) const {
  auto found = lines_.find(key);
  if (found == lines_.end()) fail(file_.string(), ": ", key, ": no such key");
  return found->second;
}

const std::string& Manifest::word(const std::string& key) const {
  const auto& values = words(key);
  expect(values.size() == 1, file_.string(), ": ", key, ": expected one value, got ", values.size());
  return values.front();
}

template <class Number>
static std::vector<Number> parsed(const std::vector<std::string>& words, const std::string& file, const std::string& key) {
  std::vector<Number> numbers;
  for (const auto& word : words) {
    Number number{};
    auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), number);
    expect(error == std::errc() && end == word.data() + word.size(), file, ": ", key, ": expected a number, got ", word);
    numbers.push_back(number);
  }
  return numbers;
}

std::vector<int64_t> Manifest::integers(const std::string& key, size_t first) const {
  const auto& all = words(key);
  const auto begin = all.begin() + static_cast<std::ptrdiff_t>(std::min(first, all.size()));
  return parsed<int64_t>(std::vector<std::string>(begin, all.end()), file_.string(), key);
}

int64_t Manifest::integer(const std::string& key) const {
  word(key);
  return integers(key).front();
}

std::vector<double> Manifest::numbers(const std::string& key) const {
  return parsed<double>(words(key), file_.string(), key);
}

double Manifest::number(const std::string& key) const {
  word(key);
  return numbers(key).front();
}

bool Manifest::flag(const std::string& key) const {
  const auto& value = word(key);
  expect(value == "true" || value == "false", file_.string(), ": ", key, ": expected true or false, got ", value);
  return value == "true";
}

}  // namespace minifocus
