// The CUDA half: launchers on ../operators.h's structs. They only enqueue work on the stream: nothing waits for the
// GPU. Each returns 0 or a cudaError_t.
#pragma once
#include <cstddef>

#include "../operators.h"

namespace minifocus::cuda {

int region_pool(const RegionArgs&, void* stream);
int region_route(const RouteArgs&, void* stream);
int region_pool_backward(const RegionBackwardArgs&, void* stream);
int importance(const ImportanceArgs&, void* stream);
int select_top_p(const SelectArgs&, void* stream);
int gather_tokens(const GatherArgs&, void* stream);

size_t region_workspace_bytes(int64_t regions);
size_t importance_workspace_bytes(int64_t text, int64_t visual, int64_t heads);

}  // namespace minifocus::cuda
