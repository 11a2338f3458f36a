// Index arithmetic beyond 2^31 elements: a tensor of 2^33 + 5, of which only the last blocks are run.
//
// Its memory is reserved, not used: pages that nothing touches cost nothing. An index cut to 32 bits would
// write near the start, or read a zero there.
#include <stdio.h>
#include <sys/mman.h>

#include "../../../csrc/cuda/launch.cuh"

using namespace merge3;

static uint16_t* reserve(int64_t elements) {
  void* p = mmap(nullptr, size_t(elements) * 2, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    perror("mmap");
    exit(77);  // this machine gives no such address space
  }
  return static_cast<uint16_t*>(p);
}

static uint16_t bf16(float x) { return uint16_t(float_to_bfloat16(as_uint(x))); }

int main() {
  const int64_t n = (int64_t(1) << 33) + 5;
  uint16_t *base = reserve(n), *expert = reserve(n), *out = reserve(n);
  for (int64_t i = n - 70000; i < n; ++i) base[i] = bf16(1.0f), expert[i] = bf16(float(3 + (i & 1)));
  merge3_tensor tensor{};
  tensor.numel = n;
  tensor.columns = n;
  tensor.dtype = tensor.out_dtype = MERGE3_BFLOAT16;
  tensor.base = base;
  tensor.experts[0] = expert;
  tensor.out = out;
  merge3_coefficient c{};
  c.weight = 1.0f, c.rescale = 1.0f, c.lo_share = 1.0f, c.density = 0.5f;
  const float lambda = 2.0f;
  emulation::last_blocks = 2;
  for (int32_t sparsify : {MERGE3_KEEP_ALL, MERGE3_KEEP_RANDOM}) {
    merge3_modes modes{};
    modes.experts = 1;
    modes.sparsify = sparsify;
    modes.seed = 5;
    if (int code = merge_cuda(modes, 1, &tensor, &c, &lambda, nullptr)) {
      printf("merge: %s\n", cuda_message(code));
      return 1;
    }
    int64_t kept = 0;
    for (int64_t i = n - kChunk; i < n; ++i) {
      const float theta = bfloat16_to_float(base[i]), tau = bfloat16_to_float(expert[i]) - theta, found = bfloat16_to_float(out[i]);
      const bool is_kept = found == theta + 2.0f * tau;
      kept += is_kept;
      if (!is_kept && (sparsify == MERGE3_KEEP_ALL || found != theta)) {
        printf("element %lld: %g\n", (long long)i, double(found));
        return 1;
      }
    }
    if (sparsify == MERGE3_KEEP_RANDOM && (kept < int64_t(0.48 * kChunk) || kept > int64_t(0.52 * kChunk))) {
      printf("%lld of %lld kept\n", (long long)kept, (long long)kChunk);
      return 1;
    }
  }
  for (int64_t i = 0; i < 4 * kChunk; ++i)
    if (out[i] || out[(int64_t(1) << 31) + i] || out[(int64_t(1) << 32) + i]) {
      printf("written near a multiple of 2^31, at %lld\n", (long long)i);
      return 1;
    }
  // Statistics of the same tensor, over the same blocks.
  const Chunks chunks(&tensor, 1);
  std::vector<double> partial(size_t(chunks.count()) * 3);
  if (gram_cuda(1, 1, &tensor, partial.data(), nullptr)) return 1;
  const double last = partial[size_t(chunks.count() - 1) * 3 + 2];  // tau . tau of the last 5 elements
  double expected = 0;
  for (int64_t i = n - 5; i < n; ++i) expected += (i & 1) ? 9.0 : 4.0;
  if (last != expected) {
    printf("gram: %g, expected %g\n", last, expected);
    return 1;
  }
  // The same as one bit per element, made and merged; and the gradient of the last elements.
  std::vector<double> sums(size_t(chunks.count()) * 2);
  auto* words = reinterpret_cast<uint32_t*>(reserve((n + 31) / 32 * 2));
  tensor.masks[0] = words;
  if (pack_cuda(MERGE3_PACK_SIGNS, 1, 1, &tensor, sums.data(), nullptr)) return 1;
  c.rescale = 2.0f;
  merge3_modes modes{};
  modes.experts = 1;
  modes.sparsify = MERGE3_SIGNS;
  if (merge_cuda(modes, 1, &tensor, &c, &lambda, nullptr)) return 1;
  for (int64_t i = n - kChunk; i < n; ++i)
    if (bfloat16_to_float(out[i]) != 1.0f + 2.0f * 2.0f) {
      printf("signs, element %lld: %g\n", (long long)i, double(bfloat16_to_float(out[i])));
      return 1;
    }
  if (words[0] || words[(n / 2) / 32] || words[(n - 6) / 32] != 0xffffffffu) return puts("packed in the wrong place"), 1;
  modes.sparsify = MERGE3_KEEP_ALL;
  c.rescale = 1.0f;
  for (int64_t i = n - 5; i < n; ++i) out[i] = bf16(1.0f);  // dL/dout
  std::vector<double> gradient(size_t(chunks.count()) * 3);
  if (backward_cuda(modes, 1, &tensor, &c, &lambda, gradient.data(), nullptr)) return 1;
  double along = 0;
  for (int64_t i = n - 5; i < n; ++i) along += 2.0 * ((i & 1) ? 3.0 : 2.0);
  if (gradient[size_t(chunks.count() - 1) * 3] != along) {
    printf("gradient: %g, expected %g\n", gradient[size_t(chunks.count() - 1) * 3], along);
    return 1;
  }
  puts("ok");
  return 0;
}
