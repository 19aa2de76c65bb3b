#include "anyres.h"

#include <algorithm>
#include <charconv>
#include <utility>

#include "error.h"

namespace minifocus {
namespace {

// Python's a // b, for a positive b.
int64_t floor_divide(int64_t a, int64_t b) { return a / b - (a % b < 0); }

// Python's int(round(value, 7)): to the nearest number of seven decimals, by the value's exact digits, and then towards zero.
int64_t whole_part_of_rounded(double value) {
  char digits[400];
  const auto written = std::to_chars(digits, digits + sizeof digits, value, std::chars_format::fixed, 7);
  double rounded = 0;
  std::from_chars(digits, written.ptr, rounded);
  return static_cast<int64_t>(rounded);
}

}  // namespace

Size select_best_resolution(Size picture, const std::vector<Size>& pinpoints) {
  const auto [height, width] = picture;
  expect(height >= 1 && width >= 1 && !pinpoints.empty(),
         "expected a picture of at least 1x1 and a grid pinpoint, got ", height, "x", width, " and ", pinpoints.size(),
         " pinpoints");
  Size best = pinpoints.front();
  std::pair<int64_t, int64_t> best_fit{-1, 0};
  for (const Size& pinpoint : pinpoints) {
    const double scale = std::min(divide(pinpoint.width, width), divide(pinpoint.height, height));
    const int64_t scaled = static_cast<int64_t>(width * scale) * static_cast<int64_t>(height * scale);
    const int64_t effective = std::min(scaled, width * height);
    const std::pair fit{effective, effective - pinpoint.height * pinpoint.width};
    if (fit > best_fit) best = pinpoint, best_fit = fit;
  }
  return best;
}

Region unpadded_grid(Size picture, Size best, int64_t image_size, const Grid& grid) {
  const auto [height, width] = picture;
  const int64_t window = grid.window;
  const int64_t rows = best.height / image_size * grid.rows * window;  // of patches
  const int64_t cols = best.width / image_size * grid.windows_across() * window;
  int64_t top = 0, left = 0;
  // The last factor is the shape of a patch: 1 where it is square.
  if (divide(width, height) > divide(best.width, best.height)) {
    const double shown = height * divide(cols, width) * divide(grid.rows, grid.windows_across());
    top = floor_divide(rows - whole_part_of_rounded(shown), 2);
  } else {
    const double shown = width * divide(rows, height) * divide(grid.windows_across(), grid.rows);
    left = floor_divide(cols - whole_part_of_rounded(shown), 2);
  }
  // The windows in a row of patches of which `cut` go at both ends.
  const auto kept = [window](int64_t whole, int64_t cut) {
    return whole > 2 * cut ? whole / window - 2 * floor_divide(cut, window) : 0;
  };
  return {floor_divide(top, window), floor_divide(left, window) * grid.together, kept(rows, top),
          kept(cols, left) * grid.together};
}

int64_t num_visual_tokens(Size picture, const std::vector<Size>& pinpoints, int64_t image_size, const Grid& grid) {
  const Region map = unpadded_grid(picture, select_best_resolution(picture, pinpoints), image_size, grid);
  return grid.cells() + map.rows * (map.cols + 1);
}

}  // namespace minifocus
