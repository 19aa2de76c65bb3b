#include "minifocus.h"

#include <ATen/Parallel.h>
#include <ATen/ops/argmax.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <chrono>

#include "error.h"
#include "network.h"
#include "package.h"
#include "pictures/decode.h"
#include "text/model_text.h"
#include "text/stream_decoder.h"

namespace minifocus {
namespace {

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// What `make` gives, or why it does not.
template <class Value, class Make>
Result<Value> result_of(const Make& make) {
  try {
    return make();
  } catch (const std::bad_alloc&) {
    throw;
  } catch (const c10::Error& error) {
    return Result<Value>::failed(std::string("torch: ") + error.what_without_backtrace());
  } catch (const std::exception& error) {
    return Result<Value>::failed(error.what());
  }
}

Picture copied(const RgbPicture& given) {
  const auto [pixels, height, width, stride] = given;
  expect(pixels != nullptr, "picture: expected pixels, got NULL");
  expect(height > 0 && width > 0, "picture: expected a size of at least 1x1, got ", height, "x", width);
  expect(height <= kMaxPixels / width, "picture: ", height, "x", width, " is over the limit of ", kMaxPixels, " pixels");
  expect(stride == 0 || stride >= 3 * width, "picture: expected a stride of at least ", 3 * width, ", got ", stride);
  Picture picture{height, width, std::vector<uint8_t>(3 * height * width)};
  for (int64_t y = 0; y < height; ++y) {
    const uint8_t* row = pixels + y * (stride == 0 ? 3 * width : stride);
    std::copy(row, row + 3 * width, picture.row(y));
  }
  return picture;
}

}  // namespace

struct Model::Parts {
  Parts(const std::filesystem::path& folder, const OpenOptions& options)
      : package(folder, options.workers, options.check_weights),
        pictures(PictureSettings::from(package.manifest())),
        tokenizer(Tokenizer::read(folder / "tokenizer.bin")),
        text(tokenizer, package.manifest()),
        network(package, pictures) {
    const Manifest& manifest = package.manifest();
    sampler = manifest.word("sampler");
    max_new_tokens = manifest.integer("generation.max_new_tokens");
    if (package.has_part("score")) {
      guided.layer = manifest.integer("guided.layer");
      guided.gamma = manifest.number("guided.gamma");
      if (manifest.has("guided.keep")) guided.keep = manifest.integer("guided.keep");
    }
  }

  Sampling sampling_of(const Request& request) const {
    const std::string& name = request.sampler.empty() ? sampler : request.sampler;
    Sampling sampling = guided;
    sampling.vision = name == "vision" || name == "focus";
    sampling.text = name == "text" || name == "focus";
    expect(sampling.vision || sampling.text || name == "none", "sampler: expected none, text, vision or focus, got ", name);
    for (const auto& [wanted, part] : {std::pair(sampling.vision, "regions"), std::pair(sampling.text, "score")}) {
      expect(!wanted || package.has_part(part), "sampler: ", package.folder().string(), " was exported with ", sampler,
             ", got ", name);
    }
    const bool given = request.gamma || request.keep || request.layer;
    expect(!given || sampling.text, "gamma, keep and layer: expected a sampler that the text guides, got ", name);
    if (request.gamma) {
      expect(*request.gamma > 0 && *request.gamma <= 1, "gamma: expected a number in (0, 1], got ", *request.gamma);
      sampling.gamma = *request.gamma, sampling.keep.reset();
    }
    if (request.keep) {
      expect(*request.keep >= 1, "keep: expected at least 1, got ", *request.keep);
      sampling.keep = request.keep;
    }
    if (request.layer) sampling.layer = *request.layer;
    expect(!sampling.text || (sampling.layer >= 0 && sampling.layer < network.num_layers()), "layer: expected 0 to ",
           network.num_layers() - 1, ", got ", sampling.layer);
    return sampling;
  }

