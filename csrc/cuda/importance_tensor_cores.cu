// importance by the tensor cores, for bfloat16 and half (importance.cu says what is computed, and does it for float).
//
// A warp multiplies 16 rows (text tokens of a head) with 8 or 16 keys, all of a head's channels, by the tensor cores'
// mma.m16n8k16. It brings what it multiplies from global memory straight into registers, and no warp waits for another
// until the end: the caches serve those that read the same.
//   1. statistics_kernel   block: 16 text tokens, one head. Its warps share out the keys. Each lane keeps the largest
//                          product m and the sum of exp(product - m) of what it has seen; at the end they are merged;
//   2. maximum_kernel      block: 16 keys, every kSplits-th group of 16 text tokens. Its warps share out the heads, and
//                          keep the maximum of exp(product - m) / sum; then the block takes the maximum over its warps
//                          and adds up over the text tokens.
//
// Which lane has what: 4 g + c has, of the 16 × 8 products, rows g and g + 8, columns 2 c and 2 c + 1. A sum of
// products may take channels in any order, so a lane reads eight neighbouring ones, 16 bytes, of every 32: of rows g
// and g + 8, and of key g.
#include "importance.h"

namespace minifocus::cuda {
namespace {

constexpr int kRows = 16;                     // of a warp
constexpr int kChunks = kTensorCoreDim / 32;  // of a head's channels
constexpr int kStatisticsWarps = 16, kStatisticsParts = 2;  // of 8 keys
constexpr int kHeadWarps = 4, kMaximumParts = 2;
constexpr int kKeys = 8 * kMaximumParts;  // of a block
constexpr int kMaximumThreads = 32 * kHeadWarps;

// d += a · b for a 16 × 16, b 16 × 8, d 16 × 8 of bf16 (or half) and float, spread over a warp as PTX's m16n8k16 says.
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (sizeof(T) == 2 && std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  // The same by hand, also the emulator's: channels 2 o, 2 o + 1 (words a[0], a[1], b[0]) and 8 more (a[2], a[3], b[1])
  // are in the lanes 4 x + o.
  const auto number = [](unsigned word, int half) {
    const unsigned short bits = (unsigned short)(word >> 16 * half);
    T value;
    memcpy(&value, &bits, sizeof(value));
    return to_float(value);
  };
  const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  for (int o = 0; o < 4; ++o) {
    for (int upper_channels = 0; upper_channels < 2; ++upper_channels) {
      const unsigned row = __shfl_sync(kAll, a[2 * upper_channels], 4 * g + o);
      const unsigned row_below = __shfl_sync(kAll, a[2 * upper_channels + 1], 4 * g + o);
      const unsigned left = __shfl_sync(kAll, b[upper_channels], 4 * (2 * c) + o);
      const unsigned right = __shfl_sync(kAll, b[upper_channels], 4 * (2 * c + 1) + o);
      for (int half = 0; half < 2; ++half) {
        d[0] = fmaf(number(row, half), number(left, half), d[0]);
        d[1] = fmaf(number(row, half), number(right, half), d[1]);
        d[2] = fmaf(number(row_below, half), number(left, half), d[2]);
        d[3] = fmaf(number(row_below, half), number(right, half), d[3]);
      }
    }
  }
#endif
}

// A lane's channels of one row of q or k.
struct Row {
  unsigned words[kChunks][4];
};

// A lane's part of row `row` of a head: of q or k, whose rows are `pitch` apart; 0 where the row does not exist.
template <class T>
__device__ __forceinline__ void read(Row& own, const T* from, int64_t pitch, int row, int rows, int dim) {
  const T* const start = from + row * pitch;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int channel = 32 * i + 8 * (threadIdx.x % 4);
    // As one word of 16 bytes: taken apart into numbers, it would be waited for here and not where it is multiplied.
    uint4 word = {0, 0, 0, 0};
    if (row < rows && channel < dim) word = *reinterpret_cast<const uint4*>(start + channel);
    own.words[i][0] = word.x;
    own.words[i][1] = word.y;
    own.words[i][2] = word.z;
    own.words[i][3] = word.w;
  }
}

// Rows · keys, for 16 rows and 8 Parts keys.
template <class T, int Parts>
__device__ __forceinline__ void multiply(float (&products)[Parts][4], const Row (&rows)[2], const Row (&keys)[Parts],
                                         int dim) {
#pragma unroll
  for (int part = 0; part < Parts; ++part) {
#pragma unroll
    for (int i = 0; i < 4; ++i) products[part][i] = 0.f;
  }
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    if (32 * i >= dim) break;
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      const unsigned a[4] = {rows[0].words[i][j], rows[1].words[i][j], rows[0].words[i][j + 1],
                             rows[1].words[i][j + 1]};
#pragma unroll
      for (int part = 0; part < Parts; ++part) {
        const unsigned b[2] = {keys[part].words[i][j], keys[part].words[i][j + 1]};
        mma<T>(products[part], a, b);
      }
    }
  }
}

