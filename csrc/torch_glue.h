// The operators as torch calls them: from tensors to operators.h's structs, to one half's functions, and back.
//
// Written once for every half. A file that includes this one has defined namespace minifocus::half, with launchers.h's functions
// and with
//   constexpr bool kIsCpu      whether this is the CPU half: it has float64, its outputs are as long as there are tokens, and it
//                              checks the contents of index tensors too, in copies that nobody else can write to
//   int expected_device(x)     where the tensors of a call have to be, by its first one
//   struct Call : Pointers     what holds while an operator runs, such as a device guard and a stream:
//     explicit Call(x)
//     void run(name, launcher, args)     throws if the launcher reports an error
//
// register.cpp does so for the CPU and for CUDA, and tests/emulator/module.cpp for CUDA in the emulator.
#pragma once
#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "launchers.h"
#include "tensors.h"

namespace minifocus {

using half::Call;
using half::kIsCpu;

// ---- Checks --------------------------------------------------------------------------------------------------------

inline std::vector<ScalarType> floating() {
  std::vector<ScalarType> types{ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
  if (kIsCpu) types.push_back(ScalarType::Double);
  return types;
}

// The first tensor of a call; returns where the others have to be.
inline int expect_first(const char* name, const Tensor& tensor, const std::vector<ScalarType>& types,
                        const std::vector<int64_t>& sizes) {
  expect_given(name, tensor);
  const int device = half::expected_device(tensor);
  expect_tensor(name, tensor, types, sizes, device);
  return device;
}

// A tensor of indices, contiguous. On the CPU it is a copy, so that an operator uses what it has checked. On a GPU, kernels
// check what they read.
inline Tensor own(const Tensor& tensor) { return kIsCpu ? private_copy(tensor) : as_contiguous(tensor); }

// Offsets that rise from 0 to `rows`. On a GPU only their shape is checked here, and a kernel that meets others stops with
// an error.
inline Tensor checked_offsets(const char* name, const Tensor& offsets, int64_t rows, int device) {
  expect_tensor(name, offsets, {ScalarType::Long}, {kAny}, device);
  expect(offsets.size(0) >= 1, name, ": expected at least one number, got none");
  expect(rows == 0 || offsets.size(0) >= 2, name, ": expected offsets from 0 to ", rows, ", got one number");
  const Tensor packed = own(offsets);
  if (!kIsCpu) return packed;
  const int64_t* values = Pointers::input<int64_t>(name, packed);
  const int64_t last = offsets.size(0) - 1;
  for (int64_t i = 0; i < last; ++i)
    expect(values[i] <= values[i + 1], name, ": expected offsets that never fall, got ", values[i], " before ",
           values[i + 1]);
  expect(values[0] == 0 && values[last] == rows, name, ": expected offsets from 0 to ", rows, ", got ", values[0],
         " to ", values[last]);
  return packed;
}

struct Workspace {
  Tensor memory;
  void* pointer = nullptr;

  Workspace(Call& call, const Tensor& like, size_t bytes) {
    if (bytes == 0) return;
    memory = allocate(like, {int64_t(bytes + 7) / 8}, ScalarType::Long);  // int64, so that it is aligned
    pointer = call.workspace(memory, bytes);
  }
};

// ---- The region operators ------------------------------------------------------------------------------------------

// The part of RegionArgs that all of them have.
struct Region {
  RegionArgs args{};
  std::vector<Grid> grids;
  Tensor x;

  Region(Call& call, const Tensor& given, const Tensor& grid_hw, int64_t window, const std::vector<int64_t>& pools) {
    expect_tensor("grid_hw", grid_hw, {ScalarType::Long}, {kAny, 2}, kCpu);
    expect(1 <= window && window <= kMaxWindow, "window: expected from 1 to ", kMaxWindow, ", got ", window);
    expect(pools.size() >= 2 && pools.size() % 2 == 0 && pools.size() <= 2 * kMaxBranches,
           "pools: expected from 1 to ", kMaxBranches, " pairs of numbers, got ", pools.size(), " numbers");
    x = as_contiguous(given);
    args.x = call.input<void>("x", x);
    args.dtype = dtype_of(x);
    args.cells = x.size(0);
    args.channels = x.size(1);
    args.window = window;
    args.branches = pools.size() / 2;
    for (int64_t s = 0; s < args.branches; ++s) {
      const int64_t h = pools[2 * s], w = pools[2 * s + 1];
      const bool drop = h == 0 && w == 0;
      expect(drop || (h > 0 && w > 0 && window % h == 0 && window % w == 0),
             "pools: expected pairs that divide the window ", window, ", or (0, 0), got (", h, ", ", w, ")");
      args.pools[s] = {h, w};
    }
    const Tensor packed = private_copy(grid_hw);  // it is on the CPU, whichever half this is
    const int64_t* sizes = Pointers::input<int64_t>("grid_hw", packed);
    args.pictures = grid_hw.size(0);
    int64_t cells = 0;
    for (int64_t b = 0; b < args.pictures; ++b) {
      const int64_t h = sizes[2 * b], w = sizes[2 * b + 1];
      int64_t area = 0;
      const bool fits = h >= 0 && w >= 0 && !__builtin_mul_overflow(h, w, &area) && area <= args.cells;
      expect(fits, "grid_hw: expected maps of at most ", args.cells, " cells, as x has, got (", h, ", ", w, ")");
      expect(area <= args.cells - cells, "grid_hw: expected ", args.cells, " cells in all, as x has, got more");
      expect(kIsCpu || area == 0 || std::max(h, w) <= kMaxSideOnGpu, "grid_hw: expected sides of at most ",
             kMaxSideOnGpu, " on a GPU, got (", h, ", ", w, ")");
      cells += area;
      grids.push_back(area == 0 ? Grid{0, 0} : Grid{h, w});  // a side may be anything where the other is 0
      args.regions += num_regions(grids.back(), window);
    }
    expect(cells == args.cells, "grid_hw: expected ", args.cells, " cells in all, as x has, got ", cells);
    args.grids = grids.data();
  }
};

// The inputs `choice` and `weight` of region_pool and its backward.
struct Chosen {
  Tensor choice;
  std::optional<Tensor> weight;

  Chosen(Call& call, RegionArgs& args, const Tensor& x, const Tensor& given, const std::optional<Tensor>& given_weight) {
    expect_tensor("choice", given, {ScalarType::Long}, {args.regions}, device_of(x));
    choice = own(given);
    args.choice = call.input<int64_t>("choice", choice);
    if (kIsCpu) {
      for (int64_t r = 0; r < args.regions; ++r)
        expect(0 <= args.choice[r] && args.choice[r] < args.branches, "choice: expected from 0 to ", args.branches - 1,
               ", got ", args.choice[r]);
    }
    if (!given_weight) return;
    expect_tensor("weight", *given_weight, {wide(x)}, {args.regions}, device_of(x));
    weight = as_contiguous(*given_weight);
    args.weight = call.input<void>("weight", *weight);
  }
};

// The outputs of region_pool and region_route. To know the number of tokens, the host would have to wait for a GPU. So there
// the outputs have as many rows as there can be tokens.
struct Pooled {
  Tensor tokens, source, offsets;
  Workspace workspace;

  Pooled(Call& call, RegionArgs& args, const Tensor& x)
      : offsets(allocate(x, {args.regions + 1}, ScalarType::Long)),
        workspace(call, x, half::region_workspace_bytes(args.regions)) {
    args.offsets = call.output<int64_t>("offsets", offsets);
    int64_t rows = args.cells;
    if constexpr (kIsCpu) rows = cpu::region_offsets(args);
    tokens = allocate(x, {rows, args.channels}, x.scalar_type());
    source = allocate(x, {rows}, ScalarType::Long);
    args.tokens = call.output<void>("tokens", tokens, Rest::unwritten);
    args.source = call.output<int64_t>("source", source);
    args.workspace = workspace.pointer;
  }
};

inline std::tuple<Tensor, Tensor, Tensor> region_pool(Tensor x, Tensor grid_hw, Tensor choice, int64_t window,
                                                      std::vector<int64_t> pools, std::optional<Tensor> weight) {
  expect_first("x", x, floating(), {kAny, kAny});
  Call call(x);
  Region region(call, x, grid_hw, window, pools);
  const Chosen chosen(call, region.args, x, choice, weight);
  const Pooled pooled(call, region.args, x);
  call.run("region_pool", half::region_pool, region.args);
  return {pooled.tokens, pooled.source, pooled.offsets};
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> region_route(Tensor x, Tensor grid_hw, Tensor context, Tensor bias,
                                                               int64_t window, std::vector<int64_t> pools) {
  const int device = expect_first("x", x, floating(), {kAny, kAny});
  Call call(x);
  Region region(call, x, grid_hw, window, pools);
  RegionArgs& args = region.args;
  expect_tensor("context", context, {wide(x)}, {args.pictures, args.branches, args.channels}, device);
  expect_tensor("bias", bias, {wide(x)}, {args.branches}, device);
  const Tensor packed_context = as_contiguous(context), packed_bias = as_contiguous(bias);
  Tensor choice = allocate(x, {args.regions}, ScalarType::Long);
  int64_t* chosen = call.output<int64_t>("choice", choice);
  args.choice = chosen;
  RouteArgs route{args, call.input<void>("context", packed_context), call.input<void>("bias", packed_bias), chosen};
  if constexpr (kIsCpu) cpu::region_choose(route);
  const Pooled pooled(call, args, x);
  route.region = args;
  call.run("region_route", half::region_route, route);
  return {pooled.tokens, pooled.source, pooled.offsets, choice};
}

inline std::tuple<Tensor, Tensor> region_pool_backward(Tensor grad_tokens, Tensor x, Tensor grid_hw, Tensor choice,
                                                       Tensor offsets, int64_t window, std::vector<int64_t> pools,
                                                       std::optional<Tensor> weight) {
  const int device = expect_first("x", x, floating(), {kAny, kAny});
  Call call(x);
  Region region(call, x, grid_hw, window, pools);
  RegionArgs& args = region.args;
  const Chosen chosen(call, args, x, choice, weight);
  expect_tensor("grad_tokens", grad_tokens, {x.scalar_type()}, {kAny, args.channels}, device);
  expect_tensor("offsets", offsets, {ScalarType::Long}, {args.regions + 1}, device);
  const Tensor packed_offsets = own(offsets);
  args.offsets = const_cast<int64_t*>(call.input<int64_t>("offsets", packed_offsets));
  if constexpr (kIsCpu) {  // on a GPU the kernel stops where they lead out of bounds
    RegionArgs expected = args;
    const Tensor expected_offsets = allocate(x, {args.regions + 1}, ScalarType::Long);
    expected.offsets = Pointers::output<int64_t>("offsets", expected_offsets);
    const int64_t tokens = cpu::region_offsets(expected);
    expect(std::equal(args.offsets, args.offsets + args.regions + 1, expected.offsets),
           "offsets: expected region_pool's for this choice");
    expect(grad_tokens.size(0) >= tokens, "grad_tokens: expected at least ", tokens, " rows, got ",
           grad_tokens.size(0));
  }
  const Tensor grad = as_contiguous(grad_tokens);
  Tensor grad_x = allocate(x, {args.cells, args.channels}, x.scalar_type());
  Tensor grad_weight = allocate(x, {weight ? args.regions : 0}, wide(x));
  RegionBackwardArgs backward{args, call.input<void>("grad_tokens", grad), grad.size(0),
                              call.output<void>("grad_x", grad_x), nullptr};
  if (weight) backward.grad_weight = call.output<void>("grad_weight", grad_weight);
  call.run("region_pool_backward", half::region_pool_backward, backward);
  return {grad_x, grad_weight};
}

// ---- The others ----------------------------------------------------------------------------------------------------

inline Tensor importance(Tensor q, Tensor k, Tensor cu_text, Tensor cu_visual, double scale) {
  const int device = expect_first("q", q, floating(), {kAny, kAny, kAny});
  expect_tensor("k", k, {q.scalar_type()}, {kAny, kAny, q.size(2)}, device);
  expect(k.size(1) >= 1 && q.size(1) % k.size(1) == 0 && q.size(1) >= 1,
         "k: expected a number of heads that divides q's ", q.size(1), ", got ", k.size(1));
  expect(q.size(2) >= 1, "q: expected heads of at least 1 channel, got 0");
  const Tensor text = checked_offsets("cu_text", cu_text, q.size(0), device);
  const Tensor visual = checked_offsets("cu_visual", cu_visual, k.size(0), device);
  expect(cu_text.size(0) == cu_visual.size(0), "cu_visual: expected as many offsets as cu_text, ", cu_text.size(0),
         ", got ", cu_visual.size(0));
  Call call(q);
  const Tensor queries = as_contiguous(q), keys = as_contiguous(k);
  Tensor scores = allocate(q, {k.size(0)}, wide(q));
  const Workspace workspace(call, q, half::importance_workspace_bytes(q.size(0), k.size(0), q.size(1)));
  ImportanceArgs args{};
  args.q = call.input<void>("q", queries);
  args.k = call.input<void>("k", keys);
  args.cu_text = call.input<int64_t>("cu_text", text);
  args.cu_visual = call.input<int64_t>("cu_visual", visual);
  args.text = q.size(0);
  args.visual = k.size(0);
  args.items = cu_text.size(0) - 1;
  args.heads = q.size(1);
  args.kv_heads = k.size(1);
  args.dim = q.size(2);
  args.scale = scale;
  args.dtype = dtype_of(q);
  args.scores = call.output<void>("scores", scores);
  args.workspace = workspace.pointer;
  call.run("importance", half::importance, args);
  return scores;
}

inline std::tuple<Tensor, Tensor> select_top_p(Tensor scores, Tensor cu_visual, double gamma,
                                               std::optional<int64_t> keep) {
  const int device = expect_first("scores", scores, floating(), {kAny});
  const Tensor offsets = checked_offsets("cu_visual", cu_visual, scores.size(0), device);
  expect(!keep || *keep >= 0, "keep: expected at least 0, got ", keep.value_or(0));
  Call call(scores);
  const Tensor packed = own(scores);  // indices are sorted by them
  Tensor index = allocate(scores, {scores.size(0)}, ScalarType::Long);
  Tensor count = allocate(scores, {cu_visual.size(0) - 1}, ScalarType::Long);
  SelectArgs args{};
  args.scores = call.input<void>("scores", packed);
  args.cu_visual = call.input<int64_t>("cu_visual", offsets);
  args.visual = scores.size(0);
  args.items = cu_visual.size(0) - 1;
  args.gamma = gamma;
  args.keep = keep.value_or(-1);
  args.dtype = dtype_of(scores);
  args.index = call.output<int64_t>("index", index);
  args.count = call.output<int64_t>("count", count);
  call.run("select_top_p", half::select_top_p, args);
  return {index, count};
}

inline std::vector<Tensor> gather_tokens(std::vector<Tensor> columns, Tensor index) {
  expect(!columns.empty() && columns.size() <= kMaxColumns, "columns: expected from 1 to ", kMaxColumns,
         " tensors, got ", columns.size());
  const int device = expect_first("index", index, {ScalarType::Long}, {kAny});
  Call call(index);
  const Tensor packed = own(index);
  GatherArgs args{};
  args.num_columns = columns.size();
  args.count = index.size(0);
  args.index = call.input<int64_t>("index", packed);
  std::vector<Tensor> gathered;
  for (size_t i = 0; i < columns.size(); ++i) {
    Tensor& column = columns[i];
    const auto came = column.sizes();
    std::vector<int64_t> sizes(came.begin(), came.end());
    if (sizes.empty() || bytes_of(column.scalar_type()) == 0 || device_of(column) != device)
      expect(false, "columns: expected tensors of rank 1 or more where index is, got ",
             describe(name_of(column.scalar_type()), sizes, device_of(column)));
    if (i == 0) args.rows = sizes[0];
    expect(sizes[0] == args.rows, "columns: expected ", args.rows, " rows in each, as the first has, got ", sizes[0]);
    column = as_contiguous(column);
    sizes[0] = args.count;
    gathered.push_back(allocate(column, sizes, column.scalar_type()));
    // Of what has been allocated, for a product of the sizes alone could overflow where one of them is 0.
    const int64_t row_bytes =
        args.count == 0 ? 0 : gathered.back().numel() / args.count * bytes_of(column.scalar_type());
    args.columns[i] = {call.input<void>("columns", column), call.output<void>("gathered", gathered.back()), row_bytes};
  }
  if (kIsCpu) {
    for (int64_t i = 0; i < args.count; ++i)
      expect(-1 <= args.index[i] && args.index[i] < args.rows, "index: expected from -1 to ", args.rows - 1, ", got ",
             args.index[i]);
  }
  call.run("gather_tokens", half::gather_tokens, args);
  return gathered;
}

inline void register_in(torch::stable::detail::StableLibrary& library) {
  library.impl("region_pool", TORCH_BOX(&region_pool));
  library.impl("region_pool_backward", TORCH_BOX(&region_pool_backward));
  library.impl("region_route", TORCH_BOX(&region_route));
  library.impl("importance", TORCH_BOX(&importance));
  library.impl("select_top_p", TORCH_BOX(&select_top_p));
  library.impl("gather_tokens", TORCH_BOX(&gather_tokens));
}

}  // namespace minifocus
