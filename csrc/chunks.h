// A model as one range of equal chunks, so that work spreads evenly over threads or blocks whatever
// the sizes of its tensors. Chunk boundaries never change a result: all offsets are in elements of
// the tensor.
#pragma once
#include <stdint.h>

#include <algorithm>
#include <vector>

#include "include/merge3/merge.h"

namespace merge3 {

// Elements. A multiple of 64, so that SIMD groups and Philox blocks never straddle two chunks.
constexpr int64_t kChunk = 1 << 16;

struct Chunks {
  std::vector<int64_t> first;  // first[t]: chunks before tensor t; first[tensors]: all of them

  Chunks(const merge3_tensor* table, int64_t tensors) : first(size_t(tensors) + 1, 0) {
    for (int64_t t = 0; t < tensors; ++t)
      first[size_t(t) + 1] = first[size_t(t)] + (table[t].numel + kChunk - 1) / kChunk;
  }
  int64_t count() const { return first.back(); }

  // body(tensor, begin, end, chunk) for each chunk in [from, to).
  template <class Body>
  void each(const merge3_tensor* table, int64_t from, int64_t to, const Body& body) const {
    int64_t t = std::upper_bound(first.begin(), first.end(), from) - first.begin() - 1;
    for (int64_t chunk = from; chunk < to; ++chunk) {
      while (chunk >= first[size_t(t) + 1]) ++t;
      const int64_t begin = (chunk - first[size_t(t)]) * kChunk;
      body(t, begin, std::min(begin + kChunk, table[t].numel), chunk);
    }
  }
};

}  // namespace merge3
