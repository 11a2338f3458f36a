// Experts held in int8, for x86-64 processors with AVX2; see merge_avx2.cpp for why the target is set here.
#include <stdint.h>
#include <string.h>

#include <algorithm>

#include "../include/merge3/compact.h"
#if defined(__x86_64__)
#include <immintrin.h>
#include "../chunks.h"
#pragma GCC target("avx2,f16c")
#define __AVX2__ 1
#define __F16C__ 1
#define MERGE3_BYTES_ENTRY add_bytes_avx2
#include "compact_bytes.h"
#endif
