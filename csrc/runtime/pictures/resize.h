// A picture in another size, bit for bit what Pillow 13's Image.resize makes of an RGB image.
#pragma once

#include <cstdint>

#include "picture.h"

namespace minifocus {

enum class Filter { kNearest, kLanczos, kBilinear, kBicubic, kBox, kHamming };  // by Pillow's numbers

// A part of a picture, in pixels. Edges may lie inside of a pixel.
struct Box {
  float left, top, right, bottom;
};

// The picture, or a box of it, in `height` x `width`. Throws Error for a size below 1x1 and for a box that is not inside of the
// picture.
Picture resize(const Picture& picture, int64_t height, int64_t width, Filter filter);
Picture resize(const Picture& picture, int64_t height, int64_t width, Filter filter, const Box& box);

}  // namespace minifocus
