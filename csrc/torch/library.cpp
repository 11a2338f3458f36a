// torch.ops.merge3.*: checks tensors once, turns them into the C API's tables, calls it.
// Built against torch's stable ABI, so one binary serves every torch from 2.11 on.
#if defined(MERGE3_WITH_CUDA)
#define USE_CUDA 1  // declares aoti_torch_get_current_cuda_stream, also in a CPU build of torch
#endif
#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <stdlib.h>
#include <string.h>

#include <string>
#include <vector>

#include "../include/merge3/merge.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

void torch_parallel_for_adapter(void*, int64_t count, void (*body)(void*, int64_t, int64_t), void* arg) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(arg, begin, end); });
}
const merge3_executor kTorchThreads = {torch_parallel_for_adapter, nullptr};

void require(merge3_status status) {
  STD_TORCH_CHECK(status == MERGE3_OK, "merge3: ", merge3_last_error());
}

int32_t storage_dtype(const Tensor& x, const char* list, int64_t t) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return MERGE3_FLOAT32;
    case ScalarType::Half: return MERGE3_FLOAT16;
    case ScalarType::BFloat16: return MERGE3_BFLOAT16;
    default:
      STD_TORCH_CHECK(false, "merge3: ", list, "[", t, "]: expected float32, float16 or bfloat16, found scalar type ",
                      int(x.scalar_type()));
  }
}

int device_of(const Tensor& x) {
#if defined(MERGE3_EMULATED)  // tests: CPU tensors stand for a GPU's
  static const bool cpu = getenv("MERGE3_TEST_DEVICE") && std::string(getenv("MERGE3_TEST_DEVICE")) == "cpu";
  return cpu ? MERGE3_CPU : MERGE3_CUDA;
#else
  return x.is_cuda() ? MERGE3_CUDA : MERGE3_CPU;
#endif
}

// Work on a GPU goes to the stream that torch is using there.
merge3_context context_on(int device, int32_t index) {
  merge3_context c{device, nullptr, &kTorchThreads};
#if defined(MERGE3_WITH_CUDA) && !defined(MERGE3_EMULATED)
  if (device == MERGE3_CUDA)
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(index, &c.stream) == 0, "merge3: no CUDA stream");
#endif
  (void)index;
  return c;
}

// One row per tensor, K experts each (expert fastest); `out` and `base` may be empty lists.
struct Table {
  std::vector<merge3_tensor> rows;
  int32_t experts = 0;
  int device = MERGE3_CPU;
  int32_t device_index = 0;

  // unread: so many experts whose tensors are not there, because no kernel reads them; then the base leads.
  Table(const Tensors& out, const Tensors& base, const Tensors& experts_list, int64_t tensors, int32_t unread = 0) {
    if (unread) {
      lead_by_base(out, base, unread);
      return;
    }
    STD_TORCH_CHECK(tensors > 0 && !experts_list.empty() && int64_t(experts_list.size()) % tensors == 0,
                    "merge3: ", experts_list.size(), " expert tensors for ", tensors,
                    " tensors: expected K per tensor, expert fastest");
    STD_TORCH_CHECK(base.empty() || int64_t(base.size()) == tensors, "merge3: ", base.size(),
                    " base tensors: expected ", tensors, " or none");
    experts = int32_t(int64_t(experts_list.size()) / tensors);
    STD_TORCH_CHECK(experts <= MERGE3_MAX_EXPERTS, "merge3: ", experts, " experts: expected 1 to ", MERGE3_MAX_EXPERTS);
    const Tensor& lead = experts_list[0];
    device = device_of(lead);
    device_index = lead.get_device_index();
    rows.resize(size_t(tensors));
    for (int64_t t = 0; t < tensors; ++t) {
      merge3_tensor& row = rows[size_t(t)];
      row = merge3_tensor{};
      const Tensor& first = experts_list[size_t(t * experts)];
      row.numel = first.numel();
      row.columns = first.dim() >= 2 ? first.size(first.dim() - 1) : row.numel;
      row.dtype = row.out_dtype = storage_dtype(first, "experts", t * experts);
      for (int k = 0; k < experts; ++k)
        row.experts[k] = data(experts_list[size_t(t * experts + k)], row, "experts", t * experts + k, true);
      if (!base.empty()) row.base = data(base[size_t(t)], row, "base", t, true);
      set_out(out, t);
    }
  }

