// Runs a launch: blocks one after another (or a few interleaved), the threads of a block as fibers that take turns.
//
// A thread runs until it waits in a barrier or a warp operation, or exits; then the next ready one is resumed. The last
// to arrive completes the barrier or the operation and makes all of its participants ready again. A block in which
// nobody is ready and not everybody has exited is stuck, which is reported with the lines where its threads wait.
#include "runtime.h"

#include <link.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <numeric>
#include <unordered_map>

namespace emulator {

Builtins builtins;
Launch current;
uintptr_t module_begin = 0, module_end = 0;

namespace {

constexpr uint64_t kMaxSteps = 200'000'000;  // of one launch: a few seconds
// Dynamic shared memory of a kernel without permission for more: 48 KB, less 2 for its __shared__ variables.
constexpr size_t kSharedBytes = 46 * 1024;

Options options;
std::unordered_map<uintptr_t, size_t> allowed_shared_bytes;  // by kernel
uint64_t random_state = 1;
std::string first_error;
uint32_t last_block_serial = 0;
Fiber scheduler;  // the program's own stack, on which run() is
Stacks stacks;
std::vector<std::unique_ptr<Block>> slots;  // kept from launch to launch

void (*call_kernel)(void*);
void* kernel_arguments;

// ---- The __shared__ variables: this module's thread-local memory (cuda_on_cpu.h) -----------------------------------

thread_local volatile char thread_local_anchor;  // finds that memory; nobody reads it: else it might be left out
unsigned char* static_shared = nullptr;
size_t static_shared_bytes = 0;
Block* static_shared_owner = nullptr;  // whose contents are in place; other blocks keep a copy

int find_module(dl_phdr_info* info, size_t, void*) {
  const uintptr_t inside = reinterpret_cast<uintptr_t>(&builtins);
  uintptr_t begin = ~uintptr_t(0), end = 0;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const auto& header = info->dlpi_phdr[i];
    if (header.p_type != PT_LOAD) continue;
    begin = std::min(begin, uintptr_t(info->dlpi_addr + header.p_vaddr));
    end = std::max(end, uintptr_t(info->dlpi_addr + header.p_vaddr + header.p_memsz));
  }
  if (inside < begin || inside >= end) return 0;
  module_begin = begin;
  module_end = end;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    if (info->dlpi_phdr[i].p_type != PT_TLS) continue;
    static_shared = static_cast<unsigned char*>(info->dlpi_tls_data);
    static_shared_bytes = info->dlpi_phdr[i].p_memsz;
  }
  return 1;
}

void put_static_shared_in_place(Block& block) {
  if (static_shared_owner == &block) return;
  if (static_shared_owner)
    static_shared_owner->static_memory.assign(static_shared, static_shared + static_shared_bytes);
  if (!block.static_memory.empty()) memcpy(static_shared, block.static_memory.data(), static_shared_bytes);
  static_shared_owner = &block;
}

// The module's other thread-local variables lie among the __shared__ ones, so all of them are put back, always.
struct StaticSharedRestored {
  const std::vector<unsigned char> original{static_shared, static_shared + static_shared_bytes};

  StaticSharedRestored() { static_shared_owner = nullptr; }
  ~StaticSharedRestored() {
    if (!original.empty()) memcpy(static_shared, original.data(), original.size());
  }
};

// ---- Taking turns --------------------------------------------------------------------------------------------------

void switch_to(Thread* next) {  // null: the scheduler
  Fiber& from = current.thread ? current.thread->fiber : scheduler;
  Fiber& to = next ? next->fiber : scheduler;
  if (&from == &to) return;
  current.thread = next;
  if (next) builtins.thread_index = next->index;
  switch_fiber(from, to);
}

Thread* next_ready() {
  Block& block = *current.block;
  if (block.ready.empty()) return nullptr;
  if (options.order == Order::random) std::swap(block.ready.front(), block.ready[random_number() % block.ready.size()]);
  const int number = block.ready.front();
  block.ready.pop_front();
  return &block.threads[number];
}

