// The network: what minifocus/model.py does, for one prompt with at most one picture, by a package's parts.
//
// S tokens, C channels, D head size. Every tensor is in the package's dtype where nothing else is said.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "package.h"
#include "pictures/tiles.h"

namespace minifocus {

// What the samplers do with a picture: the paper's §3.2 and §3.3.
struct Sampling {
  bool vision = false;  // pick a scale for each region of the feature map
  bool text = false;    // before decoder layer `layer`, keep the visual tokens that the text looks at
  int64_t layer = 0;
  double gamma = 0.85;          // the kept tokens' share of all importance (Eq. 9)
  std::optional<int64_t> keep;  // keep this many instead
};

// A picture's feature maps after the projector.
struct Features {
  at::Tensor map;        // [H, W, C], stitched and unpadded; H or W may be 0
  at::Tensor thumbnail;  // [g, g', C]; LLaVA-1.5: the same as `map`
  at::Tensor leading;    // [L, C], tokens before the map: the thumbnail, a kept class token, or none
};

// Tokens of a picture as they enter the decoder [n, C], and which of them the text-guided sampler never scores.
struct VisualTokens {
  at::Tensor tokens;
  std::vector<bool> unscored;
};

// A prompt on its way through the decoder.
struct Row {
  at::Tensor hidden;     // [1, S, C]
  at::Tensor positions;  // [S] int64; a token keeps its own when others are dropped
  std::vector<bool> visual, unscored, instruction;

  int64_t size() const { return hidden.size(1); }
  int64_t num_visual() const { return std::count(visual.begin(), visual.end(), true); }
};

// Keys and values of one layer [T, Hkv, D], with room to grow.
class LayerCache {
 public:
  LayerCache(int64_t heads, int64_t head_dim, at::ScalarType dtype);

  // A prompt's.
  void fill(const at::Tensor& k, const at::Tensor& v);
  // Adds a token. Returns all rows, those of the new one last and not set.
  std::pair<at::Tensor, at::Tensor> extend();

 private:
  void reserve(int64_t tokens);

  at::Tensor keys_, values_;
  int64_t length_ = 0;
};

class Network {
 public:
  Network(const Package& package, const PictureSettings& pictures);  // `package` has to live longer

  int64_t num_layers() const { return num_layers_; }
  int64_t context() const { return context_; }
  int64_t num_plain_tokens(const Tiles& picture) const;  // that plain LLaVA reads of it, a token for every patch

  Features encode(const Tiles& picture) const;
  VisualTokens visual_tokens(const Features& features, const Sampling& sampling) const;
  // `ids` holds `image_id` where the picture's tokens go. Throws Error where prompt and picture do not fit, or the context.
  Row embed(const std::vector<int64_t>& ids, const std::vector<bool>& instruction, int64_t image_id,
            const std::optional<VisualTokens>& picture) const;
  // Logits [V] float32 of the answer's first token. `visual` gets the number of visual tokens that each layer read.
  at::Tensor prefill(Row row, const Sampling& sampling, std::vector<LayerCache>& caches, std::vector<int64_t>& visual) const;
  // Logits of the token after `id`, which is at `position`.
  at::Tensor step(int64_t id, int64_t position, std::vector<LayerCache>& caches) const;

 private:
  std::pair<at::Tensor, at::Tensor> sample_map(const at::Tensor& map, const at::Tensor& thumbnail) const;
  VisualTokens with_newlines(const at::Tensor& leading, const std::vector<at::Tensor>& rows) const;
  std::pair<at::Tensor, at::Tensor> rope(const at::Tensor& positions) const;
  Row guided(Row row, const Sampling& sampling) const;
  at::Tensor head(const at::Tensor& hidden) const;

  const Package& package_;
  PictureSettings pictures_;
  int64_t num_layers_, context_, patches_, heads_, head_dim_, window_ = 0;
  bool keep_cls_;
  std::string thumbnail_, words_;
  at::Tensor embeddings_, newline_;
  at::Tensor cos_, sin_;  // [1, 1, context, D / 2]
  std::vector<std::vector<at::Tensor>> layer_weights_, step_weights_, score_weights_;  // by layer
  std::vector<at::Tensor> picture_weights_, regions_weights_, last_weights_, head_weights_;
};

}  // namespace minifocus
