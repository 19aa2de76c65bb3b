// region_pool, its backward and region_route: the chosen max-pool of every region of the pictures' maps (Eq. 1 and 2).
//
// A region is window x window cells, fewer at a map's ragged edge, and a cell is a row of channels. A branch cuts the
// region into windows of its pool, and each window becomes one token, the maximum of its cells channel by channel.
// Where a region's tokens go depends on all regions before it, so offsets are counted first. Regions are then
// independent of each other, and threads share them out. A window is walked cell by cell in blocks of channels that
// stay in the cache closest to the core, so x is read from memory once and tokens are written once.
#include <algorithm>
#include <limits>
#include <vector>

#include "numbers.h"
#include "../launchers.h"
#include "threads.h"

namespace minifocus::cpu {
namespace {

constexpr int64_t kBlock = 512;      // channels
constexpr int64_t kGrain = 1 << 16;  // numbers; another thread does not pay for fewer

// A rectangle of cells: a region, or one of its windows.
struct Rectangle {
  int64_t cell;           // its first cell, counted over all pictures
  int64_t height, width;  // in cells that exist
  int64_t stride;         // cells from one of its rows to the next: the map's width
};

struct Region : Rectangle {
  int64_t picture, picture_cell;  // its picture and that picture's first cell
};

// Where each region of the packed pictures lies.
class Layout {
 public:
  explicit Layout(const RegionArgs& args) : args_(args), first_cell_{0}, first_region_{0} {
    for (int64_t i = 0; i < args.pictures; ++i) {
      const Grid grid = args.grids[i];
      first_cell_.push_back(first_cell_[i] + grid.height * grid.width);
      first_region_.push_back(first_region_[i] + num_regions(grid, args.window));
    }
  }

  Region operator[](int64_t region) const {
    const auto next = std::upper_bound(first_region_.begin(), first_region_.end(), region);
    const int64_t picture = next - first_region_.begin() - 1;
    const Grid grid = args_.grids[picture];
    const int64_t across = ceil_div(grid.width, args_.window), number = region - first_region_[picture];
    const int64_t top = number / across * args_.window, left = number % across * args_.window;
    const int64_t cell = first_cell_[picture] + top * grid.width + left;
    return {{cell, std::min(args_.window, grid.height - top), std::min(args_.window, grid.width - left), grid.width},
            picture,
            first_cell_[picture]};
  }

 private:
  const RegionArgs& args_;
  std::vector<int64_t> first_cell_, first_region_;  // [pictures + 1]
};

bool drops(Pool pool) { return pool.height == 0; }

int64_t num_tokens(const Rectangle& region, Pool pool) {
  return drops(pool) ? 0 : ceil_div(region.height, pool.height) * ceil_div(region.width, pool.width);
}

// Calls f(window, token) for each window of the region, in raster order; token counts them from `first_token`.
template <typename F>
void for_each_window(const Rectangle& region, Pool pool, int64_t first_token, const F& f) {
  if (drops(pool)) return;
  int64_t token = first_token;
  for (int64_t top = 0; top < region.height; top += pool.height)
    for (int64_t left = 0; left < region.width; left += pool.width)
      f(Rectangle{region.cell + top * region.stride + left, std::min(pool.height, region.height - top),
                  std::min(pool.width, region.width - left), region.stride},
        token++);
}

// Runs body(region number) for all regions, on several threads.
template <typename F>
void for_each_region(const RegionArgs& args, const F& body) {
  const int64_t numbers = args.regions == 0 ? 1 : args.cells / args.regions * args.channels;
  parallel_for(args.regions, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, numbers)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t region = begin; region < end; ++region) body(region);
               });
}

// The first of n channels of a window's cell, in raster order; x begins at the first of those channels.
template <typename T>
MINIFOCUS_INLINE const T* cell_of(const T* x, int64_t channels, const Rectangle& window, int64_t number) {
  return x + (window.cell + number / window.width * window.stride + number % window.width) * channels;
}

