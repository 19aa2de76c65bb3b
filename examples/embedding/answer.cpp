// answer PACKAGE PICTURE QUESTION [QUESTION ...]: answers questions about a PNG or JPEG, word by word.
//
// Options before these: --sampler NAME, --gamma NUMBER, --threads COUNT, and --json, which prints a line for each answer instead.
// PICTURE may be "-" for none. Exit status: 0 answered, 1 could not, 2 wrong arguments.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>

#include "minifocus.h"

namespace {

int usage() {
  std::fprintf(stderr, "usage: answer [--sampler NAME] [--gamma NUMBER] [--threads COUNT] [--json] PACKAGE PICTURE QUESTION...\n");
  return 2;
}

void print_json(const minifocus::Answer& answer) {
  std::printf("{\"token_ids\": [");
  for (size_t i = 0; i < answer.token_ids.size(); ++i) std::printf("%s%ld", i ? ", " : "", long(answer.token_ids[i]));
  const auto& tokens = answer.tokens;
  std::printf("], \"visual_tokens\": [%ld, %ld, %ld], \"seconds\": [%.4f, %.4f]}\n", long(tokens.full),
              long(tokens.after_vision), long(tokens.after_text), answer.prefill_seconds, answer.decode_seconds);
}

}  // namespace

int main(int count, char** arguments) {
  minifocus::Request request;
  bool json = false;
  int at = 1;
  for (; at < count && std::string_view(arguments[at]).starts_with("--"); ++at) {
    const std::string_view name = arguments[at];
    if (name == "--json") {
      json = true;
    } else if (at + 1 < count && name == "--sampler") {
      request.sampler = arguments[++at];
    } else if (at + 1 < count && name == "--gamma") {
      request.gamma = std::atof(arguments[++at]);
    } else if (at + 1 < count && name == "--threads") {
      minifocus::set_num_threads(std::atoi(arguments[++at]));
    } else {
      return usage();
    }
  }
  if (count - at < 3) return usage();

  auto model = minifocus::Model::open(arguments[at]);
  if (!model) return std::fprintf(stderr, "%s\n", model.error().c_str()), 1;
  const std::string picture = arguments[at + 1];
  std::vector<uint8_t> bytes;
  if (picture != "-") {
    std::ifstream file(picture, std::ios::binary);
    if (!file) return std::fprintf(stderr, "%s: expected a picture, found no file that can be read\n", picture.c_str()), 1;
    bytes.assign(std::istreambuf_iterator<char>(file), {});
  }
  if (!json) {
    request.on_text = [](std::string_view text) {
      std::fwrite(text.data(), 1, text.size(), stdout);
      return std::fflush(stdout) == 0;
    };
  }
  for (at += 2; at < count; ++at) {
    request.question = arguments[at];
    auto answer = picture == "-" ? model->ask(request) : model->ask(minifocus::EncodedPicture{bytes}, request);
    if (!answer) return std::fprintf(stderr, "%s: %s\n", picture.c_str(), answer.error().c_str()), 1;
    json ? print_json(*answer) : void(std::puts(""));
  }
}
