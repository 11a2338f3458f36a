// Elements in device memory as float32 and back.
//
// Eight of one type known when compiling: raw 16-byte words, converted where they are used, so that a thread can have
// asked for all its inputs before it waits for the first. A type known at run time: one element at a time, or eight.
#pragma once
#include <cuda_runtime.h>

#include "../floats16.h"
#include "../merge_math.h"

namespace merge3 {

// What the vector accesses below say to the caches; benchmarks/gpu_variants.py tries the other one.
#if defined(MERGE3_PAST_L1)
#define MERGE3_LOAD "ld.global.L1::no_allocate.v4.u32"
#define MERGE3_STORE "st.global.cs.v4.u32"
#else
#define MERGE3_LOAD "ld.global.v4.u32"
#define MERGE3_STORE "st.global.v4.u32"
#endif

// kBytes: of eight elements.
struct Float32 {
  static constexpr int kBytes = 32;
};
struct Float16 {
  static constexpr int kBytes = 16;
};
struct BFloat16 {
  static constexpr int kBytes = 16;
};

template <class T>
struct Raw8 {
  uint4 part[T::kBytes / 16];
};

// Not through the read-only cache (ld.global.nc): what is written may be the base that was read.
template <class T>
__device__ __forceinline__ Raw8<T> load_raw8(const char* from) {
  Raw8<T> x;
#pragma unroll
  for (int q = 0; q < T::kBytes / 16; ++q) {
#if defined(__CUDA_ARCH__)
    asm volatile(MERGE3_LOAD " {%0,%1,%2,%3}, [%4];"
                 : "=r"(x.part[q].x), "=r"(x.part[q].y), "=r"(x.part[q].z), "=r"(x.part[q].w)
                 : "l"(from + 16 * q));
#else
    x.part[q] = reinterpret_cast<const uint4*>(from)[q];
#endif
  }
  return x;
}
// The same, or zeros. One instruction that may do nothing, no branch: what follows does not wait for it.
template <class T>
__device__ __forceinline__ Raw8<T> load_raw8_if(bool there, const char* from) {
  Raw8<T> x;
#pragma unroll
  for (int q = 0; q < T::kBytes / 16; ++q) {
    x.part[q] = make_uint4(0, 0, 0, 0);
#if defined(__CUDA_ARCH__)
    asm volatile("{.reg .pred p;\nsetp.ne.s32 p, %5, 0;\n@p " MERGE3_LOAD " {%0,%1,%2,%3}, [%4];}"
                 : "+r"(x.part[q].x), "+r"(x.part[q].y), "+r"(x.part[q].z), "+r"(x.part[q].w)
                 : "l"(from + 16 * q), "r"(int(there)));
#else
    if (there) x.part[q] = reinterpret_cast<const uint4*>(from)[q];
#endif
  }
  return x;
}

__device__ __forceinline__ uint32_t word_of(const uint4& x, int w) {
  return w == 0 ? x.x : w == 1 ? x.y : w == 2 ? x.z : x.w;
}
// Element j of eight.
template <class T>
__device__ __forceinline__ float element_of(const Raw8<T>& x, int j) {
  if constexpr (T::kBytes == 32) return as_float(word_of(x.part[j / 4], j % 4));
  const uint32_t pair = word_of(x.part[0], j / 2);
  if constexpr (__is_same(T, BFloat16)) return as_float(j & 1 ? pair & 0xffff0000u : pair << 16);
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(uint16_t(j & 1 ? pair >> 16 : pair)));
  return wide;
#else
  return float16_to_float(uint16_t(j & 1 ? pair >> 16 : pair));
#endif
}

// Two floats rounded to nearest even, the first one in the lower half. The GPU's own conversion gives these bits too,
// save those of a NaN, which it makes anew.
template <class T>
__device__ __forceinline__ uint32_t pair_of(float low, float high) {
  constexpr bool kBrain = __is_same(T, BFloat16);
#if defined(__CUDA_ARCH__)
#if __CUDA_ARCH__ >= 800
  uint32_t pair;
  if constexpr (kBrain) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#endif
#endif
  if constexpr (kBrain) return float_to_bfloat16(as_uint(low)) | float_to_bfloat16(as_uint(high)) << 16;
  else return uint32_t(float_to_float16(low)) | uint32_t(float_to_float16(high)) << 16;
}

