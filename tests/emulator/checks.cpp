// Memory checks. A kernel file compiled with -fsanitize=thread,alignment,bounds,... calls a function before every
// memory access that it cannot prove harmless. Those functions usually come from the compiler's run-time libraries;
// here they are the emulator's own (at the end of this file), and record what happens to each byte of the buffers:
//
//   memcheck    an access outside of every buffer that the kernel was given, or a write to an input
//   initcheck   a read of memory that nobody has written
//   racecheck   two accesses to a byte, at least one of them a write, that nothing orders
//   alignment, bounds, arithmetic      a misaligned access, an index past an array's end, an integer overflow
#include <algorithm>
#include <unordered_map>

#include "runtime.h"

namespace emulator {
namespace {

bool kernels_are_instrumented = false;  // set by __tsan_init, which an instrumented file calls when it is loaded
std::vector<std::unique_ptr<Region>> regions;
Region* last_region = nullptr;
std::unordered_map<uintptr_t, std::vector<Handoff>> handoffs;  // by the address of the release

bool contains(const Region& region, uintptr_t address) { return address >= region.begin && address < region.end; }

Region* find_region(uintptr_t address) {
  Block& block = *current.block;
  if (contains(block.dynamic_shared, address)) return &block.dynamic_shared;
  if (contains(block.static_shared, address)) return &block.static_shared;
  if (last_region && contains(*last_region, address)) return last_region;
  for (auto& region : regions)
    if (contains(*region, address)) return last_region = region.get();
  return nullptr;
}

void fail_outside(uintptr_t address, size_t size, bool writes, uintptr_t pc) {
  const auto distance = [&](const Region& region) {
    return address < region.begin ? region.begin - address : address - region.end;
  };
  const Region* nearest = nullptr;
  const auto consider = [&](const Region& region) {
    if (region.end > region.begin && (!nearest || distance(region) < distance(*nearest))) nearest = &region;
  };
  for (auto& region : regions) consider(*region);
  consider(current.block->dynamic_shared);
  consider(current.block->static_shared);
  const char* access = writes ? "write" : "read";
  if (!nearest) return fail({pc}, "memcheck: %s of %zu bytes outside of every buffer", access, size);
  fail({pc}, "memcheck: %s of %zu bytes outside of every buffer; the nearest is '%s' of %zu bytes, at byte %td", access,
       size, nearest->name.c_str(), size_t(nearest->end - nearest->begin), ptrdiff_t(address - nearest->begin));
}

// ---- Which accesses are ordered ------------------------------------------------------------------------------------

// Whether what another block did has been handed to this thread.
bool handed_over(uint32_t block, uint32_t phase, uint16_t thread) {
  for (const Acquired& a : current.block->acquired) {
    const Handoff& h = a.handoff;
    const bool covered = h.block == block && (phase < h.phase || (phase == h.phase && thread == h.thread));
    const bool known_here = a.phase < current.block->phase || a.thread == current.thread->number;
    if (covered && known_here) return true;
  }
  return false;
}

bool unordered(const Access& earlier, bool shared) {
  const Block& block = *current.block;
  const Thread& me = *current.thread;
  if (earlier.block != block.serial) {
    if (shared || earlier.block < current.first_block) return false;  // gone with its block, or done before this launch
    return !handed_over(earlier.block, earlier.phase, earlier.thread);
  }
  if (earlier.phase != block.phase || earlier.thread == me.number) return false;
  return earlier.thread / 32 != me.warp || earlier.warp_phase == block.warp_phase[me.warp];
}

bool unordered_reads(const Cell& cell, bool shared) {
  const Block& block = *current.block;
  const Thread& me = *current.thread;
  const Access& last = cell.read;
  if (cell.readers == Cell::one_thread || last.block != block.serial || last.phase != block.phase)
    return unordered(last, shared);
  return cell.readers == Cell::several_warps || last.thread / 32 != me.warp ||
         last.warp_phase == block.warp_phase[me.warp];
}

void record_read(Cell& cell, const Access& access, bool atomic) {
  const Access& last = cell.read;
  if (last.block != access.block || last.phase != access.phase) {
    cell.readers = Cell::one_thread;
    cell.read_was_atomic = atomic;
  } else {
    if (last.thread / 32 != access.thread / 32)
      cell.readers = Cell::several_warps;
    else if (cell.readers != Cell::several_warps && last.warp_phase != access.warp_phase)
      cell.readers = Cell::one_thread;  // what the warp read before its __syncwarp is ordered for all that matters
    else if (cell.readers == Cell::one_thread && last.thread != access.thread)
      cell.readers = Cell::one_warp;
    cell.read_was_atomic = cell.read_was_atomic && atomic;
  }
  cell.read = access;
}

void fail_race(const Region& region, size_t byte, const char* access, const char* earlier_kind, const Access& earlier,
               uintptr_t pc) {
  const bool other = earlier.block != current.block->serial;
  fail({pc}, "racecheck: %s '%s' at byte %zu is not ordered after a %s by thread %d of %s at <pc 0x%x>", access,
       region.name.c_str(), byte, earlier_kind, earlier.thread, other ? "another block" : "its block", earlier.pc);
}

}  // namespace

// ---- The check of one access ---------------------------------------------------------------------------------------

void check_access(uintptr_t address, size_t size, AccessKind kind, uintptr_t pc) {
  if (!kernels_are_instrumented || !current.thread) return;
  const uintptr_t stack = reinterpret_cast<uintptr_t>(current.thread->fiber.stack);
  if (address - stack < kStackBytes) return;  // its own local variables
  if (address - reinterpret_cast<uintptr_t>(&builtins) < sizeof builtins) return;
  if (address - current.arguments < current.arguments_size) return;
  count_steps(1, {pc});

  const bool atomic = kind != AccessKind::read && kind != AccessKind::write;
  const bool writes = kind != AccessKind::read && kind != AccessKind::atomic_read;
  const bool reads = kind != AccessKind::write && kind != AccessKind::atomic_write;
  Region* region = find_region(address);
  if (!region) {
    const bool constant = address >= module_begin && address < module_end && !writes;
    return constant ? void() : fail_outside(address, size, writes, pc);
  }
  const char* name = region->name.c_str();
  const size_t offset = address - region->begin;
  if (address + size > region->end)
    return fail({pc}, "memcheck: %s of %zu bytes at byte %zu of '%s' crosses its end at byte %zu",
                writes ? "write" : "read", size, offset, name, size_t(region->end - region->begin));
  if (!region->writable && writes) return fail({pc}, "memcheck: write to '%s', which is read-only", name);
  if (!region->writable) return maybe_change(*region, offset, size);

  const Block& block = *current.block;
  const Thread& me = *current.thread;
  const Access access{block.serial, block.phase, uint32_t(pc - module_begin), uint16_t(me.number),
                      block.warp_phase[me.warp]};
  for (size_t byte = offset; byte < offset + size; byte++) {
    Cell& cell = region->cells[byte];
    const bool written = region->shared ? cell.write.block == block.serial : cell.written;
    if (reads && !written) return fail({pc}, "initcheck: read of '%s' at byte %zu, which is unwritten", name, byte);
    if (!(atomic && cell.write_was_atomic) && unordered(cell.write, region->shared))
      return fail_race(*region, byte, writes ? "write to" : "read of", "write", cell.write, pc);
    if (!writes) {
      record_read(cell, access, atomic);
      continue;
    }
    if (!(atomic && cell.read_was_atomic) && unordered_reads(cell, region->shared))
      return fail_race(*region, byte, "write to", "read", cell.read, pc);
    cell.write = access;
    cell.write_was_atomic = atomic;
    cell.written = true;
  }
}

// ---- Handing memory from block to block ----------------------------------------------------------------------------

void begin_launch_checks() { handoffs.clear(); }

void release(uintptr_t address, bool keep_earlier) {
  const Thread& me = *current.thread;
  if (!kernels_are_instrumented || me.fence_phase == kNoFence) return;
  std::vector<Handoff>& given = handoffs[address];
  if (!keep_earlier) given.clear();
  given.push_back({current.block->serial, me.fence_phase, uint16_t(me.number)});
  for (const Acquired& a : current.block->acquired) {
    const bool known_here = a.phase < me.fence_phase || a.thread == me.number;
    if (known_here) given.push_back(a.handoff);
  }
}

void acquire(uintptr_t address) {
  const auto found = handoffs.find(address);
  if (found == handoffs.end()) return;
  const uint16_t me = uint16_t(current.thread->number);
  for (const Handoff& h : found->second)
    if (h.block != current.block->serial && !handed_over(h.block, h.phase, h.thread))
      current.block->acquired.push_back({h, current.block->phase, me});
}

void note_atomic(uintptr_t address) {
  release(address, true);
  if (kernels_are_instrumented) current.thread->atomics_met.push_back(address);
}

// ---- Functions for a test module -----------------------------------------------------------------------------------

bool checks_memory() { return kernels_are_instrumented; }

void forget_regions() {
  regions.clear();
  last_region = nullptr;
}

void add_region(const char* name, const void* memory, size_t bytes, Use use) {
  auto region = std::make_unique<Region>();
  region->name = name;
  region->begin = reinterpret_cast<uintptr_t>(memory);
  region->end = region->begin + bytes;
  region->writable = use != Use::read_only;
  if (region->writable && kernels_are_instrumented) {
    region->cells.resize(bytes);
    for (Cell& cell : region->cells) cell.written = use != Use::output;
  }
  regions.push_back(std::move(region));
}

void check_written(const char* name) {
  for (auto& region : regions) {
    if (region->name != name) continue;
    const auto unwritten = [](const Cell& cell) { return !cell.written; };
    const auto first = std::find_if(region->cells.begin(), region->cells.end(), unwritten);
    if (first == region->cells.end()) continue;
    fail({}, "initcheck: %td of the %zu bytes of output '%s' were never written, the first at byte %td",
         std::count_if(first, region->cells.end(), unwritten), region->cells.size(), name,
         first - region->cells.begin());
  }
}

}  // namespace emulator

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  using namespace emulator;
  const uintptr_t address = reinterpret_cast<uintptr_t>(memory);
  if (!error().empty()) return cudaErrorLaunchFailure;
  if (!bytes) return cudaSuccess;
  for (auto& region : regions) {
    if (!contains(*region, address)) continue;
    if (!region->writable || bytes > region->end - address) {
      fail({}, "memcheck: cudaMemsetAsync of %zu bytes at byte %zu of '%s', which is %s", bytes,
           size_t(address - region->begin), region->name.c_str(), region->writable ? "too small" : "read-only");
      return cudaErrorInvalidValue;
    }
    memset(memory, value, bytes);
    const size_t first = address - region->begin;
    for (size_t i = first; i < first + bytes && !region->cells.empty(); i++) region->cells[i].written = true;
    return cudaSuccess;
  }
  fail({}, "memcheck: cudaMemsetAsync of %zu bytes outside of every buffer", bytes);
  return cudaErrorInvalidValue;
}

