// Registers the CUDA half of torch.ops.minifocus (declared by the CPU half, which is loaded first) through LibTorch's
// stable ABI. The launchers get the current stream of the tensors' device and never wait for it.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <cuda_runtime.h>

#include "../torch_glue.h"
#include "launchers.h"

namespace minifocus {
namespace {

struct Cuda {
  static constexpr bool kIsCpu = false;
  struct Call {
    explicit Call(const Tensor& tensor) : guard(tensor.get_device_index()) {
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    }
    torch::stable::accelerator::DeviceGuard guard;
    void* stream = nullptr;
  };
  static void check(const char* name, int error) {
    expect(error == 0, name, ": ", cudaGetErrorString(static_cast<cudaError_t>(error)));
  }
  static int64_t region_workspace(int64_t regions) { return cuda::region_workspace_bytes(regions); }
  static int64_t importance_workspace(int64_t text, int64_t visual, int64_t heads) {
    return cuda::importance_workspace_bytes(text, visual, heads);
  }
  static void region_pool(const RegionArgs& args, Call& call) {
    check("region_pool", cuda::region_pool(args, call.stream));
  }
  static void region_route(const RouteArgs& args, Call& call) {
    check("region_route", cuda::region_route(args, call.stream));
  }
  static void region_pool_backward(const RegionBackwardArgs& args, Call& call) {
    check("region_pool_backward", cuda::region_pool_backward(args, call.stream));
  }
  static void importance(const ImportanceArgs& args, Call& call) {
    check("importance", cuda::importance(args, call.stream));
  }
  static void select_top_p(const SelectArgs& args, Call& call) {
    check("select_top_p", cuda::select_top_p(args, call.stream));
  }
  static void gather_tokens(const GatherArgs& args, Call& call) {
    check("gather_tokens", cuda::gather_tokens(args, call.stream));
  }
};

}  // namespace
}  // namespace minifocus

STABLE_TORCH_LIBRARY_IMPL(minifocus, CUDA, library) { minifocus::Operators<minifocus::Cuda>::register_in(library); }
