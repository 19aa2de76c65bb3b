// Which way up a picture is: what cameras write into EXIF, and editors into XMP.
#pragma once

#include <optional>
#include <string>

#include "picture.h"

namespace minifocus {

struct PictureMetadata {
  std::optional<std::string> exif;  // a TIFF file, perhaps with "Exif\0\0" before it
  std::string xmp;
};

// EXIF's tag 0x0112, and XMP's where EXIF does not have it: from 1, upright, to 8. Damaged metadata means upright.
int orientation_of(const PictureMetadata& metadata);

// The picture turned and mirrored as its orientation says.
Picture upright(Picture picture, int orientation);

}  // namespace minifocus
