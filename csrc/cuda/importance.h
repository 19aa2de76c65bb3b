// What importance's kernels share: their arguments, and which item and tile a block works on.
#pragma once
#include "vectors.h"

namespace minifocus::cuda {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kSplits = 4;  // parts that are worked on apart, so that there are blocks enough

struct ImportanceArguments {
  int64_t heads, group, dim, items, text, visual;
  float scale;
  const int64_t* cu_text;
  const int64_t* cu_visual;
  float2* statistics;  // [kSplits, heads, text]; of the tensor cores' kernels [heads, text]
  float* sums;         // [kSplits, visual]: of the text tokens' largest shares
  float* scores;       // [visual]
};

// The first two passes by the tensor cores (importance_tensor_cores.cu), for bfloat16 and half whose rows can be read
// 16 bytes at a time, and heads of at most kTensorCoreDim channels. No number of the arguments, doubled, exceeds an int.
constexpr int kTensorCoreDim = 128;
int launch_tensor_cores(const ImportanceArguments& arguments, DType dtype, const void* q, const void* k, void* stream);

struct Item {
  int64_t text, num_text, key, num_keys;
};

// The host has not checked offsets that are on the GPU. Those out of order or out of range stop the launch.
__device__ __forceinline__ Item item_of(const ImportanceArguments& arguments, int64_t number) {
  const int64_t text = arguments.cu_text[number], text_end = arguments.cu_text[number + 1];
  const int64_t key = arguments.cu_visual[number], key_end = arguments.cu_visual[number + 1];
  DEVICE_CHECK(0 <= text && text <= text_end && text_end <= arguments.text);
  DEVICE_CHECK(0 <= key && key <= key_end && key_end <= arguments.visual);
  DEVICE_CHECK(number > 0 || (text == 0 && key == 0));
  DEVICE_CHECK(number + 1 < arguments.items || (text_end == arguments.text && key_end == arguments.visual));
  return {text, text_end - text, key, key_end - key};
}

// The tile that a block works on, number blockIdx.x over all items, whose `length`s are cut into tiles of `size`. False
// beyond the last tile. One thread reads for all: another stream may write other offsets meanwhile, and threads with
// different items would wait for each other at different barriers.
__device__ __forceinline__ bool find_tile(const ImportanceArguments& arguments, int64_t Item::* length, int size,
                                          Item& item, int64_t& tile) {
  __shared__ Item found;
  __shared__ int64_t found_tile;
  if (threadIdx.x == 0) {
    found_tile = -1;
    int64_t left = blockIdx.x;
    for (int64_t number = 0; number < arguments.items && found_tile < 0; ++number) {
      found = item_of(arguments, number);
      const int64_t tiles = (found.*length + size - 1) / size;
      if (left < tiles) found_tile = left;
      left -= tiles;
    }
  }
  __syncthreads();
  item = found;
  tile = found_tile;
  return tile >= 0;
}

}  // namespace minifocus::cuda