void make_ready(const std::vector<int>& numbers) {
  for (size_t i = 0; i < numbers.size(); i++) {
    const int number = options.order == Order::reverse ? numbers[numbers.size() - 1 - i] : numbers[i];
    current.block->threads[number].state = Thread::State::ready;
    current.block->ready.push_back(number);
  }
}

// ---- Completing barriers and warp operations -----------------------------------------------------------------------

void complete_barrier() {
  Block& block = *current.block;
  const int count = int(block.threads.size());
  if (!block.at_barrier || block.at_barrier + block.exited != count) return;
  std::vector<int> waiting;
  int votes = 0;
  for (Thread& thread : block.threads) {
    if (thread.state != Thread::State::at_barrier) continue;
    waiting.push_back(thread.number);
    votes += thread.value != 0;
  }
  const Thread& first = block.threads[waiting[0]];
  const Where where{0, first.file, first.line};
  if (block.exited)
    return fail(where, "barrier: %d of %d threads exited without reaching the __syncthreads of the others",
                block.exited, count);
  for (Thread& thread : block.threads)
    if (thread.line != first.line || thread.vote != first.vote || strcmp(thread.file, first.file) != 0)
      return fail(where, "barrier: divergent __syncthreads: thread %d waits at %s:%d, thread %d at %s:%d", first.number,
                  first.file, first.line, thread.number, thread.file, thread.line);
  for (Thread& thread : block.threads) {
    switch (thread.vote) {
      case Vote::none: break;
      case Vote::count: thread.result = votes; break;
      case Vote::all: thread.result = votes == count; break;
      case Vote::any: thread.result = votes > 0; break;
    }
  }
  make_ready(waiting);
  block.at_barrier = 0;
  block.phase++;
}

uint64_t reduce(WarpOp op, uint64_t a, uint64_t b) {
  switch (op) {
    case WarpOp::add: return a + b;
    case WarpOp::min: return std::min(a, b);
    case WarpOp::max: return std::max(a, b);
    case WarpOp::bit_and: return a & b;
    case WarpOp::bit_or: return a | b;
    case WarpOp::bit_xor: return a ^ b;
    default: return 0;
  }
}

// Completes the operation that `arrived` waits in, if all lanes of its mask that have not exited wait in it too.
void complete_warp_op(const Thread& arrived) {
  Block& block = *current.block;
  const unsigned mask = arrived.mask;
  const WarpOp op = arrived.op;
  if (mask & block.lanes_alive[arrived.warp] & ~block.lanes_waiting[arrived.warp]) return;
  const auto lane_thread = [&](int lane) -> Thread& { return block.threads[arrived.warp * 32 + lane]; };
  std::vector<int> participants;
  unsigned present = 0;
  for (int lane = 0; lane < 32; lane++) {
    if (!(mask & block.lanes_alive[arrived.warp] & 1u << lane)) continue;
    const Thread& thread = lane_thread(lane);
    if (thread.mask != mask || thread.op != op)
      return fail({0, arrived.file, arrived.line},
                  "warp: lane %d waits here with mask %08x; lane %d, of that mask, waits at %s:%d in another operation "
                  "or with another mask, %08x",
                  arrived.lane, mask, lane, thread.file, thread.line, thread.mask);
    participants.push_back(thread.number);
    present |= 1u << lane;
  }

  uint64_t ballot = 0, reduced = block.threads[participants[0]].value;
  for (size_t i = 0; i < participants.size(); i++) {
    const Thread& thread = block.threads[participants[i]];
    ballot |= uint64_t(thread.value != 0) << thread.lane;
    if (i) reduced = reduce(op, reduced, thread.value);
  }
  for (int number : participants) {
    Thread& thread = block.threads[number];
    switch (op) {
      case WarpOp::sync: break;
      case WarpOp::ballot: thread.result = ballot; break;
      case WarpOp::shuffle:
        if (!(present >> thread.source_lane & 1))
          return fail({0, thread.file, thread.line},
                      "warp: lane %d shuffles from lane %d, which has exited or is not in the mask %08x", thread.lane,
                      thread.source_lane, mask);
        thread.result = lane_thread(thread.source_lane).value;
        break;
      case WarpOp::match:
        thread.result = 0;
        for (int other : participants)
          if (block.threads[other].value == thread.value) thread.result |= 1u << block.threads[other].lane;
        break;
      default: thread.result = reduced;
    }
  }
  make_ready(participants);
  block.lanes_waiting[arrived.warp] &= ~present;
  if (op == WarpOp::sync) block.warp_phase[arrived.warp]++;  // shuffles and votes do not order memory
}