  bool here(const Tensor& x) const { return device_of(x) == device && x.get_device_index() == device_index; }

  merge3_context context() const { return context_on(device, device_index); }

 private:
  void lead_by_base(const Tensors& out, const Tensors& base, int32_t count) {
    STD_TORCH_CHECK(!base.empty() && base.size() == out.size(), "merge3: ", base.size(), " base tensors: expected ", out.size());
    STD_TORCH_CHECK(count <= MERGE3_MAX_EXPERTS, "merge3: ", count, " experts: expected 1 to ", MERGE3_MAX_EXPERTS);
    experts = count;
    device = device_of(base[0]);
    device_index = base[0].get_device_index();
    rows.resize(base.size());
    for (size_t t = 0; t < base.size(); ++t) {
      merge3_tensor& row = rows[t];
      row = merge3_tensor{};
      row.numel = base[t].numel();
      row.columns = base[t].dim() >= 2 ? base[t].size(base[t].dim() - 1) : row.numel;
      row.dtype = storage_dtype(base[t], "base", int64_t(t));
      row.base = data(base[t], row, "base", int64_t(t), true);
      set_out(out, int64_t(t));
    }
  }

  void set_out(const Tensors& out, int64_t t) {
    merge3_tensor& row = rows[size_t(t)];
    if (out.empty()) return;
    row.out = data(out[size_t(t)], row, "out", t, false);
    row.out_dtype = storage_dtype(out[size_t(t)], "out", t);
  }

  void* data(const Tensor& x, const merge3_tensor& row, const char* list, int64_t i, bool same_dtype) const {
    STD_TORCH_CHECK(x.is_contiguous(), "merge3: ", list, "[", i, "]: expected a contiguous tensor");
    STD_TORCH_CHECK(x.numel() == row.numel, "merge3: ", list, "[", i, "]: found ", x.numel(),
                    " elements, expected ", row.numel);
    STD_TORCH_CHECK(here(x), "merge3: ", list, "[", i, "]: on another device than experts[0]");
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(x.data_ptr()) % (row.dtype == MERGE3_FLOAT32 ? 4 : 2) == 0, "merge3: ", list,
                    "[", i, "]: misaligned, expected an address that is a multiple of its element size");
    STD_TORCH_CHECK(!same_dtype || storage_dtype(x, list, i) == row.dtype, "merge3: ", list, "[", i,
                    "]: its dtype differs from the first expert's of this tensor");
    return x.data_ptr();
  }
};

template <class T>
T* host(const Tensor& x, ScalarType dtype, int64_t numel, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.scalar_type() == dtype, "merge3: ", name,
                  ": expected a contiguous CPU tensor of scalar type ", int(dtype), ", found ", int(x.scalar_type()));
  STD_TORCH_CHECK(x.numel() == numel, "merge3: ", name, ": found ", x.numel(), " elements, expected ", numel);
  return static_cast<T*>(x.data_ptr());
}

void set_rank_tables(Table& table, const Tensors& tables, int64_t stride, const char* name, bool slices = false) {
  STD_TORCH_CHECK(tables.size() == table.rows.size() * size_t(table.experts), "merge3: ", tables.size(), " ", name,
                  ": expected ", table.rows.size() * size_t(table.experts));
  for (size_t i = 0; i < tables.size(); ++i) {
    merge3_tensor& row = table.rows[i / size_t(table.experts)];
    // A slice has the tables of its whole tensor.
    const int64_t found = tables[i].numel(), expected = row.columns ? (row.offset + row.numel + row.columns - 1) / row.columns * stride : 0;
    STD_TORCH_CHECK(tables[i].scalar_type() == ScalarType::Float && tables[i].is_contiguous() &&
                        (found == expected || (slices && found > expected)) && table.here(tables[i]),
                    "merge3: ", name, "[", i, "]: expected ", expected, " contiguous float32 on the device of experts[0], found ",
                    tables[i].numel(), " elements");
    row.rank_tables[i % size_t(table.experts)] = static_cast<const float*>(tables[i].data_ptr());
  }
}

