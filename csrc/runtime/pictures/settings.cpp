#include "settings.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "../error.h"

namespace minifocus {
namespace {

constexpr int64_t kLargestEdge = 1 << 16;
constexpr int64_t kMostCells = 1 << 30;

// The numbers of a line, of which there must be between `least` and `most`, each from `low` to `high`.
template <class Number>
std::vector<Number> checked(std::vector<Number> numbers, const std::string& key, size_t least, size_t most, Number low,
                            Number high) {
  expect(least <= numbers.size() && numbers.size() <= most, "manifest: ", key, ": expected ", least,
         most > least ? " values or more, got " : " values, got ", numbers.size());
  for (const Number number : numbers) {
    expect(low <= number && number <= high, "manifest: ", key, ": expected a number from ", low, " to ", high, ", got ",
           number);
  }
  return numbers;
}

std::array<double, 3> three(const Manifest& manifest, const std::string& key, double low) {
  const auto numbers = checked(manifest.numbers(key), key, 3, 3, low, 1e30);
  return {numbers[0], numbers[1], numbers[2]};
}

std::vector<Size> read_pinpoints(const Manifest& manifest, int64_t image_size, bool anyres) {
  const std::string key = "picture.pinpoints";
  const auto edges = checked(manifest.integers(key), key, anyres ? 2 : 0, 1 << 16, image_size, kMaxPixels);
  expect(edges.size() % 2 == 0, "manifest: ", key, ": expected a height and a width of each, got ", edges.size(),
         " numbers");
  std::vector<Size> pinpoints;
  for (size_t i = 0; i < edges.size(); i += 2) {
    const Size pinpoint{edges[i], edges[i + 1]};
    expect(pinpoint.height % image_size == 0 && pinpoint.width % image_size == 0 &&
               pinpoint.height <= kMaxPixels / pinpoint.width,
           "manifest: ", key, ": expected multiples of ", image_size, " and at most ", kMaxPixels, " pixels, got ",
           pinpoint.height, "x", pinpoint.width);
    pinpoints.push_back(pinpoint);
  }
  return pinpoints;
}

Grid read_grid(const Manifest& manifest) {
  const std::string key = "picture.grid";
  const auto numbers = checked<int64_t>(manifest.integers(key), key, 4, 4, 1, kLargestEdge);
  const Grid grid{numbers[0], numbers[1], numbers[2], numbers[3]};
  expect(grid.columns % grid.together == 0, "manifest: ", key, ": expected columns in groups of ", grid.together,
         ", got ", grid.columns);
  expect(grid.cells() <= kMostCells, "manifest: ", key, ": expected at most ", kMostCells, " tokens, got ", grid.rows,
         "x", grid.columns);
  return grid;
}

}  // namespace

PictureSettings PictureSettings::from(const Manifest& manifest) {
  const auto one = [&](const std::string& key, int64_t low, int64_t high) {
    return checked<int64_t>({manifest.integer(key)}, key, 1, 1, low, high).front();
  };
  PictureSettings settings{};
  settings.anyres = manifest.flag("picture.anyres");
  settings.image_size = one("picture.image_size", 1, 9459);  // whose square is a picture of kMaxPixels
  settings.size = checked<int64_t>(manifest.integers("picture.size"), "picture.size", 1, 2, 1, kLargestEdge);
  settings.mean = three(manifest, "picture.mean", -1e30);
  settings.std = three(manifest, "picture.std", 1e-30);
  settings.rescale_factor =
      checked({manifest.number("picture.rescale_factor")}, "picture.rescale_factor", 1, 1, -1e30, 1e30).front();
  settings.resample = static_cast<Filter>(one("picture.resample", 0, 5));
  settings.pad = manifest.flag("picture.pad");
  settings.pinpoints = read_pinpoints(manifest, settings.image_size, settings.anyres);
  settings.grid = read_grid(manifest);
  return settings;
}

}  // namespace minifocus
