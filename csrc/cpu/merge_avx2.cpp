// The fused merge for x86-64 processors with AVX2 and F16C (any since 2013). The target is set
// here, after the standard headers, rather than on the command line: setuptools has no flags per file.
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "../include/merge3/merge.h"
#if defined(__x86_64__)
#include <immintrin.h>
#include "../chunks.h"  // its inline code must keep the baseline target
#pragma GCC target("avx2,f16c")
#define __AVX2__ 1
#define __F16C__ 1
#define MERGE3_MERGE_ENTRY merge_avx2
#define MERGE3_LANES f32x8
#define MERGE3_DIRECT 1
#include "merge_loop.h"
#endif
