// Registers the CPU half of torch.ops.minifocus through LibTorch's stable ABI: the library that this builds works with
// every Python >= 3.10 and torch >= 2.10. minifocus/ops/registration.py declares the operators.
#include "../halves.h"
#include "../tensors.h"
#include "parallel.h"

namespace minifocus {
namespace cpu {

constexpr bool kIsCpu = true;

inline int expected_device(const Tensor&) { return kCpu; }

struct Call : Pointers {
  explicit Call(const Tensor&) {}
  template <class Args>
  static void run(const char*, void (*function)(const Args&), const Args& args) {
    function(args);
  }
};

void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, n, grain, body);
}

int64_t num_threads() { return torch::stable::get_num_threads(); }

}  // namespace cpu

namespace half = cpu;

}  // namespace minifocus

#include "../torch_glue.h"

STABLE_TORCH_LIBRARY_IMPL(minifocus, CPU, library) { minifocus::register_in(library); }
