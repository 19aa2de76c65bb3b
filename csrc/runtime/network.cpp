#include "network.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>

#include "error.h"

namespace minifocus {
namespace {

at::Tensor whole_numbers(const std::vector<int64_t>& numbers) { return at::tensor(numbers, at::kLong); }

// Eq. 9: the numbers of the tokens that stay.
std::vector<int64_t> select_top_p(const at::Tensor& scores, const Sampling& sampling) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("minifocus::select_top_p", "")
                             .typed<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, double,
                                                                       std::optional<int64_t>)>();
  const auto [index, count] = op.call(scores, whole_numbers({0, scores.size(0)}), sampling.gamma, sampling.keep);
  const int64_t* first = index.const_data_ptr<int64_t>();
  return {first, first + count.item<int64_t>()};  // the rest of `index` is not set
}

}  // namespace

LayerCache::LayerCache(int64_t heads, int64_t head_dim, at::ScalarType dtype)
    : keys_(at::empty({0, heads, head_dim}, dtype)), values_(keys_) {}

void LayerCache::reserve(int64_t tokens) {
  if (tokens <= keys_.size(0)) return;
  const int64_t room = length_ == 0 ? 128 : std::max<int64_t>(128, tokens / 8);
  for (at::Tensor* one : {&keys_, &values_}) {
    at::Tensor larger = at::empty({tokens + room, one->size(1), one->size(2)}, one->options());
    larger.narrow(0, 0, length_).copy_(one->narrow(0, 0, length_));
    *one = larger;
  }
}

void LayerCache::fill(const at::Tensor& k, const at::Tensor& v) {
  reserve(k.size(0));
  length_ = k.size(0);
  keys_.narrow(0, 0, length_).copy_(k);
  values_.narrow(0, 0, length_).copy_(v);
}

std::pair<at::Tensor, at::Tensor> LayerCache::extend() {
  reserve(length_ + 1);
  ++length_;
  return {keys_.narrow(0, 0, length_), values_.narrow(0, 0, length_)};
}

Network::Network(const Package& package, const PictureSettings& pictures) : package_(package), pictures_(pictures) {
  const Manifest& manifest = package.manifest();
  num_layers_ = manifest.integer("model.layers");
  context_ = manifest.integer("model.context");
  patches_ = manifest.integer("model.patches");
  heads_ = manifest.integer("model.key_heads");
  head_dim_ = manifest.integer("model.head_dim");
  keep_cls_ = manifest.flag("model.keep_cls");
  expect(num_layers_ > 0 && context_ > 0, package.folder().string(), ": expected layers and a context, found none");
  embeddings_ = package.weight("language_model.model.embed_tokens.weight");
  const at::Tensor frequencies = package.weight("rope.frequencies");
  if (pictures_.anyres) newline_ = package.weight("image_newline");
  const int64_t channels = embeddings_.dim() == 2 ? embeddings_.size(1) : -1;
  const bool fit = channels > 0 && frequencies.dim() == 1 && 2 * frequencies.size(0) == head_dim_ &&
                   (!pictures_.anyres || newline_.sizes() == at::IntArrayRef{channels});
  expect(fit, package.folder().string(), ": expected embeddings, frequencies and a newline that fit each other, found ",
         embeddings_.sizes(), ", ", frequencies.sizes(), " and ", newline_.defined() ? newline_.sizes() : at::IntArrayRef{});
  const at::Tensor angles = at::arange(context_, at::kFloat).unsqueeze(1).mul(frequencies).unsqueeze(0).unsqueeze(0);
  cos_ = angles.cos().to(embeddings_.scalar_type()), sin_ = angles.sin().to(embeddings_.scalar_type());
  if (package.has_part("regions")) {
    window_ = manifest.integer("regions.window");
    thumbnail_ = manifest.word("regions.thumbnail");
    expect(window_ > 0, package.folder().string(), "/manifest.txt: regions.window: expected at least 1, got ", window_);
  }
  if (package.has_part("score")) words_ = manifest.word("guided.text");
  for (int64_t layer = 0; layer < num_layers_; ++layer) {
    const std::string prefix = "language_model.model.layers." + std::to_string(layer) + ".";
    layer_weights_.push_back(package.weights_of("layer", prefix));
    step_weights_.push_back(package.weights_of("step", prefix));
    if (package.has_part("score")) score_weights_.push_back(package.weights_of("score", prefix));
    if (layer == num_layers_ - 1) last_weights_ = package.weights_of("last", prefix);
  }
  picture_weights_ = package.weights_of("picture", "");
  if (package.has_part("regions")) regions_weights_ = package.weights_of("regions", "before_llm.");
  head_weights_ = package.weights_of("head", "language_model.");
}

