// The functions of the CPU half (cpu/) and of the CUDA half (cuda/), on operators.h's structs and without torch.
//
// Both halves have the same names, so that torch_glue.h calls either. A region operator takes several calls, because the
// CPU half allocates its outputs once their size is known:
//   region_choose     region_route's choice
//   region_offsets    returns how many rows of tokens to allocate
//   region_pool or region_route
#pragma once
#include <cstddef>

#include "operators.h"

// Returns when the outputs are written.
namespace minifocus::cpu {

void region_choose(const RouteArgs&);
int64_t region_offsets(const RegionArgs&);  // writes offsets for the choice; returns the number of tokens
void region_pool(const RegionArgs&);        // writes tokens and source to these offsets
inline void region_route(const RouteArgs& args) { region_pool(args.region); }
void region_pool_backward(const RegionBackwardArgs&);
void importance(const ImportanceArgs&);
void select_top_p(const SelectArgs&);
void gather_tokens(const GatherArgs&);

inline size_t region_workspace_bytes(int64_t) { return 0; }
inline size_t importance_workspace_bytes(int64_t, int64_t, int64_t) { return 0; }

}  // namespace minifocus::cpu

// Launchers: they only enqueue work on the stream, and nothing waits for the GPU. Each returns 0 or a cudaError_t.
namespace minifocus::cuda {

inline void region_choose(const RouteArgs&) {}                                 // the kernel of region_route does
inline int64_t region_offsets(const RegionArgs& args) { return args.cells; }  // the most that there can be
int region_pool(const RegionArgs&, void* stream);
int region_route(const RouteArgs&, void* stream);
int region_pool_backward(const RegionBackwardArgs&, void* stream);
int importance(const ImportanceArgs&, void* stream);
int select_top_p(const SelectArgs&, void* stream);
int gather_tokens(const GatherArgs&, void* stream);

size_t region_workspace_bytes(int64_t regions);
size_t importance_workspace_bytes(int64_t text, int64_t visual, int64_t heads);

}  // namespace minifocus::cuda
