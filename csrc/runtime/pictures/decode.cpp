#include "decode.h"

#include <algorithm>
#include <string_view>
#include <utility>

#include "../error.h"
#include "jpeg.h"
#include "orientation.h"
#include "png.h"

namespace minifocus {
namespace {

bool begins_with(std::span<const uint8_t> file, std::string_view bytes) {
  return file.size() >= bytes.size() && std::equal(bytes.begin(), bytes.end(), file.begin(),
                                                   [](char a, uint8_t b) { return static_cast<uint8_t>(a) == b; });
}

}  // namespace

Picture decode_picture(std::span<const uint8_t> file, const std::string& name) {
  const bool png = begins_with(file, "\x89PNG\r\n\x1a\n");
  expect(png || begins_with(file, "\xff\xd8\xff"), name,
         ": not a picture that can be read: expected a PNG or a JPEG, got ", file.size(),
         " bytes that begin like neither");
  PictureMetadata metadata;
  Picture picture = png ? decode_png(file, name, metadata) : decode_jpeg(file, name, metadata);
  return upright(std::move(picture), orientation_of(metadata));
}

}  // namespace minifocus
