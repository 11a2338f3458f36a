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
constexpr int64_t kChunk = MERGE3_CHUNK;
static_assert(kChunk % 512 == 0);

inline void count_chunks(const merge3_tensor* table, int64_t tensors, int64_t* first) {
  first[0] = 0;
  for (int64_t t = 0; t < tensors; ++t) first[t + 1] = first[t] + (table[t].numel + kChunk - 1) / kChunk;
}

struct ChunkRange {
  const int64_t* first;  // first[t]: chunks before tensor t; first[tensors]: all of them
  int64_t tensors;

  int64_t count() const { return first[tensors]; }

  // body(tensor, begin, end, chunk) for each chunk in [from, to).
  template <class Body>
  void each(const merge3_tensor* table, int64_t from, int64_t to, const Body& body) const {
    int64_t t = std::upper_bound(first, first + tensors + 1, from) - first - 1;
    for (int64_t chunk = from; chunk < to; ++chunk) {
      while (chunk >= first[t + 1]) ++t;
      const int64_t begin = (chunk - first[t]) * kChunk;
      body(t, begin, std::min(begin + kChunk, table[t].numel), chunk);
    }
  }
};

// A range that owns its counts.
struct Chunks : ChunkRange {
  Chunks(const merge3_tensor* table, int64_t tensors) : ChunkRange{nullptr, tensors}, counts(size_t(tensors) + 1) {
    count_chunks(table, tensors, counts.data());
    first = counts.data();
  }
  Chunks(const Chunks&) = delete;
  Chunks& operator=(const Chunks&) = delete;

  std::vector<int64_t> counts;
};

}  // namespace merge3
