// A pixel of the new picture is a weighted mean of the old pixels around the place that it comes from. The filter weighs them by
// their distance, in old pixels where the picture grows and in new ones where it shrinks. Rows and columns are done one after
// the other, with 8-bit samples in between. Weights are integers of kBits bits of fraction, so that sums do not depend on their
// order, nor the result on the processor.
#include "resize.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <vector>

#include "../../cpu/simd.h"
#include "../error.h"

namespace minifocus {
namespace {

// Of 32 bits, 8 are a sample's and 2 are left for sums outside of 0…255: filters have negative weights.
constexpr int kBits = 22;
constexpr int32_t kHalf = 1 << (kBits - 1);

// The numbers of a block of weights that are kept at a time: of the widest slivers, all would take gigabytes.
constexpr int64_t kWeightsAtATime = 1 << 22;

// One direction of a resizing: [start, stop) of `length` pixels become `resized` pixels.
struct Axis {
  int64_t length, resized;
  float start, stop;
};

double sinc(double x) {
  x *= std::numbers::pi;
  return x == 0 ? 1 : std::sin(x) / x;
}

// How far a filter reaches from its middle.
double reach_of(Filter filter) {
  switch (filter) {
    case Filter::kBox: return 0.5;
    case Filter::kBilinear:
    case Filter::kHamming: return 1;
    case Filter::kBicubic: return 2;
    default: return 3;
  }
}

// A filter's weight at a distance x from its middle.
double weight_at(Filter filter, double x) {
  if (filter == Filter::kBox) return x > -0.5 && x <= 0.5;  // the only one that has sides
  if (filter == Filter::kLanczos) return -3 <= x && x < 3 ? sinc(x) * sinc(x / 3) : 0;
  x = std::abs(x);
  if (filter == Filter::kBilinear) return x < 1 ? 1 - x : 0;
  if (filter == Filter::kHamming) {  // Pillow has the window's two constants as floats, which do not sum to 1
    return x == 0 ? 1 : x < 1 ? sinc(x) * (0.54f + 0.46f * std::cos(x * std::numbers::pi)) : 0;
  }
  constexpr double a = -0.5;  // Keys' cubic convolution
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

// The old pixels that make a new one: `count` from `first` on.
struct Window {
  int64_t first, count;
};

class Weights {
 public:
  Weights(const Axis& axis, Filter filter) : axis_(axis), filter_(filter) {
    scale_ = static_cast<double>(axis.stop - axis.start) / static_cast<double>(axis.resized);
    shrink_ = std::max(scale_, 1.0);
    reach_ = reach_of(filter) * shrink_;
  }

  // At least as many as any window has.
  int64_t most() const { return 2 * static_cast<int64_t>(std::ceil(reach_)) + 1; }

  Window window(int64_t place) const {
    const double middle = middle_of(place);
    const int64_t first = std::max<int64_t>(static_cast<int64_t>(middle - reach_ + 0.5), 0);
    const int64_t last = std::min(static_cast<int64_t>(middle + reach_ + 0.5), axis_.length);
    return {first, std::max<int64_t>(last - first, 0)};
  }

  // Appends the weights of a window's pixels. They sum to 1, but for rounding.
  void append(int64_t place, const Window& window, std::vector<int32_t>& weights) {
    const double middle = middle_of(place), step = 1 / shrink_;
    exact_.resize(window.count);
    double sum = 0;
    for (int64_t i = 0; i < window.count; ++i) {
      exact_[i] = weight_at(filter_, (static_cast<double>(i + window.first) - middle + 0.5) * step);
      sum += exact_[i];
    }
    for (double weight : exact_) {
      if (sum != 0) weight /= sum;
      weights.push_back(static_cast<int32_t>((weight < 0 ? -0.5 : 0.5) + weight * (1 << kBits)));
    }
  }

 private:
  double middle_of(int64_t place) const { return axis_.start + (static_cast<double>(place) + 0.5) * scale_; }

  Axis axis_;
  Filter filter_;
  double scale_, shrink_, reach_;
  std::vector<double> exact_;
};

MINIFOCUS_INLINE uint8_t sample_of(int32_t sum) { return static_cast<uint8_t>(std::clamp(sum >> kBits, 0, 255)); }

// `count` pixels of a row, each from its window of the old row.
MINIFOCUS_MULTIVERSION
void resize_row(const uint8_t* from, uint8_t* to, const Window* windows, const int32_t* weights, int64_t count) {
  for (int64_t x = 0; x < count; ++x) {
    const uint8_t* pixel = from + windows[x].first * 3;
    int32_t red = kHalf, green = kHalf, blue = kHalf;
    for (int64_t i = 0; i < windows[x].count; ++i, pixel += 3) {
      red += pixel[0] * weights[i];
      green += pixel[1] * weights[i];
      blue += pixel[2] * weights[i];
    }
    weights += windows[x].count;
    to[3 * x] = sample_of(red);
    to[3 * x + 1] = sample_of(green);
    to[3 * x + 2] = sample_of(blue);
  }
}

MINIFOCUS_MULTIVERSION
void add_row(const uint8_t* from, int32_t weight, int32_t* sums, int64_t samples) {
  for (int64_t i = 0; i < samples; ++i) sums[i] += from[i] * weight;
}

MINIFOCUS_MULTIVERSION
void round_row(const int32_t* sums, uint8_t* to, int64_t samples) {
  for (int64_t i = 0; i < samples; ++i) to[i] = sample_of(sums[i]);
}

// Columns are made narrower or wider. Of the rows, only [first_row, last_row) are made.
Picture resize_columns(const Picture& picture, const Axis& axis, Filter filter, int64_t first_row, int64_t last_row) {
  Picture resized = filled(last_row - first_row, axis.resized, {});
  Weights weights(axis, filter);
  const int64_t at_a_time = std::max<int64_t>(kWeightsAtATime / weights.most(), 1);
  std::vector<Window> windows;
  std::vector<int32_t> values;
  for (int64_t x = 0; x < axis.resized; x += at_a_time) {
    const int64_t count = std::min(at_a_time, axis.resized - x);
    windows.clear();
    values.clear();
    for (int64_t i = x; i < x + count; ++i) {
      windows.push_back(weights.window(i));
      weights.append(i, windows.back(), values);
    }
    for (int64_t y = first_row; y < last_row; ++y) {
      resize_row(picture.row(y), resized.row(y - first_row) + x * 3, windows.data(), values.data(), count);
    }
  }
  return resized;
}

// Rows are made fewer or more. Of the picture's rows, those before `first_row` are missing.
Picture resize_rows(const Picture& picture, const Axis& axis, Filter filter, int64_t first_row) {
  Picture resized = filled(axis.resized, picture.width, {});
  Weights weights(axis, filter);
  std::vector<int32_t> values, sums(picture.width * 3);
  for (int64_t y = 0; y < axis.resized; ++y) {
    const Window window = weights.window(y);
    values.clear();
    weights.append(y, window, values);
    std::fill(sums.begin(), sums.end(), kHalf);
    for (int64_t i = 0; i < window.count; ++i) {
      add_row(picture.row(window.first - first_row + i), values[i], sums.data(), picture.width * 3);
    }
    round_row(sums.data(), resized.row(y), picture.width * 3);
  }
  return resized;
}

// The old pixel of each new one, or -1. The place is a running sum, as in Pillow, with its rounding errors.
std::vector<int64_t> nearest(const Axis& axis) {
  const double step = static_cast<double>(axis.stop - axis.start) / static_cast<double>(axis.resized);
  std::vector<int64_t> pixels;
  double place = axis.start + step * 0.5;
  for (int64_t i = 0; i < axis.resized; ++i, place += step) {
    pixels.push_back(place >= 0 && place < static_cast<double>(axis.length) ? static_cast<int64_t>(place) : -1);
  }
  return pixels;
}

Picture resize_nearest(const Picture& picture, const Axis& rows, const Axis& columns) {
  Picture resized = filled(rows.resized, columns.resized, {});
  const std::vector<int64_t> from_row = nearest(rows), from_column = nearest(columns);
  for (int64_t y = 0; y < resized.height; ++y) {
    if (from_row[y] < 0) continue;
    for (int64_t x = 0; x < resized.width; ++x) {
      if (from_column[x] < 0) continue;
      std::copy_n(picture.row(from_row[y]) + from_column[x] * 3, 3, resized.row(y) + x * 3);
    }
  }
  return resized;
}

bool changes(const Axis& axis) {
  return axis.resized != axis.length || axis.start != 0 || axis.stop != static_cast<float>(axis.resized);
}

}  // namespace

Picture resize(const Picture& picture, int64_t height, int64_t width, Filter filter) {
  if (height == picture.height && width == picture.width) return picture;
  return resize(picture, height, width, filter,
                {0, 0, static_cast<float>(picture.width), static_cast<float>(picture.height)});
}

Picture resize(const Picture& picture, int64_t height, int64_t width, Filter filter, const Box& box) {
  expect(height >= 1 && width >= 1, "resize: expected a size of at least 1x1, got ", height, "x", width);
  const bool inside = 0 <= box.left && box.left <= box.right && box.right <= static_cast<float>(picture.width) &&
                      0 <= box.top && box.top <= box.bottom && box.bottom <= static_cast<float>(picture.height);
  expect(inside, "resize: expected a box inside of ", picture.height, "x", picture.width, ", got ", box.top, "…",
         box.bottom, " x ", box.left, "…", box.right);
  const bool whole = box.left == std::trunc(box.left) && box.top == std::trunc(box.top);
  if (whole && box.right - box.left == static_cast<float>(width) &&
      box.bottom - box.top == static_cast<float>(height)) {
    const auto top = static_cast<int64_t>(box.top), left = static_cast<int64_t>(box.left);
    return crop(picture, top, left, top + height, left + width);
  }
  const Axis rows{picture.height, height, box.top, box.bottom}, columns{picture.width, width, box.left, box.right};
  if (filter == Filter::kNearest) return resize_nearest(picture, rows, columns);
  // Rows come first where they lose most: Pillow's rule since version 13. The order shows in the last bit.
  const int64_t fewer_rows = rows.length - rows.resized, fewer_columns = columns.length - columns.resized;
  if (fewer_rows > std::max<int64_t>(2 * fewer_columns, 0)) {
    Picture resized = resize_rows(picture, rows, filter, 0);
    return changes(columns) ? resize_columns(resized, columns, filter, 0, height) : resized;
  }
  if (!changes(columns)) return changes(rows) ? resize_rows(picture, rows, filter, 0) : picture;
  if (!changes(rows)) return resize_columns(picture, columns, filter, 0, height);
  const Weights weights(rows, filter);
  const Window last = weights.window(height - 1);
  const int64_t first_row = weights.window(0).first, last_row = last.first + last.count;
  return resize_rows(resize_columns(picture, columns, filter, first_row, last_row), rows, filter, first_row);
}

}  // namespace minifocus
