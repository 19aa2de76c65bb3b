// Where a region lies: which picture it belongs to, which of its cells exist, and which windows a branch cuts it into.
#pragma once
#include <climits>

#include "vectors.h"

namespace minifocus::cuda {

// Pictures' sizes travel to the GPU by value, as a kernel parameter, so that nothing is copied there beforehand. If the
// pictures do not all fit, there are more launches.
constexpr int kPicturesPerLaunch = 64;

struct Pictures {
  int count;
  int64_t first_picture;
  int height[kPicturesPerLaunch], width[kPicturesPerLaunch];
  int64_t first_cell[kPicturesPerLaunch], first_region[kPicturesPerLaunch];
};

struct Branches {
  int window, count;
  int height[kMaxBranches], width[kMaxBranches];
};

struct Region {
  int64_t picture;
  int64_t first_cell;  // of its picture, in x
  int map_width;
  int top, left;      // in its picture
  int height, width;  // of what exists of it: less than the window at the right and lower edge

  __device__ int64_t row_of(int y, int x) const { return first_cell + int64_t(top + y) * map_width + left + x; }
};

__device__ __forceinline__ Region find_region(const Pictures& pictures, int window, int64_t number) {
  int p = 0;
  for (int above = pictures.count; above - p > 1;) {  // the last picture that begins at or before it
    const int middle = (p + above) / 2;
    if (pictures.first_region[middle] <= number)
      p = middle;
    else
      above = middle;
  }
  const unsigned across = unsigned(pictures.width[p] + window - 1) / unsigned(window);
  const unsigned own = unsigned(number - pictures.first_region[p]);  // a launch has fewer than 2^31 blocks
  Region region;
  region.picture = pictures.first_picture + p;
  region.first_cell = pictures.first_cell[p];
  region.map_width = pictures.width[p];
  region.top = int(own / across) * window;
  region.left = int(own % across) * window;
  region.height = min(window, pictures.height[p] - region.top);
  region.width = min(window, pictures.width[p] - region.left);
  return region;
}

// The windows of one branch in one region. A branch of 0 × 0 has none.
struct Windows {
  int height, width;  // of a window
  int across, count;

  __device__ Windows(const Region& region, const Branches& branches, int branch)
      : height(branches.height[branch]), width(branches.width[branch]), across(0), count(0) {
    if (height == 0) return;
    across = (region.width + width - 1) / width;
    count = (region.height + height - 1) / height * across;
  }
};

// How the threads of a block share out tokens and the vectors of their channels: neighbours have neighbouring vectors,
// so that they read and write memory side by side; threads beyond a token's last vector take further tokens.
//     for (int token = share.token; token < count; token += share.tokens)
//       for (int64_t column = share.column; column < vectors; column += share.columns)
struct Share {
  int columns, tokens, column, token;

  __device__ Share(int64_t vectors, int threads)
      : columns(int(max(int64_t(1), min(vectors, int64_t(threads))))),
        tokens(threads / columns),
        column(int(threadIdx.x) % columns),
        token(int(threadIdx.x) / columns) {
    if (token >= tokens) token = INT_MAX - threads;  // left over: nothing to do
  }
};

inline Branches branches_of(const RegionArgs& args) {
  Branches branches{int(args.window), int(args.branches), {}, {}};
  for (int s = 0; s < branches.count; ++s) {
    branches.height[s] = int(args.pools[s].height);
    branches.width[s] = int(args.pools[s].width);
  }
  return branches;
}

// Calls launch(pictures, regions) for every group of pictures with regions; stops at the first error.
template <class Launch>
int for_each_group(const RegionArgs& args, Launch&& launch) {
  int64_t cell = 0, region = 0;
  for (int64_t first = 0; first < args.pictures; first += kPicturesPerLaunch) {
    Pictures pictures{};
    pictures.first_picture = first;
    const int64_t before = region;
    for (; pictures.count < kPicturesPerLaunch && first + pictures.count < args.pictures; ++pictures.count) {
      const Grid grid = args.grids[first + pictures.count];
      pictures.height[pictures.count] = int(grid.height);
      pictures.width[pictures.count] = int(grid.width);
      pictures.first_cell[pictures.count] = cell;
      pictures.first_region[pictures.count] = region;
      cell += grid.height * grid.width;
      region += num_regions(grid, args.window);
    }
    if (region == before) continue;
    const int error = launch(pictures, region - before);
    if (error) return error;
  }
  return 0;
}

}  // namespace minifocus::cuda
