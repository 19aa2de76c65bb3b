// Registers one half of torch.ops.minifocus, through LibTorch's stable ABI: the library that this builds works with every
// Python >= 3.10 and torch >= 2.10. Compiled twice: with USE_CUDA it is the CUDA half, without it the CPU half, which also
// declares the operators and so is loaded first. Fake kernels and gradients: minifocus/ops/torch_integration.py.
#ifdef USE_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <cuda_runtime.h>
#endif

#include "cpu/threads.h"
#include "launchers.h"
#include "tensors.h"
#ifdef MINIFOCUS_RUNTIME
#include "runtime/operators.h"
#endif

namespace minifocus {

#ifdef USE_CUDA

namespace cuda {

constexpr bool kIsCpu = false;

// torch also calls this half if only a later tensor is on a GPU.
inline int expected_device(const Tensor& first) { return first.is_cuda() ? first.get_device_index() : 0; }

// Launchers get the current stream of the tensors' device and never wait for it.
struct Call : Pointers {
  explicit Call(const Tensor& tensor) : guard(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  }
  template <class Args>
  void run(const char* name, int (*launcher)(const Args&, void* stream), const Args& args) const {
    const int error = launcher(args, stream);
    expect(error == 0, name, ": ", cudaGetErrorString(static_cast<cudaError_t>(error)));
  }
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
};

}  // namespace cuda

namespace half = cuda;

#else

namespace cpu {

constexpr bool kIsCpu = true;

inline int expected_device(const Tensor&) { return kCpu; }

struct Call : Pointers {
  explicit Call(const Tensor&) {}
  template <class Args>
  static void run(const char*, int (*launcher)(const Args&, void* stream), const Args& args) {
    launcher(args, nullptr);
  }
};

void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, n, grain, body);
}

int64_t num_threads() { return torch::stable::get_num_threads(); }

}  // namespace cpu

namespace half = cpu;

#endif

}  // namespace minifocus

#include "torch_glue.h"

#ifdef USE_CUDA

STABLE_TORCH_LIBRARY_IMPL(minifocus, CUDA, library) { minifocus::register_in(library); }

#else

namespace {

void declare_in(torch::stable::detail::StableLibrary& library) {
  for (const char* schema : {
#include "../minifocus/ops/schemas.inc"
       })
    library.def(schema);
}

}  // namespace

#ifdef MINIFOCUS_RUNTIME

// csrc/runtime asks for the operators where the process has none yet: a Python in it may have loaded its own.
void minifocus::register_operators() {
  using torch::stable::detail::StableLibrary;
  static StableLibrary declared(StableLibrary::Kind::DEF, "minifocus", nullptr, __FILE__, __LINE__);
  static StableLibrary implemented(StableLibrary::Kind::IMPL, "minifocus", "CPU", __FILE__, __LINE__);
  declare_in(declared);
  minifocus::register_in(implemented);
}

#else

STABLE_TORCH_LIBRARY(minifocus, library) { declare_in(library); }

STABLE_TORCH_LIBRARY_IMPL(minifocus, CPU, library) { minifocus::register_in(library); }

#endif

#endif
