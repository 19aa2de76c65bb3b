// From torch tensors to operators.h's structs and back: checks arguments, allocates outputs, fills the structs in.
//
// Written once for both halves and compiled for each: with USE_CUDA for the CUDA half, whose launchers get the current stream
// of the tensors' device and never wait for it. On the CPU the contents of index tensors are checked too, in copies that
// nobody else can write to. A wrong argument gives a RuntimeError that names it, what was expected and what came, in the words of
// minifocus/ops/checks.py.
#pragma once
#ifdef USE_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <cuda_runtime.h>
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/threads.h"
#include "launchers.h"

namespace minifocus {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
void expect(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Short: return "int16";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

inline int64_t bytes_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
    case ScalarType::Long: return 8;
    case ScalarType::Float:
    case ScalarType::Int: return 4;
    case ScalarType::BFloat16:
    case ScalarType::Half:
    case ScalarType::Short: return 2;
    case ScalarType::Char:
    case ScalarType::Byte:
    case ScalarType::Bool: return 1;
    default: return 0;
  }
}

constexpr int64_t kAny = -1;
constexpr int64_t kMaxSideOnGpu = int64_t(1) << 30;  // of a map: kernels count its rows and columns in 32 bits

constexpr int kCpu = -1;  // a device: kCpu, or the number of a GPU

// "float32 [2, *] on cpu"
inline std::string describe(const std::string& type, const std::vector<int64_t>& sizes, int device) {
  std::ostringstream text;
  text << type << " [";
  for (size_t i = 0; i < sizes.size(); ++i) {
    text << (i ? ", " : "");
    if (sizes[i] == kAny)
      text << "*";
    else
      text << sizes[i];
  }
  text << "] on ";
  if (device == kCpu)
    text << "cpu";
  else
    text << "cuda:" << device;
  return text.str();
}

inline int device_of(const Tensor& tensor) { return tensor.is_cpu() ? kCpu : tensor.get_device_index(); }

// torch passes None on where the schema has a tensor.
inline void expect_given(const char* name, const Tensor& tensor) {
  expect(tensor.defined(), name, ": expected a tensor, got None");
}

inline void expect_tensor(const char* name, const Tensor& tensor, const std::vector<ScalarType>& types,
                          const std::vector<int64_t>& sizes, int device) {
  expect_given(name, tensor);
  bool ok = device_of(tensor) == device && tensor.dim() == (int64_t)sizes.size();
  for (size_t i = 0; ok && i < sizes.size(); ++i) ok = sizes[i] == kAny || tensor.size(i) == sizes[i];
  bool type_ok = false;
  std::string expected;
  for (size_t i = 0; i < types.size(); ++i) {
    type_ok |= tensor.scalar_type() == types[i];
    expected += std::string(i == 0 ? "" : i + 1 == types.size() ? " or " : ", ") + name_of(types[i]);
  }
  if (ok && type_ok) return;
  const auto came = tensor.sizes();
  expect(false, name, ": expected ", describe(expected, sizes, device), ", got ",
         describe(name_of(tensor.scalar_type()), {came.begin(), came.end()}, device_of(tensor)));
}

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: return DType::f64;  // the checks let no other through
  }
}