// ---- The functions that instrumented code calls --------------------------------------------------------------------
// Hidden, so that they serve this module only. A return address minus one lies inside of the instruction that called.

#define HOOK extern "C" __attribute__((visibility("hidden")))
#define HOOK_PC (reinterpret_cast<uintptr_t>(__builtin_return_address(0)) - 1)
#define READ_AND_WRITE_HOOKS(suffix, size)                                                                     \
  HOOK void __tsan_read##suffix(void* p) {                                                                     \
    emulator::check_access(reinterpret_cast<uintptr_t>(p), size, emulator::AccessKind::read, HOOK_PC);         \
    emulator::maybe_preempt();                                                                                 \
  }                                                                                                            \
  HOOK void __tsan_write##suffix(void* p) {                                                                    \
    emulator::check_access(reinterpret_cast<uintptr_t>(p), size, emulator::AccessKind::write, HOOK_PC);        \
    emulator::maybe_preempt();                                                                                 \
  }                                                                                                            \
  HOOK void __tsan_unaligned_read##suffix(void* p) {                                                           \
    emulator::check_access(reinterpret_cast<uintptr_t>(p), size, emulator::AccessKind::read, HOOK_PC);         \
  }                                                                                                            \
  HOOK void __tsan_unaligned_write##suffix(void* p) {                                                          \
    emulator::check_access(reinterpret_cast<uintptr_t>(p), size, emulator::AccessKind::write, HOOK_PC);        \
  }
