// The fused merge over compacted experts: each part of a chunk is expanded into scratch that stays in cache, and the
// ordinary loop of this processor merges it there. So all modes are there at once, and their bits are the same.
// Moves the base, the out, and of each expert a bit and the values kept (or a byte) per element.
#include <exception>
#include <vector>

#include "../checks.h"
#include "../include/merge3/compact.h"
#include "loops.h"
#include "storage.h"
#include "threads.h"

namespace merge3 {
namespace {

constexpr int64_t kPart = std::min<int64_t>(16384, kChunk);  // elements; of three bfloat16 experts 96 KB
constexpr int64_t kCached = int64_t(16) << 20;               // as in api.cpp
static_assert(kChunk % kPart == 0 && kPart % 512 == 0);

const char* at(const void* data, int64_t element, int32_t dtype) {
  return static_cast<const char*>(data) + element * element_size(dtype);
}

// Puts the values from `next` on where bits are set. Returns the first that is left.
template <class T>
const void* scatter(const uint32_t* mask, int64_t n, const void* next, char* to) {
  const T* value = static_cast<const T*>(next);
  for (int64_t word = 0; word * 32 < n; ++word) {
    T* block = reinterpret_cast<T*>(to) + word * 32;
    for (uint32_t bits = mask[word]; bits; bits &= bits - 1) block[__builtin_ctz(bits)] = *value++;
  }
  return value;
}

// Elements [begin, begin + n) of base + scale * byte.
void add_bytes(const merge3_compact& compact, int32_t dtype, const void* base, int64_t begin, int64_t n, char* to) {
  constexpr int kBlock = 512;
  alignas(64) float theta[kBlock];
  const int8_t* bytes = static_cast<const int8_t*>(compact.values);
  for (int64_t from = 0; from < n; from += kBlock) {
    const int m = int(std::min<int64_t>(n - from, kBlock));
    load_block(dtype, base, begin + from, m, theta);
    for (int j = 0; j < m;) {  // row by row
      const int64_t element = begin + from + j, row = element / compact.columns;
      const int until = int(std::min<int64_t>(m, (row + 1) * compact.columns - (begin + from)));
      const float scale = compact.scales[row];
      const int8_t* own = bytes + begin + from;
      for (; j < until; ++j) theta[j] += scale * float(own[j]);
    }
    store_block(dtype, to, from, m, theta, false);
  }
}

// Where the next part's values are, of each expert of a chunk.
struct Reader {
  const void* next[MERGE3_MAX_EXPERTS];

  Reader(const merge3_compact* compact, const merge3_tensor& tensor, int experts, int64_t begin) {
    for (int k = 0; k < experts; ++k)
      next[k] = compact[k].starts ? at(compact[k].values, compact[k].starts[begin / kChunk], tensor.dtype) : nullptr;
  }

  // Elements [begin, begin + n) of expert k, where they lie or in `scratch`.
  const void* read(const merge3_compact& compact, const merge3_tensor& tensor, int k, int64_t begin, int64_t n, char* scratch) {
    const char* from = at(tensor.experts[k], begin, tensor.dtype);
    if (!compact.values) return from;
    if (compact.scales) {
      add_bytes(compact, tensor.dtype, tensor.experts[k], begin, n, scratch);
      return scratch;
    }
    const int64_t size = element_size(tensor.dtype);
    memcpy(scratch, from, size_t(n * size));
    const uint32_t* mask = compact.mask + begin / 32;
    next[k] = size == 4 ? scatter<uint32_t>(mask, n, next[k], scratch) : scatter<uint16_t>(mask, n, next[k], scratch);
    return scratch;
  }
};

merge3_status check_compact(const merge3_tensor& tensor, const merge3_compact& compact, int64_t t, int k) {
  if (!compact.values || tensor.numel == 0) return MERGE3_OK;
  const bool kept = compact.mask && compact.starts && !compact.scales;
  const bool rows = compact.scales && !compact.mask && compact.columns > 0 && tensor.numel % compact.columns == 0;
  if (!kept && !rows)
    return fail(MERGE3_INVALID_ARGUMENT, "tensor %lld: compacted expert %d: expected a mask and starts, or scales of its rows",
                (long long)t, k);
  if (tensor.offset) return fail(MERGE3_INVALID_ARGUMENT, "tensor %lld: a slice: compacted experts need whole tensors", (long long)t);
  return MERGE3_OK;
}

void merge_parts(const MergeCall& call, const merge3_compact* compact, int64_t from, int64_t to) {
  const int K = call.modes->experts;
  constexpr int64_t kRoom = (kPart + 32) * 4;
  static thread_local std::vector<char> scratch;
  scratch.resize(size_t(K * kRoom + 64));
  char* aligned = scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64);
  const auto merge = loops().merge;
  call.chunks->each(call.table, from, to, [&](int64_t t, int64_t begin, int64_t end, int64_t) {
    const merge3_tensor& tensor = call.table[t];
    const merge3_compact* own = compact + t * K;
    Reader reader(own, tensor, K, begin);
    for (int64_t part = begin; part < end; part += kPart) {
      merge3_tensor row = tensor;
      row.numel = std::min(kPart, end - part);
      row.offset = tensor.offset + part;
      row.out = const_cast<char*>(at(tensor.out, part, tensor.out_dtype));
      if (tensor.base) row.base = at(tensor.base, part, tensor.dtype);
      for (int k = 0; k < K; ++k) row.experts[k] = reader.read(own[k], tensor, k, part, row.numel, aligned + k * kRoom);
      const int64_t counts[2] = {0, 1};
      const ChunkRange one{counts, 1};
      merge({call.modes, &row, call.coefficients + t * K, call.lambda + t, &one, call.stream}, 0, 1);
    }
  });
}

}  // namespace
}  // namespace merge3

using namespace merge3;

extern "C" merge3_status merge3_merge_compact(const merge3_context* context, const merge3_modes* modes, int64_t tensors,
                                              const merge3_tensor* table, const merge3_compact* compact,
                                              const merge3_coefficient* coefficients, const float* lambda) {
  try {
    std::vector<int64_t> first(size_t(std::max<int64_t>(tensors, 0)) + 1);
    if (merge3_status s = merge3_prepare(context, modes, tensors, table, first.data())) return s;
    if (merge3_status s = check_numbers(tensors, coefficients, lambda)) return s;
    if (context->device != MERGE3_CPU || modes->sparsify > MERGE3_KEEP_BAND)
      return fail(MERGE3_UNSUPPORTED, "compacted experts are merged on the CPU, in an unpacked mode");
    if (tensors > 0 && !compact) return fail(MERGE3_INVALID_ARGUMENT, "no compacted experts: call merge3_merge");
    int64_t bytes = 0;
    for (int64_t t = 0; t < tensors; ++t) {
      bytes += table[t].numel * element_size(table[t].out_dtype);
      for (int k = 0; k < modes->experts; ++k)
        if (merge3_status s = check_compact(table[t], compact[t * modes->experts + k], t, k)) return s;
    }
    const ChunkRange range{first.data(), tensors};
    const MergeCall call{modes, table, coefficients, lambda, &range, bytes > kCached};
    parallel(*context, range.count(), [&](int64_t from, int64_t to) { merge_parts(call, compact, from, to); });
    return MERGE3_OK;
  } catch (const std::exception& error) {
    return fail(MERGE3_DEVICE_ERROR, "%s", error.what());
  }
}