// Here products come times log2(e), so that exp is exp2, of which a GPU has an instruction.
constexpr double kLog2E = 1.4426950408889634;

// A largest product, and the sum of exp(product - largest).
__device__ __forceinline__ float2 merge(float2 one, float2 other) {
  const float largest = fmaxf(one.x, other.x);
  // A sum of nothing goes with a largest product of -inf, and exp(-inf + inf) would be NaN.
  const float sum = (one.y == 0.f ? 0.f : one.y * exp2f(one.x - largest)) +
                    (other.y == 0.f ? 0.f : other.y * exp2f(other.x - largest));
  return make_float2(largest, sum);
}

// Block (x, y): text tokens [16 x, + 16) of an item, head y.
template <class T>
__global__ void __launch_bounds__(32 * kStatisticsWarps, 1)
    statistics_kernel(const ImportanceArguments arguments, const T* __restrict__ q, const T* __restrict__ k) {
  __shared__ float2 seen[kRows][4 * kStatisticsWarps + 1];
  constexpr int kParts = kStatisticsParts;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int head = blockIdx.y;
  const int kv_head = head / int(arguments.group);
  Item item;
  int64_t tile;
  if (!find_tile(arguments, &Item::num_text, kRows, item, tile)) return;
  const int first_text = int(tile) * kRows, num_keys = int(item.num_keys);
  const int kv_heads = int(arguments.heads / arguments.group), dim = int(arguments.dim);
  const int64_t q_pitch = arguments.heads * dim, k_pitch = int64_t(kv_heads) * dim;
  const T* const of_q = q + item.text * q_pitch + head * dim;
  const T* const of_k = k + item.key * k_pitch + kv_head * dim;
  Row rows[2], keys[kParts];
#pragma unroll
  for (int i = 0; i < 2; ++i) read(rows[i], of_q, q_pitch, first_text + g + 8 * i, int(item.num_text), dim);
  float2 own[2] = {{-INFINITY, 0.f}, {-INFINITY, 0.f}};  // of rows g and g + 8
  for (int first_key = warp * 8 * kParts; first_key < num_keys; first_key += kStatisticsWarps * 8 * kParts) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) read(keys[part], of_k, k_pitch, first_key + 8 * part + g, num_keys, dim);
    float products[kParts][4];
    multiply<T>(products, rows, keys, dim);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float here = own[row].x;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& product = products[part][2 * row + i];
          product = first_key + 8 * part + 2 * c + i < num_keys ? product * arguments.scale : -INFINITY;
          here = fmaxf(here, product);
        }
      }
      float sum = own[row].y == 0.f ? 0.f : own[row].y * exp2f(own[row].x - here);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float product = products[part][2 * row + i];
          if (product != -INFINITY) sum += exp2f(product - here);
        }
      }
      own[row] = make_float2(here, sum);
    }
  }
  seen[g][4 * warp + c] = own[0];
  seen[g + 8][4 * warp + c] = own[1];
  __syncthreads();
  for (int row = warp; row < kRows; row += kStatisticsWarps) {
    float2 all = seen[row][lane];
    for (int i = lane + 32; i < 4 * kStatisticsWarps; i += 32) all = merge(all, seen[row][i]);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      all = merge(all, {__shfl_xor_sync(kAll, all.x, step), __shfl_xor_sync(kAll, all.y, step)});
    }
    if (lane == 0 && first_text + row < item.num_text)
      arguments.statistics[head * arguments.text + item.text + first_text + row] = make_float2(all.x, 1.f / all.y);
  }
}