void set_masks(Table& table, const Tensors& masks, bool slices = false) {
  STD_TORCH_CHECK(masks.size() == table.rows.size() * size_t(table.experts), "merge3: ", masks.size(), " masks: expected ",
                  table.rows.size() * size_t(table.experts));
  for (size_t i = 0; i < masks.size(); ++i) {
    merge3_tensor& row = table.rows[i / size_t(table.experts)];
    const int64_t found = masks[i].numel(), expected = (row.offset + row.numel + 31) / 32;
    STD_TORCH_CHECK(masks[i].scalar_type() == ScalarType::Int && masks[i].is_contiguous() && table.here(masks[i]) &&
                        (found == expected || (slices && found > expected)),
                    "merge3: masks[", i, "]: expected ", expected, " contiguous int32 on the device of the tensors, found ", found);
    row.masks[i % size_t(table.experts)] = static_cast<const uint32_t*>(masks[i].data_ptr());
  }
}

// columns: of each row's tensor where the rows are slices, whose own shapes do not tell.
Table merge_table(const Tensors& out, const Tensors& base, const Tensors& experts, const Tensor& ids, const Tensors& rank_tables,
                  int64_t sparsify, const Tensor* offsets = nullptr, const Tensor* columns = nullptr) {
  const int64_t T = int64_t(out.size());
  const int32_t unread = sparsify == MERGE3_SIGNS && T ? int32_t(int64_t(rank_tables.size()) / T) : 0;
  Table table(out, base, experts, T, unread);
  const int64_t* id = host<int64_t>(ids, ScalarType::Long, T, "ids");
  const bool slices = offsets && offsets->numel() != 0;
  const int64_t* offset = slices ? host<int64_t>(*offsets, ScalarType::Long, T, "offsets") : nullptr;
  const int64_t* column = slices ? host<int64_t>(*columns, ScalarType::Long, T, "columns") : nullptr;
  for (int64_t t = 0; t < T; ++t) {
    merge3_tensor& row = table.rows[size_t(t)];
    row.id = uint32_t(id[t]);
    if (slices) row.offset = offset[t], row.columns = column[t];
  }
  if (sparsify == MERGE3_KEEP_RANKED) set_rank_tables(table, rank_tables, MERGE3_RANK_STRIDE, "rank_tables", slices);
  if (sparsify > MERGE3_KEEP_BAND) set_masks(table, rank_tables, slices);
  return table;
}

constexpr int64_t kFields = sizeof(merge3_coefficient) / sizeof(float);

const merge3_coefficient* as_coefficients(const Tensor& x, int64_t pairs) {
  return reinterpret_cast<const merge3_coefficient*>(host<float>(x, ScalarType::Float, pairs * kFields, "coefficients"));
}

void merge_(Tensors out, Tensors base, Tensors experts, Tensor coefficients, Tensor lambda, Tensor ids, Tensor offsets,
            Tensor columns, Tensors rank_tables, int64_t sparsify, int64_t elect, bool normalize, int64_t seed) {
  const int64_t T = int64_t(out.size());
  if (T == 0) return;
  const Table table = merge_table(out, base, experts, ids, rank_tables, sparsify, &offsets, &columns);
  const merge3_modes modes{table.experts, int32_t(sparsify), int32_t(elect), normalize, uint64_t(seed)};
  const merge3_context context = table.context();
  require(merge3_merge(&context, &modes, T, table.rows.data(), as_coefficients(coefficients, T * table.experts),
                       host<float>(lambda, ScalarType::Float, T, "lambda_")));
}

// gradients: of the outputs. Fills float64 CPU [T, K], [T, K] and [T].
void merge_backward_(Tensor weight, Tensor rescale, Tensor lambda_gradient, Tensors gradients, Tensors base, Tensors experts,
                     Tensor coefficients, Tensor lambda, Tensor ids, Tensors rank_tables, int64_t sparsify, int64_t elect,
                     bool normalize, int64_t seed) {
  const int64_t T = int64_t(gradients.size());
  if (T == 0) return;
  const Table table = merge_table(gradients, base, experts, ids, rank_tables, sparsify);
  const merge3_modes modes{table.experts, int32_t(sparsify), int32_t(elect), normalize, uint64_t(seed)};
  const merge3_context context = table.context();
  require(merge3_merge_backward(&context, &modes, T, table.rows.data(), as_coefficients(coefficients, T * table.experts),
                                host<float>(lambda, ScalarType::Float, T, "lambda_"),
                                host<double>(weight, ScalarType::Double, T * table.experts, "weight"),
                                host<double>(rescale, ScalarType::Double, T * table.experts, "rescale"),
                                host<double>(lambda_gradient, ScalarType::Double, T, "lambda_gradient")));
}

