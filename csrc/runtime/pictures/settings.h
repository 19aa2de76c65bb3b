// How a model wants its pictures: the `picture.` lines of a package's manifest, as minifocus/export/picture_settings.py
// writes them.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "../anyres.h"
#include "../manifest.h"
#include "resize.h"

namespace minifocus {

struct PictureSettings {
  bool anyres;                // LLaVA-NeXT: a thumbnail and tiles
  int64_t image_size;         // the side of a tile, in pixels
  std::vector<int64_t> size;  // LLaVA-1.5, before its centre is cut out: the shortest edge, or height and width
  std::array<double, 3> mean, std;
  double rescale_factor;
  Filter resample;
  bool pad;  // LLaVA-1.5: whether a picture is padded to a square first
  std::vector<Size> pinpoints;
  Grid grid;  // the tokens of a tile

  // Throws Error, which names file and key, for a line that is missing or that no exporter writes.
  static PictureSettings from(const Manifest& manifest);
};

}  // namespace minifocus
