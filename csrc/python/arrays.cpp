// merge3.arrays: the C library for NumPy and DLPack arrays, for tools that have no torch.
//
// An array is a NumPy array or anything with __dlpack__ (CuPy, JAX, torch, ..). NumPy's own bfloat16 does not exist:
// arrays of ml_dtypes' are known by name, and 16-bit integers are taken as bfloat16.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "../include/merge3/merge.h"

namespace py = pybind11;

namespace {

// The parts of the DLPack ABI that are read here (dmlc/dlpack, version 0.x capsules).
struct DLDataType { uint8_t code, bits; uint16_t lanes; };
struct DLDevice { int32_t type, id; };
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
enum { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kDLCPU = 1, kDLCUDA = 2, kDLCUDAHost = 3 };

struct Array {
  void* data = nullptr;
  int64_t numel = 1, last = 1;
  int32_t dtype = -1, device = MERGE3_CPU, device_index = 0;
  bool writable = true;
  py::object owner;  // a capsule that nobody consumes frees its tensor itself
};

std::string device_name(const Array& a) {
  return a.device == MERGE3_CUDA ? "cuda:" + std::to_string(a.device_index) : "cpu";
}

[[noreturn]] void refuse(const std::string& name, const std::string& found, const std::string& expected) {
  throw py::value_error(name + ": " + found + "; expected " + expected);
}

Array from_numpy(const py::array& x, const std::string& name) {
  Array a;
  if (!(x.flags() & py::array::c_style)) refuse(name, "not contiguous", "a C-contiguous array");
  const std::string kind = py::str(x.dtype().attr("name"));
  a.dtype = kind == "float32" ? MERGE3_FLOAT32 : kind == "float16" ? MERGE3_FLOAT16
            : kind == "bfloat16" || kind == "uint16" || kind == "int16" ? MERGE3_BFLOAT16 : -1;
  if (a.dtype < 0) refuse(name, "dtype " + kind, "float32, float16, or bfloat16 (16-bit integers stand for it)");
  a.data = const_cast<void*>(x.data());
  a.numel = x.size();
  a.last = x.ndim() ? x.shape(x.ndim() - 1) : 1;
  a.writable = x.writeable();
  a.owner = x;
  return a;
}

Array from_dlpack(const py::object& x, const std::string& name, std::optional<int64_t> stream) {
  if (!py::hasattr(x, "__dlpack__")) refuse(name, std::string(py::str(py::type::of(x))), "a NumPy array or one with __dlpack__");
  Array a;
  const auto place = x.attr("__dlpack_device__")().cast<std::pair<int32_t, int32_t>>();
  a.device = place.first == kDLCUDA ? MERGE3_CUDA : MERGE3_CPU;
  if (a.device == MERGE3_CUDA) a.device_index = place.second;
  if (place.first != kDLCPU && place.first != kDLCUDA && place.first != kDLCUDAHost)
    refuse(name, "DLPack device type " + std::to_string(place.first), "CPU or CUDA memory");
  a.owner = a.device == MERGE3_CUDA && stream ? x.attr("__dlpack__")(py::arg("stream") = *stream) : x.attr("__dlpack__")();
  const auto* t = static_cast<const DLTensor*>(PyCapsule_GetPointer(a.owner.ptr(), "dltensor"));
  if (!t) throw py::error_already_set();
  int64_t expected = 1;
  for (int i = t->ndim - 1; i >= 0; --i) {
    if (t->strides && t->shape[i] != 1 && t->strides[i] != expected) refuse(name, "not contiguous", "a contiguous array");
    expected *= t->shape[i];
  }
  const DLDataType d = t->dtype;
  if (d.lanes == 1 && d.code == kFloat && d.bits == 32) a.dtype = MERGE3_FLOAT32;
  else if (d.lanes == 1 && d.code == kFloat && d.bits == 16) a.dtype = MERGE3_FLOAT16;
  else if (d.lanes == 1 && d.bits == 16 && (d.code == kBfloat || d.code == kInt || d.code == kUInt)) a.dtype = MERGE3_BFLOAT16;
  else refuse(name, "DLPack type " + std::to_string(d.code) + " of " + std::to_string(d.bits) + " bits", "float32, float16 or bfloat16");
  a.data = static_cast<char*>(t->data) + t->byte_offset;
  a.numel = expected;
  a.last = t->ndim ? t->shape[t->ndim - 1] : 1;
  return a;
}

struct Call {
  std::vector<Array> arrays;  // keeps their owners
  std::vector<merge3_tensor> table;
  merge3_context context{MERGE3_CPU, nullptr, nullptr, 0};
  int32_t experts = 0;