// ---- A thread's life -----------------------------------------------------------------------------------------------

void thread_main() {
  call_kernel(kernel_arguments);
  Thread& me = *current.thread;
  Block& block = *current.block;
  me.state = Thread::State::exited;
  block.exited++;
  block.lanes_alive[me.warp] &= ~(1u << me.lane);
  complete_barrier();
  const size_t end = std::min(block.threads.size(), size_t(me.warp) * 32 + 32);
  for (size_t i = size_t(me.warp) * 32; i < end; i++)  // operations that waited for this lane only
    if (block.threads[i].state == Thread::State::in_warp_op) complete_warp_op(block.threads[i]);
  switch_to(next_ready());
  abort();  // an exited thread is never resumed
}

Block& free_slot(const std::vector<Block*>& active) {
  for (auto& slot : slots)
    if (std::find(active.begin(), active.end(), slot.get()) == active.end()) return *slot;
  slots.push_back(std::make_unique<Block>());
  return *slots.back();
}

void set_up_region(Region& region, const char* name, void* memory, size_t bytes) {
  region.name = name;
  region.begin = reinterpret_cast<uintptr_t>(memory);
  region.end = region.begin + bytes;
  region.writable = region.shared = true;
  if (checks_memory() && region.cells.size() < bytes) region.cells.resize(bytes);
}

void start_block(Block& block, uint3 index, dim3 size, size_t shared_bytes, size_t first_stack) {
  block.index = index;
  block.serial = ++last_block_serial;
  block.phase = 0;
  block.exited = block.at_barrier = 0;
  block.acquired.clear();
  block.ready.clear();
  const size_t count = size_t(size.x) * size.y * size.z;
  block.threads.resize(count);
  block.warp_phase.assign((count + 31) / 32, 0);
  block.lanes_alive.assign((count + 31) / 32, 0);
  block.lanes_waiting.assign((count + 31) / 32, 0);
  block.first_stack = first_stack;

  put_static_shared_in_place(block);
  if (static_shared_bytes) memset(static_shared, options.poison, static_shared_bytes);
  block.dynamic_memory.resize((shared_bytes + 15) / 16);
  if (shared_bytes) memset(block.dynamic_memory.data(), options.poison, shared_bytes);
  set_up_region(block.static_shared, "__shared__ variables", static_shared, static_shared_bytes);
  set_up_region(block.dynamic_shared, "dynamic shared memory", block.dynamic_memory.data(), shared_bytes);

  for (size_t i = 0; i < count; i++) {
    Thread& thread = block.threads[i];
    thread.index = {unsigned(i % size.x), unsigned(i / size.x % size.y), unsigned(i / size.x / size.y)};
    thread.number = int(i);
    thread.warp = int(i / 32);
    thread.lane = int(i % 32);
    thread.fence_phase = kNoFence;
    thread.atomics_met.clear();
    thread.fiber.stack = stacks[first_stack + i];
    prepare(thread.fiber, thread_main);
    block.lanes_alive[i / 32] |= 1u << i % 32;
  }
  std::vector<int> all(count);
  std::iota(all.begin(), all.end(), 0);
  current.block = &block;
  make_ready(all);
}

// Lets a block run until it is done, stuck, or has given way to the others.
void resume_block(Block& block) {
  current.block = &block;
  builtins.block_index = block.index;
  put_static_shared_in_place(block);
  switch_to(next_ready());
}

void report_stuck(const Block& block) {
  std::string waiting;
  int shown = 0;
  for (const Thread& thread : block.threads) {
    if (thread.state == Thread::State::exited || shown++ >= 4) continue;
    char text[400];
    if (thread.state == Thread::State::at_barrier)
      snprintf(text, sizeof text, "\n  thread %d waits for the block at %s:%d", thread.number, thread.file,
               thread.line);
    else
      snprintf(text, sizeof text, "\n  thread %d waits for the lanes %08x at %s:%d", thread.number, thread.mask,
               thread.file, thread.line);
    waiting += text;
  }
  fail({}, "deadlock: %zu of %zu threads of block (%u, %u, %u) wait for what does not come:%s",
       block.threads.size() - block.exited, block.threads.size(), block.index.x, block.index.y, block.index.z,
       waiting.c_str());
}