  Answer ask(const std::optional<Picture>& picture, const Request& request, double begun) const {
    const c10::InferenceMode guard;
    const Sampling sampling = sampling_of(request);
    const int64_t most = request.max_new_tokens.value_or(max_new_tokens);
    expect(most >= 1, "max_new_tokens: expected at least 1, got ", most);
    const ModelText prompt = text.read(request.question, picture ? 1 : 0);

    Answer answer;
    std::optional<VisualTokens> visual;
    if (picture) {
      const Tiles tiles = make_tiles(*picture, pictures);
      answer.tokens.full = network.num_plain_tokens(tiles);
      visual = network.visual_tokens(network.encode(tiles), sampling);
      answer.tokens.after_vision = static_cast<int64_t>(visual->unscored.size());
    }
    Row row = network.embed(prompt.ids, prompt.instruction, text.image_token(), visual);
    visual.reset();
    const int64_t words = row.size() - row.num_visual();
    int64_t position = row.size() - 1;
    const int64_t longest = std::min(most, network.context() - position);
    std::vector<LayerCache> caches;
    std::vector<int64_t> seen;
    at::Tensor logits = network.prefill(std::move(row), sampling, caches, seen);
    count(answer, seen, words);
    answer.prefill_seconds = seconds() - begun;

    begun = seconds();
    const std::vector<int64_t>& stops = text.stop_ids();
    StreamDecoder stream(tokenizer);
    const auto tell = [&](const std::string& piece) { return piece.empty() || !request.on_text || request.on_text(piece); };
    for (bool wanted = true;;) {
      const int64_t token = logits.argmax().item<int64_t>();
      if (std::find(stops.begin(), stops.end(), token) != stops.end()) {
        answer.finish = Answer::Finish::kStop;
        break;
      }
      answer.token_ids.push_back(token);
      wanted = tell(stream.push(token));
      if (!wanted) answer.finish = Answer::Finish::kCancelled;
      if (!wanted || static_cast<int64_t>(answer.token_ids.size()) == longest) break;
      logits = network.step(token, ++position, caches);
    }
    if (answer.finish != Answer::Finish::kCancelled && !tell(stream.flush())) answer.finish = Answer::Finish::kCancelled;
    answer.text = text.stripped(tokenizer.decode(answer.token_ids));
    answer.decode_seconds = seconds() - begun;
    return answer;
  }

  // `seen` by each layer, visual tokens; `words` all of them read.
  static void count(Answer& answer, const std::vector<int64_t>& seen, int64_t words) {
    double sum = 0;
    for (const int64_t one : seen) {
      answer.layer_tokens.push_back(one + words);
      sum += static_cast<double>(one);
    }
    TokenCounts& tokens = answer.tokens;
    tokens.after_text = seen.back();
    if (tokens.full > 0) tokens.equivalent = sum / static_cast<double>(seen.size()) / static_cast<double>(tokens.full);
  }

  Package package;
  PictureSettings pictures;
  Tokenizer tokenizer;
  TextReader text;
  Network network;
  std::string sampler;
  Sampling guided;
  int64_t max_new_tokens;
};

Model::Model(std::unique_ptr<Parts> parts) : parts_(std::move(parts)) {}
Model::Model(Model&&) noexcept = default;
Model& Model::operator=(Model&&) noexcept = default;
Model::~Model() = default;

Result<Model> Model::open(const std::filesystem::path& package, const OpenOptions& options) {
  return result_of<Model>([&]() -> Result<Model> {
    expect(options.workers >= 1 && options.workers <= 1024, "workers: expected 1 to 1024, got ", options.workers);
    const c10::InferenceMode guard;
    return Model(std::make_unique<Parts>(package, options));
  });
}

Result<Answer> Model::ask(const EncodedPicture& picture, const Request& request) const {
  const double begun = seconds();
  return result_of<Answer>([&] { return parts_->ask(decode_picture(picture.bytes, "the picture"), request, begun); });
}

Result<Answer> Model::ask(const RgbPicture& picture, const Request& request) const {
  const double begun = seconds();
  return result_of<Answer>([&] { return parts_->ask(copied(picture), request, begun); });
}

Result<Answer> Model::ask(const Request& request) const {
  const double begun = seconds();
  return result_of<Answer>([&] { return parts_->ask(std::nullopt, request, begun); });
}

void set_num_threads(int count) { at::set_num_threads(std::max(count, 1)); }

}  // namespace minifocus