// The maximum of each of n channels over the window's cells. It takes 64 channels at a time, so that their maxima stay in the
// cache. (With fewer, GCC 12 makes slower code.)
template <typename T, typename Real = typename T::Real>
MINIFOCUS_INLINE void window_max(const T* x, int64_t channels, const Rectangle& window, int64_t n, Real* largest) {
  constexpr int64_t kLanes = 64;
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    Real maxima[kLanes];
    const T* row = x + window.cell * channels + c;
    for (int64_t lane = 0; lane < kLanes; ++lane) maxima[lane] = row[lane].get();
    for (int64_t down = 0; down < window.height; ++down, row += window.stride * channels)
      for (int64_t across = 0; across < window.width; ++across) {
        const T* cell = row + across * channels;
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          const Real value = cell[lane].get();
          maxima[lane] = is_larger(value, maxima[lane]) ? value : maxima[lane];
        }
      }
    for (int64_t lane = 0; lane < kLanes; ++lane) largest[c + lane] = maxima[lane];
  }
  for (; c < n; ++c) {
    largest[c] = x[window.cell * channels + c].get();
    for (int64_t number = 1; number < window.height * window.width; ++number) {
      const Real value = cell_of(x, channels, window, number)[c].get();
      largest[c] = is_larger(value, largest[c]) ? value : largest[c];
    }
  }
}

// The same, and the number of the cell that holds it, in raster order.
template <typename T, typename Real = typename T::Real>
MINIFOCUS_INLINE void window_argmax(const T* x, int64_t channels, const Rectangle& window, int64_t n, Real* largest,
                                    int32_t* where) {
  for (int64_t c = 0; c < n; ++c) largest[c] = -std::numeric_limits<Real>::infinity();
  std::fill_n(where, n, 0);
  for (int64_t number = 0; number < window.height * window.width; ++number) {
    const T* cell = cell_of(x, channels, window, number);
    for (int64_t c = 0; c < n; ++c) {
      const Real value = cell[c].get();
      const bool take = is_larger(value, largest[c]);
      largest[c] = take ? value : largest[c];
      where[c] = take ? static_cast<int32_t>(number) : where[c];
    }
  }
}

// A dot product, given in pieces. A fixed number of partial sums lets the compiler vectorise without reordering them.
template <typename Real>
struct Dot {
  static constexpr int kLanes = 16;
  Real lanes[kLanes] = {};

  template <typename T>
  MINIFOCUS_INLINE void add(const Real* a, const T* b, int64_t n) {
    Real sums[kLanes];  // in registers
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] = lanes[lane];
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) sums[lane] += a[i + lane] * b[i + lane].get();
    for (int lane = 0; i + lane < n; ++lane) sums[lane] += a[i + lane] * b[i + lane].get();
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = sums[lane];
  }

  MINIFOCUS_INLINE Real total() const {
    Real sums[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] = lanes[lane];
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
    return sums[0];
  }
};

// The token of a window.
template <typename T, typename Real = typename T::Real>
MINIFOCUS_MULTIVERSION void pool_window(const T* x, int64_t channels, const Rectangle& window, Real weight, T* token) {
  if (window.height * window.width == 1 && weight == 1) {  // a branch that pools nothing, and often the most frequent
    std::copy_n(x + window.cell * channels, channels, token);
    return;
  }
  Real largest[kBlock];
  for (int64_t begin = 0; begin < channels; begin += kBlock) {
    const int64_t n = std::min(kBlock, channels - begin);
    window_max(x + begin, channels, window, n, largest);
    for (int64_t c = 0; c < n; ++c) token[begin + c].set(largest[c] * weight);
  }
}

// Writes the gradient of each of the window's cells; returns the sum of gradient * maximum over the channels.
template <typename T, typename Real = typename T::Real>
MINIFOCUS_MULTIVERSION Real pool_window_backward(const T* x, int64_t channels, const Rectangle& window, Real weight,
                                                 const T* grad_token, T* grad_x) {
  Real largest[kBlock];
  int32_t where[kBlock];
  Dot<Real> grad_weight;
  for (int64_t begin = 0; begin < channels; begin += kBlock) {
    const int64_t n = std::min(kBlock, channels - begin);
    const T* grad = grad_token + begin;
    window_argmax(x + begin, channels, window, n, largest, where);
    grad_weight.add(largest, grad, n);
    for (int64_t row = 0; row < window.height; ++row)
      for (int64_t column = 0; column < window.width; ++column) {
        const int32_t number = static_cast<int32_t>(row * window.width + column);
        T* cell = grad_x + (window.cell + row * window.stride + column) * channels + begin;
        for (int64_t c = 0; c < n; ++c) cell[c].set(where[c] == number ? grad[c].get() * weight : Real{0});
      }
  }
  return grad_weight.total();
}

