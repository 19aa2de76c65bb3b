// Registers the CUDA half of torch.ops.minifocus through LibTorch's stable ABI; minifocus/ops/registration.py declares the
// operators. The launchers get the current stream of the tensors' device and never wait for it.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <cuda_runtime.h>

#include "../halves.h"
#include "../tensors.h"

namespace minifocus {
namespace cuda {

constexpr bool kIsCpu = false;

// torch also calls this half where only a later tensor is on a GPU.
inline int expected_device(const Tensor& first) { return first.is_cuda() ? first.get_device_index() : 0; }

struct Call : Pointers {
  explicit Call(const Tensor& tensor) : guard(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  }
  template <class Args>
  void run(const char* name, int (*launch)(const Args&, void* stream), const Args& args) const {
    const int error = launch(args, stream);
    expect(error == 0, name, ": ", cudaGetErrorString(static_cast<cudaError_t>(error)));
  }
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
};

}  // namespace cuda

namespace half = cuda;

}  // namespace minifocus

#include "../torch_glue.h"

STABLE_TORCH_LIBRARY_IMPL(minifocus, CUDA, library) { minifocus::register_in(library); }
