// Torch tensors as the C API's table: checked once, each by its list and index.
#pragma once
#if defined(MERGE3_WITH_CUDA)
#define USE_CUDA 1  // declares aoti_torch_get_current_cuda_stream, also in a CPU build of torch
#endif
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../include/merge3/merge.h"

namespace merge3::torch_binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// What is refused, as torch passes it on: a RuntimeError that begins with "merge3: ". Not by STD_TORCH_CHECK, which writes
// numbers to a stream: where a toolchain puts a C++ library of its own into the extension, as some images' do, the locales
// that it finds in the process are another's, and the first number ends the process.
inline void append(std::string& text, const std::string& part) { text += part; }
template <class T, std::enable_if_t<std::is_integral_v<T>, int> = 0>
void append(std::string& text, T number) {
  text += std::to_string(number);
}
template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::string text = "merge3: ";
  (append(text, parts), ...);
  throw std::runtime_error(text);
}
#define MERGE3_CHECK(condition, ...)       \
  do {                                     \
    if (!(condition)) refuse(__VA_ARGS__); \
  } while (0)

inline void torch_parallel_for_adapter(void*, int64_t count, void (*body)(void*, int64_t, int64_t), void* arg) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(arg, begin, end); });
}
const merge3_executor kTorchThreads = {torch_parallel_for_adapter, nullptr};

inline void require(merge3_status status) {
  MERGE3_CHECK(status == MERGE3_OK, merge3_last_error());
}

inline int32_t storage_dtype(const Tensor& x, const char* list, int64_t t) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return MERGE3_FLOAT32;
    case ScalarType::Half: return MERGE3_FLOAT16;
    case ScalarType::BFloat16: return MERGE3_BFLOAT16;
    default: refuse(list, "[", t, "]: expected float32, float16 or bfloat16, found scalar type ", int(x.scalar_type()));
  }
}

inline int device_of(const Tensor& x) {
#if defined(MERGE3_EMULATED)  // tests: CPU tensors stand for a GPU's
  static const bool cpu = getenv("MERGE3_TEST_DEVICE") && std::string(getenv("MERGE3_TEST_DEVICE")) == "cpu";
  return cpu ? MERGE3_CPU : MERGE3_CUDA;
#else
  return x.is_cuda() ? MERGE3_CUDA : MERGE3_CPU;
#endif
}

// As PyTorch writes it.
inline std::string device_name(const Tensor& x) {
  if (x.is_cpu()) return "cpu";
  return (x.is_cuda() ? "cuda:" : "other:") + std::to_string(x.get_device_index());
}

// Where an op works. A GPU is the current device as long as this lives, and work there goes to the stream that torch
// is using. The C API would switch devices itself; but torch's guard, when it switches back, does not open a context on
// a GPU that this process has not used so far.
class Place {
 public:
  Place(int device, int32_t index) : context_{device, nullptr, &kTorchThreads, std::max(index, int32_t(0))} {
#if defined(MERGE3_EMULATED)  // tests: the GPU that CPU tensors stand for
    if (const char* chosen = getenv("MERGE3_TEST_DEVICE_INDEX")) context_.device_index = int32_t(atoi(chosen));
#elif defined(MERGE3_WITH_CUDA)
    if (device != MERGE3_CUDA) return;
    guard_.emplace(index);
    const bool found = aoti_torch_get_current_cuda_stream(index, &context_.stream) == 0;
    MERGE3_CHECK(found, "no stream on cuda:", index);
#endif
  }

  const merge3_context* context() const { return &context_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  merge3_context context_;
};

// One row per tensor, K experts each (expert fastest); `out` and `base` may be empty lists.
struct Table {
  std::vector<merge3_tensor> rows;
  int32_t experts = 0;
  int device = MERGE3_CPU;
  int32_t device_index = 0;
  std::string there;  // the device in words, and by whose example

