#include "settings.h"

#include <string>

#include "../error.h"

namespace minifocus {
namespace {

constexpr int64_t kLargestEdge = 1 << 16;
constexpr int64_t kMostCells = 1 << 30;
constexpr double kLargest = 1e30;  // of means and deviations: what a float holds with room to spare

// The numbers of a line, of which there must be between `least` and `most`, each from `low` to `high`.
template <class Number>
std::vector<Number> checked(const std::string& line, std::vector<Number> numbers, size_t least, size_t most, Number low,
                            Number high) {
  expect(least <= numbers.size() && numbers.size() <= most, line, ": expected ", least,
         most > least ? " values or more, got " : " values, got ", numbers.size());
  for (const Number number : numbers) {
    expect(low <= number && number <= high, line, ": expected a number from ", low, " to ", high, ", got ", number);
  }
  return numbers;
}

// Where a line is, for messages.
std::string line_of(const Manifest& manifest, const std::string& key) { return manifest.file().string() + ": " + key; }

int64_t whole(const Manifest& manifest, const std::string& key, int64_t low, int64_t high) {
  return checked<int64_t>(line_of(manifest, key), {manifest.integer(key)}, 1, 1, low, high).front();
}

std::array<double, 3> three(const Manifest& manifest, const std::string& key, double low) {
  const auto numbers = checked(line_of(manifest, key), manifest.numbers(key), 3, 3, low, kLargest);
  return {numbers[0], numbers[1], numbers[2]};
}

std::vector<Size> read_pinpoints(const Manifest& manifest, int64_t image_size, bool anyres) {
  const std::string key = "picture.pinpoints", line = line_of(manifest, key);
  const auto edges = checked(line, manifest.integers(key), anyres ? 2 : 0, 1 << 16, image_size, kMaxPixels);
  expect(edges.size() % 2 == 0, line, ": expected a height and a width of each, got ", edges.size(), " numbers");
  std::vector<Size> pinpoints;
  for (size_t i = 0; i < edges.size(); i += 2) {
    const auto [height, width] = pinpoints.emplace_back(Size{edges[i], edges[i + 1]});
    expect(height % image_size == 0 && width % image_size == 0 && height <= kMaxPixels / width, line,
           ": expected multiples of ", image_size, " and at most ", kMaxPixels, " pixels, got ", height, "x", width);
  }
  return pinpoints;
}

Grid read_grid(const Manifest& manifest) {
  const std::string key = "picture.grid", line = line_of(manifest, key);
  const auto numbers = checked<int64_t>(line, manifest.integers(key), 4, 4, 1, kLargestEdge);
  const Grid grid{numbers[0], numbers[1], numbers[2], numbers[3]};
  expect(grid.columns % grid.together == 0, line, ": expected columns in groups of ", grid.together, ", got ",
         grid.columns);
  expect(grid.cells() <= kMostCells, line, ": expected at most ", kMostCells, " tokens, got ", grid.rows, "x",
         grid.columns);
  return grid;
}

}  // namespace

PictureSettings PictureSettings::from(const Manifest& manifest) {
  PictureSettings settings{};
  settings.anyres = manifest.flag("picture.anyres");
  settings.image_size = whole(manifest, "picture.image_size", 1, 9459);  // whose square is a picture of kMaxPixels
  settings.size =
      checked<int64_t>(line_of(manifest, "picture.size"), manifest.integers("picture.size"), 1, 2, 1, kLargestEdge);
  settings.mean = three(manifest, "picture.mean", -kLargest);
  settings.std = three(manifest, "picture.std", 1 / kLargest);
  const std::string factor = "picture.rescale_factor";
  settings.rescale_factor =
      checked(line_of(manifest, factor), {manifest.number(factor)}, 1, 1, -kLargest, kLargest).front();
  settings.resample = static_cast<Filter>(whole(manifest, "picture.resample", 0, 5));
  settings.pad = manifest.flag("picture.pad");
  settings.pinpoints = read_pinpoints(manifest, settings.image_size, settings.anyres);
  settings.grid = read_grid(manifest);
  return settings;
}

}  // namespace minifocus