READ_AND_WRITE_HOOKS(1, 1)
READ_AND_WRITE_HOOKS(2, 2)
READ_AND_WRITE_HOOKS(4, 4)
READ_AND_WRITE_HOOKS(8, 8)
READ_AND_WRITE_HOOKS(16, 16)
HOOK void __tsan_read_range(void* p, size_t size) {
  emulator::check_access(reinterpret_cast<uintptr_t>(p), size, emulator::AccessKind::read, HOOK_PC);
}
HOOK void __tsan_write_range(void* p, size_t size) {
  emulator::check_access(reinterpret_cast<uintptr_t>(p), size, emulator::AccessKind::write, HOOK_PC);
}
HOOK void __tsan_init() { emulator::kernels_are_instrumented = true; }

HOOK void __ubsan_handle_type_mismatch_v1(void*, uintptr_t address) {
  emulator::fail({HOOK_PC}, "alignment: address 0x%zx is misaligned for its type", size_t(address));
}
HOOK void __ubsan_handle_out_of_bounds(void*, uintptr_t index) {
  emulator::fail({HOOK_PC}, "bounds: index %td is outside of the array", ptrdiff_t(index));
}
#define ARITHMETIC_HOOK(name, what) \
  HOOK void __ubsan_handle_##name(void*, uintptr_t) { emulator::fail({HOOK_PC}, "arithmetic: " what); }
ARITHMETIC_HOOK(add_overflow, "an integer sum overflows")
ARITHMETIC_HOOK(sub_overflow, "an integer difference overflows")
ARITHMETIC_HOOK(mul_overflow, "an integer product overflows")
ARITHMETIC_HOOK(negate_overflow, "an integer negation overflows")
ARITHMETIC_HOOK(divrem_overflow, "an integer division by zero or overflow")
ARITHMETIC_HOOK(shift_out_of_bounds, "a shift by a negative number or by too much")
