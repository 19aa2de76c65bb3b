// Picture → tiles: resized, cut, and normalised as for CLIP, bit for bit as minifocus/inputs/image_processor.py does.
//
// LLaVA-1.5 takes the centre of the picture as one tile, or, if `pad` says so, all of it on a square of the mean colour.
// LLaVA-NeXT takes a thumbnail of the whole picture and then, row by row, the tiles of the grid resolution ("pinpoint") that
// fits it best.
#pragma once

#include <cstdint>
#include <vector>

#include "picture.h"
#include "settings.h"

namespace minifocus {

struct Tiles {
  int64_t count, side;
  std::vector<float> values;  // [count, 3, side, side]
  int64_t height, width;      // of the picture
};

// Throws Error for a picture whose size is not that of its samples, without pixels, or of more than kMaxPixels.
Tiles make_tiles(const Picture& picture, const PictureSettings& settings);

}  // namespace minifocus
