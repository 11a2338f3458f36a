// The fused merge over compacted experts: each part of a chunk is expanded into scratch that stays in cache, and the
// ordinary loop of this processor merges it there. So all modes are there at once, and their bits are the same.
// Where a processor expands registers by a mask (AVX-512 VBMI2), words are; tried: bit by bit, 0.35 ns an element more.
// Moves the base, the out, and of each expert a bit and the values kept (or a byte) per element.
#include <exception>
#include <vector>

#include "../checks.h"
#include "compact_bytes.h"
#include "loops.h"
#include "threads.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace merge3 {
#if defined(__x86_64__)
void add_bytes_avx2(const merge3_compact& compact, int32_t dtype, const void* base, int64_t begin, int64_t n, char* to);
#endif
namespace {

#if defined(__x86_64__)
constexpr auto add_bytes_best = add_bytes_avx2;
#else
constexpr auto add_bytes_best = add_bytes_generic;
#endif
constexpr int64_t kPart = std::min<int64_t>(16384, kChunk);  // elements; of three bfloat16 experts 96 KB
constexpr int64_t kCached = int64_t(16) << 20;               // as in api.cpp
static_assert(kChunk % kPart == 0 && kPart % 512 == 0);

const char* at(const void* data, int64_t element, int32_t dtype) {
  return static_cast<const char*>(data) + element * element_size(dtype);
}

// The n elements of `from`, with the values from `next` on where bits are set. Returns the first value that is left.
template <class T>
const T* expand_any(const uint32_t* mask, int64_t n, const T* from, const T* next, const T*, T* to) {
  memcpy(to, from, size_t(n) * sizeof(T));
  for (int64_t word = 0; word * 32 < n; ++word)
    for (uint32_t bits = mask[word]; bits; bits &= bits - 1) to[word * 32 + __builtin_ctz(bits)] = *next++;
  return next;
}

#if defined(__x86_64__)
// A whole word at a time. `end`: behind the tensor's last value, beyond which nothing is read.
#define MERGE3_EXPAND(T, STEP, TARGET, BLEND)                                                                            \
  __attribute__((target(TARGET))) const T* expand_words(const uint32_t* mask, int64_t n, const T* from, const T* next,   \
                                                        const T* end, T* to) {                                           \
    int64_t word = 0;                                                                                                    \
    for (; (word + 1) * 32 <= n && end - next >= 32; ++word)                                                             \
      for (int half = 0; half < 32; half += STEP) {                                                                      \
        const uint32_t bits = uint32_t(uint64_t(mask[word]) >> half) & uint32_t((uint64_t(1) << STEP) - 1);              \
        const int64_t at = word * 32 + half;                                                                             \
        _mm512_storeu_si512(to + at, BLEND(_mm512_loadu_si512(from + at), bits, _mm512_loadu_si512(next)));              \
        next += __builtin_popcount(bits);                                                                                \
      }                                                                                                                  \
    const int64_t done = word * 32;                                                                                      \
    return done < n ? expand_any(mask + word, n - done, from + done, next, end, to + done) : next;                       \
  }
MERGE3_EXPAND(uint16_t, 32, "avx512f,avx512bw,avx512vbmi2,popcnt", _mm512_mask_expand_epi16)
MERGE3_EXPAND(uint32_t, 16, "avx512f,popcnt", _mm512_mask_expand_epi32)
#undef MERGE3_EXPAND

bool by_words() {
  static const bool can = !strcmp(loops().name, "avx512") && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("popcnt");
  return can;
}
#else
template <class T>
const T* expand_words(const uint32_t* mask, int64_t n, const T* from, const T* next, const T* end, T* to) {
  return expand_any(mask, n, from, next, end, to);
}
bool by_words() { return false; }
#endif

template <class T>
const void* expand(const uint32_t* mask, int64_t n, const void* from, const void* next, const void* end, char* to) {
  const auto* source = static_cast<const T*>(from);
  const auto *value = static_cast<const T*>(next), *last = static_cast<const T*>(end);
  auto* target = reinterpret_cast<T*>(to);
  return by_words() ? expand_words(mask, n, source, value, last, target) : expand_any(mask, n, source, value, last, target);
}

// Where the next part's values are, and where they end, of each expert of a chunk.
struct Reader {
  const void *next[MERGE3_MAX_EXPERTS], *last[MERGE3_MAX_EXPERTS];

  Reader(const merge3_compact* compact, const merge3_tensor& tensor, int experts, int64_t begin) {
    for (int k = 0; k < experts; ++k) {
      if (!compact[k].starts) continue;
      next[k] = at(compact[k].values, compact[k].starts[begin / kChunk], tensor.dtype);
      last[k] = at(compact[k].values, compact[k].starts[(tensor.numel + kChunk - 1) / kChunk], tensor.dtype);
    }
  }

  // Elements [begin, begin + n) of expert k, where they lie or in `scratch`.
  const void* read(const merge3_compact& compact, const merge3_tensor& tensor, int k, int64_t begin, int64_t n, char* scratch) {
    const char* from = at(tensor.experts[k], begin, tensor.dtype);
    if (!compact.values) return from;
    if (compact.scales) {
      const auto add = strcmp(loops().name, "generic") ? add_bytes_best : add_bytes_generic;
      add(compact, tensor.dtype, tensor.experts[k], begin, n, scratch);
      return scratch;
    }
    const auto expanded = element_size(tensor.dtype) == 4 ? &expand<uint32_t> : &expand<uint16_t>;
    next[k] = expanded(compact.mask + begin / 32, n, from, next[k], last[k], scratch);
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
    if (merge3_status s = check_merge(context, modes, tensors, table)) return s;
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
    const Chunks range(table, tensors);
    const MergeCall call{modes, table, coefficients, lambda, &range, bytes > kCached};
    parallel(*context, range.count(), [&](int64_t from, int64_t to) { merge_parts(call, compact, from, to); });
    return MERGE3_OK;
  } catch (const std::exception& error) {
    return fail(MERGE3_DEVICE_ERROR, "%s", error.what());
  }
}
