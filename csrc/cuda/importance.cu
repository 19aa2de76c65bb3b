// importance (Eq. 7 and 8): the softmax over the keys n of scale * q[t, h] . k[n, h / group], its maximum over heads h,
// and the mean of that over text tokens t.
//
// The h × T × N products are never stored. Each is computed twice, tile by tile:
//   1. statistics_kernel   per row (text token, head): the largest product m and the sum of exp(product - m), which is
//                          the softmax's denominator, of each of kSplits parts of the keys;
//   2. maximum_kernel      per tile of keys: exp(product - m) / denominator, its maximum over heads kept in registers,
//                          the sum over text tokens; kSplits parts of the text apart, so that there are blocks enough;
//   3. mean_kernel         adds those and divides by T.
// No sum depends on the order in which blocks run. Extra memory: 8 kSplits bytes per (t, h) and 4 kSplits per key.
//
// Here the products are plain multiply-adds. bfloat16 and half go through the tensor cores where the GPU has such
// (importance_tensor_cores.cu). A tile is 64 keys by 16 rows per warp, in eight parts of 16 × 8, of which lane
// 4 g + c has rows g and g + 8, columns 2 c and 2 c + 1.
#include <cstdlib>

#include "importance.h"

namespace minifocus::cuda {
namespace {

constexpr int kKeys = 64;  // of a tile
constexpr int kRows = 16;  // of a warp
constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;

// A row of a tile in shared memory; its pitch lets the 32 lanes of a fragment's load hit 32 different banks.
template <class T>
struct Tile {
  static constexpr int kChannels = 256 / int(sizeof(T));  // of a head, brought into shared memory at a time
  static constexpr int kPitch = kChannels + 16 / int(sizeof(T));
  alignas(16) T v[kKeys][kPitch];
};

// tile[row][channel] = from[row * pitch + channel] for the first Rows rows; 0 beyond `rows` and `channels`.
template <int Rows, int V, class T>
__device__ void fill(Tile<T>& tile, const T* from, int64_t pitch, int64_t rows, int64_t channels) {
  constexpr int kChannels = Tile<T>::kChannels;
  for (int i = threadIdx.x; i < Rows * (kChannels / V); i += kThreads) {
    const int row = i / (kChannels / V), channel = i % (kChannels / V) * V;
    Vec<T, V> value;
    if (row < rows && channel < channels) {
      value = load<V>(from + row * pitch + channel);
    } else {
#pragma unroll
      for (int j = 0; j < V; ++j) value.v[j] = from_float<T>(0.f);
    }
    *reinterpret_cast<Vec<T, V>*>(&tile.v[row][channel]) = value;
  }
}

// products += rows [first_row, + 16) of q · keys [first_key, + 8 * Parts) of k, over the tiles' first channels.
template <class T, int Parts>
__device__ __forceinline__ void add_products(float (&products)[Parts][4], const Tile<T>& q, int first_row,
                                             const Tile<T>& k, int first_key, int channels) {
  const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll 4
  for (int channel = 0; channel < channels; ++channel) {
    const float upper = to_float(q.v[first_row + g][channel]), lower = to_float(q.v[first_row + g + 8][channel]);
#pragma unroll
    for (int part = 0; part < Parts; ++part) {
      const float left = to_float(k.v[first_key + 8 * part + 2 * c][channel]);
      const float right = to_float(k.v[first_key + 8 * part + 2 * c + 1][channel]);
      products[part][0] = fmaf(upper, left, products[part][0]);
      products[part][1] = fmaf(upper, right, products[part][1]);
      products[part][2] = fmaf(lower, left, products[part][2]);
      products[part][3] = fmaf(lower, right, products[part][3]);
    }
  }
}

// The products of Rows rows of head `head` with 64 keys, each warp its own part. Every thread of the block must call.
// If a tile holds whole heads, the last call's rows (or keys) are still there, and are not loaded again.
template <int Rows, int V, class T, int Parts>
__device__ void multiply(float (&products)[Parts][4], Tile<T>& q_tile, Tile<T>& k_tile,
                         const ImportanceArguments& arguments, const T* q, int64_t rows, int first_row, bool same_rows,
                         const T* k, int64_t keys, int first_key, bool same_keys, int64_t head) {
#pragma unroll
  for (int part = 0; part < Parts; ++part) {
#pragma unroll
    for (int i = 0; i < 4; ++i) products[part][i] = 0.f;
  }
  const int64_t kv_heads = arguments.heads / arguments.group, dim = arguments.dim;
  const bool whole = dim <= Tile<T>::kChannels;
  for (int64_t channel = 0; channel < dim; channel += Tile<T>::kChannels) {
    __syncthreads();  // the last tiles have been read
    if (!whole || !same_rows)
      fill<Rows, V>(q_tile, q + head * dim + channel, arguments.heads * dim, rows, dim - channel);
    if (!whole || !same_keys)
      fill<kKeys, V>(k_tile, k + head / arguments.group * dim + channel, kv_heads * dim, keys, dim - channel);
    __syncthreads();
    add_products(products, q_tile, first_row, k_tile, first_key, int(min(int64_t(Tile<T>::kChannels), dim - channel)));
  }
}

// Block (x, y, z): text tokens [64 x, + 64) of an item, head y, part z of its keys. Each warp has 16 of the rows.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 3)
    statistics_kernel(const ImportanceArguments arguments, const T* __restrict__ q, const T* __restrict__ k) {
  __shared__ Tile<T> q_tile, k_tile;
  constexpr int kParts = kKeys / 8;
  const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4, first_row = threadIdx.x / 32 * kRows;
  const int64_t head = blockIdx.y, split = blockIdx.z;
  Item item;
  int64_t tile;
  if (!find_tile(arguments, &Item::num_text, kWarps * kRows, item, tile)) return;
  const int64_t first_text = tile * kWarps * kRows;
  const int64_t key_tiles = (item.num_keys + kKeys - 1) / kKeys;
  float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};  // of rows g and g + 8
  for (int64_t key_tile = split; key_tile < key_tiles; key_tile += kSplits) {
    const int64_t first_key = key_tile * kKeys, keys = item.num_keys - first_key;
    float products[kParts][4];
    multiply<kWarps * kRows, V>(
        products, q_tile, k_tile, arguments, q + (item.text + first_text) * arguments.heads * arguments.dim,
        item.num_text - first_text, first_row, key_tile != split,
        k + (item.key + first_key) * (arguments.heads / arguments.group) * arguments.dim, keys, 0, false, head);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float here = -INFINITY;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& product = products[part][2 * row + i];
          product *= arguments.scale;
          if (8 * part + 2 * c + i < keys) here = fmaxf(here, product);
        }
      }
      here = fmaxf(here, __shfl_xor_sync(kAll, here, 1));
      here = fmaxf(here, __shfl_xor_sync(kAll, here, 2));
      const float above = fmaxf(largest[row], here);
      // While all products are -inf, exp(product - above) would be exp(NaN).
      float added = 0.f;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float product = products[part][2 * row + i];
          if (8 * part + 2 * c + i < keys && product != -INFINITY) added += expf(product - above);
        }
      }
      added += __shfl_xor_sync(kAll, added, 1);
      added += __shfl_xor_sync(kAll, added, 2);
      sum[row] = (sum[row] == 0.f ? 0.f : sum[row] * expf(largest[row] - above)) + added;
      largest[row] = above;
    }
  }
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int64_t text = first_text + first_row + g + 8 * row;
    if (c == 0 && text < item.num_text) {
      arguments.statistics[(split * arguments.heads + head) * arguments.text + item.text + text] =
          make_float2(largest[row], sum[row]);
    }
  }
}