  // unread: so many experts whose tensors are not there, because no kernel reads them; then the base leads.
  Table(const Tensors& out, const Tensors& base, const Tensors& experts_list, int64_t tensors, int32_t unread = 0) {
    if (unread) {
      lead_by_base(out, base, unread);
      return;
    }
    MERGE3_CHECK(tensors > 0 && !experts_list.empty() && int64_t(experts_list.size()) % tensors == 0,
                 experts_list.size(), " expert tensors for ", tensors,
                 " tensors: expected K per tensor, expert fastest");
    MERGE3_CHECK(base.empty() || int64_t(base.size()) == tensors, base.size(),
                 " base tensors: expected ", tensors, " or none");
    experts = int32_t(int64_t(experts_list.size()) / tensors);
    MERGE3_CHECK(experts <= MERGE3_MAX_EXPERTS, experts, " experts: expected 1 to ", MERGE3_MAX_EXPERTS);
    settle(experts_list[0], "experts[0]");
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

  // All tensors of a call lie on one device. i: its place in the list, where it stands in one.
  void require_here(const Tensor& x, const char* name, int64_t i = -1) const {
    MERGE3_CHECK(device_of(x) == device && x.get_device_index() == device_index, name,
                 i < 0 ? "" : "[" + std::to_string(i) + "]", ": on ", device_name(x), ", expected ", there);
  }

  Place place() const { return Place(device, device_index); }

 private:
  void settle(const Tensor& lead, const char* name) {
    device = device_of(lead);
    device_index = lead.get_device_index();
    there = device_name(lead) + ", where " + name + " is";
  }

  void lead_by_base(const Tensors& out, const Tensors& base, int32_t count) {
    MERGE3_CHECK(!base.empty() && base.size() == out.size(), base.size(), " base tensors: expected ", out.size());
    MERGE3_CHECK(count <= MERGE3_MAX_EXPERTS, count, " experts: expected 1 to ", MERGE3_MAX_EXPERTS);
    experts = count;
    settle(base[0], "base[0]");
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
    MERGE3_CHECK(x.is_contiguous(), list, "[", i, "]: expected a contiguous tensor");
    MERGE3_CHECK(x.numel() == row.numel, list, "[", i, "]: found ", x.numel(),
                 " elements, expected ", row.numel);
    require_here(x, list, i);
    MERGE3_CHECK(reinterpret_cast<uintptr_t>(x.data_ptr()) % (row.dtype == MERGE3_FLOAT32 ? 4 : 2) == 0, list,
                 "[", i, "]: misaligned, expected an address that is a multiple of its element size");
    MERGE3_CHECK(!same_dtype || storage_dtype(x, list, i) == row.dtype, list, "[", i,
                 "]: its dtype differs from the first expert's of this tensor");
    return x.data_ptr();
  }
};

template <class T>
T* host(const Tensor& x, ScalarType dtype, int64_t numel, const char* name) {
  MERGE3_CHECK(x.is_cpu() && x.is_contiguous() && x.scalar_type() == dtype, name,
               ": expected a contiguous CPU tensor of scalar type ", int(dtype), ", found ", int(x.scalar_type()),
               " on ", device_name(x));
  MERGE3_CHECK(x.numel() == numel, name, ": found ", x.numel(), " elements, expected ", numel);
  return static_cast<T*>(x.data_ptr());
}

inline void set_rank_tables(Table& table, const Tensors& tables, int64_t stride, const char* name, bool slices = false) {
  MERGE3_CHECK(tables.size() == table.rows.size() * size_t(table.experts), tables.size(), " ", name,
               ": expected ", table.rows.size() * size_t(table.experts));
  for (size_t i = 0; i < tables.size(); ++i) {
    merge3_tensor& row = table.rows[i / size_t(table.experts)];
    // A slice has the tables of its whole tensor.
    const int64_t rows = row.columns ? (row.offset + row.numel + row.columns - 1) / row.columns : 0;
    const int64_t found = tables[i].numel(), expected = rows * stride;
    table.require_here(tables[i], name, int64_t(i));
    MERGE3_CHECK(tables[i].scalar_type() == ScalarType::Float && tables[i].is_contiguous() &&
                     (found == expected || (slices && found > expected)),
                 name, "[", i, "]: expected ", expected, " contiguous float32, found ", found,
                 " elements");
    row.rank_tables[i % size_t(table.experts)] = static_cast<const float*>(tables[i].data_ptr());
  }
}

inline void set_masks(Table& table, const Tensors& masks, bool slices = false) {
  MERGE3_CHECK(masks.size() == table.rows.size() * size_t(table.experts), masks.size(), " masks: expected ",
               table.rows.size() * size_t(table.experts));
  for (size_t i = 0; i < masks.size(); ++i) {
    merge3_tensor& row = table.rows[i / size_t(table.experts)];
    const int64_t found = masks[i].numel(), expected = (row.offset + row.numel + 31) / 32;
    table.require_here(masks[i], "masks", int64_t(i));
    MERGE3_CHECK(masks[i].scalar_type() == ScalarType::Int && masks[i].is_contiguous() &&
                     (found == expected || (slices && found > expected)),
                 "masks[", i, "]: expected ", expected, " contiguous int32, found ", found);
    row.masks[i % size_t(table.experts)] = static_cast<const uint32_t*>(masks[i].data_ptr());
  }
}

// columns: of each row's tensor where the rows are slices, whose own shapes do not tell.
inline Table merge_table(const Tensors& out, const Tensors& base, const Tensors& experts, const Tensor& ids, const Tensors& rank_tables,
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

}  // namespace merge3::torch_binding
