// Which kernel serves which part of a merge on a GPU, decided once per table, so that a launch need not look at it.
#pragma once
#include "chunks.h"

namespace merge3 {

// Every chunk of every tensor in turn, for operations that have one kernel.
inline std::vector<merge3_block> list_blocks(const merge3_tensor* table, int64_t tensors) {
  std::vector<merge3_block> blocks;
  for (int64_t t = 0; t < tensors; ++t)
    for (int64_t c = 0; c * kChunk < table[t].numel; ++c) blocks.push_back({int32_t(t), int32_t(c)});
  return blocks;
}

// Whether groups of eight elements can be read and written 16 bytes at a time.
inline bool whole_groups(const merge3_modes& modes, const merge3_tensor& x) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  bool fits = x.dtype == x.out_dtype && aligned(x.base) && aligned(x.out);
  for (int k = 0; modes.sparsify != MERGE3_SIGNS && k < modes.experts; ++k) fits = fits && aligned(x.experts[k]);
  return fits && (modes.sparsify != MERGE3_KEEP_RANKED || x.columns % 8 == 0);
}

// The kernel of one chunk, as an index of merge3_plan. The last chunk of a tensor may end within a group of eight.
inline int kernel_of(const merge3_tensor& x, bool whole, int64_t chunk) {
  return whole && ((chunk + 1) * kChunk <= x.numel || x.numel % 8 == 0) ? 1 + x.dtype : 0;
}

// blocks: NULL, or room for all.
inline merge3_plan plan_merge(const merge3_modes& modes, int64_t tensors, const merge3_tensor* table, merge3_block* blocks) {
  const auto each = [&](const auto& body) {
    for (int64_t t = 0; t < tensors; ++t) {
      const bool whole = whole_groups(modes, table[t]);
      for (int64_t c = 0; c * kChunk < table[t].numel; ++c)
        body(kernel_of(table[t], whole, c), merge3_block{int32_t(t), int32_t(c)});
    }
  };
  merge3_plan plan{};
  each([&](int kernel, merge3_block) { ++plan.blocks[kernel]; });
  if (!blocks) return plan;
  int64_t next[MERGE3_MERGE_KERNELS] = {};
  for (int kernel = 1; kernel < MERGE3_MERGE_KERNELS; ++kernel) next[kernel] = next[kernel - 1] + plan.blocks[kernel - 1];
  each([&](int kernel, merge3_block block) { blocks[next[kernel]++] = block; });
  return plan;
}

inline int64_t count_blocks(const merge3_plan& plan) {
  int64_t all = 0;
  for (int64_t n : plan.blocks) all += n;
  return all;
}

}  // namespace merge3