template <class T>
__device__ __forceinline__ Raw8<T> raw8_of(const float (&x)[8]) {
  Raw8<T> raw;
  if constexpr (T::kBytes == 32) {
#pragma unroll
    for (int q = 0; q < 2; ++q)
      raw.part[q] = make_uint4(as_uint(x[4 * q]), as_uint(x[4 * q + 1]), as_uint(x[4 * q + 2]), as_uint(x[4 * q + 3]));
  } else {
    raw.part[0] = make_uint4(pair_of<T>(x[0], x[1]), pair_of<T>(x[2], x[3]), pair_of<T>(x[4], x[5]), pair_of<T>(x[6], x[7]));
  }
  return raw;
}
template <class T>
__device__ __forceinline__ void store_raw8(char* to, const Raw8<T>& x) {
#pragma unroll
  for (int q = 0; q < T::kBytes / 16; ++q) {
#if defined(__CUDA_ARCH__)
    asm volatile(MERGE3_STORE " [%0], {%1,%2,%3,%4};" ::"l"(to + 16 * q), "r"(x.part[q].x), "r"(x.part[q].y),
                 "r"(x.part[q].z), "r"(x.part[q].w)
                 : "memory");
#else
    reinterpret_cast<uint4*>(to)[q] = x.part[q];
#endif
  }
}

// ------------------------------------------------------------------------ a type known at run time

__device__ __forceinline__ float load1(int32_t dtype, const void* data, int64_t i) {
  if (data == nullptr) return 0.0f;
  if (dtype == MERGE3_FLOAT32) return static_cast<const float*>(data)[i];
  const uint16_t x = static_cast<const uint16_t*>(data)[i];
  return dtype == MERGE3_BFLOAT16 ? bfloat16_to_float(x) : float16_to_float(x);
}

// Eight of them, raw; float32 fills both parts.
struct Any8 {
  uint4 part[2];
};
__device__ __forceinline__ bool aligned16(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

// data: at a multiple of 16 bytes, or NULL for zeros; i: a multiple of eight.
__device__ __forceinline__ Any8 load_any8(int32_t dtype, const void* data, int64_t i) {
  if (data == nullptr) return {{make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)}};
  const char* from = static_cast<const char*>(data) + i * (dtype == MERGE3_FLOAT32 ? 4 : 2);
  Any8 x;
  x.part[0] = load_raw8<BFloat16>(from).part[0];
  x.part[1] = dtype == MERGE3_FLOAT32 ? load_raw8<BFloat16>(from + 16).part[0] : make_uint4(0, 0, 0, 0);
  return x;
}
__device__ __forceinline__ void widen(int32_t dtype, const Any8& x, float (&to)[8]) {
  if (dtype == MERGE3_FLOAT32) {
#pragma unroll
    for (int j = 0; j < 8; ++j) to[j] = element_of(Raw8<Float32>{x.part[0], x.part[1]}, j);
  } else if (dtype == MERGE3_BFLOAT16) {
#pragma unroll
    for (int j = 0; j < 8; ++j) to[j] = element_of(Raw8<BFloat16>{x.part[0]}, j);
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) to[j] = element_of(Raw8<Float16>{x.part[0]}, j);
  }
}
// Wherever it lies: the first n of eight, and zeros.
__device__ __forceinline__ void load_few(int32_t dtype, const void* data, int64_t i, int n, float (&to)[8]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) to[j] = j < n ? load1(dtype, data, i + j) : 0.0f;
}

__device__ __forceinline__ void store1(int32_t dtype, void* out, int64_t i, float x) {
  if (dtype == MERGE3_FLOAT32) static_cast<float*>(out)[i] = x;
  else
    static_cast<uint16_t*>(out)[i] =
        dtype == MERGE3_BFLOAT16 ? uint16_t(float_to_bfloat16(as_uint(x))) : float_to_float16(x);
}

}  // namespace merge3