  Call(const py::list& out, const py::list& base, const py::list& expert_list, size_t tensors, std::optional<int64_t> stream) {
    if (!tensors || expert_list.size() == 0 || expert_list.size() % tensors)
      refuse("experts", std::to_string(expert_list.size()) + " arrays for " + std::to_string(tensors) + " tensors", "K per tensor, expert fastest");
    if (base.size() && base.size() != tensors) refuse("base", std::to_string(base.size()) + " arrays", std::to_string(tensors) + " or none");
    experts = int32_t(expert_list.size() / tensors);
    if (experts > MERGE3_MAX_EXPERTS) refuse("experts", std::to_string(experts) + " per tensor", "1 to " + std::to_string(MERGE3_MAX_EXPERTS));
    context.stream = reinterpret_cast<void*>(stream.value_or(0));
    table.resize(tensors);
    for (size_t t = 0; t < tensors; ++t) {
      merge3_tensor& row = table[t];
      row = merge3_tensor{};
      for (int32_t k = 0; k < experts; ++k) {
        const size_t i = t * size_t(experts) + size_t(k);
        const Array& a = take(expert_list[i], "experts[" + std::to_string(i) + "]", stream);
        if (k == 0) row.numel = a.numel, row.columns = a.last, row.dtype = row.out_dtype = a.dtype;
        row.experts[k] = fit(a, row, "experts[" + std::to_string(i) + "]");
      }
      const std::string at = "[" + std::to_string(t) + "]";
      if (base.size()) row.base = fit(take(base[t], "base" + at, stream), row, "base" + at);
      if (out.size()) {
        const Array& a = take(out[t], "out" + at, stream);
        if (!a.writable) refuse("out" + at, "read-only", "an array that can be written");
        row.out_dtype = a.dtype;
        if (a.numel != row.numel) refuse("out" + at, std::to_string(a.numel) + " elements", std::to_string(row.numel));
        row.out = a.data;
      }
    }
  }

 private:
  const Array& take(const py::handle& x, const std::string& name, std::optional<int64_t> stream) {
    const auto object = py::reinterpret_borrow<py::object>(x);
    arrays.push_back(py::isinstance<py::array>(object) ? from_numpy(object, name) : from_dlpack(object, name, stream));
    if (arrays.size() == 1) context.device = arrays[0].device, context.device_index = arrays[0].device_index;
    if (arrays.back().device != context.device || arrays.back().device_index != context.device_index)
      refuse(name, "on " + device_name(arrays.back()), device_name(arrays[0]) + ", where experts[0] is");
    return arrays.back();
  }
  void* fit(const Array& a, const merge3_tensor& row, const std::string& name) const {
    if (a.numel != row.numel) refuse(name, std::to_string(a.numel) + " elements", std::to_string(row.numel));
    if (a.dtype != row.dtype) refuse(name, "another dtype", "that of the tensor's first expert");
    return a.data;
  }
};

template <class T>
using Numbers = py::array_t<T, py::array::c_style | py::array::forcecast>;

int32_t index_of(const std::string& name, const std::vector<std::string>& names, const char* what) {
  std::string all;
  for (size_t i = 0; i < names.size(); ++i) {
    if (names[i] == name) return int32_t(i);
    all += (i ? ", " : "") + names[i];
  }
  refuse(what, "unknown '" + name + "'", all);
}

void require(merge3_status status) {
  if (status == MERGE3_INVALID_ARGUMENT) throw py::value_error(merge3_last_error());
  if (status != MERGE3_OK) throw std::runtime_error(merge3_last_error());
}

void merge(const py::list& out, const py::list& base, const py::list& experts, const Numbers<float>& coefficients,
           std::optional<Numbers<float>> lambda, const std::string& sparsify, const std::string& elect, bool normalize, uint64_t seed,
           std::optional<Numbers<uint32_t>> ids, std::optional<int64_t> stream) {
  const size_t T = out.size();
  if (T == 0) return;
  Call call(out, base, experts, T, stream);
  const int64_t fields = sizeof(merge3_coefficient) / sizeof(float), count = int64_t(T) * call.experts * fields;
  if (coefficients.size() != count)
    refuse("coefficients", std::to_string(coefficients.size()) + " numbers", std::to_string(count) + ", [tensors, experts, " + std::to_string(fields) + "]");
  const std::vector<float> ones(T, 1.0f);
  if (lambda && size_t(lambda->size()) != T) refuse("lambda_", std::to_string(lambda->size()) + " numbers", std::to_string(T));
  if (ids && size_t(ids->size()) != T) refuse("ids", std::to_string(ids->size()) + " numbers", std::to_string(T));
  for (size_t t = 0; t < T; ++t) call.table[t].id = ids ? ids->data()[t] : uint32_t(t);
  const merge3_modes modes{call.experts, index_of(sparsify, {"all", "magnitude", "random", "", "band"}, "sparsify"),
                           index_of(elect, {"none", "sum", "count"}, "elect"), normalize, seed};
  py::gil_scoped_release release;
  require(merge3_merge(&call.context, &modes, int64_t(T), call.table.data(), reinterpret_cast<const merge3_coefficient*>(coefficients.data()),
                       lambda ? lambda->data() : ones.data()));
}

py::array_t<double> gram(const py::list& base, const py::list& experts, size_t tensors, std::optional<int64_t> stream) {
  Call call(py::list(), base, experts, tensors, stream);
  const int64_t vectors = call.experts + 1;
  py::array_t<double> result({int64_t(tensors), vectors, vectors});
  double* to = result.mutable_data();
  py::gil_scoped_release release;
  require(merge3_gram(&call.context, call.experts, int64_t(tensors), call.table.data(), to));
  return result;
}

py::dict order_statistics(const py::list& base, const py::list& experts, const Numbers<int64_t>& ranks, std::optional<int64_t> stream) {
  if (ranks.ndim() != 2) refuse("ranks", std::to_string(ranks.ndim()) + " dimensions", "[tensors, ranks]");
  const int64_t T = ranks.shape(0), R = ranks.shape(1);
  Call call(py::list(), base, experts, size_t(T), stream);
  const std::vector<int64_t> each{T, call.experts, R}, pair{T, call.experts};
  py::array_t<float> value(each);
  py::array_t<int64_t> greater(each), equal(each), nonzero(pair);
  py::array_t<double> l1_greater(each), total(pair);
  auto *v = value.mutable_data();
  auto *g = greater.mutable_data(), *e = equal.mutable_data(), *n = nonzero.mutable_data();
  auto *l = l1_greater.mutable_data(), *s = total.mutable_data();
  {
    py::gil_scoped_release release;
    require(merge3_order_statistics(&call.context, MERGE3_MAGNITUDE, call.experts, T, call.table.data(), R, ranks.data(), v, g, e, l, s, n));
  }
  py::dict found;
  found["value"] = value, found["greater"] = greater, found["equal"] = equal, found["l1_greater"] = l1_greater;
  found["total"] = total, found["nonzero"] = nonzero;
  return found;
}

// Neutral: weight 1, no rescale, everything kept.
py::array_t<float> coefficients(int64_t tensors, int64_t experts) {
  const merge3_coefficient neutral{1.0f, 1.0f, 0.0f, 1.0f, std::numeric_limits<float>::infinity(), 1.0f, 1.0f, 0.0f};
  const int64_t fields = sizeof(merge3_coefficient) / sizeof(float);
  py::array_t<float> c({tensors, experts, fields});
  const auto* from = reinterpret_cast<const float*>(&neutral);
  for (int64_t i = 0; i < tensors * experts * fields; ++i) c.mutable_data()[i] = from[i % fields];
  return c;
}

}  // namespace