// The branch with the largest context[branch] . (maximum over the region) + bias[branch].
template <typename T, typename Wide = typename T::Wide>
MINIFOCUS_MULTIVERSION int64_t choose(const T* x, int64_t channels, const Rectangle& region, int64_t branches,
                                      const Wide* context, const Wide* bias) {
  using Real = typename T::Real;
  Real pooled[kBlock];
  Dot<Real> logits[kMaxBranches];
  for (int64_t begin = 0; begin < channels; begin += kBlock) {
    const int64_t n = std::min(kBlock, channels - begin);
    window_max(x + begin, channels, region, n, pooled);
    for (int64_t s = 0; s < branches; ++s) logits[s].add(pooled, context + s * channels + begin, n);
  }
  int64_t best = 0;
  Real best_logit = logits[0].total() + bias[0].get();
  for (int64_t s = 1; s < branches; ++s) {
    const Real logit = logits[s].total() + bias[s].get();
    if (is_larger(logit, best_logit)) best = s, best_logit = logit;
  }
  return best;
}

// A region's factor, rounded to the dtype of x as autocast would.
template <typename T, typename Real = typename T::Real>
Real weight_of(const RegionArgs& args, int64_t region) {
  if (args.weight == nullptr) return 1;
  T rounded;
  rounded.set(static_cast<const typename T::Wide*>(args.weight)[region].get());
  return rounded.get();
}

template <typename T>
void pool(const RegionArgs& args) {
  const Layout layout(args);
  for_each_region(args, [&](int64_t r) {
    const Region region = layout[r];
    for_each_window(region, args.pools[args.choice[r]], args.offsets[r], [&](const Rectangle& window, int64_t token) {
      args.source[token] = window.cell - region.picture_cell;
      pool_window(static_cast<const T*>(args.x), args.channels, window, weight_of<T>(args, r),
                  static_cast<T*>(args.tokens) + token * args.channels);
    });
  });
}

template <typename T>
void pool_backward(const RegionBackwardArgs& backward) {
  const RegionArgs& args = backward.region;
  const Layout layout(args);
  for_each_region(args, [&](int64_t r) {
    const Region region = layout[r];
    const Pool pool = args.pools[args.choice[r]];
    T* grad_x = static_cast<T*>(backward.grad_x);
    if (drops(pool))
      for (int64_t row = 0; row < region.height; ++row)
        std::fill_n(grad_x + (region.cell + row * region.stride) * args.channels, region.width * args.channels, T{});
    typename T::Real grad_weight = 0;
    for_each_window(region, pool, args.offsets[r], [&](const Rectangle& window, int64_t token) {
      grad_weight += pool_window_backward(static_cast<const T*>(args.x), args.channels, window, weight_of<T>(args, r),
                                          static_cast<const T*>(backward.grad_tokens) + token * args.channels, grad_x);
    });
    if (backward.grad_weight != nullptr) static_cast<typename T::Wide*>(backward.grad_weight)[r].set(grad_weight);
  });
}

template <typename T>
void choose(const RouteArgs& args) {
  using Wide = typename T::Wide;
  const Layout layout(args.region);
  for_each_region(args.region, [&](int64_t r) {
    const Region region = layout[r];
    const int64_t per_picture = args.region.branches * args.region.channels;
    args.choice[r] = choose(static_cast<const T*>(args.region.x), args.region.channels, region, args.region.branches,
                            static_cast<const Wide*>(args.context) + region.picture * per_picture,
                            static_cast<const Wide*>(args.bias));
  });
}

}  // namespace

int64_t region_offsets(const RegionArgs& args) {
  const Layout layout(args);
  args.offsets[0] = 0;
  for (int64_t r = 0; r < args.regions; ++r)
    args.offsets[r + 1] = args.offsets[r] + num_tokens(layout[r], args.pools[args.choice[r]]);
  return args.offsets[args.regions];
}

int region_pool(const RegionArgs& args, void*) {
  with_dtype(args.dtype, [&](auto number) { pool<decltype(number)>(args); });
  return 0;
}

// region_choose has made the choice.
int region_route(const RouteArgs& args, void* stream) { return region_pool(args.region, stream); }

int region_pool_backward(const RegionBackwardArgs& args, void*) {
  with_dtype(args.region.dtype, [&](auto number) { pool_backward<decltype(number)>(args); });
  return 0;
}

size_t region_workspace_bytes(int64_t) { return 0; }

void region_choose(const RouteArgs& args) {
  with_dtype(args.region.dtype, [&](auto number) { choose<decltype(number)>(args); });
}

}  // namespace minifocus::cpu
