// LLaVA-NeXT's grid of tiles, as minifocus/inputs/anyres.py has it: the resolution that a picture gets, and the feature map
// that its tiles are joined to. The resolutions to choose from are called pinpoints.
#pragma once

#include <cstdint>
#include <vector>

namespace minifocus {

struct Size {
  int64_t height, width;
};

// Python's a / b.
inline double divide(int64_t a, int64_t b) { return static_cast<double>(a) / static_cast<double>(b); }

// The tokens of a view, in raster order.
struct Grid {
  int64_t rows, columns;
  int64_t together = 1;  // tokens of a row that stand for one window, and are never parted
  int64_t window = 1;    // patches of the tower along a side of a window

  int64_t cells() const { return rows * columns; }
  int64_t windows_across() const { return columns / together; }
};

// A rectangle of the stitched feature map, in tokens.
struct Region {
  int64_t top, left, rows, cols;
};

// The pinpoint that keeps most of the picture's pixels. Of several, the one with the least padding; then the first. Throws
// Error for a picture without pixels and for no pinpoints.
Size select_best_resolution(Size picture, const std::vector<Size>& pinpoints);

// The part of the stitched feature map that shows the picture and not its padding. `grid` is a tile's own; the map of
// resolution `best` has best / image_size of them. A token of several patches stays if one of them does. A very flat picture
// has 0 rows.
Region unpadded_grid(Size picture, Size best, int64_t image_size, const Grid& grid);

// How many `<image>` places a LLaVA-NeXT picture takes: thumbnail, map, and one newline after each map row.
int64_t num_visual_tokens(Size picture, const std::vector<Size>& pinpoints, int64_t image_size, const Grid& grid);

}  // namespace minifocus
