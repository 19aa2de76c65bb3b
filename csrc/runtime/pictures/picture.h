// A picture in memory, and the two things that need no arithmetic: to cut one out of another, and to put one onto another.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace minifocus {

constexpr int64_t kMaxPixels = 89'478'485;  // as minifocus/inputs/open_image.py has it

struct Picture {
  int64_t height = 0, width = 0;
  std::vector<uint8_t> rgb;  // [height, width, 3]: red, green, blue

  uint8_t* row(int64_t y) { return rgb.data() + y * width * 3; }
  const uint8_t* row(int64_t y) const { return rgb.data() + y * width * 3; }
};

// A picture of one colour.
Picture filled(int64_t height, int64_t width, std::array<uint8_t, 3> colour);

// [top, bottom) x [left, right) of a picture; black where that is beyond its edges.
Picture crop(const Picture& picture, int64_t top, int64_t left, int64_t bottom, int64_t right);

// Puts `picture` onto `canvas`, where it must fit.
void paste(Picture& canvas, const Picture& picture, int64_t top, int64_t left);

}  // namespace minifocus
