// What went wrong, with the file, key or argument, what was expected and what came. Thrown inside the library; at its edges
// (minifocus.h, minifocus_c.h) errors are values.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace minifocus {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The parts, each as a stream prints it, as one Error.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Error(text.str());
}

template <class... Parts>
void expect(bool holds, const Parts&... parts) {
  if (!holds) fail(parts...);
}

}  // namespace minifocus