int64_t Network::num_plain_tokens(const Tiles& picture) const {
  const Grid grid{patches_, patches_};
  if (!pictures_.anyres) return grid.cells() + keep_cls_;
  return num_visual_tokens({picture.height, picture.width}, pictures_.pinpoints, pictures_.image_size, grid);
}

Features Network::encode(const Tiles& picture) const {
  const Grid& grid = pictures_.grid;
  const auto pixels = at::from_blob(const_cast<float*>(picture.values.data()),
                                    {picture.count, 3, picture.side, picture.side}, at::kFloat);
  const at::Tensor features =
      package_.part("picture")(picture_weights_, {pixels.to(embeddings_.scalar_type())}).front();
  const int64_t cls = features.size(1) - grid.cells();
  const at::Tensor cells = features.narrow(1, cls, grid.cells());
  const at::Tensor views = cells.unflatten(1, {grid.rows, grid.columns});
  if (!pictures_.anyres) return {views[0], views[0], features[0].narrow(0, 0, cls)};
  const Size size{picture.height, picture.width}, best = select_best_resolution(size, pictures_.pinpoints);
  const int64_t down = best.height / pictures_.image_size, across = best.width / pictures_.image_size;
  const at::Tensor tiles = views.narrow(0, 1, down * across).unflatten(0, {down, across});
  const at::Tensor map = tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1);
  const Region seen = unpadded_grid(size, best, pictures_.image_size, grid);
  return {map.narrow(0, seen.top, seen.rows).narrow(1, seen.left, seen.cols), views[0], cells[0]};
}

// `rows` are the tokens of the map's rows of cells or regions, each of which gets a newline. LLaVA-1.5 has none.
VisualTokens Network::with_newlines(const at::Tensor& leading, const std::vector<at::Tensor>& rows) const {
  std::vector<at::Tensor> pieces{leading};
  // LLaVA-1.5's leading token is a class token, LLaVA-NeXT's are the thumbnail.
  std::vector<bool> unscored(leading.size(0), !pictures_.anyres);
  for (const at::Tensor& row : rows) {
    pieces.push_back(row);
    unscored.insert(unscored.end(), row.size(0), false);
    if (pictures_.anyres) {
      pieces.push_back(newline_.unsqueeze(0));
      unscored.push_back(true);
    }
  }
  return {at::cat(pieces), unscored};
}

std::pair<at::Tensor, at::Tensor> Network::sample_map(const at::Tensor& map, const at::Tensor& thumbnail) const {
  const auto found = package_.part("regions")(regions_weights_, {map.contiguous(), thumbnail.contiguous()});
  const at::Tensor& offsets = found[1];
  return {found[0].narrow(0, 0, offsets[-1].item<int64_t>()), offsets};
}

VisualTokens Network::visual_tokens(const Features& features, const Sampling& sampling) const {
  const int64_t height = features.map.size(0), width = features.map.size(1);
  std::vector<at::Tensor> rows;
  if (!sampling.vision) {
    for (int64_t y = 0; y < height; ++y) rows.push_back(features.map[y]);
    return with_newlines(features.leading, rows);
  }
  at::Tensor leading = features.leading;
  if (thumbnail_ == "drop") leading = leading.narrow(0, 0, 0);
  if (thumbnail_ == "compress") leading = sample_map(features.thumbnail, features.thumbnail).first;
  const int64_t down = (height + window_ - 1) / window_, across = (width + window_ - 1) / window_;
  if (across == 0) {
    rows.assign(down, features.leading.narrow(0, 0, 0));
  } else if (down > 0) {
    const auto [tokens, offsets] = sample_map(features.map, features.thumbnail);
    const int64_t* begins = offsets.const_data_ptr<int64_t>();
    for (int64_t row = 0; row < down; ++row) {
      const int64_t begin = begins[row * across], end = begins[(row + 1) * across];
      rows.push_back(tokens.narrow(0, begin, end - begin));
    }
  }
  return with_newlines(leading, rows);
}