// The largest product of a row and one over the sum of exp(product - largest), from the parts' own.
__device__ __forceinline__ float2 merge(const float2* parts, int64_t pitch) {
  float largest = -INFINITY, sum = 0.f;
  for (int split = 0; split < kSplits; ++split) largest = fmaxf(largest, parts[split * pitch].x);
  for (int split = 0; split < kSplits; ++split) {
    const float2 part = parts[split * pitch];
    if (part.y != 0.f) sum += part.y * expf(part.x - largest);
  }
  return make_float2(largest, 1.f / sum);
}

// Block (x, y): keys [64 x, + 64) of an item, its text tokens in groups y, y + kSplits, … of 16. Each warp has 16 of
// the keys.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 3)
    maximum_kernel(const ImportanceArguments arguments, const T* __restrict__ q, const T* __restrict__ k) {
  __shared__ Tile<T> q_tile, k_tile;
  constexpr int kParts = kKeys / 8 / kWarps;
  const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4, own_key = threadIdx.x / 32 * kParts * 8;
  Item item;
  int64_t tile;
  if (!find_tile(arguments, &Item::num_keys, kKeys, item, tile)) return;
  const int64_t first_key = tile * kKeys, keys = item.num_keys - first_key;
  float sum[kParts][2] = {};  // over text, of keys own_key + 8 part + 2 c and + 1
  for (int64_t first_text = blockIdx.y * kRows; first_text < item.num_text; first_text += kSplits * kRows) {
    float best[kParts][4] = {};  // a softmax is never below 0
    for (int64_t head = 0; head < arguments.heads; ++head) {
      float products[kParts][4];
      multiply<kRows, V>(products, q_tile, k_tile, arguments,
                                  q + (item.text + first_text) * arguments.heads * arguments.dim,
                                  min(int64_t(kRows), item.num_text - first_text), 0, false,
                                  k + (item.key + first_key) * (arguments.heads / arguments.group) * arguments.dim,
                                  keys, own_key, head % arguments.group != 0, head);
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const int64_t text = first_text + g + 8 * row;
        if (text >= item.num_text) continue;
        const float2 statistics =
            merge(arguments.statistics + head * arguments.text + item.text + text, arguments.heads * arguments.text);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float share = expf(products[part][2 * row + i] * arguments.scale - statistics.x) * statistics.y;
            keep_first_max(best[part][2 * row + i], share);
          }
        }
      }
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float both = best[part][i] + best[part][2 + i];
#pragma unroll
        for (int step = 4; step < 32; step *= 2) both += __shfl_xor_sync(kAll, both, step);
        sum[part][i] += both;
      }
    }
  }
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t key = own_key + 8 * part + 2 * c + i;
      if (g == 0 && key < keys)
        arguments.sums[blockIdx.y * arguments.visual + item.key + first_key + key] = sum[part][i];
    }
  }
}