PYBIND11_MODULE(arrays, m) {
  m.doc() = "The merge kernels for NumPy and DLPack arrays, without torch. Lists hold T tensors (experts: T * K, expert fastest).";
  m.attr("FIELDS") = py::make_tuple("weight", "rescale", "lo", "lo_share", "hi", "hi_share", "density", "epsilon");
  m.def("merge", &merge, py::arg("out"), py::arg("base"), py::arg("experts"), py::arg("coefficients"), py::arg("lambda_") = py::none(),
        py::kw_only(), py::arg("sparsify") = "all", py::arg("elect") = "none", py::arg("normalize") = false, py::arg("seed") = 0,
        py::arg("ids") = py::none(), py::arg("stream") = py::none(),
        "Write base + lambda * elect(sparsify(experts - base)) into out, in place, one pass. base may be empty.\n\n"
        "coefficients: float32 [T, K, 8], columns as in FIELDS. ids: each tensor's random stream. stream: a CUDA stream's address.\n"
        "ValueError names the array that does not fit.");
  m.def("gram", &gram, py::arg("base"), py::arg("experts"), py::arg("tensors"), py::kw_only(), py::arg("stream") = py::none(),
        "Inner products of [base, experts - base]: float64 [T, K + 1, K + 1].");
  m.def("order_statistics", &order_statistics, py::arg("base"), py::arg("experts"), py::arg("ranks"), py::kw_only(),
        py::arg("stream") = py::none(),
        "Exact order statistics of |expert - base|. ranks: int64 [T, R], 1-based from the largest. A dict of value, greater, equal,\n"
        "l1_greater [T, K, R], total and nonzero [T, K]: what a density's threshold is made of.");
  m.def("coefficients", &coefficients, py::arg("tensors"), py::arg("experts"), "Neutral coefficients, float32 [T, K, 8].");
  m.def("build", [] { return std::string(merge3_build()); }, "The devices that this build serves.");
}