Row Network::embed(const std::vector<int64_t>& ids, const std::vector<bool>& instruction, int64_t image_id,
                   const std::optional<VisualTokens>& picture) const {
  Row row;
  std::vector<at::Tensor> pieces;
  std::vector<int64_t> words;
  const auto flush = [&] {
    if (!words.empty()) pieces.push_back(embeddings_.index_select(0, whole_numbers(words)));
    words.clear();
  };
  for (size_t i = 0; i < ids.size(); ++i) {
    if (picture && ids[i] == image_id) {
      flush();
      pieces.push_back(picture->tokens);
      const size_t count = picture->unscored.size();
      row.visual.insert(row.visual.end(), count, true);
      row.unscored.insert(row.unscored.end(), picture->unscored.begin(), picture->unscored.end());
      row.instruction.insert(row.instruction.end(), count, false);
    } else {
      expect(ids[i] >= 0 && ids[i] < embeddings_.size(0), package_.folder().string(), ": its tokenizer gives token ", ids[i],
             ", but the vocabulary has ", embeddings_.size(0));
      words.push_back(ids[i]);
      row.visual.push_back(false);
      row.unscored.push_back(false);
      row.instruction.push_back(instruction[i]);
    }
  }
  flush();
  const auto size = static_cast<int64_t>(row.visual.size());
  expect(size > 0, "question: the prompt has no tokens");
  expect(size <= context_, "the prompt with its picture takes ", size, " tokens, more than the context length of ", context_);
  row.hidden = at::cat(pieces).unsqueeze(0);
  row.positions = at::arange(size, at::kLong);
  return row;
}

std::pair<at::Tensor, at::Tensor> Network::rope(const at::Tensor& positions) const {
  const auto rows = [&](const at::Tensor& table) { return table.index_select(2, positions); };
  return {rows(cos_), rows(sin_)};
}

// Eq. 6 to 9: without the visual tokens that the text does not look at.
Row Network::guided(Row row, const Sampling& sampling) const {
  std::vector<int64_t> tokens, words;
  for (int64_t i = 0; i < row.size(); ++i) {
    if (row.visual[i] && !row.unscored[i]) tokens.push_back(i);
  }
  if (tokens.empty()) return row;
  for (int64_t i = 0; i < row.size(); ++i) {
    if (words_ == "all" ? !row.visual[i] : words_ == "instruction" && row.instruction[i] && i > tokens.back()) words.push_back(i);
  }
  if (words.empty()) words.push_back(row.size() - 1);
  const at::Tensor places = whole_numbers(tokens);
  const at::Tensor scores = package_.part("score")(score_weights_[sampling.layer],
                                                   {row.hidden, whole_numbers(words), places, row.positions}).front();
  std::vector<bool> kept(row.size());
  for (int64_t i = 0; i < row.size(); ++i) kept[i] = !row.visual[i] || row.unscored[i];
  for (const int64_t i : select_top_p(scores, sampling)) kept[tokens[i]] = true;
  kept.back() = true;  // its state says the next token, though the prompt may end in a picture
  std::vector<int64_t> left;
  Row shorter;
  for (int64_t i = 0; i < row.size(); ++i) {
    if (!kept[i]) continue;
    left.push_back(i);
    shorter.visual.push_back(row.visual[i]);
    shorter.unscored.push_back(row.unscored[i]);
    shorter.instruction.push_back(row.instruction[i]);
  }
  shorter.hidden = row.hidden.index_select(1, whole_numbers(left));
  shorter.positions = row.positions.index_select(0, whole_numbers(left));
  return shorter;
}

at::Tensor Network::prefill(Row row, const Sampling& sampling, std::vector<LayerCache>& caches,
                            std::vector<int64_t>& visual) const {
  caches.assign(num_layers_, LayerCache(heads_, head_dim_, embeddings_.scalar_type()));
  auto [cos, sin] = rope(row.positions);
  for (int64_t layer = 0; layer < num_layers_; ++layer) {
    if (sampling.text && layer == sampling.layer) {
      row = guided(std::move(row), sampling);
      std::tie(cos, sin) = rope(row.positions);
    }
    visual.push_back(row.num_visual());
    if (row.size() == 1) {
      auto [k, v] = caches[layer].extend();
      row.hidden = package_.part("step")(step_weights_[layer], {row.hidden, cos, sin, k, v}).front();
      continue;
    }
    const bool last = layer == num_layers_ - 1;
    auto found = package_.part(last ? "last" : "layer")(last ? last_weights_ : layer_weights_[layer], {row.hidden, cos, sin});
    row.hidden = found[0];
    caches[layer].fill(found[1], found[2]);
  }
  return head(row.hidden);
}

at::Tensor Network::step(int64_t id, int64_t position, std::vector<LayerCache>& caches) const {
  at::Tensor x = embeddings_.narrow(0, id, 1).unsqueeze(0);
  const at::Tensor cos = cos_.narrow(2, position, 1), sin = sin_.narrow(2, position, 1);
  for (int64_t layer = 0; layer < num_layers_; ++layer) {
    auto [k, v] = caches[layer].extend();
    x = package_.part("step")(step_weights_[layer], {x, cos, sin, k, v}).front();
  }
  return head(x);
}

at::Tensor Network::head(const at::Tensor& hidden) const { return package_.part("head")(head_weights_, {hidden}).front(); }

}  // namespace minifocus
