// gather_tokens: row index[i] of every column (hidden states, positions, masks, …), in one launch. Rows are bytes
// here, copied in the largest words that their size and addresses allow. -1 gives a row of zeros.
#include "vectors.h"

namespace minifocus::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWords = 4;  // per thread, so that several loads are under way at once

struct Columns {
  GatherArgs::Column column[kMaxColumns];
  int word_bytes[kMaxColumns];
};

template <class Word>
__device__ void copy(const GatherArgs::Column& column, const int64_t* index, int64_t rows, int64_t count) {
  const int64_t words = column.row_bytes / int64_t(sizeof(Word));
  const Word* from = static_cast<const Word*>(column.from);
  Word* to = static_cast<Word*>(column.to);
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x; first < count * words; first += kWords * step) {
    Word value[kWords];
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      const int64_t i = first + j * step;
      value[j] = Word{};
      if (i >= count * words) continue;
      const int64_t row = index[i / words];
      DEVICE_CHECK(-1 <= row && row < rows);
      if (row >= 0) value[j] = from[row * words + i % words];
    }
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      if (first + j * step < count * words) to[first + j * step] = value[j];
    }
  }
}

// Block (x, y) works on column y.
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const __grid_constant__ Columns columns, const int64_t* __restrict__ index, int64_t rows,
                  int64_t count) {
  const GatherArgs::Column& column = columns.column[blockIdx.y];
  switch (columns.word_bytes[blockIdx.y]) {
    case 16: return copy<uint4>(column, index, rows, count);
    case 8: return copy<uint2>(column, index, rows, count);
    case 4: return copy<unsigned>(column, index, rows, count);
    case 2: return copy<unsigned short>(column, index, rows, count);
    default: return copy<unsigned char>(column, index, rows, count);
  }
}

}  // namespace

int gather_tokens(const GatherArgs& args, void* stream) {
  Columns columns{};
  int64_t most_words = 0;
  for (int c = 0; c < args.num_columns; ++c) {
    columns.column[c] = args.columns[c];
    const uint64_t addresses = reinterpret_cast<uintptr_t>(args.columns[c].from) |
                               reinterpret_cast<uintptr_t>(args.columns[c].to) | args.columns[c].row_bytes;
    int bytes = 16;
    while (addresses % bytes) bytes /= 2;
    columns.word_bytes[c] = bytes;
    most_words = max(most_words, args.count * args.columns[c].row_bytes / bytes);
  }
  if (most_words == 0) return 0;
  const int64_t blocks = min((most_words + kThreads * kWords - 1) / (kThreads * kWords), int64_t(1) << 30);
  return gpu::launch(gather_kernel, dim3(gpu::dimension(blocks), unsigned(args.num_columns)), dim3(kThreads), 0,
                     static_cast<cudaStream_t>(stream), columns, args.index, args.rows, args.count);
}

}  // namespace minifocus::cuda