std::vector<uint32_t> block_order(uint64_t count) {
  std::vector<uint32_t> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (options.order == Order::reverse) std::reverse(order.begin(), order.end());
  if (options.order == Order::random)
    for (uint64_t i = count; i > 1; i--) std::swap(order[i - 1], order[random_number() % i]);
  return order;
}

const char* invalid_configuration(dim3 grid, dim3 block, size_t shared_bytes) {
  if (!grid.x || !grid.y || !grid.z) return "the grid is empty";
  if (!block.x || !block.y || !block.z) return "the block is empty";
  if (grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535) return "the grid is too large";
  if (block.x > 1024 || block.y > 1024 || block.z > 64) return "the block is too large in one direction";
  if (uint64_t(block.x) * block.y * block.z > 1024) return "the block has more than 1024 threads";
  const auto allowed = allowed_shared_bytes.find(current.kernel);
  if (shared_bytes > (allowed == allowed_shared_bytes.end() ? kSharedBytes : allowed->second))
    return "more dynamic shared memory than the kernel is allowed";
  return nullptr;
}

void run_blocks(dim3 grid, dim3 size, size_t shared_bytes) {
  const size_t threads = size_t(size.x) * size.y * size.z;
  const std::vector<uint32_t> order = block_order(uint64_t(grid.x) * grid.y * grid.z);
  const size_t resident = std::min(order.size(), size_t(std::max(1, options.resident_blocks)));
  stacks.reserve(threads * resident);
  std::vector<Block*> active;
  std::vector<size_t> free_stacks;
  for (size_t i = 0; i < resident; i++) free_stacks.push_back(i * threads);
  size_t started = 0, turn = 0;
  while (started < order.size() || !active.empty()) {
    while (active.size() < resident && started < order.size()) {
      const uint32_t i = order[started++];
      const uint3 index{i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
      Block& block = free_slot(active);
      start_block(block, index, size, shared_bytes, free_stacks.back());
      free_stacks.pop_back();
      active.push_back(&block);
    }
    turn = (options.order == Order::random ? random_number() : turn + 1) % active.size();
    Block& block = *active[turn];
    resume_block(block);
    if (!first_error.empty()) return;
    if (size_t(block.exited) == threads) {
      free_stacks.push_back(block.first_stack);
      active.erase(active.begin() + turn);
      if (static_shared_owner == &block) static_shared_owner = nullptr;
    } else if (block.ready.empty()) {
      return report_stuck(block);
    }
  }
}

}  // namespace

// ---- Errors --------------------------------------------------------------------------------------------------------

void fail(Where where, const char* format, ...) {
  if (first_error.empty()) {
    char text[2000];
    va_list values;
    va_start(values, format);
    vsnprintf(text, sizeof text, format, values);
    va_end(values);
    first_error = text;
    if (current.kernel) {
      snprintf(text, sizeof text, "\n  in kernel <function 0x%zx>", size_t(current.kernel - module_begin));
      first_error += text;
    }
    if (current.thread) {
      const uint3 b = builtins.block_index, t = current.thread->index;
      snprintf(text, sizeof text, ", block (%u, %u, %u), thread (%u, %u, %u)", b.x, b.y, b.z, t.x, t.y, t.z);
      first_error += text;
    }
    if (where.pc)
      snprintf(text, sizeof text, ", at <pc 0x%zx>", size_t(where.pc - module_begin));
    else if (where.file)
      snprintf(text, sizeof text, ", at %s:%d", where.file, where.line);
    if (where.pc || where.file) first_error += text;
  }
  if (current.thread) switch_to(nullptr);  // the launch is given up: its threads are never resumed
}

void count_steps(uint64_t steps, Where where) {
  current.steps += steps;
  if (current.steps > kMaxSteps) fail(where, "livelock: the launch does not come to an end; it may wait in a loop");
}