// y [M, N] = x [M, in] W^T + bias, W the merge of base [N, in] and its experts. bias: one tensor, or none.
void merged_linear_(Tensor y, Tensor x, Tensors base, Tensors experts, Tensors bias, Tensor coefficients, Tensor lambda, Tensor ids,
                    Tensors rank_tables, int64_t sparsify, int64_t elect, bool normalize, int64_t seed) {
  const Tensor& weight = base.empty() ? experts.at(0) : base[0];
  STD_TORCH_CHECK(weight.dim() == 2, "merge3: base[0]: expected [out, in], found ", weight.dim(), " dimensions");
  Table table({}, base, experts, 1);
  const merge3_tensor& row = table.rows[0];
  table.rows[0].id = uint32_t(host<int64_t>(ids, ScalarType::Long, 1, "ids")[0]);
  if (sparsify == MERGE3_KEEP_RANKED) set_rank_tables(table, rank_tables, MERGE3_RANK_STRIDE, "rank_tables");
  const int64_t N = weight.size(0), M = x.dim() == 2 ? x.size(0) : -1;
  const auto fits = [&](const Tensor& t, const char* name, int64_t numel) {
    STD_TORCH_CHECK(t.is_contiguous() && table.here(t) && storage_dtype(t, name, 0) == row.dtype && t.numel() == numel, "merge3: ", name,
                    ": expected ", numel, " contiguous elements of the weights' dtype on their device, found ", t.numel());
    return t.data_ptr();
  };
  const void* from = fits(x, "x", M * weight.size(1));
  void* to = fits(y, "y", M * N);
  const void* add = bias.empty() ? nullptr : fits(bias[0], "bias", N);
  const merge3_modes modes{table.experts, int32_t(sparsify), int32_t(elect), normalize, uint64_t(seed)};
  const merge3_context context = table.context();
  require(merge3_merged_linear(&context, &modes, &row, as_coefficients(coefficients, table.experts),
                               *host<float>(lambda, ScalarType::Float, 1, "lambda_"), from, M, add, to));
}

// A prepared table: first[T + 1], then the rows. Its bytes go to the device as they are.
void prepare_(Tensor table, Tensors out, Tensors base, Tensors experts, Tensor ids, Tensors rank_tables, int64_t sparsify) {
  const int64_t T = int64_t(out.size());
  const Table rows = merge_table(out, base, experts, ids, rank_tables, sparsify);
  char* to = host<char>(table, ScalarType::Byte, 8 * (T + 1) + T * int64_t(sizeof(merge3_tensor)), "table");
  const merge3_modes modes{rows.experts, int32_t(sparsify), 0, 0, 0};
  const merge3_context context = rows.context();
  require(merge3_prepare(&context, &modes, T, rows.rows.data(), reinterpret_cast<int64_t*>(to)));
  memcpy(to + 8 * (T + 1), rows.rows.data(), size_t(T) * sizeof(merge3_tensor));
}

