// bfloat16 and float16, to float32 and back: the same bits on every device.
#pragma once
#include "lanes.h"

namespace merge3 {

MERGE3_HD float bfloat16_to_float(uint16_t x) { return as_float(uint32_t(x) << 16); }

// Round to nearest even: the result is the upper half. Not for NaNs with payload in the lower half.
template <class U>
MERGE3_HD U round_bfloat16(U bits) {
  return bits + same<U>(0x7fffu) + ((bits >> 16) & same<U>(1u));
}
// The same for any float; a NaN stays a (quiet) NaN.
template <class U>
MERGE3_HD U float_to_bfloat16(U bits) {
  const U rounded = round_bfloat16(bits) >> 16;
  const U quiet = (bits >> 16) | same<U>(0x40u);
  return select((bits & same<U>(0x7fffffffu)) > same<U>(0x7f800000u), quiet, rounded);
}

MERGE3_HD float float16_to_float(uint16_t x) {
  const uint32_t sign = uint32_t(x & 0x8000u) << 16, rest = x & 0x7fffu;
  if (rest >= 0x7c00u) return as_float(sign | 0x7f800000u | ((rest & 0x3ffu) << 13) | (rest > 0x7c00u ? 0x400000u : 0u));
  // Scaling by 2^112 moves the exponent bias from 15 to 127 and is exact for subnormals too.
  return as_float(sign | as_uint(as_float(rest << 13) * 5192296858534827628530496329220096.0f));
}

MERGE3_HD uint16_t float_to_float16(float value) {
  const uint32_t bits = as_uint(value), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return uint16_t(sign | 0x7e00u | ((rest >> 13) & 0x1ffu));
  if (rest >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // 65520 and above round to infinity
  if (rest < 0x38800000u) {  // subnormal: adding 0.5 aligns and rounds the mantissa
    return uint16_t(sign | (as_uint(as_float(rest) + 0.5f) - 0x3f000000u));
  }
  return uint16_t(sign | ((rest + 0xc8000fffu + ((rest >> 13) & 1u)) >> 13));
}

}  // namespace merge3
