// JPEG → RGB, by libjpeg.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "orientation.h"
#include "picture.h"

namespace minifocus {

// The picture as it is stored, not turned upright, and what the file says of it. Throws Error, as decode_picture does.
Picture decode_jpeg(std::span<const uint8_t> file, const std::string& name, PictureMetadata& metadata);

}  // namespace minifocus
