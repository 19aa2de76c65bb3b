// Work on several threads. ../register.cpp implements this with torch's threads, so that the rest of this half needs no torch.
#pragma once
#include <cstdint>
#include <functional>

namespace minifocus::cpu {

// Runs body(begin, end) on pieces of [0, n), each of at least `grain` numbers except for the last.
void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body);
int64_t num_threads();

}  // namespace minifocus::cpu