// Block (x, y): keys of item y.
__global__ void __launch_bounds__(kThreads) mean_kernel(const ImportanceArguments arguments) {
  for (int64_t number = blockIdx.y; number < arguments.items; number += gridDim.y) {
    const Item item = item_of(arguments, number);
    for (int64_t n = int64_t(blockIdx.x) * kThreads + threadIdx.x; n < item.num_keys;
         n += int64_t(gridDim.x) * kThreads) {
      float sum = 0.f;
      for (int split = 0; split < kSplits; ++split) sum += arguments.sums[split * arguments.visual + item.key + n];
      arguments.scores[item.key + n] = item.num_text ? sum / float(item.num_text) : 0.f;
    }
  }
}

// MINIFOCUS_TENSOR_CORES=0 turns them off, to compare.
bool tensor_cores_wanted() {
  const char* value = std::getenv("MINIFOCUS_TENSOR_CORES");
  return gpu::has_tensor_cores() && !(value && value[0] == '0');
}

}  // namespace

size_t importance_workspace_bytes(int64_t text, int64_t visual, int64_t heads) {
  return size_t(kSplits) * size_t(heads * text * int64_t(sizeof(float2)) + visual * int64_t(sizeof(float)));
}

int importance(const ImportanceArgs& args, void* stream_pointer) {
  cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  if (args.visual == 0 || args.items == 0) return 0;
  ImportanceArguments arguments{args.heads,        args.heads / args.kv_heads,
                      args.dim,          args.items,
                      args.text,         args.visual,
                      float(args.scale), args.cu_text,
                      args.cu_visual,    static_cast<float2*>(args.workspace),
                      nullptr,           static_cast<float*>(args.scores)};
  arguments.sums = reinterpret_cast<float*>(arguments.statistics + kSplits * args.heads * args.text);
  const int error = dispatch(args.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kWide = 16 / sizeof(T);
    const bool wide = aligned16(args.q) && aligned16(args.k) && args.dim % kWide == 0;
    const bool fits = args.dim <= kTensorCoreDim && max(max(args.text, args.visual), args.heads * args.dim) < 1 << 30;
    if (sizeof(T) == 2 && wide && fits && tensor_cores_wanted())
      return launch_tensor_cores(arguments, args.dtype, args.q, args.k, stream_pointer);
    const auto run = [&](auto statistics, auto maximum) -> int {
      const T *q = static_cast<const T*>(args.q), *k = static_cast<const T*>(args.k);
      // An item's last tile may be a partial one, so there are up to `items` tiles more than the whole ones.
      const unsigned row_tiles = gpu::dimension(args.text / (kWarps * kRows) + args.items);
      const unsigned key_tiles = gpu::dimension(args.visual / kKeys + args.items);
      const dim3 row_blocks(row_tiles, gpu::dimension(args.heads), kSplits);
      const int launched =
          args.text == 0 ? 0 : gpu::launch(statistics, row_blocks, dim3(kThreads), 0, stream, arguments, q, k);
      return launched ? launched
                      : gpu::launch(maximum, dim3(key_tiles, kSplits), dim3(kThreads), 0, stream, arguments, q, k);
    };
    return wide ? run(statistics_kernel<T, kWide>, maximum_kernel<T, kWide>)
                : run(statistics_kernel<T, 1>, maximum_kernel<T, 1>);
  });
  if (error) return error;
  const unsigned blocks = unsigned(min((args.visual + kThreads - 1) / kThreads, int64_t(1024)));
  return gpu::launch(mean_kernel, dim3(blocks, unsigned(min(args.items, int64_t(65535)))), dim3(kThreads), 0, stream,
                     arguments);
}

}  // namespace minifocus::cuda