void merge_prepared_(Tensor table, Tensor coefficients, Tensor lambda, int64_t tensors, int64_t chunks, int64_t experts,
                     int64_t sparsify, int64_t elect, bool normalize, int64_t seed) {
  const auto resident = [&](const Tensor& x, ScalarType dtype, int64_t numel, const char* name) {
    STD_TORCH_CHECK(device_of(x) == device_of(table) && x.get_device_index() == table.get_device_index(), "merge3: ", name,
                    ": on another device than the table");
    STD_TORCH_CHECK(x.is_contiguous() && x.scalar_type() == dtype && x.numel() == numel, "merge3: ", name, ": expected ", numel,
                    " contiguous elements of scalar type ", int(dtype), ", found ", x.numel(), " of ", int(x.scalar_type()));
    return static_cast<const char*>(x.data_ptr());
  };
  const int64_t head = 8 * (tensors + 1);
  const char* data = resident(table, ScalarType::Byte, head + tensors * int64_t(sizeof(merge3_tensor)), "table");
  const merge3_modes modes{int32_t(experts), int32_t(sparsify), int32_t(elect), normalize, uint64_t(seed)};
  const merge3_context context = context_on(device_of(table), table.get_device_index());
  require(merge3_merge_resident(
      &context, &modes, tensors, chunks, reinterpret_cast<const merge3_tensor*>(data + head), reinterpret_cast<const int64_t*>(data),
      reinterpret_cast<const merge3_coefficient*>(resident(coefficients, ScalarType::Float, tensors * experts * kFields, "coefficients")),
      reinterpret_cast<const float*>(resident(lambda, ScalarType::Float, tensors, "lambda_"))));
}

void elementwise_(Tensors out, Tensors base, Tensors experts, Tensor scalars, Tensor per_expert, Tensors rows,
                  int64_t rule) {
  const int64_t T = int64_t(out.size());
  if (T == 0) return;
  Table table(out, base, experts, T);
  if (rule == MERGE3_ARCEE_FUSION) set_rank_tables(table, rows, 1, "rows");
  const merge3_context context = table.context();
  require(merge3_elementwise(&context, int32_t(rule), table.experts, T, table.rows.data(),
                             host<float>(scalars, ScalarType::Float, T, "scalars"),
                             host<float>(per_expert, ScalarType::Float, T * table.experts, "per_expert")));
}

void gram_(Tensor gram, Tensors base, Tensors experts) {
  const int64_t T = gram.dim() == 3 ? gram.size(0) : -1;
  if (T == 0) return;
  const Table table({}, base, experts, T);
  const int64_t vectors = table.experts + 1;
  const merge3_context context = table.context();
  require(merge3_gram(&context, table.experts, T, table.rows.data(),
                      host<double>(gram, ScalarType::Double, T * vectors * vectors, "gram")));
}

void order_statistics_(Tensor value, Tensor greater, Tensor equal, Tensor l1_greater, Tensor total, Tensor nonzero,
                       Tensors base, Tensors experts, Tensor ranks, int64_t statistic) {
  const int64_t T = ranks.size(0), R = ranks.size(1);
  if (T == 0) return;
  const Table table({}, base, experts, T);
  const int64_t pairs = T * (statistic == MERGE3_VARIANCE ? 1 : table.experts);
  const merge3_context context = table.context();
  require(merge3_order_statistics(&context, int32_t(statistic), table.experts, T, table.rows.data(), R,
                                  host<int64_t>(ranks, ScalarType::Long, T * R, "ranks"),
                                  host<float>(value, ScalarType::Float, pairs * R, "value"),
                                  host<int64_t>(greater, ScalarType::Long, pairs * R, "greater"),
                                  host<int64_t>(equal, ScalarType::Long, pairs * R, "equal"),
                                  host<double>(l1_greater, ScalarType::Double, pairs * R, "l1_greater"),
                                  host<double>(total, ScalarType::Double, pairs, "total"),
                                  host<int64_t>(nonzero, ScalarType::Long, pairs, "nonzero")));
}

// unified: T tensors, or none to pack the signs.
void pack_(Tensors masks, Tensor sums, Tensors base, Tensors experts, Tensors unified) {
  const int64_t T = sums.size(0);
  if (T == 0) return;
  Table table(unified, base, experts, T);
  set_masks(table, masks);
  const merge3_context context = table.context();
  require(merge3_pack(&context, unified.empty() ? MERGE3_PACK_SIGNS : MERGE3_PACK_AGREEMENT, table.experts, T, table.rows.data(),
                      host<double>(sums, ScalarType::Double, T * table.experts * 2, "sums")));
}

void rank_tables_(Tensors tables, Tensor bin_l1, Tensors base, Tensors experts) {
  const int64_t T = bin_l1.size(0);
  if (T == 0) return;
  Table table({}, base, experts, T);
  set_rank_tables(table, tables, MERGE3_RANK_STRIDE, "tables");
  const merge3_context context = table.context();
  require(merge3_rank_tables(&context, table.experts, T, table.rows.data(),
                             host<double>(bin_l1, ScalarType::Double, T * table.experts * MERGE3_RANK_BINS, "bin_l1")));
}

}  // namespace

