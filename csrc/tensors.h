// Checks of arguments, allocation and pointers for torch_glue.h, which turns torch's tensors into operators.h's structs.
//
// A wrong argument gives a RuntimeError that names it, what was expected and what came, in the words of
// minifocus/ops/checks.py.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "operators.h"

namespace minifocus {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
void expect(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Short: return "int16";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

inline int64_t bytes_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
    case ScalarType::Long: return 8;
    case ScalarType::Float:
    case ScalarType::Int: return 4;
    case ScalarType::BFloat16:
    case ScalarType::Half:
    case ScalarType::Short: return 2;
    case ScalarType::Char:
    case ScalarType::Byte:
    case ScalarType::Bool: return 1;
    default: return 0;
  }
}

constexpr int64_t kAny = -1;
constexpr int64_t kMaxSideOnGpu = int64_t(1) << 30;  // of a map: kernels count its rows and columns in 32 bits

constexpr int kCpu = -1;  // a device: kCpu, or the number of a GPU

// "float32 [2, *] on cpu"
inline std::string describe(const std::string& type, const std::vector<int64_t>& sizes, int device) {
  std::ostringstream text;
  text << type << " [";
  for (size_t i = 0; i < sizes.size(); ++i) {
    text << (i ? ", " : "");
    if (sizes[i] == kAny)
      text << "*";
    else
      text << sizes[i];
  }
  text << "] on ";
  if (device == kCpu)
    text << "cpu";
  else
    text << "cuda:" << device;
  return text.str();
}

inline int device_of(const Tensor& tensor) { return tensor.is_cpu() ? kCpu : tensor.get_device_index(); }

// torch passes None on where the schema has a tensor.
inline void expect_given(const char* name, const Tensor& tensor) {
  expect(tensor.defined(), name, ": expected a tensor, got None");
}

inline void expect_tensor(const char* name, const Tensor& tensor, const std::vector<ScalarType>& types,
                          const std::vector<int64_t>& sizes, int device) {
  expect_given(name, tensor);
  bool ok = device_of(tensor) == device && tensor.dim() == (int64_t)sizes.size();
  for (size_t i = 0; ok && i < sizes.size(); ++i) ok = sizes[i] == kAny || tensor.size(i) == sizes[i];
  if (ok && std::find(types.begin(), types.end(), tensor.scalar_type()) != types.end()) return;
  std::string expected;
  for (size_t i = 0; i < types.size(); ++i)
    expected += std::string(i == 0 ? "" : i + 1 == types.size() ? " or " : ", ") + name_of(types[i]);
  const auto came = tensor.sizes();
  expect(false, name, ": expected ", describe(expected, sizes, device), ", got ",
         describe(name_of(tensor.scalar_type()), {came.begin(), came.end()}, device_of(tensor)));
}

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: return DType::f64;  // the checks let no other through
  }
}

// What is accumulated and returned in: float64 for float64, else float32.
inline ScalarType wide(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// What torch throws through its stable ABI does not say why.
template <class Make>
Tensor made(const Make& make, ScalarType type, const std::vector<int64_t>& sizes, int device) {
  try {
    return make();
  } catch (const std::exception&) {
    expect(false, "cannot allocate ", describe(name_of(type), sizes, device));
    throw;
  }
}

inline Tensor allocate(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  return made([&] { return torch::stable::new_empty(like, sizes, type); }, type, sizes, device_of(like));
}

// `make` gives a copy of `tensor`.
template <class Make>
Tensor copied(const Tensor& tensor, const Make& make) {
  const auto sizes = tensor.sizes();
  return made([&] { return make(tensor); }, tensor.scalar_type(), {sizes.begin(), sizes.end()}, device_of(tensor));
}

inline Tensor as_contiguous(const Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  return copied(tensor, [](const Tensor& t) { return torch::stable::contiguous(t); });
}

// Contiguous, and a copy in any case: another thread may write to a tensor while an operator runs.
inline Tensor private_copy(const Tensor& tensor) {
  if (!tensor.is_contiguous()) return as_contiguous(tensor);
  return copied(tensor, [](const Tensor& t) { return torch::stable::clone(t); });
}

enum class Rest { written, unwritten };  // whether an operator may leave the last rows of an output as they are

// A call's tensors as pointers. The emulator (tests/emulator/module.cpp) has its own version of this. There, a kernel may touch
// only memory that was handed out here, and messages call it by these names.
struct Pointers {
  template <class T>
  static const T* input(const char*, const Tensor& tensor) {
    return static_cast<const T*>(tensor.const_data_ptr());
  }
  template <class T>
  static T* output(const char*, const Tensor& tensor, Rest = Rest::written) {
    return static_cast<T*>(tensor.mutable_data_ptr());
  }
  static void* workspace(const Tensor& tensor, size_t) { return tensor.mutable_data_ptr(); }
};

}  // namespace minifocus
