// The CUDA half's operators, run by the emulator on torch's CPU tensors. tests/emulator/emulated.py calls them.
//
// ../../csrc/torch_glue.h turns the tensors into launchers' arguments, as it does for a GPU. The half that it is given here
// tells the emulator of each pointer that it hands out, and fills outputs with garbage.
#include "../../csrc/launchers.h"
#include "../../csrc/tensors.h"

#include <cstring>
#include <memory>

#include "bindings.h"

namespace minifocus {
namespace emulated {

using namespace cuda;

constexpr bool kIsCpu = false;

inline int expected_device(const Tensor&) { return kCpu; }

class Call {
 public:
  explicit Call(const Tensor&) {}

  template <class T>
  const T* input(const char* name, const Tensor& tensor) {
    return static_cast<const T*>(call_.input(name, tensor.const_data_ptr(), bytes(tensor)));
  }
  template <class T>
  T* output(const char* name, const Tensor& tensor, Rest rest = Rest::written) {
    std::memset(tensor.mutable_data_ptr(), 0xee, bytes(tensor));
    const auto left = rest == Rest::written ? emulator::Left::nothing_unwritten : emulator::Left::rest_unwritten;
    return static_cast<T*>(call_.output(name, tensor.mutable_data_ptr(), bytes(tensor), left));
  }
  void* workspace(const Tensor& tensor, size_t size) {
    std::memset(tensor.mutable_data_ptr(), 0xee, bytes(tensor));
    return call_.output("workspace", tensor.mutable_data_ptr(), size, emulator::Left::rest_unwritten);
  }
  template <class Args>
  void run(const char*, int (*launch)(const Args&, void* stream), const Args& args) {
    call_.finish(launch(args, nullptr));
  }

 private:
  static size_t bytes(const Tensor& tensor) { return tensor.numel() * bytes_of(tensor.scalar_type()); }

  emulator::Call call_;
};

}  // namespace emulated

namespace half = emulated;

}  // namespace minifocus

#include "../../csrc/torch_glue.h"

namespace {

// Implements torch.ops.<operators>.*, which have been declared. Called once.
void register_in(const char* operators) {
  using torch::stable::detail::StableLibrary;
  static StableLibrary library(StableLibrary::Kind::IMPL, operators, "CPU", __FILE__, __LINE__);
  minifocus::register_in(library);
}

}  // namespace

PYBIND11_MODULE(operators, module) {
  emulator::add_common(module);
  module.def("register_in", &register_in);
}
