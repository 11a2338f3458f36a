// torch.ops.merge3.merge_compact_: the fused merge over compacted experts; see include/merge3/compact.h.
#include "../include/merge3/compact.h"
#include "table.h"
#include <torch/csrc/stable/library.h>

namespace {

using namespace merge3::torch_binding;

constexpr int64_t kFields = sizeof(merge3_coefficient) / sizeof(float);

// values, masks, sides: T*K. No values: the expert is in `experts`. Of kept values: a mask, and int64 starts of the
// chunks with their sum behind. Of bytes: no mask, and float32 scales of the rows.
std::vector<merge3_compact> compact_of(const Table& table, const Tensors& values, const Tensors& masks, const Tensors& sides) {
  const size_t count = table.rows.size() * size_t(table.experts);
  MERGE3_CHECK(values.size() == count && masks.size() == count && sides.size() == count, values.size(),
               " values, ", masks.size(), " masks, ", sides.size(), " sides: expected ", count, " of each");
  std::vector<merge3_compact> found(count);
  for (size_t i = 0; i < count; ++i) {
    const merge3_tensor& row = table.rows[i / size_t(table.experts)];
    const int64_t own = values[i].numel();
    if (own == 0) continue;  // none kept: the expert is the base, which stands in its place
    table.require_here(values[i], "values", int64_t(i));
    const bool bytes = values[i].scalar_type() == ScalarType::Char;
    const int64_t rows = row.columns ? row.numel / row.columns : 0, chunks = (row.numel + MERGE3_CHUNK - 1) / MERGE3_CHUNK;
    MERGE3_CHECK(values[i].is_contiguous() && (bytes ? own == row.numel : storage_dtype(values[i], "values", int64_t(i)) == row.dtype),
                 "values[", i, "]: expected as many bytes as elements, or values of the expert's dtype, found ", own);
    merge3_compact& to = found[i];
    to.values = values[i].data_ptr();
    to.columns = row.columns;
    if (bytes) {
      to.scales = host<float>(sides[i], ScalarType::Float, rows, "sides");
      continue;
    }
    to.mask = reinterpret_cast<const uint32_t*>(host<int32_t>(masks[i], ScalarType::Int, (row.numel + 31) / 32, "masks"));
    to.starts = host<int64_t>(sides[i], ScalarType::Long, chunks + 1, "sides");
    MERGE3_CHECK(to.starts[chunks] == own, "values[", i, "]: found ", own, ", its chunks have ", to.starts[chunks]);
  }
  return found;
}

void merge_compact_(Tensors out, Tensors base, Tensors experts, Tensors values, Tensors masks, Tensors sides, Tensor coefficients,
                    Tensor lambda, Tensor ids, Tensors rank_tables, int64_t sparsify, int64_t elect, bool normalize, int64_t seed) {
  const int64_t T = int64_t(out.size());
  if (T == 0) return;
  const Table table = merge_table(out, base, experts, ids, rank_tables, sparsify);
  const std::vector<merge3_compact> compact = compact_of(table, values, masks, sides);
  const merge3_modes modes{table.experts, int32_t(sparsify), int32_t(elect), normalize, uint64_t(seed)};
  const Place place = table.place();
  const float* c = host<float>(coefficients, ScalarType::Float, T * table.experts * kFields, "coefficients");
  require(merge3_merge_compact(place.context(), &modes, T, table.rows.data(), compact.data(),
                               reinterpret_cast<const merge3_coefficient*>(c),
                               host<float>(lambda, ScalarType::Float, T, "lambda_")));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(merge3, m) {
  m.def("merge_compact_(Tensor(a!)[] out, Tensor[] base, Tensor[] experts, Tensor[] values, Tensor[] masks, Tensor[] sides, "
        "Tensor coefficients, Tensor lambda_, Tensor ids, Tensor[] rank_tables, int sparsify, int elect, bool normalize, "
        "int seed) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(merge3, CPU, m) { m.impl("merge_compact_", TORCH_BOX(&merge_compact_)); }
