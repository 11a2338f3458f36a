// Merges from one bit per element, for x86-64 processors with AVX2; see merge_avx2.cpp for why the target is set here.
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "../include/merge3/merge.h"
#if defined(__x86_64__)
#include <immintrin.h>
#include "../chunks.h"
#pragma GCC target("avx2,f16c")
#define __AVX2__ 1
#define __F16C__ 1
#define MERGE3_PACKED_ENTRY packed_avx2
#define MERGE3_LANES f32x8
#define MERGE3_DIRECT 1
#include "packed_loop.h"
#endif
