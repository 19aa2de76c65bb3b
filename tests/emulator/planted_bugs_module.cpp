// planted_bugs.cu for Python, and the emulator's number conversions and types. tests/emulator/test_emulator.py calls it.
#include "planted_bugs.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>

#include "bindings.h"
#include "cuda_on_cpu.h"

namespace {

using emulator::Call;
namespace py = pybind11;
using Size = std::array<unsigned, 3>;

// y is an output that begins unwritten, or if `y_is_ready` one that has been filled.
void run(const std::string& name, py::array x, py::array y, bool y_is_ready, py::array counter, Size grid, Size block,
         size_t shared_bytes) {
  for (int i = 0; i < kNumPlantedBugs; i++) {
    if (name != kPlantedBugs[i].name) continue;
    Call call;
    call.input("x", x.data(), x.nbytes());
    const float* from = static_cast<const float*>(x.data());
    float* to = static_cast<float*>(y.mutable_data());
    if (y_is_ready) call.in_out("y", to, y.nbytes());
    else call.output("y", to, y.nbytes());
    int* count = static_cast<int*>(counter.mutable_data());
    call.in_out("counter", count, counter.nbytes());
    const int n = int(x.size());
    const PlantedKernel kernel = kPlantedBugs[i].kernel;
    return call.finish(launch_planted_bug(kernel, from, to, count, n, grid.data(), block.data(), shared_bytes));
  }
  throw py::value_error("no such kernel: " + name);
}

void clear(py::array array, size_t bytes, bool read_only) {
  Call call;
  void* memory = array.mutable_data();
  if (read_only) call.input("array", memory, array.nbytes());
  else call.output("array", memory, array.nbytes());
  call.finish(planted_memset(memory, bytes));
}

template <class From, class To, To convert(From)>
py::array_t<To> converted(py::array_t<From> numbers) {
  py::array_t<To> result(numbers.size());
  for (py::ssize_t i = 0; i < numbers.size(); i++) result.mutable_data()[i] = convert(numbers.data()[i]);
  return result;
}

float from_bfloat16(uint16_t bits) { return __bfloat162float(__ushort_as_bfloat16(bits)); }
uint16_t to_bfloat16(float value) { return __bfloat16_as_ushort(__float2bfloat16(value)); }
float from_half(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
uint16_t to_half(float value) { return __half_as_ushort(__float2half(value)); }

// Size and alignment, as the CUDA C++ programming guide's table "Alignment Requirements" has them.
#define EXPECT_LAYOUT(T, size, alignment) static_assert(sizeof(T) == size && alignof(T) == alignment, #T)
EXPECT_LAYOUT(char2, 2, 2);
EXPECT_LAYOUT(char3, 3, 1);
EXPECT_LAYOUT(char4, 4, 4);
EXPECT_LAYOUT(uchar2, 2, 2);
EXPECT_LAYOUT(uchar3, 3, 1);
EXPECT_LAYOUT(uchar4, 4, 4);
EXPECT_LAYOUT(short2, 4, 4);
EXPECT_LAYOUT(short3, 6, 2);
EXPECT_LAYOUT(short4, 8, 8);
EXPECT_LAYOUT(ushort2, 4, 4);
EXPECT_LAYOUT(ushort3, 6, 2);
EXPECT_LAYOUT(ushort4, 8, 8);
EXPECT_LAYOUT(int2, 8, 8);
EXPECT_LAYOUT(int3, 12, 4);
EXPECT_LAYOUT(int4, 16, 16);
EXPECT_LAYOUT(uint2, 8, 8);
EXPECT_LAYOUT(uint3, 12, 4);
EXPECT_LAYOUT(uint4, 16, 16);
EXPECT_LAYOUT(longlong2, 16, 16);
EXPECT_LAYOUT(longlong3, 24, 8);
EXPECT_LAYOUT(ulonglong2, 16, 16);
EXPECT_LAYOUT(ulonglong3, 24, 8);
EXPECT_LAYOUT(float2, 8, 8);
EXPECT_LAYOUT(float3, 12, 4);
EXPECT_LAYOUT(float4, 16, 16);
EXPECT_LAYOUT(double2, 16, 16);
EXPECT_LAYOUT(double3, 24, 8);
EXPECT_LAYOUT(__nv_bfloat16, 2, 2);
EXPECT_LAYOUT(__nv_bfloat162, 4, 4);
EXPECT_LAYOUT(__half, 2, 2);
EXPECT_LAYOUT(__half2, 4, 4);
EXPECT_LAYOUT(dim3, 12, 4);

}  // namespace

PYBIND11_MODULE(planted_bugs, module) {
  emulator::add_common(module);
  module.def("run", &run);
  module.def("clear", &clear);
  module.def("from_bfloat16", &converted<uint16_t, float, from_bfloat16>);
  module.def("to_bfloat16", &converted<float, uint16_t, to_bfloat16>);
  module.def("from_half", &converted<uint16_t, float, from_half>);
  module.def("to_half", &converted<float, uint16_t, to_half>);
}
