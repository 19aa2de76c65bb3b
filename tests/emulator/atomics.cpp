// Atomics and fences. They are not in the header, where the compiler's instrumentation would take them for plain accesses.
// A thread is never interrupted in one of these functions after its check, so the operation is atomic.
#include "runtime.h"

namespace emulator {
namespace {

template <class T>
void before_atomic(T* address, uintptr_t pc) {
  maybe_preempt();
  count_steps(100, {pc});  // the more, the sooner a loop that waits by atomics is noticed
  const uintptr_t where = reinterpret_cast<uintptr_t>(address);
  check_access(where, sizeof(T), AccessKind::atomic_update, pc);
  note_atomic(where);
}

}  // namespace
}  // namespace emulator

#define CALLER_PC (reinterpret_cast<uintptr_t>(__builtin_return_address(0)) - 1)
#define ATOMIC(T, name, next_value)                   \
  T name(T* address, T value) {                       \
    emulator::before_atomic(address, CALLER_PC);      \
    const T old = *address;                           \
    *address = next_value;                            \
    return old;                                       \
  }
#define INTEGER_ATOMICS(T)                            \
  ATOMIC(T, atomicAdd, static_cast<T>(uint64_t(old) + uint64_t(value))) \
  ATOMIC(T, atomicMin, value < old ? value : old)     \
  ATOMIC(T, atomicMax, value > old ? value : old)     \
  ATOMIC(T, atomicExch, value)                        \
  ATOMIC(T, atomicAnd, old & value)                   \
  ATOMIC(T, atomicOr, old | value)                    \
  ATOMIC(T, atomicXor, old ^ value)                   \
  T atomicCAS(T* address, T expected, T value) {      \
    emulator::before_atomic(address, CALLER_PC);      \
    const T old = *address;                           \
    if (old == expected) *address = value;            \
    return old;                                       \
  }
INTEGER_ATOMICS(int)
INTEGER_ATOMICS(unsigned)
INTEGER_ATOMICS(unsigned long long)
ATOMIC(long long, atomicMin, value < old ? value : old)
ATOMIC(long long, atomicMax, value > old ? value : old)
ATOMIC(float, atomicAdd, old + value)
ATOMIC(float, atomicExch, value)
ATOMIC(double, atomicAdd, old + value)

// An atomic followed by a fence takes up what was released at its address; a fence followed by an atomic releases.
void __threadfence() {
  emulator::Thread& me = *emulator::current.thread;
  for (uintptr_t address : me.atomics_met) emulator::acquire(address);
  me.atomics_met.clear();
  me.fence_phase = emulator::current.block->phase;
}

void __nanosleep(unsigned) {
  emulator::count_steps(1000, {CALLER_PC});
  emulator::let_others_run();
}

namespace gpu {

void store_release(unsigned long long* address, unsigned long long value) {
  using namespace emulator;
  const uintptr_t where = reinterpret_cast<uintptr_t>(address);
  maybe_preempt();
  check_access(where, sizeof value, AccessKind::atomic_write, CALLER_PC);
  current.thread->fence_phase = current.block->phase;
  release(where, false);
  *address = value;
  let_others_run();  // they may see this value before its writer does anything else
}

unsigned long long load_acquire(const unsigned long long* address) {
  using namespace emulator;
  const uintptr_t where = reinterpret_cast<uintptr_t>(address);
  count_steps(1000, {CALLER_PC});
  let_others_run();  // otherwise a loop that waits for the value would wait in vain
  check_access(where, sizeof *address, AccessKind::atomic_read, CALLER_PC);
  acquire(where);
  return *address;
}

}  // namespace gpu