STABLE_TORCH_LIBRARY(merge3, m) {
  m.def("merge_(Tensor(a!)[] out, Tensor[] base, Tensor[] experts, Tensor coefficients, Tensor lambda_, "
        "Tensor ids, Tensor offsets, Tensor columns, Tensor[] rank_tables, int sparsify, int elect, bool normalize, int seed) -> ()");
  m.def("merge_backward_(Tensor(a!) weight, Tensor(b!) rescale, Tensor(c!) lambda_gradient, Tensor[] gradients, Tensor[] base, "
        "Tensor[] experts, Tensor coefficients, Tensor lambda_, Tensor ids, Tensor[] rank_tables, int sparsify, int elect, "
        "bool normalize, int seed) -> ()");
  m.def("merged_linear_(Tensor(a!) y, Tensor x, Tensor[] base, Tensor[] experts, Tensor[] bias, Tensor coefficients, Tensor lambda_, "
        "Tensor ids, Tensor[] rank_tables, int sparsify, int elect, bool normalize, int seed) -> ()");
  m.def("prepare_(Tensor(a!) table, Tensor[] out, Tensor[] base, Tensor[] experts, Tensor ids, Tensor[] rank_tables, "
        "int sparsify) -> ()");
  m.def("merge_prepared_(Tensor table, Tensor coefficients, Tensor lambda_, int tensors, int chunks, int experts, "
        "int sparsify, int elect, bool normalize, int seed) -> ()");
  m.def("elementwise_(Tensor(a!)[] out, Tensor[] base, Tensor[] experts, Tensor scalars, Tensor per_expert, "
        "Tensor[] rows, int rule) -> ()");
  m.def("gram_(Tensor(a!) gram, Tensor[] base, Tensor[] experts) -> ()");
  m.def("order_statistics_(Tensor(a!) value, Tensor(b!) greater, Tensor(c!) equal, Tensor(d!) l1_greater, "
        "Tensor(e!) total, Tensor(f!) nonzero, Tensor[] base, Tensor[] experts, Tensor ranks, int statistic) -> ()");
  m.def("pack_(Tensor(a!)[] masks, Tensor(b!) sums, Tensor[] base, Tensor[] experts, Tensor[] unified) -> ()");
  m.def("rank_tables_(Tensor(a!)[] tables, Tensor(b!) bin_l1, Tensor[] base, Tensor[] experts) -> ()");
}

#define MERGE3_IMPLEMENT(key)                               \
  STABLE_TORCH_LIBRARY_IMPL(merge3, key, m) {               \
    m.impl("merge_", TORCH_BOX(&merge_));                   \
    m.impl("merge_backward_", TORCH_BOX(&merge_backward_)); \
    m.impl("merged_linear_", TORCH_BOX(&merged_linear_));   \
    m.impl("prepare_", TORCH_BOX(&prepare_));               \
    m.impl("merge_prepared_", TORCH_BOX(&merge_prepared_)); \
    m.impl("elementwise_", TORCH_BOX(&elementwise_));       \
    m.impl("gram_", TORCH_BOX(&gram_));                     \
    m.impl("order_statistics_", TORCH_BOX(&order_statistics_)); \
    m.impl("pack_", TORCH_BOX(&pack_));                     \
    m.impl("rank_tables_", TORCH_BOX(&rank_tables_));       \
  }
MERGE3_IMPLEMENT(CPU)
#if defined(MERGE3_WITH_CUDA)
MERGE3_IMPLEMENT(CUDA)
#endif

// The Python module: torch.ops is filled by loading this library, the module only says how it was built.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* m = PyModule_Create(&module);
  if (m == nullptr) return m;
  PyModule_AddStringConstant(m, "build", merge3_build());
  PyModule_AddStringConstant(m, "cpu", merge3_cpu());
  PyModule_AddIntConstant(m, "chunk", MERGE3_CHUNK);
  PyModule_AddIntConstant(m, "tensor_bytes", sizeof(merge3_tensor));
  return m;
}
