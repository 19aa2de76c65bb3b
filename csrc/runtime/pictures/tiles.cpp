#include "tiles.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "../anyres.h"
#include "../error.h"
#include "resize.h"

namespace minifocus {
namespace {

// A sliver of millions of rows is shortened before it is widened, lest each of its rows be.
Picture resize_sliver_safe(const Picture& picture, int64_t height, int64_t width, Filter filter) {
  if (width > picture.width && width * picture.height > kMaxPixels) {
    return resize(resize(picture, height, picture.width, filter), height, width, filter);
  }
  return resize(picture, height, width, filter);
}

// The picture in the middle of a square of the mean colour. A sliver that makes a huge one is shortened first.
Picture padded(const Picture& picture, const PictureSettings& settings) {
  int64_t side = std::max(picture.height, picture.width);
  Picture shorter;
  const Picture* shown = &picture;
  if (side * side > kMaxPixels) {
    const auto longest = static_cast<int64_t>(std::sqrt(static_cast<double>(kMaxPixels)));
    const double scale = divide(longest, side);
    const auto shortened = [scale](int64_t edge) { return std::max<int64_t>(std::llrint(edge * scale), 1); };
    shorter = resize(picture, shortened(picture.height), shortened(picture.width), settings.resample);
    shown = &shorter;
    side = longest;
  }
  std::array<uint8_t, 3> colour;
  for (int i = 0; i < 3; ++i) {
    colour[i] = static_cast<uint8_t>(std::clamp(std::trunc(settings.mean[i] * 255), 0.0, 255.0));
  }
  Picture canvas = filled(side, side, colour);
  paste(canvas, *shown, (side - shown->height) / 2, (side - shown->width) / 2);
  return canvas;
}

// LLaVA-1.5: the size to which a picture is resized before its centre is cut out.
Size resized_size(const Picture& picture, const std::vector<int64_t>& size) {
  if (size.size() == 2) return {size[0], size[1]};
  const int64_t shortest = std::min(picture.height, picture.width);
  const auto scaled = [&](int64_t edge) { return static_cast<int64_t>(divide(size[0] * edge, shortest)); };
  return {scaled(picture.height), scaled(picture.width)};
}

// The pixels [first, last) of an axis that make [start, stop) of the resized axis, and its start and stop from `first`.
struct Source {
  int64_t first, last;
  float start, stop;

  Source(int64_t length, int64_t resized, int64_t from, int64_t to) {
    const double step = divide(length, resized), from_pixel = from * step, to_pixel = to * step;
    const double reach = 3 * std::max(step, 1.0) + 1;  // of the widest filter
    first = std::max<int64_t>(static_cast<int64_t>(from_pixel - reach), 0);
    last = std::min(static_cast<int64_t>(std::ceil(to_pixel + reach)), length);
    start = static_cast<float>(from_pixel - static_cast<double>(first));
    stop = static_cast<float>(std::min(to_pixel - static_cast<double>(first), static_cast<double>(last - first)));
  }
};

// floor(edge / 2) of what is cut off or missing at one end.
int64_t half(int64_t edge) { return edge >> 1; }

// The central side x side square of a picture resized to `size`, with black around a smaller one.
Picture resize_and_crop(const Picture& picture, Size size, int64_t side, Filter filter) {
  const int64_t top = half(size.height - side), left = half(size.width - side);
  const int64_t y0 = std::max<int64_t>(top, 0), y1 = std::min(top + side, size.height);
  const int64_t x0 = std::max<int64_t>(left, 0), x1 = std::min(left + side, size.width);
  Picture region;
  if (size.height * size.width <= kMaxPixels) {
    region = crop(resize_sliver_safe(picture, size.height, size.width, filter), y0, x0, y1, x1);
  } else {  // resize only the part that is kept
    const Source rows(picture.height, size.height, y0, y1), columns(picture.width, size.width, x0, x1);
    const Picture part = crop(picture, rows.first, columns.first, rows.last, columns.last);
    region = resize(part, y1 - y0, x1 - x0, filter, {columns.start, rows.start, columns.stop, rows.stop});
  }
  return crop(region, top - y0, left - x0, top - y0 + side, left - x0 + side);
}

// The picture scaled into `best` and centred on black.
Picture fitted(const Picture& picture, Size best, Filter filter) {
  const double scale_y = divide(best.height, picture.height), scale_x = divide(best.width, picture.width);
  Size inner = best;
  if (scale_x < scale_y) {
    inner.height = std::min(static_cast<int64_t>(std::ceil(picture.height * scale_x)), best.height);
  } else {
    inner.width = std::min(static_cast<int64_t>(std::ceil(picture.width * scale_y)), best.width);
  }
  Picture canvas = filled(best.height, best.width, {});
  const Picture shown = resize_sliver_safe(picture, inner.height, inner.width, filter);
  paste(canvas, shown, (best.height - inner.height) / 2, (best.width - inner.width) / 2);
  return canvas;
}

// What each value of a sample becomes, in the order and precision of transformers.
std::array<std::array<float, 256>, 3> normalised_levels(const PictureSettings& settings) {
  std::array<std::array<float, 256>, 3> levels;
  for (int channel = 0; channel < 3; ++channel) {
    const auto mean = static_cast<float>(settings.mean[channel]), deviation = static_cast<float>(settings.std[channel]);
    for (int sample = 0; sample < 256; ++sample) {
      levels[channel][sample] = (static_cast<float>(sample * settings.rescale_factor) - mean) / deviation;
    }
  }
  return levels;
}

}  // namespace

Tiles make_tiles(const Picture& picture, const PictureSettings& settings) {
  const int64_t height = picture.height, width = picture.width, side = settings.image_size;
  expect(height >= 1 && width >= 1 && height <= kMaxPixels / width, "expected a picture of 1 to ", kMaxPixels,
         " pixels, got ", height, "x", width);
  expect(static_cast<int64_t>(picture.rgb.size()) == height * width * 3, "expected ", height * width * 3,
         " samples of a ", height, "x", width, " picture, got ", picture.rgb.size());
  std::vector<Picture> sheets;  // each is cut into tiles
  if (settings.anyres) {
    sheets.push_back(resize_sliver_safe(picture, side, side, settings.resample));
    sheets.push_back(fitted(picture, select_best_resolution({height, width}, settings.pinpoints), settings.resample));
  } else if (settings.pad) {
    const Picture square = padded(picture, settings);
    sheets.push_back(resize_and_crop(square, resized_size(square, settings.size), side, settings.resample));
  } else {
    sheets.push_back(resize_and_crop(picture, resized_size(picture, settings.size), side, settings.resample));
  }
  Tiles tiles{0, side, {}, height, width};
  for (const Picture& sheet : sheets) tiles.count += (sheet.height / side) * (sheet.width / side);
  tiles.values.resize(tiles.count * 3 * side * side);
  const auto levels = normalised_levels(settings);
  float* value = tiles.values.data();
  for (const Picture& sheet : sheets) {
    for (int64_t top = 0; top < sheet.height; top += side) {
      for (int64_t left = 0; left < sheet.width; left += side) {
        for (int channel = 0; channel < 3; ++channel) {
          for (int64_t y = top; y < top + side; ++y) {
            const uint8_t* sample = sheet.row(y) + left * 3 + channel;
            for (int64_t x = 0; x < side; ++x) *value++ = levels[channel][sample[3 * x]];
          }
        }
      }
    }
  }
  return tiles;
}

}  // namespace minifocus
