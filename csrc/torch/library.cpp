// torch.ops.merge3.*: checks tensors once, turns them into the C API's tables, calls it.
// Built against torch's stable ABI, so one binary serves every torch from 2.11 on.
#include <Python.h>

#include "../plan.h"
#include "table.h"
#include <torch/csrc/stable/library.h>

namespace {

using namespace merge3::torch_binding;

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
  const Place place = table.place();
  require(merge3_merge(place.context(), &modes, T, table.rows.data(), as_coefficients(coefficients, T * table.experts),
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
  const Place place = table.place();
  require(merge3_merge_backward(place.context(), &modes, T, table.rows.data(),
                                as_coefficients(coefficients, T * table.experts),
                                host<float>(lambda, ScalarType::Float, T, "lambda_"),
                                host<double>(weight, ScalarType::Double, T * table.experts, "weight"),
                                host<double>(rescale, ScalarType::Double, T * table.experts, "rescale"),
                                host<double>(lambda_gradient, ScalarType::Double, T, "lambda_gradient")));
}

// table: the blocks of the plan, then the rows. Its bytes go to the device as they are; the plan stays.
void prepare_(Tensor table, Tensor plan, Tensors out, Tensors base, Tensors experts, Tensor ids, Tensors rank_tables, int64_t sparsify) {
  const int64_t T = int64_t(out.size());
  const Table rows = merge_table(out, base, experts, ids, rank_tables, sparsify);
  const merge3_modes modes{rows.experts, int32_t(sparsify), 0, 0, 0};
  const Place place = rows.place();
  auto* counts = reinterpret_cast<merge3_plan*>(host<int64_t>(plan, ScalarType::Long, MERGE3_MERGE_KERNELS, "plan"));
  require(merge3_prepare(place.context(), &modes, T, rows.rows.data(), counts, nullptr));
  const int64_t head = merge3::count_blocks(*counts) * int64_t(sizeof(merge3_block)), tail = T * int64_t(sizeof(merge3_tensor));
  char* to = host<char>(table, ScalarType::Byte, head + tail, "table");
  require(merge3_prepare(place.context(), &modes, T, rows.rows.data(), counts, reinterpret_cast<merge3_block*>(to)));
  memcpy(to + head, rows.rows.data(), size_t(tail));
}

// Of each merge in turn: what prepare_ made, its numbers, its modes. All have as many tensors and experts.
void merge_prepared_(Tensors tables, Tensors plans, Tensors coefficients, Tensors lambdas, int64_t tensors, int64_t experts,
                     std::vector<int64_t> sparsify, std::vector<int64_t> elect, std::vector<int64_t> normalize,
                     std::vector<int64_t> seeds) {
  const size_t count = tables.size();
  MERGE3_CHECK(count > 0 && plans.size() == count && coefficients.size() == count && lambdas.size() == count &&
                   sparsify.size() == count && elect.size() == count && normalize.size() == count && seeds.size() == count,
               "tables, plans, coefficients, lambdas and modes: expected as many of each");
  const Tensor& first = tables[0];
  const auto resident = [&](const Tensor& x, ScalarType dtype, int64_t numel, const char* name) {
    MERGE3_CHECK(device_of(x) == device_of(first) && x.get_device_index() == first.get_device_index(), name,
                 ": on ", device_name(x), ", expected ", device_name(first), ", where the table is");
    MERGE3_CHECK(x.is_contiguous() && x.scalar_type() == dtype && x.numel() == numel, name, ": expected ", numel,
                 " contiguous elements of scalar type ", int(dtype), ", found ", x.numel(), " of ", int(x.scalar_type()));
    return static_cast<const char*>(x.data_ptr());
  };
  std::vector<merge3_modes> modes(count);
  std::vector<merge3_prepared> merges(count);
  for (size_t i = 0; i < count; ++i) {
    const auto* counts = reinterpret_cast<const merge3_plan*>(host<int64_t>(plans[i], ScalarType::Long, MERGE3_MERGE_KERNELS, "plan"));
    const int64_t head = merge3::count_blocks(*counts) * int64_t(sizeof(merge3_block));
    const char* data = resident(tables[i], ScalarType::Byte, head + tensors * int64_t(sizeof(merge3_tensor)), "table");
    modes[i] = {int32_t(experts), int32_t(sparsify[i]), int32_t(elect[i]), int32_t(normalize[i]), uint64_t(seeds[i])};
    merges[i] = {&modes[i], counts, reinterpret_cast<const merge3_tensor*>(data + head), reinterpret_cast<const merge3_block*>(data),
                 reinterpret_cast<const merge3_coefficient*>(
                     resident(coefficients[i], ScalarType::Float, tensors * experts * kFields, "coefficients")),
                 reinterpret_cast<const float*>(resident(lambdas[i], ScalarType::Float, tensors, "lambda_"))};
  }
  const Place place(device_of(first), first.get_device_index());
  require(merge3_merge_together(place.context(), int32_t(count), tensors, merges.data()));
}

void elementwise_(Tensors out, Tensors base, Tensors experts, Tensor scalars, Tensor per_expert, Tensors rows,
                  int64_t rule) {
  const int64_t T = int64_t(out.size());
  if (T == 0) return;
  Table table(out, base, experts, T);
  if (rule == MERGE3_ARCEE_FUSION) set_rank_tables(table, rows, 1, "rows");
  const Place place = table.place();
  require(merge3_elementwise(place.context(), int32_t(rule), table.experts, T, table.rows.data(),
                             host<float>(scalars, ScalarType::Float, T, "scalars"),
                             host<float>(per_expert, ScalarType::Float, T * table.experts, "per_expert")));
}

void gram_(Tensor gram, Tensors base, Tensors experts) {
  const int64_t T = gram.dim() == 3 ? gram.size(0) : -1;
  if (T == 0) return;
  const Table table({}, base, experts, T);
  const int64_t vectors = table.experts + 1;
  const Place place = table.place();
  require(merge3_gram(place.context(), table.experts, T, table.rows.data(),
                      host<double>(gram, ScalarType::Double, T * vectors * vectors, "gram")));
}

void order_statistics_(Tensor value, Tensor greater, Tensor equal, Tensor l1_greater, Tensor total, Tensor nonzero,
                       Tensors base, Tensors experts, Tensor ranks, int64_t statistic) {
  const int64_t T = ranks.size(0), R = ranks.size(1);
  if (T == 0) return;
  const Table table({}, base, experts, T);
  const int64_t pairs = T * (statistic == MERGE3_VARIANCE ? 1 : table.experts);
  const Place place = table.place();
  require(merge3_order_statistics(place.context(), int32_t(statistic), table.experts, T, table.rows.data(), R,
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
  const Place place = table.place();
  const int32_t packing = unified.empty() ? MERGE3_PACK_SIGNS : MERGE3_PACK_AGREEMENT;
  require(merge3_pack(place.context(), packing, table.experts, T, table.rows.data(),
                      host<double>(sums, ScalarType::Double, T * table.experts * 2, "sums")));
}

void rank_tables_(Tensors tables, Tensor bin_l1, Tensors base, Tensors experts) {
  const int64_t T = bin_l1.size(0);
  if (T == 0) return;
  Table table({}, base, experts, T);
  set_rank_tables(table, tables, MERGE3_RANK_STRIDE, "tables");
  const Place place = table.place();
  require(merge3_rank_tables(place.context(), table.experts, T, table.rows.data(),
                             host<double>(bin_l1, ScalarType::Double, T * table.experts * MERGE3_RANK_BINS, "bin_l1")));
}

}  // namespace

STABLE_TORCH_LIBRARY(merge3, m) {
  m.def("merge_(Tensor(a!)[] out, Tensor[] base, Tensor[] experts, Tensor coefficients, Tensor lambda_, "
        "Tensor ids, Tensor offsets, Tensor columns, Tensor[] rank_tables, int sparsify, int elect, bool normalize, int seed) -> ()");
  m.def("merge_backward_(Tensor(a!) weight, Tensor(b!) rescale, Tensor(c!) lambda_gradient, Tensor[] gradients, Tensor[] base, "
        "Tensor[] experts, Tensor coefficients, Tensor lambda_, Tensor ids, Tensor[] rank_tables, int sparsify, int elect, "
        "bool normalize, int seed) -> ()");
  m.def("prepare_(Tensor(a!) table, Tensor(b!) plan, Tensor[] out, Tensor[] base, Tensor[] experts, Tensor ids, Tensor[] rank_tables, "
        "int sparsify) -> ()");
  m.def("merge_prepared_(Tensor[] tables, Tensor[] plans, Tensor[] coefficients, Tensor[] lambdas, int tensors, int experts, "
        "int[] sparsify, int[] elect, int[] normalize, int[] seeds) -> ()");
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
  PyModule_AddIntConstant(m, "block_bytes", sizeof(merge3_block));
  PyModule_AddIntConstant(m, "merge_kernels", MERGE3_MERGE_KERNELS);
  return m;
}