template <class T>
const T* in(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* out(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

#ifdef USE_CUDA

namespace half = cuda;
constexpr bool kIsCpu = false;

// Calls a launcher on the device of `where`, on its current stream.
template <class Args>
void launch(const char* name, int (*launcher)(const Args&, void*), const Args& args, const Tensor& where) {
  torch::stable::accelerator::DeviceGuard guard(where.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(where.get_device_index(), &stream));
  const int error = launcher(args, stream);
  expect(error == 0, name, ": ", cudaGetErrorString(static_cast<cudaError_t>(error)));
}

#else

namespace half = cpu;
constexpr bool kIsCpu = true;

template <class Args>
void launch(const char*, int (*launcher)(const Args&, void*), const Args& args, const Tensor&) {
  launcher(args, nullptr);
}

#endif

struct Operators {

  static std::vector<ScalarType> floating() {
    std::vector<ScalarType> types{ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
    if (kIsCpu) types.push_back(ScalarType::Double);
    return types;
  }

  // What is accumulated and returned in: float64 for float64, else float32.
  static ScalarType wide(const Tensor& x) {
    return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }

  // Where an operator's tensors have to be: where its first one is, which must be on this half's kind of device.
  static int device_of_first(const char* name, const Tensor& tensor) {
    expect_given(name, tensor);
    return kIsCpu ? kCpu : tensor.is_cuda() ? tensor.get_device_index() : 0;
  }

  // What torch throws through its stable ABI does not say why.
  template <class Make>
  static Tensor made(const Make& make, ScalarType type, const std::vector<int64_t>& sizes, int device) {
    try {
      return make();
    } catch (const std::exception&) {
      expect(false, "cannot allocate ", describe(name_of(type), sizes, device));
      throw;
    }
  }

  // `make` gives a copy of `tensor`.
  template <class Make>
  static Tensor copied(const Tensor& tensor, const Make& make) {
    const auto sizes = tensor.sizes();
    return made([&] { return make(tensor); }, tensor.scalar_type(), {sizes.begin(), sizes.end()}, device_of(tensor));
  }

  static Tensor contiguous(const Tensor& tensor) {
    if (tensor.is_contiguous()) return tensor;
    return copied(tensor, [](const Tensor& t) { return torch::stable::contiguous(t); });
  }

  // A tensor whose numbers other numbers are looked up by. On the CPU a copy: another thread may write to the tensor
  // while an operator runs, and what has been checked must be what is used. On a GPU kernels check what they read.
  static Tensor own(const Tensor& tensor, bool on_cpu = kIsCpu) {
    if (!on_cpu || !tensor.is_contiguous()) return contiguous(tensor);
    return copied(tensor, [](const Tensor& t) { return torch::stable::clone(t); });
  }

  static Tensor allocate(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
    return made([&] { return torch::stable::new_empty(like, sizes, type); }, type, sizes, device_of(like));
  }

  static Tensor workspace(const Tensor& like, int64_t bytes) {  // int64, so that it is aligned
    return allocate(like, {(bytes + 7) / 8}, ScalarType::Long);
  }

  // Offsets of `items` + 1 numbers that rise from 0 to `rows`. On a GPU only their shape is looked at here, and a
  // kernel that meets others stops with an error.
  static Tensor checked_offsets(const char* name, const Tensor& offsets, int64_t rows, int device) {
    expect_tensor(name, offsets, {ScalarType::Long}, {kAny}, device);
    expect(offsets.size(0) >= 1, name, ": expected at least one number, got none");
    expect(rows == 0 || offsets.size(0) >= 2, name, ": expected offsets from 0 to ", rows, ", got one number");
    const Tensor packed = own(offsets);
    if (!kIsCpu) return packed;
    const int64_t* values = in<int64_t>(packed);
    const int64_t last = offsets.size(0) - 1;
    for (int64_t i = 0; i < last; ++i)
      expect(values[i] <= values[i + 1], name, ": expected offsets that never fall, got ", values[i], " before ",
             values[i + 1]);
    expect(values[0] == 0 && values[last] == rows, name, ": expected offsets from 0 to ", rows, ", got ", values[0],
           " to ", values[last]);
    return packed;
  }

  // The part of RegionArgs that every region operator has.
  struct Region {
    RegionArgs args{};
    std::vector<Grid> grids;
    Tensor x;

    Region(const Tensor& given, const Tensor& grid_hw, int64_t window, const std::vector<int64_t>& pools) {
      expect_tensor("x", given, floating(), {kAny, kAny}, device_of_first("x", given));
      expect_tensor("grid_hw", grid_hw, {ScalarType::Long}, {kAny, 2}, kCpu);
      expect(1 <= window && window <= kMaxWindow, "window: expected from 1 to ", kMaxWindow, ", got ", window);
      expect(pools.size() >= 2 && pools.size() % 2 == 0 && pools.size() <= 2 * kMaxBranches,
             "pools: expected from 1 to ", kMaxBranches, " pairs of numbers, got ", pools.size(), " numbers");
      x = contiguous(given);
      args.x = x.const_data_ptr();
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
      const Tensor packed = own(grid_hw, true);  // it is on the CPU, whichever half this is
      const int64_t* sizes = in<int64_t>(packed);
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

  static Tensor checked_choice(const Tensor& choice, const RegionArgs& args, int device) {
    expect_tensor("choice", choice, {ScalarType::Long}, {args.regions}, device);
    const Tensor packed = own(choice);
    if (kIsCpu) {
      const int64_t* values = in<int64_t>(packed);
      for (int64_t r = 0; r < args.regions; ++r)
        expect(0 <= values[r] && values[r] < args.branches, "choice: expected from 0 to ", args.branches - 1, ", got ",
               values[r]);
    }
    return packed;
  }

  static std::optional<Tensor> checked_weight(const std::optional<Tensor>& weight, const Tensor& x, int64_t regions) {
    if (!weight) return weight;
    expect_tensor("weight", *weight, {wide(x)}, {regions}, device_of(x));
    return contiguous(*weight);
  }

  // What region_pool writes. On the CPU it has as many rows as there are tokens. On a GPU their number would have to be
  // waited for, so it has as many as there can be.
  struct Pooled {
    Tensor tokens, source, offsets, scratch;

    Pooled(const Tensor& x, RegionArgs& args) {
      offsets = allocate(x, {args.regions + 1}, ScalarType::Long);
      args.offsets = out<int64_t>(offsets);
      int64_t rows = args.cells;
      if constexpr (kIsCpu) rows = cpu::region_offsets(args);
      tokens = allocate(x, {rows, args.channels}, x.scalar_type());
      source = allocate(x, {rows}, ScalarType::Long);
      scratch = workspace(x, half::region_workspace_bytes(args.regions));
      args.tokens = tokens.mutable_data_ptr();
      args.source = out<int64_t>(source);
      args.workspace = scratch.mutable_data_ptr();
    }
  };

  static std::tuple<Tensor, Tensor, Tensor> region_pool(Tensor x, Tensor grid_hw, Tensor choice, int64_t window,
                                                        std::vector<int64_t> pools, std::optional<Tensor> weight) {
    Region region(x, grid_hw, window, pools);
    RegionArgs& args = region.args;
    const Tensor chosen = checked_choice(choice, args, device_of(x));
    const std::optional<Tensor> factor = checked_weight(weight, x, args.regions);
    args.choice = in<int64_t>(chosen);
    args.weight = factor ? factor->const_data_ptr() : nullptr;
    const Pooled pooled(x, args);
    launch("region_pool", half::region_pool, args, x);
    return {pooled.tokens, pooled.source, pooled.offsets};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> region_route(Tensor x, Tensor grid_hw, Tensor context, Tensor bias,
                                                                 int64_t window, std::vector<int64_t> pools) {
    Region region(x, grid_hw, window, pools);
    RegionArgs& args = region.args;
    expect_tensor("context", context, {wide(x)}, {args.pictures, args.branches, args.channels}, device_of(x));
    expect_tensor("bias", bias, {wide(x)}, {args.branches}, device_of(x));
    const Tensor packed_context = contiguous(context), packed_bias = contiguous(bias);
    Tensor choice = allocate(x, {args.regions}, ScalarType::Long);
    args.choice = out<int64_t>(choice);
    RouteArgs route{args, packed_context.const_data_ptr(), packed_bias.const_data_ptr(), out<int64_t>(choice)};
    if constexpr (kIsCpu) cpu::region_choose(route);
    const Pooled pooled(x, args);
    route.region = args;
    launch("region_route", half::region_route, route, x);
    return {pooled.tokens, pooled.source, pooled.offsets, choice};
  }

  static std::tuple<Tensor, Tensor> region_pool_backward(Tensor grad_tokens, Tensor x, Tensor grid_hw, Tensor choice,
                                                         Tensor offsets, int64_t window, std::vector<int64_t> pools,
                                                         std::optional<Tensor> weight) {
    Region region(x, grid_hw, window, pools);
    RegionArgs& args = region.args;
    const Tensor chosen = checked_choice(choice, args, device_of(x));
    const std::optional<Tensor> factor = checked_weight(weight, x, args.regions);
    expect_tensor("grad_tokens", grad_tokens, {x.scalar_type()}, {kAny, args.channels}, device_of(x));
    expect_tensor("offsets", offsets, {ScalarType::Long}, {args.regions + 1}, device_of(x));
    args.choice = in<int64_t>(chosen);
    args.weight = factor ? factor->const_data_ptr() : nullptr;
    const Tensor packed_offsets = own(offsets);
    args.offsets = const_cast<int64_t*>(in<int64_t>(packed_offsets));
    if constexpr (kIsCpu) {  // on a GPU the kernel stops at others
      RegionArgs expected = args;
      const Tensor expected_offsets = allocate(x, {args.regions + 1}, ScalarType::Long);
      expected.offsets = out<int64_t>(expected_offsets);
      const int64_t tokens = cpu::region_offsets(expected);
      expect(std::equal(args.offsets, args.offsets + args.regions + 1, expected.offsets),
             "offsets: expected region_pool's for this choice");
      expect(grad_tokens.size(0) >= tokens, "grad_tokens: expected at least ", tokens, " rows, got ",
             grad_tokens.size(0));
    }
    const Tensor grad = contiguous(grad_tokens);
    Tensor grad_x = allocate(x, {args.cells, args.channels}, x.scalar_type());
    Tensor grad_weight = allocate(x, {factor ? args.regions : 0}, wide(x));
    const RegionBackwardArgs backward{args, grad.const_data_ptr(), grad.size(0), grad_x.mutable_data_ptr(),
                                      factor ? grad_weight.mutable_data_ptr() : nullptr};
    launch("region_pool_backward", half::region_pool_backward, backward, x);
    return {grad_x, grad_weight};
  }

  static Tensor importance(Tensor q, Tensor k, Tensor cu_text, Tensor cu_visual, double scale) {
    const int device = device_of_first("q", q);
    expect_tensor("q", q, floating(), {kAny, kAny, kAny}, device);
    expect_tensor("k", k, {q.scalar_type()}, {kAny, kAny, q.size(2)}, device);
    expect(k.size(1) >= 1 && q.size(1) % k.size(1) == 0 && q.size(1) >= 1,
           "k: expected a number of heads that divides q's ", q.size(1), ", got ", k.size(1));
    expect(q.size(2) >= 1, "q: expected heads of at least 1 channel, got 0");
    const Tensor text = checked_offsets("cu_text", cu_text, q.size(0), device);
    const Tensor visual = checked_offsets("cu_visual", cu_visual, k.size(0), device);
    expect(cu_text.size(0) == cu_visual.size(0), "cu_visual: expected as many offsets as cu_text, ", cu_text.size(0),
           ", got ", cu_visual.size(0));
    const Tensor queries = contiguous(q), keys = contiguous(k);
    Tensor scores = allocate(q, {k.size(0)}, wide(q));
    const Tensor scratch = workspace(q, half::importance_workspace_bytes(q.size(0), k.size(0), q.size(1)));
    const ImportanceArgs args{queries.const_data_ptr(),
                              keys.const_data_ptr(),
                              in<int64_t>(text),
                              in<int64_t>(visual),
                              q.size(0),
                              k.size(0),
                              cu_text.size(0) - 1,
                              q.size(1),
                              k.size(1),
                              q.size(2),
                              scale,
                              dtype_of(q),
                              scores.mutable_data_ptr(),
                              scratch.mutable_data_ptr()};
    launch("importance", half::importance, args, q);
    return scores;
  }

  static std::tuple<Tensor, Tensor> select_top_p(Tensor scores, Tensor cu_visual, double gamma,
                                                 std::optional<int64_t> keep) {
    const int device = device_of_first("scores", scores);
    expect_tensor("scores", scores, floating(), {kAny}, device);
    const Tensor offsets = checked_offsets("cu_visual", cu_visual, scores.size(0), device);
    expect(!keep || *keep >= 0, "keep: expected at least 0, got ", keep.value_or(0));
    const Tensor packed = own(scores);  // indices are sorted by them
    Tensor index = allocate(scores, {scores.size(0)}, ScalarType::Long);
    Tensor count = allocate(scores, {cu_visual.size(0) - 1}, ScalarType::Long);
    const SelectArgs args{
        packed.const_data_ptr(), in<int64_t>(offsets), scores.size(0),      cu_visual.size(0) - 1, gamma,
        keep.value_or(-1),       dtype_of(scores),     out<int64_t>(index), out<int64_t>(count)};
    launch("select_top_p", half::select_top_p, args, scores);
    return {index, count};
  }

  static std::vector<Tensor> gather_tokens(std::vector<Tensor> columns, Tensor index) {
    expect(!columns.empty() && columns.size() <= kMaxColumns, "columns: expected from 1 to ", kMaxColumns,
           " tensors, got ", columns.size());
    const int device = device_of_first("index", index);
    expect_tensor("index", index, {ScalarType::Long}, {kAny}, device);
    const Tensor packed = own(index);
    GatherArgs args{};
    args.num_columns = columns.size();
    args.count = index.size(0);
    args.index = in<int64_t>(packed);
    std::vector<Tensor> gathered;
    for (size_t i = 0; i < columns.size(); ++i) {
      Tensor& column = columns[i];
      const auto came = column.sizes();
      std::vector<int64_t> sizes(came.begin(), came.end());
      expect(!sizes.empty() && bytes_of(column.scalar_type()) > 0 && device_of(column) == device,
             "columns: expected tensors of rank 1 or more where index is, got ",
             describe(name_of(column.scalar_type()), sizes, device_of(column)));
      if (i == 0) args.rows = sizes[0];
      expect(sizes[0] == args.rows, "columns: expected ", args.rows, " rows in each, as the first has, got ", sizes[0]);
      column = contiguous(column);
      sizes[0] = args.count;
      gathered.push_back(allocate(column, sizes, column.scalar_type()));
      // Of what has been allocated, for a product of the sizes alone could overflow where one of them is 0.
      const int64_t row_bytes =
          args.count == 0 ? 0 : gathered.back().numel() / args.count * bytes_of(column.scalar_type());
      args.columns[i] = {column.const_data_ptr(), gathered.back().mutable_data_ptr(), row_bytes};
    }
    if (kIsCpu) {
      for (int64_t i = 0; i < args.count; ++i)
        expect(-1 <= args.index[i] && args.index[i] < args.rows, "index: expected from -1 to ", args.rows - 1, ", got ",
               args.index[i]);
    }
    launch("gather_tokens", half::gather_tokens, args, columns[0]);
    return gathered;
  }

  static void register_in(torch::stable::detail::StableLibrary& library) {
    library.impl("region_pool", TORCH_BOX(&region_pool));
    library.impl("region_pool_backward", TORCH_BOX(&region_pool_backward));
    library.impl("region_route", TORCH_BOX(&region_route));
    library.impl("importance", TORCH_BOX(&importance));
    library.impl("select_top_p", TORCH_BOX(&select_top_p));
    library.impl("gather_tokens", TORCH_BOX(&gather_tokens));
  }
};

}  // namespace minifocus
