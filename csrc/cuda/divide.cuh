// Four quotients at once. The compiler's own division asks of each whether it is an easy one, and calls a subroutine if
// not, as for the smallest normal number by which a sum of nothing is divided: most elements of a trimmed merge. Measured
// on an H200: merges that divided so took up to twice the time of those that did not.
#pragma once
#include <cuda_runtime.h>

#include "../merge_math.h"

namespace merge3 {

// Whether quotients by sums of these weights, or by `total`, are easy: what follows is then right for every ordinary
// numerator.
template <int K>
__device__ __forceinline__ bool divides_easily(const merge3_coefficient* c, float total) {
  bool easy = magnitude(total) >= 1e-10f && magnitude(total) <= 1e10f;
#pragma unroll
  for (int k = 0; k < K; ++k) easy = easy && (c[k].weight == 0.0f || (c[k].weight >= 1e-10f && c[k].weight <= 1e10f));
  return easy;
}

// a / b to the bit, for |b| from 1e-10 to 1e11 or the smallest normal number, and a that is ordinary: a reciprocal of a
// bit more than float's accuracy, and twice what a quotient leaves over (Markstein 1990). SIGNED: a or b may be negative,
// and a zero then has a sign.
template <bool SIGNED>
__device__ __forceinline__ float easy_quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(b));
  y = __fmaf_rn(y, __fmaf_rn(-b, y, 1.0f), y);
  float q = __fmul_rn(a, y);
  q = __fmaf_rn(y, __fmaf_rn(-b, q, a), q);
  q = __fmaf_rn(y, __fmaf_rn(-b, q, a), q);
  return SIGNED ? as_float((as_uint(q) & 0x7fffffffu) | ((as_uint(a) ^ as_uint(b)) & 0x80000000u)) : q;
#else
  return a / b;
#endif
}

// Whether all four are ordinary: zero, or of a magnitude from 2^-88 to 2^59. In multiplications and additions, of which a
// GPU does twice as many as comparisons.
__device__ __forceinline__ bool ordinary(const float (&a)[4]) {
  float sum = 0.0f, between = 0.0f;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    sum = sum + magnitude(a[j]);
#if defined(__CUDA_ARCH__)
    const float whole = __saturatef(magnitude(a[j]) * 3.0948501e26f);  // 2^88: 0 of zero, 1 of what is large enough
    between = between + __fmaf_rn(-whole, whole, whole);
#endif
  }
  return sum <= 5.7646075e17f && between == 0.0f;
}

// a[j] /= b[j]. GUARDED: where b is zero, a stays.
template <bool SIGNED, bool GUARDED>
__device__ __forceinline__ void divide(float (&a)[4], const float (&b)[4], bool easy) {
  if (easy && ordinary(a)) {
#pragma unroll
    for (int j = 0; j < 4; ++j) a[j] = easy_quotient<SIGNED>(a[j], b[j]);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) a[j] = a[j] / (GUARDED && b[j] == 0.0f ? 1.0f : b[j]);
  }
}

}  // namespace merge3
