// What the emulator's Python modules have in common.
//
// A module has configure(...), which sets the options of all later calls, and failure(), which says what went wrong in the last
// one; tests/emulator/emulated.py turns the addresses in its text into source lines.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "emulator.h"

namespace emulator {

namespace py = pybind11;

inline Options& configured() {
  static Options options;
  return options;
}

inline std::string& failure() {
  static std::string text;
  return text;
}

// Whether a launcher may leave some of an output's bytes as they are.
enum class Left { nothing_unwritten, rest_unwritten };

// One call of a launcher: the memory that its kernels may touch, each part under the name that messages call it by.
class Call {
 public:
  Call() { begin(configured()); }

  const void* input(const char* name, const void* memory, size_t bytes) {
    add_region(name, memory, bytes, Use::read_only);
    return memory;
  }

  void* in_out(const char* name, void* memory, size_t bytes) {
    add_region(name, memory, bytes, Use::writable);
    return memory;
  }

  // It begins unwritten. finish() reports bytes that stay so, unless they may.
  void* output(const char* name, void* memory, size_t bytes, Left left = Left::nothing_unwritten) {
    add_region(name, memory, bytes, Use::output);
    if (left == Left::nothing_unwritten) to_be_written_.push_back(name);
    return memory;
  }

  // `error_code` is what the launcher returned.
  void finish(int error_code) {
    if (!error_code)
      for (const std::string& name : to_be_written_) check_written(name.c_str());
    failure() = error();
    if (error_code && failure().empty())
      failure() = "launch: the launcher returned error " + std::to_string(error_code);
  }

 private:
  std::vector<std::string> to_be_written_;
};

inline void configure(const std::string& order, uint64_t seed, int preempt, int resident_blocks, int poison,
                      int64_t shared_bytes, const std::string& changing, const py::bytes& other) {
  failure().clear();
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
  module.def("failure", [] { return failure(); });
  module.def("configure", &configure, py::kw_only(), py::arg("order"), py::arg("seed"), py::arg("preempt"),
             py::arg("resident_blocks"), py::arg("poison"), py::arg("shared_bytes"), py::arg("changing"),
             py::arg("other"));
}

}  // namespace emulator
