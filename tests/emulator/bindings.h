// What the emulator's Python modules have in common: numpy arrays become the memory that kernels may touch.
//
// A module has configure(...), which sets the options of all later calls, and Failure, the exception of a failed call;
// tests/emulator/emulated.py turns the addresses in its text into source lines.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "emulator.h"

namespace emulator {

namespace py = pybind11;

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline Options& configured() {
  static Options options;
  return options;
}

// One call of a launcher. Each array is given under the name that messages call it by.
class Call {
 public:
  Call() { begin(configured()); }

  template <class T>
  const T* input(const char* name, const py::array& array) {
    expect_contiguous(name, array);
    add_region(name, array.data(), array.nbytes(), Use::read_only);
    return static_cast<const T*>(array.data());
  }

  // Null for None.
  template <class T>
  const T* optional_input(const char* name, const py::object& array) {
    return array.is_none() ? nullptr : input<T>(name, array.cast<py::array>());
  }

  template <class T>
  T* in_out(const char* name, py::array array) {
    expect_contiguous(name, array);
    add_region(name, array.data(), array.nbytes(), Use::writable);
    return static_cast<T*>(array.mutable_data());
  }

  // An output that begins unwritten. finish() reports bytes that stay so, unless they may.
  enum class Left { nothing_unwritten, rest_unwritten };
  template <class T>
  T* output(const char* name, py::array array, Left left = Left::nothing_unwritten) {
    expect_contiguous(name, array);
    add_region(name, array.data(), array.nbytes(), Use::output);
    if (left == Left::nothing_unwritten) to_be_written_.push_back(name);
    return static_cast<T*>(array.mutable_data());
  }

  void* workspace(size_t bytes) {
    workspace_.assign((bytes + 7) / 8, 0xeeeeeeeeeeeeeeeeull);
    add_region("workspace", workspace_.data(), bytes, Use::output);
    return workspace_.data();
  }

  // `error` is what the launcher returned.
  void finish(int error_code) {
    if (!error_code)
      for (const std::string& name : to_be_written_) check_written(name.c_str());
    if (!error().empty()) throw Failure(error());
    if (error_code) throw Failure("launch: the launcher returned error " + std::to_string(error_code));
  }

 private:
  static void expect_contiguous(const char* name, const py::array& array) {
    if (array.flags() & py::array::c_style) return;
    throw py::value_error(std::string(name) + ": expected a contiguous array");
  }

  std::vector<std::string> to_be_written_;
  std::vector<unsigned long long> workspace_;
};

inline void configure(const std::string& order, uint64_t seed, int preempt, int resident_blocks, int poison,
                      int64_t shared_bytes, const std::string& changing, const py::bytes& other) {
  const Order orders[] = {Order::forward, Order::reverse, Order::random};
  const char* names[] = {"forward", "reverse", "random"};
  for (int i = 0; i < 3; i++) {
    if (order != names[i]) continue;
    configured() = {orders[i],    seed,     preempt, resident_blocks, static_cast<unsigned char>(poison),
                    shared_bytes, changing, other};
    return;
  }
  throw py::value_error("order: expected forward, reverse or random, got " + order);
}

inline void add_common(py::module_& module) {
  py::register_local_exception<Failure>(module, "Failure");
  module.def("configure", &configure, py::kw_only(), py::arg("order"), py::arg("seed"), py::arg("preempt"),
             py::arg("resident_blocks"), py::arg("poison"), py::arg("shared_bytes"), py::arg("changing"),
             py::arg("other"));
}

}  // namespace emulator
