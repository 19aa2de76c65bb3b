// The CUDA half's launchers (csrc/launchers.h) for Python, run by the emulator. tests/emulator/emulated.py calls them.
//
// Arrays come as numpy knows them, bfloat16 as uint16, with the name of their dtype beside them. The caller allocates
// the outputs.
#include "../../csrc/launchers.h"

#include "bindings.h"

namespace {

using emulator::Call;
using minifocus::DType;
namespace cuda = minifocus::cuda;
namespace py = pybind11;

DType dtype_from(const std::string& name) {
  if (name == "float32") return DType::f32;
  if (name == "bfloat16") return DType::bf16;
  if (name == "float16") return DType::f16;
  if (name == "float64") return DType::f64;
  throw py::value_error("dtype: " + name);
}

using Int64s = py::array_t<int64_t, py::array::c_style>;

// What all region operators are given. `grids` is read on the host only, so kernels get no access to it.
minifocus::RegionArgs region_args(Call& call, const py::array& x, const std::string& dtype, const Int64s& grids,
                                  int64_t window, const Int64s& pools) {
  minifocus::RegionArgs args{};
  args.x = call.input<void>("x", x);
  args.dtype = dtype_from(dtype);
  args.cells = x.shape(0);
  args.channels = x.shape(1);
  args.grids = reinterpret_cast<const minifocus::Grid*>(grids.data());
  args.pictures = grids.shape(0);
  args.window = window;
  args.branches = pools.size() / 2;
  for (int64_t s = 0; s < args.branches; s++) args.pools[s] = {pools.data()[2 * s], pools.data()[2 * s + 1]};
  for (int64_t b = 0; b < args.pictures; b++)
    args.regions += minifocus::num_regions(args.grids[b], window);
  return args;
}

void add_region_outputs(Call& call, minifocus::RegionArgs& args, const py::array& tokens, const py::array& source,
                        const py::array& offsets) {
  args.tokens = call.output<void>("tokens", tokens, Call::Left::rest_unwritten);
  args.source = call.output<int64_t>("source", source);
  args.offsets = call.output<int64_t>("offsets", offsets);
  args.workspace = call.workspace(cuda::region_workspace_bytes(args.regions));
}

void region_pool(py::array x, std::string dtype, Int64s grids, py::array choice, int64_t window, Int64s pools,
                 py::object weight, py::array tokens, py::array source, py::array offsets) {
  Call call;
  minifocus::RegionArgs args = region_args(call, x, dtype, grids, window, pools);
  args.choice = call.input<int64_t>("choice", choice);
  args.weight = call.optional_input<void>("weight", weight);
  add_region_outputs(call, args, tokens, source, offsets);
  call.finish(cuda::region_pool(args, nullptr));
}

void region_route(py::array x, std::string dtype, Int64s grids, py::array context, py::array bias, int64_t window,
                  Int64s pools, py::array tokens, py::array source, py::array offsets, py::array choice) {
  Call call;
  minifocus::RouteArgs args{};
  args.region = region_args(call, x, dtype, grids, window, pools);
  args.context = call.input<void>("context", context);
  args.bias = call.input<void>("bias", bias);
  add_region_outputs(call, args.region, tokens, source, offsets);
  args.choice = call.output<int64_t>("choice", choice);
  call.finish(cuda::region_route(args, nullptr));
}

void region_pool_backward(py::array grad_tokens, py::array x, std::string dtype, Int64s grids, py::array choice,
                          py::array offsets, int64_t window, Int64s pools, py::object weight, py::array grad_x,
                          py::array grad_weight) {
  Call call;
  minifocus::RegionBackwardArgs args{};
  args.region = region_args(call, x, dtype, grids, window, pools);
  args.region.choice = call.input<int64_t>("choice", choice);
  args.region.weight = call.optional_input<void>("weight", weight);
  args.region.offsets = const_cast<int64_t*>(call.input<int64_t>("offsets", offsets));
  args.grad_tokens = call.input<void>("grad_tokens", grad_tokens);
  args.rows = grad_tokens.shape(0);
  args.grad_x = call.output<void>("grad_x", grad_x);
  args.grad_weight = weight.is_none() ? nullptr : call.output<void>("grad_weight", grad_weight);
  call.finish(cuda::region_pool_backward(args, nullptr));
}

void importance(py::array q, py::array k, std::string dtype, py::array cu_text, py::array cu_visual, double scale,
                py::array scores) {
  Call call;
  minifocus::ImportanceArgs args{};
  args.q = call.input<void>("q", q);
  args.k = call.input<void>("k", k);
  args.dtype = dtype_from(dtype);
  args.cu_text = call.input<int64_t>("cu_text", cu_text);
  args.cu_visual = call.input<int64_t>("cu_visual", cu_visual);
  args.text = q.shape(0);
  args.visual = k.shape(0);
  args.items = cu_text.shape(0) - 1;
  args.heads = q.shape(1);
  args.kv_heads = k.shape(1);
  args.dim = q.shape(2);
  args.scale = scale;
  args.scores = call.output<void>("scores", scores);
  args.workspace = call.workspace(cuda::importance_workspace_bytes(args.text, args.visual, args.heads));
  call.finish(cuda::importance(args, nullptr));
}

void select_top_p(py::array scores, std::string dtype, py::array cu_visual, double gamma, int64_t keep, py::array index,
                  py::array count) {
  Call call;
  minifocus::SelectArgs args{};
  args.scores = call.input<void>("scores", scores);
  args.dtype = dtype_from(dtype);
  args.cu_visual = call.input<int64_t>("cu_visual", cu_visual);
  args.visual = scores.shape(0);
  args.items = cu_visual.shape(0) - 1;
  args.gamma = gamma;
  args.keep = keep;
  args.index = call.output<int64_t>("index", index);
  args.count = call.output<int64_t>("count", count);
  call.finish(cuda::select_top_p(args, nullptr));
}

// Columns come as bytes, [rows, bytes of a row].
void gather_tokens(std::vector<py::array> columns, py::array index, std::vector<py::array> gathered) {
  Call call;
  minifocus::GatherArgs args{};
  args.num_columns = int(columns.size());
  args.rows = columns.at(0).shape(0);
  args.count = index.shape(0);
  args.index = call.input<int64_t>("index", index);
  for (size_t i = 0; i < columns.size(); i++) {
    const std::string number = std::to_string(i);
    args.columns[i].from = call.input<void>(("column " + number).c_str(), columns[i]);
    args.columns[i].to = call.output<void>(("gathered column " + number).c_str(), gathered.at(i));
    args.columns[i].row_bytes = columns[i].shape(1);
  }
  call.finish(cuda::gather_tokens(args, nullptr));
}

}  // namespace

PYBIND11_MODULE(operators, module) {
  emulator::add_common(module);
  module.def("region_pool", &region_pool);
  module.def("region_route", &region_route);
  module.def("region_pool_backward", &region_pool_backward);
  module.def("importance", &importance);
  module.def("select_top_p", &select_top_p);
  module.def("gather_tokens", &gather_tokens);
}
