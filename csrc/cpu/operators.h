// The CPU half: functions on ../operators.h's structs, in plain C++ without torch.
#pragma once
#include <functional>

#include "../operators.h"

namespace minifocus::cpu {

// A region operator here is several calls, so that outputs are allocated once their size is known.
void region_choose(const RouteArgs&);       // region_route's choice
int64_t region_offsets(const RegionArgs&);  // writes offsets for the choice; returns the number of tokens
void region_pool(const RegionArgs&);        // writes tokens and source to these offsets
void region_pool_backward(const RegionBackwardArgs&);
void importance(const ImportanceArgs&);
void select_top_p(const SelectArgs&);
void gather_tokens(const GatherArgs&);

// Runs body(begin, end) on pieces of [0, n), each of at least `grain` but the last, on torch's threads (register.cpp).
void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body);
int64_t num_threads();

}  // namespace minifocus::cpu
