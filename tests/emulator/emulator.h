// The emulator's functions for a test module (module.cpp), outside of kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace emulator {

enum class Order { forward, reverse, random };

struct Options {
  Order order = Order::forward;     // in which threads and blocks take their turns
  uint64_t seed = 0;                // of everything random below
  int preempt = 0;                  // n > 0: about one memory access in n lets another thread run first
  int resident_blocks = 1;          // how many blocks are under way at a time; more than one interleaves them
  unsigned char poison = 0xff;      // shared memory is filled with it before each block
  int64_t shared_bytes = 225 * 1024;  // what gpu::max_shared_bytes() says; less makes kernels take their other paths
  // As if another stream wrote to an input meanwhile: before each read of the one of this name, by a coin's toss, the
  // bytes read change places with those of `other`. Only in a module compiled for checking.
  std::string changing, other;
};

// Begins a call: sets the options, forgets the last error and every region.
void begin(const Options& options);

// Memory that kernels may touch. `output` counts as unwritten until a kernel has written it.
enum class Use { read_only, writable, output };
void add_region(const char* name, const void* memory, size_t bytes, Use use);

// Reports an error if some byte of an `output` was never written. Knows only in a module compiled for checking.
void check_written(const char* name);

// Empty, or what went wrong first since begin(). "<pc 0x12>" and "<function 0x12>" in it are addresses in this module.
const std::string& error();

// Whether the kernels of this module were compiled for checking.
bool checks_memory();

}  // namespace emulator
