// The runtime's text part for Python: plain functions for ctypes. A call that
// fails returns null, and `minifocus_error` says why. Whoever gets a pointer
// gives it back to minifocus_free.
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "runtime/error.h"
#include "runtime/manifest.h"
#include "runtime/text/model_text.h"
#include "runtime/text/prompt.h"
#include "runtime/text/stream_decoder.h"
#include "runtime/text/tokenizer.h"

using namespace minifocus;

namespace {

thread_local std::string error;

template <class Made>
void* made(const Made& make) {
  try {
    return make();
  } catch (const Error& caught) {
    error = caught.what();
  } catch (const std::exception& caught) {  // none is expected
    error = std::string("not an Error: ") + caught.what();
  }
  return nullptr;
}

// The number of int64 that follow, and those.
void* numbers(const std::vector<int64_t>& values) {
  auto* copy = new int64_t[values.size() + 1];
  copy[0] = static_cast<int64_t>(values.size());
  std::copy(values.begin(), values.end(), copy + 1);
  return copy;
}

// The number of bytes that follow, as an int64, and those.
void* bytes(const std::string& text) {
  auto* copy = new char[sizeof(int64_t) + text.size()];
  const auto size = static_cast<int64_t>(text.size());
  std::memcpy(copy, &size, sizeof size);
  std::memcpy(copy + sizeof size, text.data(), text.size());
  return copy;
}

std::vector<int64_t> ids_of(const int64_t* ids, int64_t count) { return {ids, ids + count}; }

}  // namespace

extern "C" {

const char* minifocus_error() { return error.c_str(); }
void minifocus_free(void* pointer) { delete[] static_cast<char*>(pointer); }

void* tokenizer_read(const char* file) {
  return made([&] { return new Tokenizer(Tokenizer::read(file)); });
}
void tokenizer_close(void* tokenizer) { delete static_cast<Tokenizer*>(tokenizer); }
int64_t tokenizer_vocab_size(void* tokenizer) { return static_cast<Tokenizer*>(tokenizer)->vocab_size(); }

// Three numbers for each token: its id and its offsets.
void* tokenizer_encode(void* tokenizer, const char* text, int64_t size, bool special) {
  return made([&] {
    const auto encoding = static_cast<Tokenizer*>(tokenizer)->encode({text, static_cast<size_t>(size)}, special);
    std::vector<int64_t> values;
    for (size_t i = 0; i < encoding.ids.size(); ++i) {
      values.insert(values.end(), {encoding.ids[i], encoding.offsets[i].first, encoding.offsets[i].second});
    }
    return numbers(values);
  });
}

void* tokenizer_decode(void* tokenizer, const int64_t* ids, int64_t count, bool skip_special) {
  return made([&] { return bytes(static_cast<Tokenizer*>(tokenizer)->decode(ids_of(ids, count), skip_special)); });
}

// What each id makes final, and the rest: before each its number of bytes and a
// space.
void* tokenizer_stream(void* tokenizer, const int64_t* ids, int64_t count, bool skip_special) {
  return made([&] {
    StreamDecoder decoder(*static_cast<Tokenizer*>(tokenizer), skip_special);
    std::string text;
    const auto add = [&](const std::string& piece) { text += std::to_string(piece.size()) + ' ' + piece; };
    for (const int64_t id : ids_of(ids, count)) add(decoder.push(id));
    add(decoder.flush());
    return bytes(text);
  });
}

void* prompts_read(const char* manifest) {
  return made([&] { return new Prompts(Prompts::from(Manifest::read(manifest))); });
}
void prompts_close(void* prompts) { delete static_cast<Prompts*>(prompts); }

// The text, and the span of the question's words in front of it as two numbers
// with a space behind each.
void* prompts_write(void* prompts, const char* question, int64_t size, int64_t num_pictures) {
  return made([&] {
    const auto prompt = static_cast<Prompts*>(prompts)->write({question, static_cast<size_t>(size)}, num_pictures);
    return bytes(std::to_string(prompt.begin) + ' ' + std::to_string(prompt.end) + ' ' + prompt.text);
  });
}

// Two numbers for each token: its id, and whether it is a part of the
// instruction.
void* model_text(void* tokenizer, const char* manifest, const char* question, int64_t size, int64_t num_pictures) {
  return made([&] {
    const TextReader reader(*static_cast<Tokenizer*>(tokenizer), Manifest::read(manifest));
    const ModelText text = reader.read({question, static_cast<size_t>(size)}, num_pictures);
    std::vector<int64_t> values;
    for (size_t i = 0; i < text.ids.size(); ++i) values.insert(values.end(), {text.ids[i], text.instruction[i]});
    return numbers(values);
  });
}

}  // extern "C"
