// Registers one half of torch.ops.minifocus, through LibTorch's stable ABI: the library that this builds works with every
// Python >= 3.10 and torch >= 2.10. Compiled twice: with USE_CUDA it is the CUDA half, without it the CPU half, which also
// declares the operators and so is loaded first. Fake kernels and gradients: minifocus/ops/torch_integration.py.
#include "torch_glue.h"

#ifndef USE_CUDA

namespace minifocus::cpu {

void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, n, grain, body);
}

int64_t num_threads() { return torch::stable::get_num_threads(); }

}  // namespace minifocus::cpu

STABLE_TORCH_LIBRARY(minifocus, library) {
  for (const char* schema : {
#include "../minifocus/ops/schemas.inc"
       })
    library.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(minifocus, CPU, library) { minifocus::Operators::register_in(library); }

#else

STABLE_TORCH_LIBRARY_IMPL(minifocus, CUDA, library) { minifocus::Operators::register_in(library); }

#endif
