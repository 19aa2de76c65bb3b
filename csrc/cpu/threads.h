// torch's threads, for the CPU half (../register.cpp has them).
#pragma once
#include <cstdint>
#include <functional>

namespace minifocus::cpu {

// Runs body(begin, end) on pieces of [0, n), each of at least `grain` but the last.
void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body);
int64_t num_threads();

}  // namespace minifocus::cpu
