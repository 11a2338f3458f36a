// float16 as the emulated matrix operations read it.
#pragma once
#include <stdint.h>

#include "../../../csrc/merge_math.h"

struct __half {
  uint16_t bits;
  operator float() const { return merge3::float16_to_float(bits); }
};