// Block (x, y): keys [16 x, + 16) of an item, its text tokens in groups y, y + kSplits, … of 16.
template <class T>
__global__ void __launch_bounds__(kMaximumThreads, 2)
    maximum_kernel(const ImportanceArguments arguments, const T* __restrict__ q, const T* __restrict__ k) {
  __shared__ float largest[kHeadWarps][kRows][kKeys + 1];
  __shared__ float added[kMaximumThreads / kKeys][kKeys];
  constexpr int kParts = kMaximumParts;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  Item item;
  int64_t tile;
  if (!find_tile(arguments, &Item::num_keys, kKeys, item, tile)) return;
  const int heads = (int(arguments.heads) + kHeadWarps - 1) / kHeadWarps;  // of a warp
  const int first_head = warp * heads, end_head = min(first_head + heads, int(arguments.heads));
  const int first_key = int(tile) * kKeys, num_text = int(item.num_text);
  const int group = int(arguments.group), dim = int(arguments.dim);
  const int64_t q_pitch = arguments.heads * dim, k_pitch = arguments.heads / group * dim;
  Row rows[2], next_rows[2], keys[kParts];
  float2 statistics[2], next_statistics[2];
  // Brings the next head's rows while this one's are worked on.
  const auto bring = [&](int first_text, int head) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = first_text + g + 8 * i;
      read(next_rows[i], q + item.text * q_pitch + head * dim, q_pitch, row, num_text, dim);
      next_statistics[i] = make_float2(0.f, 0.f);
      if (row < num_text) next_statistics[i] = arguments.statistics[head * arguments.text + item.text + row];
    }
  };
  int keys_of = -1;  // the head whose keys were read last
  float sum = 0.f;   // over text, of the key first_key + threadIdx.x
  for (int first_text = blockIdx.y * kRows; first_text < num_text; first_text += kSplits * kRows) {
    const bool exists[2] = {first_text + g < num_text, first_text + g + 8 < num_text};
    float best[kParts][4] = {};  // a softmax is never below 0
    if (first_head < end_head) bring(first_text, first_head);
#pragma unroll 1
    for (int head = first_head; head < end_head; ++head) {
#pragma unroll
      for (int i = 0; i < 2; ++i) rows[i] = next_rows[i], statistics[i] = next_statistics[i];
      if (keys_of != head / group) {
        keys_of = head / group;
#pragma unroll
        for (int part = 0; part < kParts; ++part)
          read(keys[part], k + item.key * k_pitch + keys_of * dim, k_pitch, first_key + 8 * part + g,
               int(item.num_keys), dim);
      }
      if (head + 1 < end_head) bring(first_text, head + 1);
      float products[kParts][4];
      multiply<T>(products, rows, keys, dim);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float share = exp2f(products[part][i] * arguments.scale - statistics[i / 2].x) * statistics[i / 2].y;
          if (exists[i / 2]) keep_first_max(best[part][i], share);
        }
      }
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int i = 0; i < 4; ++i) largest[warp][g + 8 * (i / 2)][8 * part + 2 * c + i % 2] = best[part][i];
    }
    __syncthreads();
    const int key = threadIdx.x % kKeys, share = threadIdx.x / kKeys;
    constexpr int kGroups = kMaximumThreads / kKeys;
    float of_rows = 0.f;
    for (int row = share; row < kRows; row += kGroups) {
      float of_row = largest[0][row][key];
#pragma unroll
      for (int w = 1; w < kHeadWarps; ++w) keep_first_max(of_row, largest[w][row][key]);
      of_rows += of_row;
    }
    added[share][key] = of_rows;
    __syncthreads();
    if (threadIdx.x < kKeys) {
      for (int i = 0; i < kGroups; ++i) sum += added[i][threadIdx.x];
    }
  }
  if (threadIdx.x < kKeys && first_key + int(threadIdx.x) < item.num_keys)
    arguments.sums[blockIdx.y * arguments.visual + item.key + first_key + threadIdx.x] = sum;
}

}  // namespace

int launch_tensor_cores(const ImportanceArguments& given, DType dtype, const void* q, const void* k,
                        void* stream_pointer) {
  ImportanceArguments arguments = given;
  arguments.scale = float(given.scale * kLog2E);
  cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  return dispatch(dtype, [&](auto element) -> int {
    using T = decltype(element);
    if constexpr (sizeof(T) == 2) {
      const T *queries = static_cast<const T*>(q), *keys = static_cast<const T*>(k);
      // An item's last tile may be a partial one, so there are up to `items` tiles more than the whole ones.
      const dim3 rows(gpu::dimension(arguments.text / kRows + arguments.items), gpu::dimension(arguments.heads));
      const dim3 tiles(gpu::dimension(arguments.visual / kKeys + arguments.items), kSplits);
      const int launched = arguments.text == 0 ? 0
                                               : gpu::launch(statistics_kernel<T>, rows, dim3(32 * kStatisticsWarps), 0,
                                                             stream, arguments, queries, keys);
      return launched
                 ? launched
                 : gpu::launch(maximum_kernel<T>, tiles, dim3(kMaximumThreads), 0, stream, arguments, queries, keys);
    } else {
      return cudaErrorInvalidValue;
    }
  });
}

}  // namespace minifocus::cuda
