#include "minifocus_c.h"

#include <charconv>

#include "minifocus.h"

struct minifocus_model {
  minifocus::Model model;
};
struct minifocus_request {
  minifocus::Request request;
};
struct minifocus_answer {
  minifocus::Answer answer;
};

namespace {

thread_local std::string last_error;

minifocus_answer* handed_on(minifocus::Result<minifocus::Answer> result) {
  if (result) return new minifocus_answer{std::move(*result)};
  last_error = result.error();
  return nullptr;
}

template <class Ask>
minifocus_answer* with_request(const minifocus_model* model, const minifocus_request* request, const Ask& ask) {
  if (model != nullptr && request != nullptr) return handed_on(ask(request->request));
  last_error = model == nullptr ? "model: expected one that minifocus_open gave, got NULL"
                                : "request: expected one that minifocus_request_new gave, got NULL";
  return nullptr;
}

// Whether all of `text` is a number.
template <class Number>
bool read_number(std::string_view text, std::optional<Number>& value) {
  Number number{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  const bool whole = error == std::errc() && end == text.data() + text.size();
  if (whole) value = number;
  return whole;
}

}  // namespace

extern "C" {

minifocus_request* minifocus_request_new(const char* question) {
  if (question != nullptr) {
    auto made = std::make_unique<minifocus_request>();
    made->request.question = question;
    return made.release();
  }
  last_error = "question: expected text, got NULL";
  return nullptr;
}

int minifocus_request_set(minifocus_request* given, const char* name, const char* value) {
  if (given == nullptr || name == nullptr || value == nullptr) {
    last_error = "request, name and value: expected none of them to be NULL";
    return 0;
  }
  minifocus::Request& request = given->request;
  const std::string_view key = name;
  bool done = key == "sampler";
  if (done) request.sampler = value;
  if (key == "gamma") done = read_number(value, request.gamma);
  if (key == "keep") done = read_number(value, request.keep);
  if (key == "layer") done = read_number(value, request.layer);
  if (key == "max_new_tokens") done = read_number(value, request.max_new_tokens);
  if (!done) {
    last_error = std::string(name) + ": expected sampler, or gamma, keep, layer or max_new_tokens and a number, got " + value;
  }
  return done;
}

void minifocus_request_on_text(minifocus_request* request, minifocus_on_text on_text, void* context) {
  request->request.on_text = [on_text, context](std::string_view text) {
    return on_text == nullptr || on_text(std::string(text).c_str(), context) != 0;
  };
}

void minifocus_request_free(minifocus_request* request) { delete request; }

minifocus_model* minifocus_open(const char* package, int workers, int check_weights) {
  if (package == nullptr) {
    last_error = "package: expected the path of a folder, got NULL";
    return nullptr;
  }
  auto opened = minifocus::Model::open(package, {.workers = workers, .check_weights = check_weights != 0});
  if (opened) return new minifocus_model{std::move(*opened)};
  last_error = opened.error();
  return nullptr;
}

void minifocus_close(minifocus_model* model) { delete model; }

minifocus_answer* minifocus_ask_encoded(const minifocus_model* model, const uint8_t* bytes, size_t count,
                                        const minifocus_request* request) {
  return with_request(model, request, [&](const minifocus::Request& one) {
    return model->model.ask(minifocus::EncodedPicture{{bytes, bytes == nullptr ? 0 : count}}, one);
  });
}

minifocus_answer* minifocus_ask_rgb(const minifocus_model* model, const uint8_t* pixels, int64_t height, int64_t width,
                                    int64_t stride, const minifocus_request* request) {
  return with_request(model, request, [&](const minifocus::Request& one) {
    return model->model.ask(minifocus::RgbPicture{pixels, height, width, stride}, one);
  });
}

minifocus_answer* minifocus_ask_text(const minifocus_model* model, const minifocus_request* request) {
  return with_request(model, request, [&](const minifocus::Request& one) { return model->model.ask(one); });
}

const char* minifocus_answer_text(const minifocus_answer* answer) { return answer->answer.text.c_str(); }

const char* minifocus_answer_finish(const minifocus_answer* answer) {
  switch (answer->answer.finish) {
    case minifocus::Answer::Finish::kStop: return "stop";
    case minifocus::Answer::Finish::kLength: return "length";
    case minifocus::Answer::Finish::kCancelled: return "cancelled";
  }
  return "";
}

const int64_t* minifocus_answer_tokens(const minifocus_answer* answer, size_t* count) {
  *count = answer->answer.token_ids.size();
  return answer->answer.token_ids.data();
}

const int64_t* minifocus_answer_layer_tokens(const minifocus_answer* answer, size_t* count) {
  *count = answer->answer.layer_tokens.size();
  return answer->answer.layer_tokens.data();
}

void minifocus_answer_counts(const minifocus_answer* answer, int64_t counts[3], double* equivalent) {
  const minifocus::TokenCounts& tokens = answer->answer.tokens;
  counts[0] = tokens.full, counts[1] = tokens.after_vision, counts[2] = tokens.after_text;
  *equivalent = tokens.equivalent;
}

void minifocus_answer_seconds(const minifocus_answer* answer, double* prefill, double* decode) {
  *prefill = answer->answer.prefill_seconds, *decode = answer->answer.decode_seconds;
}

void minifocus_answer_free(minifocus_answer* answer) { delete answer; }

const char* minifocus_error(void) { return last_error.c_str(); }

void minifocus_set_num_threads(int count) { minifocus::set_num_threads(count); }

}  // extern "C"
