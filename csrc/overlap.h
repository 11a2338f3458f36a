// Whether a merge would write what it still has to read. Tensors are merged in parallel, so no output may
// share memory with an input or another output, save with the base of its own tensor, element for element.
#pragma once
#include <algorithm>
#include <string>
#include <vector>

#include "include/merge3/merge.h"

namespace merge3 {

struct Span {
  uintptr_t begin, end;
  int64_t tensor;
  int32_t what;  // -2: out, -1: base, k: expert k

  std::string name() const {
    const std::string of = " of tensor " + std::to_string(tensor);
    return (what == -2 ? "out" : what == -1 ? "base" : "expert " + std::to_string(what)) + of;
  }
};

inline int64_t element_size(int32_t dtype) { return dtype == MERGE3_FLOAT32 ? 4 : 2; }

// Empty, or a sentence about the first overlap by address. A sort and one pass.
inline std::string find_overlap(const merge3_tensor* table, int64_t tensors, int32_t experts) {
  std::vector<Span> spans;
  spans.reserve(size_t(tensors) * size_t(experts + 2));
  for (int64_t t = 0; t < tensors; ++t) {
    const merge3_tensor& x = table[t];
    const auto add = [&](const void* data, int32_t dtype, int32_t what) {
      const auto begin = reinterpret_cast<uintptr_t>(data);
      if (data && x.numel) spans.push_back({begin, begin + uintptr_t(x.numel * element_size(dtype)), t, what});
    };
    add(x.out, x.out_dtype, -2);
    if (x.base != x.out || x.dtype != x.out_dtype) add(x.base, x.dtype, -1);
    for (int32_t k = 0; k < experts; ++k) add(x.experts[k], x.dtype, k);
  }
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
  Span written{}, any{};  // those that reach furthest so far
  for (const Span& span : spans) {
    const Span& before = span.what == -2 ? any : written;
    if (span.begin < before.end) return span.name() + " overlaps " + before.name();
    if (span.what == -2 && span.end > written.end) written = span;
    if (span.end > any.end) any = span;
  }
  return {};
}

}  // namespace merge3
