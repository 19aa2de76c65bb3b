// The state that the emulator's files share: threads, blocks, and who is running.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "cuda_on_cpu.h"
#include "emulator.h"
#include "fibers.h"

namespace emulator {

// ---- Shadow memory (checks.cpp): what is known about each byte that kernels may touch ------------------------------

struct Access {
  uint32_t block = 0;  // its serial number; blocks are numbered from 1 through all launches
  uint32_t phase = 0;  // how many barriers the block had passed
  uint32_t pc = 0;     // offset in this module
  uint16_t thread = 0;
  uint16_t warp_phase = 0;  // how many __syncwarp the warp had passed
};

struct Cell {
  enum Readers : uint8_t { one_thread, one_warp, several_warps };  // since the last barrier
  Access write, read;
  bool written = false, write_was_atomic = false, read_was_atomic = false;
  Readers readers = one_thread;
};

struct Region {
  std::string name;
  uintptr_t begin = 0, end = 0;
  bool writable = false;
  bool shared = false;      // of one block
  std::vector<Cell> cells;  // one per byte; none where nothing is written
};

// What a block handed to others by a release: all that `thread` did up to and in `phase`, and the others before it.
struct Handoff {
  uint32_t block, phase;
  uint16_t thread;
};
struct Acquired {
  Handoff handoff;
  uint32_t phase;  // since when, and by whom; after the next barrier all threads of the block have it
  uint16_t thread;
};

// ---- Threads and blocks --------------------------------------------------------------------------------------------

struct Thread {
  enum class State : uint8_t { ready, at_barrier, in_warp_op, exited };
  Fiber fiber;
  uint3 index;
  int number, warp, lane;
  State state;

  // The barrier or warp operation that it waits in.
  const char* file;
  int line;
  Vote vote;
  WarpOp op;
  unsigned mask;
  int source_lane;
  uint64_t value, result;

  uint32_t fence_phase;                // the phase of its last __threadfence, or kNoFence
  std::vector<uintptr_t> atomics_met;  // addresses of its atomics since then
};
constexpr uint32_t kNoFence = ~0u;

struct Block {
  uint3 index;
  uint32_t serial = 0, phase = 0;
  std::vector<Thread> threads;
  std::deque<int> ready;
  int exited = 0, at_barrier = 0;
  std::vector<uint16_t> warp_phase;
  std::vector<unsigned> lanes_alive, lanes_waiting;  // of each warp: not exited; in a warp operation
  size_t first_stack = 0;
  std::vector<uint4> dynamic_memory;          // uint4: aligned to 16 bytes
  std::vector<unsigned char> static_memory;   // the contents of the __shared__ variables while another block runs
  Region dynamic_shared, static_shared;
  std::vector<Acquired> acquired;
};

struct Launch {
  Block* block = nullptr;    // running now; null outside of kernels
  Thread* thread = nullptr;  // of that block
  uint32_t first_block = 1;  // serial number of the launch's first block
  uintptr_t kernel = 0;
  uintptr_t arguments = 0, arguments_size = 0;  // of the kernel, which every thread copies
  uint64_t steps = 0;  // how much has been done, for finding endless loops
};

extern Launch current;
extern uintptr_t module_begin, module_end;  // where this module lies in memory

// ---- Services of runtime.cpp ---------------------------------------------------------------------------------------

// Where something happened: a place in the code or the source line of a call.
struct Where {
  uintptr_t pc = 0;
  const char* file = nullptr;
  int line = 0;
};

// Reports an error. In a kernel it stops the launch and does not return.
__attribute__((format(printf, 2, 3))) void fail(Where where, const char* format, ...);

void maybe_preempt();   // as Options::preempt says
void let_others_run();  // other threads of the block and the other resident blocks
void maybe_change(const Region& region, size_t offset, size_t size);  // before a read of it, as Options::changing says
void count_steps(uint64_t steps, Where where);
uint32_t random_number();

// ---- Services of checks.cpp ----------------------------------------------------------------------------------------

enum class AccessKind { read, write, atomic_read, atomic_write, atomic_update };
void check_access(uintptr_t address, size_t size, AccessKind kind, uintptr_t pc);
void begin_launch_checks();
void forget_regions();

// The memory model between blocks: a release attaches what its thread knows to an address, an acquire takes it up.
void release(uintptr_t address, bool keep_earlier);
void acquire(uintptr_t address);
void note_atomic(uintptr_t address);

}  // namespace emulator
