#include "orientation.h"

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <set>
#include <string_view>
#include <utility>

namespace minifocus {
namespace {

constexpr uint16_t kOrientation = 0x0112;
constexpr int kUpright = 1;

// Numbers of a TIFF file, in its byte order.
class Tiff {
 public:
  Tiff(std::string_view bytes, bool big_endian) : bytes_(bytes), big_endian_(big_endian) {}

  size_t size() const { return bytes_.size(); }

  uint64_t unsigned_number(size_t place, size_t bytes) const {
    uint64_t number = 0;
    for (size_t i = 0; i < bytes; ++i) {
      number = number << 8 | static_cast<uint8_t>(bytes_[place + (big_endian_ ? i : bytes - 1 - i)]);
    }
    return number;
  }

  // The number of this type, as a double has it. Text and bytes are no numbers: 0.
  double number(size_t place, int type) const {
    switch (type) {
      case 3: return static_cast<double>(unsigned_number(place, 2));
      case 4:
      case 13: return static_cast<double>(unsigned_number(place, 4));
      case 5:
        return static_cast<double>(unsigned_number(place, 4)) / static_cast<double>(unsigned_number(place + 4, 4));
      case 6: return static_cast<int8_t>(unsigned_number(place, 1));
      case 8: return static_cast<int16_t>(unsigned_number(place, 2));
      case 9: return static_cast<int32_t>(unsigned_number(place, 4));
      case 10: return signed_number(place) / signed_number(place + 4);
      case 11: return std::bit_cast<float>(static_cast<uint32_t>(unsigned_number(place, 4)));
      case 12: return std::bit_cast<double>(unsigned_number(place, 8));
      case 16: return static_cast<double>(unsigned_number(place, 8));
      default: return 0;
    }
  }

 private:
  double signed_number(size_t place) const { return static_cast<int32_t>(unsigned_number(place, 4)); }

  std::string_view bytes_;
  bool big_endian_;
};

// The bytes of a number of a TIFF type; 0 for types that there are not.
size_t bytes_of(uint64_t type) {
  constexpr std::array<size_t, 17> bytes{0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8};
  return type < bytes.size() ? bytes[type] : 0;
}

int as_orientation(double value) {
  for (int orientation = 1; orientation <= 8; ++orientation) {
    if (value == orientation) return orientation;
  }
  return kUpright;
}

// The tag's value, from the first directory of the TIFF file; nullopt where that has no such tag.
//
// Pillow's rules for damage: the first entry of a tag counts, an entry that claims more than the file has is passed over, and
// one that points outside of it ends the directory.
std::optional<int> exif_orientation(std::string_view exif) {
  constexpr std::string_view kPrefix("Exif\0\0", 6);
  for (int i = 0; i < 2 && exif.starts_with(kPrefix); ++i) exif.remove_prefix(kPrefix.size());
  if (exif.empty()) return std::nullopt;
  const std::string_view order = exif.substr(0, 2), version = exif.substr(0, 4).substr(order.size());
  const bool big_endian = order == "MM";
  const bool known = version == std::string_view("\0*", 2) || version == std::string_view("*\0", 2) ||
                     (big_endian && version == std::string_view("\0+", 2));
  if ((!big_endian && order != "II") || !known || exif.size() < 8) return kUpright;

  const Tiff tiff(exif, big_endian);
  std::set<uint64_t> seen;
  uint64_t claimed = 0;
  size_t place = tiff.unsigned_number(4, 4);
  if (place + 2 > tiff.size()) return std::nullopt;
  const uint64_t entries = tiff.unsigned_number(place, 2);
  place += 2;
  for (uint64_t i = 0; i < entries && place + 12 <= tiff.size(); ++i, place += 12) {
    const uint64_t tag = tiff.unsigned_number(place, 2), type = tiff.unsigned_number(place + 2, 2);
    const uint64_t bytes = tiff.unsigned_number(place + 4, 4) * bytes_of(type);
    if (bytes == 0 || seen.contains(tag)) continue;
    size_t value = place + 8;
    if (bytes > 4) {  // the value is elsewhere
      claimed += bytes;
      if (claimed > tiff.size()) continue;
      value = tiff.unsigned_number(value, 4);
      if (value + bytes > tiff.size()) return std::nullopt;
    }
    if (tag == kOrientation) return as_orientation(tiff.number(value, static_cast<int>(type)));
    seen.insert(tag);
  }
  return std::nullopt;
}

int xmp_orientation(std::string_view xmp) {
  constexpr std::string_view kName = "tiff:Orientation";
  for (size_t place = xmp.find(kName); place != std::string_view::npos; place = xmp.find(kName, place + 1)) {
    std::string_view rest = xmp.substr(place + kName.size());
    const size_t before = rest.starts_with("=\"") ? 2 : rest.starts_with(">") ? 1 : 0;
    if (before && rest.size() > before && rest[before] >= '0' && rest[before] <= '9')
      return as_orientation(rest[before] - '0');
  }
  return kUpright;
}

}  // namespace

int orientation_of(const PictureMetadata& metadata) {
  if (metadata.exif) {
    if (const auto orientation = exif_orientation(*metadata.exif)) return *orientation;
  }
  return xmp_orientation(metadata.xmp);
}

Picture upright(Picture picture, int orientation) {
  if (orientation == kUpright) return picture;
  const bool turned = orientation >= 5;  // rows become columns
  const bool from_below = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
  const bool from_right = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;
  const int64_t height = picture.height, width = picture.width;
  Picture turned_picture = turned ? filled(width, height, {}) : filled(height, width, {});
  for (int64_t y = 0; y < turned_picture.height; ++y) {
    uint8_t* to = turned_picture.row(y);
    for (int64_t x = 0; x < turned_picture.width; ++x, to += 3) {
      const int64_t row = turned ? x : y, column = turned ? y : x;
      const uint8_t* from =
          picture.row(from_below ? height - 1 - row : row) + (from_right ? width - 1 - column : column) * 3;
      std::memcpy(to, from, 3);
    }
  }
  return turned_picture;
}

}  // namespace minifocus