uint32_t random_number() {  // xorshift
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return uint32_t(random_state >> 16);
}

void let_others_run() {
  current.block->ready.push_back(current.thread->number);
  switch_to(nullptr);
}

void maybe_preempt() {
  if (!options.preempt || !current.thread || random_number() % options.preempt) return;
  if (random_number() % 16 == 0) return let_others_run();
  current.block->ready.push_back(current.thread->number);  // a thread of the same block: far cheaper than another block
  switch_to(next_ready());
}

void maybe_change(const Region& region, size_t offset, size_t size) {
  if (region.name != options.changing || random_number() % 2) return;
  char* const memory = reinterpret_cast<char*>(region.begin + offset);
  std::swap_ranges(memory, memory + size, options.other.data() + offset);
}

// ---- What the header's functions call ------------------------------------------------------------------------------

int lane() { return current.thread->lane; }

unsigned char* dynamic_shared() { return reinterpret_cast<unsigned char*>(current.block->dynamic_memory.data()); }

int64_t shared_bytes_option() { return options.shared_bytes; }

void allow_shared(const void* kernel, int64_t bytes) {
  allowed_shared_bytes[reinterpret_cast<uintptr_t>(kernel)] = size_t(bytes);
}

int block_barrier(Vote vote, int predicate, const char* file, int line) {
  Thread& me = *current.thread;
  me.state = Thread::State::at_barrier;
  me.vote = vote;
  me.value = predicate != 0;
  me.file = file;
  me.line = line;
  current.block->at_barrier++;
  complete_barrier();
  switch_to(next_ready());
  return int(me.result);
}

uint64_t warp_collective(WarpOp op, unsigned mask, uint64_t value, int source_lane, const char* file, int line) {
  Thread& me = *current.thread;
  if (!(mask >> me.lane & 1)) fail({0, file, line}, "warp: lane %d is not in its own mask %08x", me.lane, mask);
  me.state = Thread::State::in_warp_op;
  current.block->lanes_waiting[me.warp] |= 1u << me.lane;
  me.op = op;
  me.mask = mask;
  me.value = value;
  me.source_lane = source_lane;
  me.file = file;
  me.line = line;
  complete_warp_op(me);
  switch_to(next_ready());
  return me.result;
}

void check_failed(const char* condition, const char* file, int line) {
  fail({0, file, line}, "check: DEVICE_CHECK(%s) does not hold", condition);
}

cudaError_t run(dim3 grid, dim3 block, size_t shared_bytes, void (*call)(void*), void* arguments,
                size_t arguments_size, const void* kernel) {
  if (!first_error.empty()) return cudaErrorLaunchFailure;  // as on a GPU, an error stays
  thread_local_anchor = 1;                                   // its memory exists from the first use on
  dl_iterate_phdr(find_module, nullptr);
  current.kernel = reinterpret_cast<uintptr_t>(kernel);
  if (const char* reason = invalid_configuration(grid, block, shared_bytes)) {
    fail({}, "launch: invalid configuration, %s: grid (%u, %u, %u), block (%u, %u, %u), %zu bytes of shared memory",
         reason, grid.x, grid.y, grid.z, block.x, block.y, block.z, shared_bytes);
    current.kernel = 0;
    return cudaErrorInvalidConfiguration;
  }
  call_kernel = call;
  kernel_arguments = arguments;
  current.arguments = reinterpret_cast<uintptr_t>(arguments);
  current.arguments_size = arguments_size;
  builtins.block_size = block;
  builtins.grid_size = grid;
  current.first_block = last_block_serial + 1;
  current.steps = 0;
  begin_launch_checks();
  const StaticSharedRestored restored;
  run_blocks(grid, block, shared_bytes);
  current = Launch{};
  return first_error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

void begin(const Options& new_options) {
  options = new_options;
  random_state = options.seed * 0x9E3779B97F4A7C15ull | 1;
  for (int i = 0; i < 8; i++) random_number();
  first_error.clear();
  allowed_shared_bytes.clear();
  forget_regions();
}

const std::string& error() { return first_error; }

}  // namespace emulator
