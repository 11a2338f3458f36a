// Statistics for x86-64 processors with AVX2 and F16C; see merge_avx2.cpp for why the target is set here.
#include <math.h>
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
#define MERGE3_STATISTICS(name) name##_avx2
#include "statistics_loop.h"
#endif
