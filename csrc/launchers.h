// The functions that each half implements, on operators.h's structs: plain C++ and CUDA, without torch. torch_glue.h calls
// them.
#pragma once
#include <cstddef>

#include "operators.h"

// The CUDA half only enqueues work on the stream: nothing waits for the GPU. Each function returns 0 or a cudaError_t.
// The CPU half gets no stream, returns when it has done its work, and needs no workspace.
#define MINIFOCUS_LAUNCHERS(half)                                                              \
  namespace minifocus::half {                                                                  \
  int region_pool(const RegionArgs&, void* stream);                                            \
  int region_route(const RouteArgs&, void* stream);                                            \
  int region_pool_backward(const RegionBackwardArgs&, void* stream);                           \
  int importance(const ImportanceArgs&, void* stream);                                         \
  int select_top_p(const SelectArgs&, void* stream);                                           \
  int gather_tokens(const GatherArgs&, void* stream);                                          \
  size_t region_workspace_bytes(int64_t regions);                                              \
  size_t importance_workspace_bytes(int64_t text, int64_t visual, int64_t heads);              \
  }
MINIFOCUS_LAUNCHERS(cpu)
MINIFOCUS_LAUNCHERS(cuda)
#undef MINIFOCUS_LAUNCHERS

namespace minifocus::cpu {

// The region operators call these before their outputs are allocated, whose size is known only then.
void region_choose(const RouteArgs&);       // region_route's choice
int64_t region_offsets(const RegionArgs&);  // writes offsets for the choice; returns the number of tokens

}  // namespace minifocus::cpu
