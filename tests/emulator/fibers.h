// A fiber is a function call that can be left in the middle and resumed later: a stack of its own and the place where
// that stack was left. Changing from one to another costs about 10 ns, so that a block of 1024 of them is affordable.
#pragma once

#include <cstddef>

namespace emulator {

constexpr size_t kStackBytes = 64 * 1024;

struct Fiber {
  void* stack_pointer = nullptr;  // where it was left
  char* stack = nullptr;          // kStackBytes of its own; null for the program's original stack
};

// Makes `fiber` begin with entry() when it is next switched to. entry must not return.
void prepare(Fiber& fiber, void (*entry)());

// Leaves `from`, which is running, and resumes `to`; returns when something switches back.
void switch_fiber(Fiber& from, Fiber& to);

// `count` stacks, each (up to 16384 of them) above a page that no one may touch, so that an overflow stops the program.
class Stacks {
 public:
  void reserve(size_t count);
  char* operator[](size_t i) const { return memory_ + i * kStride + kGuardBytes; }
  ~Stacks() { release(); }

 private:
  static constexpr size_t kGuardBytes = 4096, kStride = kStackBytes + kGuardBytes;
  void release();
  char* memory_ = nullptr;
  size_t count_ = 0;
};

}  // namespace emulator
