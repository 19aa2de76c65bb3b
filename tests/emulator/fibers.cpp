#include "fibers.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>

// emulator_switch_stack(void** leave, void* resume): pushes the registers that a function has to preserve, stores the
// stack pointer in *leave, takes `resume` as the stack pointer and pops the registers that were left there.
// The x86-64 version is the one that has been run; the AArch64 version follows the same plan and has not.
#if defined(__x86_64__)
asm(R"(
.text
.globl emulator_switch_stack
.hidden emulator_switch_stack
.type emulator_switch_stack, @function
emulator_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch_stack, . - emulator_switch_stack
)");
constexpr size_t kSavedWords = 8;  // six registers, the return address, and a word that keeps the stack aligned
constexpr size_t kReturnAddress = 6;
#elif defined(__aarch64__)
asm(R"(
.text
.globl emulator_switch_stack
.hidden emulator_switch_stack
.type emulator_switch_stack, @function
emulator_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size emulator_switch_stack, . - emulator_switch_stack
)");
constexpr size_t kSavedWords = 20;
constexpr size_t kReturnAddress = 11;  // x30
#else
#error "the emulator's fibers are written for x86-64 and AArch64"
#endif

extern "C" __attribute__((visibility("hidden"))) void emulator_switch_stack(void** leave, void* resume);

namespace emulator {

void prepare(Fiber& fiber, void (*entry)()) {
  // Stacks that all began at the same offset in a page would compete for the same few lines of the cache.
  const size_t shift = reinterpret_cast<uintptr_t>(fiber.stack) / 4096 % 32 * 128;
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes - shift) - kSavedWords;
  for (size_t i = 0; i < kSavedWords; i++) top[i] = nullptr;
  top[kReturnAddress] = reinterpret_cast<void*>(entry);
  fiber.stack_pointer = top;
}

void switch_fiber(Fiber& from, Fiber& to) { emulator_switch_stack(&from.stack_pointer, to.stack_pointer); }

// Each guard takes two of the 65530 mappings that Linux allows a process, which needs others too.
constexpr size_t kGuarded = 16384;

void Stacks::reserve(size_t count) {
  if (count <= count_) return;
  release();
  void* memory =
      mmap(nullptr, count * kStride, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("no memory for the stacks of the emulated threads");
  memory_ = static_cast<char*>(memory);
  count_ = count;
  for (size_t i = 0; i < std::min(count, kGuarded); i++) mprotect(memory_ + i * kStride, kGuardBytes, PROT_NONE);
}

void Stacks::release() {
  if (memory_) munmap(memory_, count_ * kStride);
  memory_ = nullptr;
  count_ = 0;
}

}  // namespace emulator
