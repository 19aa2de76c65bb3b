// The CPU half: functions on ../operators.h's structs, in plain C++ without torch.
#pragma once
#include <functional>

#include "../operators.h"

namespace minifocus::cpu {

void region_pool(const RegionArgs&);
void region_route(const RouteArgs&);
void region_pool_backward(const RegionBackwardArgs&);
void importance(const ImportanceArgs&);
void select_top_p(const SelectArgs&);
void gather_tokens(const GatherArgs&);

// Runs body(begin, end) on pieces of [0, n), each of at least `grain` (but the last); register.cpp lends torch's
// threads.
void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body);
int64_t num_threads();

}  // namespace minifocus::cpu
