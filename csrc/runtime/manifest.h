// manifest.txt of an exported package: a line for each key, with its values behind it, a space before each.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace minifocus {

class Manifest {
 public:
  static Manifest read(const std::filesystem::path& file);

  const std::filesystem::path& file() const { return file_; }
  bool has(const std::string& key) const { return lines_.contains(key); }
  // Each throws Error, which names file and key, for a key that is not there and for values of another kind or number.
  const std::vector<std::string>& words(const std::string& key) const;
  const std::string& word(const std::string& key) const;
  std::vector<int64_t> integers(const std::string& key, size_t first = 0) const;  // from the value `first` on
  int64_t integer(const std::string& key) const;
  std::vector<double> numbers(const std::string& key) const;
  double number(const std::string& key) const;
  bool flag(const std::string& key) const;  // "true" or "false"

 private:
  std::filesystem::path file_;
  std::map<std::string, std::vector<std::string>> lines_;
};

}  // namespace minifocus
