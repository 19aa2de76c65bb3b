// What every implementation of an operator is given: plain pointers and sizes, no torch.
//
// The CPU half (cpu/) and the CUDA half (cuda/) implement the same functions on these structs; torch_glue.h checks
// the arguments, allocates the outputs and fills the structs in. Arrays are contiguous; every pointer is on the
// half's own device unless it says "host". Ragged batches are packed along the first axis with cu_seqlens-style
// offsets: item b holds rows offsets[b] to offsets[b + 1]. The meaning of each operator is minifocus/ops/reference.py's.
#pragma once
#include <cstdint>

namespace minifocus {

enum class DType : int { f32, bf16, f16, f64 };  // f64: CPU only

struct Grid {
  int64_t height, width;
};

struct Pool {
  int64_t height, width;  // {0, 0} leaves no token
};

// Rounded up, without a sum that could overflow. a >= 0, b > 0.
inline int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// How many regions of window x window cells, partial ones included, cover a map: none of one without cells.
inline int64_t num_regions(Grid grid, int64_t window) {
  return ceil_div(grid.height, window) * ceil_div(grid.width, window);
}

constexpr int kMaxWindow = 1024;
constexpr int kMaxBranches = 8;
constexpr int kMaxColumns = 8;

// region_pool: each region's chosen max-pool, in raster order inside the region, region after region.
struct RegionArgs {
  const void* x;      // [cells, channels] of dtype; the maps of the pictures, one after another
  const Grid* grids;  // [pictures], host; {0, 0} of a map without cells
  int64_t pictures, cells, regions, channels, window, branches;
  Pool pools[kMaxBranches];  // each divides the window, or is {0, 0}
  DType dtype;
  const int64_t* choice;  // [regions], 0 <= choice < branches
  const void* weight;     // [regions] float (double for f64), or null: tokens are multiplied by it, rounded to dtype
  void* tokens;      // out [tokens, channels]; CUDA: [cells, channels], rows from offsets[regions] on left as they are
  int64_t* source;   // out [tokens]: the cell of its picture where a token's window begins; CUDA: [cells], then -1
  int64_t* offsets;  // out [regions + 1] into tokens
  void* workspace;   // CUDA: region_workspace_bytes(regions); CPU: null
};

// region_route: region_pool after choice = argmax_s (max over the region's cells . context[picture, s] + bias[s]).
struct RouteArgs {
  RegionArgs region;    // region.choice and region.weight are not read
  const void* context;  // [pictures, branches, channels] float (double for f64)
  const void* bias;     // [branches] float (double for f64)
  int64_t* choice;      // out [regions]
};

// region_pool's backward: each token's gradient goes to the first maximum of its window in raster order (a NaN is
// larger than everything, the first one wins); every other cell gets 0.
struct RegionBackwardArgs {
  RegionArgs region;        // x, choice, weight and offsets are inputs; tokens and source are not used
  const void* grad_tokens;  // [rows, channels] of dtype; rows from offsets[regions] on are not read
  int64_t rows;
  void* grad_x;       // out [cells, channels] of dtype
  void* grad_weight;  // out [regions] float (double for f64), or null: sum over a region's tokens of grad * pooled
};

// importance (Eq. 7 and 8): softmax of scale * q.k over an item's visual tokens, maximum over heads, mean over text.
struct ImportanceArgs {
  const void* q;             // [text, heads, dim] of dtype
  const void* k;             // [visual, kv_heads, dim] of dtype; query head h reads key head h / (heads / kv_heads)
  const int64_t* cu_text;    // [items + 1]
  const int64_t* cu_visual;  // [items + 1]
  int64_t text, visual, items, heads, kv_heads, dim;
  double scale;
  DType dtype;
  void* scores;     // out [visual] float (double for f64); 0 for an item without text
  void* workspace;  // CUDA: importance_workspace_bytes(text, visual, heads); CPU: null
};

// select_top_p (Eq. 9): the kept indices of item b, ascending, from index[cu_visual[b]] on, then -1.
struct SelectArgs {
  const void* scores;        // [visual] of dtype
  const int64_t* cu_visual;  // [items + 1]
  int64_t visual, items;
  double gamma;
  int64_t keep;  // -1: by gamma
  DType dtype;
  int64_t* index;  // out [visual]
  int64_t* count;  // out [items]
};

// gather_tokens: row index[i] of every column; -1 gives a row of zero bytes.
struct GatherArgs {
  struct Column {
    const void* from;  // [rows, row_bytes]
    void* to;          // out [count, row_bytes]
    int64_t row_bytes;
  } columns[kMaxColumns];
  int num_columns;
  int64_t rows, count;
  const int64_t* index;  // [count], -1 <= index < rows
};

}  // namespace minifocus
