// An encoded picture → RGB, as a viewer shows it and as minifocus/inputs/open_image.py reads it: upright, first frame,
// transparency over white, deep samples rescaled.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "picture.h"

namespace minifocus {

// A PNG's or a JPEG's content. `name` is what messages call it. Throws Error for another format, for a damaged or cut-off
// file, and for a picture without pixels or of more than kMaxPixels, whose size is checked before anything is decoded.
Picture decode_picture(std::span<const uint8_t> file, const std::string& name);

}  // namespace minifocus
