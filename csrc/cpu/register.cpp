// Declares the operators of torch.ops.minifocus and registers the CPU half, through LibTorch's stable ABI: the library
// that this builds works with every Python >= 3.10 and torch >= 2.10. Fake kernels and autograd: minifocus/ops/backend.py.
#include "../torch_glue.h"
#include "operators.h"

namespace minifocus {
namespace {

struct Cpu {
  static constexpr bool kIsCpu = true;
  struct Call {
    explicit Call(const Tensor&) {}
  };
  static int64_t region_workspace(int64_t) { return 0; }
  static int64_t importance_workspace(int64_t, int64_t, int64_t) { return 0; }
  static void region_choose(const RouteArgs& args) { cpu::region_choose(args); }
  static int64_t region_offsets(const RegionArgs& args) { return cpu::region_offsets(args); }
  static void region_pool(const RegionArgs& args, Call&) { cpu::region_pool(args); }
  static void region_pool_backward(const RegionBackwardArgs& args, Call&) { cpu::region_pool_backward(args); }
  static void importance(const ImportanceArgs& args, Call&) { cpu::importance(args); }
  static void select_top_p(const SelectArgs& args, Call&) { cpu::select_top_p(args); }
  static void gather_tokens(const GatherArgs& args, Call&) { cpu::gather_tokens(args); }
};

}  // namespace

namespace cpu {

void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, n, grain, body);
}

int64_t num_threads() { return torch::stable::get_num_threads(); }

}  // namespace cpu
}  // namespace minifocus

STABLE_TORCH_LIBRARY(minifocus, library) {
  library.def(
      "region_pool(Tensor x, Tensor grid_hw, Tensor choice, int window, int[] pools, Tensor? weight=None)"
      " -> (Tensor tokens, Tensor source, Tensor offsets)");
  library.def(
      "region_pool_backward(Tensor grad_tokens, Tensor x, Tensor grid_hw, Tensor choice, Tensor offsets, int window,"
      " int[] pools, Tensor? weight=None) -> (Tensor grad_x, Tensor grad_weight)");
  library.def(
      "region_route(Tensor x, Tensor grid_hw, Tensor context, Tensor bias, int window, int[] pools)"
      " -> (Tensor tokens, Tensor source, Tensor offsets, Tensor choice)");
  library.def("importance(Tensor q, Tensor k, Tensor cu_text, Tensor cu_visual, float scale) -> Tensor");
  library.def(
      "select_top_p(Tensor scores, Tensor cu_visual, float gamma=0., int? keep=None) -> (Tensor index, Tensor count)");
  library.def("gather_tokens(Tensor[] columns, Tensor index) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(minifocus, CPU, library) { minifocus::Operators<minifocus::Cpu>::register_in(library); }
