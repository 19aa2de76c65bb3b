// minifocus for C++: answers questions about pictures from a package that examples/export.py wrote, without Python.
//
//   auto model = minifocus::Model::open("package");
//   if (!model) die(model.error());
//   auto answer = model->ask(minifocus::EncodedPicture{bytes}, {.question = "What is written on the sign?"});
//   if (answer) std::puts(answer->text.c_str());
//
// Nothing here throws but std::bad_alloc. docs/embedding.md tells how to build it and what it needs; minifocus_c.h is the same
// for other languages.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#ifndef MINIFOCUS_API
#define MINIFOCUS_API __attribute__((visibility("default")))
#endif

namespace minifocus {

// A value, or the reason why there is none: the file, key or argument, what was expected and what came.
template <class Value>
class Result {
 public:
  Result(Value value) : holds_(std::in_place_index<0>, std::move(value)) {}
  static Result failed(std::string error) { return Result(std::in_place_index<1>, std::move(error)); }

  explicit operator bool() const { return holds_.index() == 0; }
  Value& operator*() { return std::get<0>(holds_); }
  const Value& operator*() const { return std::get<0>(holds_); }
  Value* operator->() { return &**this; }
  const Value* operator->() const { return &**this; }
  const std::string& error() const { return std::get<1>(holds_); }

 private:
  template <size_t index, class Given>
  Result(std::in_place_index_t<index> place, Given given) : holds_(place, std::move(given)) {}
  std::variant<Value, std::string> holds_;
};

struct OpenOptions {
  int workers = 1;             // how many threads may compute one part of the network at once; more wait for each other
  bool check_weights = false;  // compare the weights' hash too, which reads them all
};

// A PNG's or JPEG's bytes.
struct EncodedPicture {
  std::span<const uint8_t> bytes;
};

// Decoded pixels [height, width, 3]: red, green, blue. `stride` is the bytes of a row; 0: 3 * width.
struct RgbPicture {
  const uint8_t* pixels = nullptr;
  int64_t height = 0, width = 0, stride = 0;
};

struct Request {
  std::string question;  // UTF-8
  std::string sampler;   // "none", "text", "vision" or "focus" (both), as far as the package has them; "": the package's own
  // Of the text-guided sampler; what is not given is the package's own.
  std::optional<double> gamma;   // the kept tokens' share of all importance, in (0, 1]
  std::optional<int64_t> keep;   // keep so many tokens instead
  std::optional<int64_t> layer;  // before which decoder layer it acts
  std::optional<int64_t> max_new_tokens;
  // Called with each piece of text as soon as it is final. False ends the answer.
  std::function<bool(std::string_view)> on_text;
};

// Visual tokens of a prompt, newlines and thumbnails included, as minifocus/trace.py counts them.
struct TokenCounts {
  int64_t full = 0;           // before any sampler: a token for every patch
  int64_t after_vision = 0;   // as they enter the language model
  int64_t after_text = 0;     // as they reach its last layer
  double equivalent = 1;      // the mean over layers as a fraction of `full` (paper §4.4)
};

struct Answer {
  enum class Finish { kStop, kLength, kCancelled };

  std::string text;  // without white space at either end
  std::vector<int64_t> token_ids;
  TokenCounts tokens;
  std::vector<int64_t> layer_tokens;  // that each decoder layer read of the prompt, text and all
  Finish finish = Finish::kLength;
  double prefill_seconds = 0, decode_seconds = 0;
};

// A model in memory. Threads may ask one model at once. Answers are greedy.
class MINIFOCUS_API Model {
 public:
  // A package runs code: open only those of people you trust.
  static Result<Model> open(const std::filesystem::path& package, const OpenOptions& options = {});
  Model(Model&&) noexcept;
  Model& operator=(Model&&) noexcept;
  ~Model();

  Result<Answer> ask(const EncodedPicture& picture, const Request& request) const;
  Result<Answer> ask(const RgbPicture& picture, const Request& request) const;
  Result<Answer> ask(const Request& request) const;  // without a picture

 private:
  struct Parts;
  explicit Model(std::unique_ptr<Parts> parts);
  std::unique_ptr<Parts> parts_;
};

// Threads that one computation is shared out among, in the whole process. At least 1.
MINIFOCUS_API void set_num_threads(int count);

}  // namespace minifocus
