#include "picture.h"

#include <algorithm>

namespace minifocus {

Picture filled(int64_t height, int64_t width, std::array<uint8_t, 3> colour) {
  Picture picture{height, width, std::vector<uint8_t>(height * width * 3)};
  if (colour != std::array<uint8_t, 3>{}) {
    for (size_t i = 0; i < picture.rgb.size(); ++i) picture.rgb[i] = colour[i % 3];
  }
  return picture;
}

Picture crop(const Picture& picture, int64_t top, int64_t left, int64_t bottom, int64_t right) {
  Picture part = filled(bottom - top, right - left, {});
  const int64_t first = std::max<int64_t>(left, 0), last = std::min(right, picture.width);
  if (first >= last) return part;
  for (int64_t y = std::max<int64_t>(top, 0); y < std::min(bottom, picture.height); ++y) {
    std::copy(picture.row(y) + first * 3, picture.row(y) + last * 3, part.row(y - top) + (first - left) * 3);
  }
  return part;
}

void paste(Picture& canvas, const Picture& picture, int64_t top, int64_t left) {
  for (int64_t y = 0; y < picture.height; ++y) {
    std::copy_n(picture.row(y), picture.width * 3, canvas.row(top + y) + left * 3);
  }
}

}  // namespace minifocus
