// What lets one formula serve a CUDA thread, a scalar loop tail and a CPU vector register: the
// operations that C++ spells differently for `float` and for a GCC vector of floats.
//
// F is float, f32x8 or f32x16, or two vectors; U and I are the unsigned and signed integers of the same width and
// count. A comparison of F gives a Mask<F>: bool, or a vector of 0 / -1. Kept is one that was made elsewhere.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__) && !defined(__CUDACC__)
#include <immintrin.h>
#endif

#if defined(__CUDACC__)
#define MERGE3_HD __host__ __device__ __forceinline__
#define MERGE3_UNROLL _Pragma("unroll")
#else
#define MERGE3_HD inline __attribute__((always_inline))
#define MERGE3_UNROLL _Pragma("GCC unroll 8")
#endif

namespace merge3 {

template <class F>
struct Lanes;

template <>
struct Lanes<float> {
  using U = uint32_t;
  using I = int32_t;
  using Kept = bool;
  using One = float;
};
template <class F>
using One = typename Lanes<F>::One;  // F, or what Two<F> is two of

template <class T>
struct Same {
  template <class X>
  static MERGE3_HD T of(X x) { return T(x); }
};
template <class T, class X>
MERGE3_HD T same(X x) { return Same<T>::of(x); }  // x in every lane

MERGE3_HD uint32_t as_uint(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
MERGE3_HD float as_float(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}
MERGE3_HD float positive_part(float x) { return x > 0.0f ? x : 0.0f; }  // NaN: 0
MERGE3_HD float keep_where(bool mask, float x) { return mask ? x : 0.0f; }
MERGE3_HD float add_where(bool mask, float sum, float x) { return mask ? sum + x : sum; }
MERGE3_HD float flip_sign(float x, float by) { return as_float(as_uint(x) ^ (as_uint(by) & 0x80000000u)); }

template <class T>
MERGE3_HD T select(bool mask, T a, T b) { return mask ? a : b; }

#if !defined(__CUDACC__)
typedef int32_t Kept8 __attribute__((vector_size(32)));
#if defined(__AVX512F__)
typedef __mmask16 Kept16;
#else
typedef int32_t Kept16 __attribute__((vector_size(64)));
#endif
// Eight lanes fill an AVX register and sixteen an AVX-512 one; other targets split them, at no cost.
#define MERGE3_VECTOR_LANES(N)                                                                       \
  typedef float f32x##N __attribute__((vector_size(4 * N)));                                         \
  typedef uint32_t u32x##N __attribute__((vector_size(4 * N)));                                      \
  typedef int32_t i32x##N __attribute__((vector_size(4 * N)));                                       \
  typedef uint16_t u16x##N __attribute__((vector_size(2 * N)));                                      \
  template <>                                                                                        \
  struct Lanes<f32x##N> {                                                                            \
    using U = u32x##N;                                                                               \
    using I = i32x##N;                                                                               \
    using Kept = Kept##N;                                                                            \
    using One = f32x##N;                                                                             \
  };                                                                                                 \
  template <>                                                                                        \
  struct Same<f32x##N> {                                                                             \
    static MERGE3_HD f32x##N of(float x) { return x - f32x##N{}; }                                   \
  };                                                                                                 \
  template <>                                                                                        \
  struct Same<u32x##N> {                                                                             \
    static MERGE3_HD u32x##N of(uint32_t x) { return x - u32x##N{}; }                                \
  };                                                                                                 \
  template <>                                                                                        \
  struct Same<i32x##N> {                                                                             \
    static MERGE3_HD i32x##N of(int32_t x) { return x - i32x##N{}; }                                 \
  };                                                                                                 \
  MERGE3_HD u32x##N as_uint(f32x##N x) { return (u32x##N)x; }                                        \
  MERGE3_HD f32x##N as_float(u32x##N u) { return (f32x##N)u; }                                       \
  MERGE3_HD f32x##N select(i32x##N mask, f32x##N a, f32x##N b) { return mask ? a : b; }              \
  MERGE3_HD u32x##N select(i32x##N mask, u32x##N a, u32x##N b) { return mask ? a : b; }              \
  MERGE3_HD i32x##N select(i32x##N mask, i32x##N a, i32x##N b) { return mask ? a : b; }
MERGE3_VECTOR_LANES(8)
MERGE3_VECTOR_LANES(16)
#undef MERGE3_VECTOR_LANES

MERGE3_HD f32x8 keep_where(i32x8 mask, f32x8 x) { return as_float(as_uint(x) & (u32x8)mask); }
MERGE3_HD f32x16 keep_where(i32x16 mask, f32x16 x) { return select(mask, x, f32x16{}); }
#if defined(__AVX512F__)
MERGE3_HD f32x16 keep_where(__mmask16 mask, f32x16 x) { return (f32x16)_mm512_maskz_mov_ps(mask, (__m512)x); }
#endif
MERGE3_HD f32x8 add_where(i32x8 mask, f32x8 sum, f32x8 x) { return sum + (mask ? x : f32x8{}); }
MERGE3_HD f32x16 add_where(i32x16 mask, f32x16 sum, f32x16 x) { return mask ? sum + x : sum; }  // one masked add

MERGE3_HD f32x8 flip_sign(f32x8 x, f32x8 by) { return as_float(as_uint(x) ^ (as_uint(by) & same<u32x8>(0x80000000u))); }
#if defined(__AVX512F__)
MERGE3_HD f32x16 flip_sign(f32x16 x, f32x16 by) {
  return (f32x16)_mm512_ternarylogic_epi32((__m512i)x, (__m512i)by, _mm512_set1_epi32(int(0x80000000u)), 0x78);
}
#endif

MERGE3_HD f32x8 positive_part(f32x8 x) {
#if defined(__AVX2__)
  return (f32x8)_mm256_max_ps((__m256)x, _mm256_setzero_ps());
#else
  return select(x > f32x8{}, x, f32x8{});
#endif
}
#if defined(__AVX512F__)
MERGE3_HD f32x16 positive_part(f32x16 x) { return (f32x16)_mm512_max_ps((__m512)x, _mm512_setzero_ps()); }
#endif

// Two vectors that go through a formula step by step side by side. A formula is one long chain of dependent
// instructions, of which a processor only sees so many ahead: two chains in turn keep it busy.
template <class V>
struct Two {
  V a, b;
};
template <class V>
struct Lanes<Two<V>> {
  using U = Two<typename Lanes<V>::U>;
  using I = Two<typename Lanes<V>::I>;
  using Kept = Two<typename Lanes<V>::Kept>;
  using One = merge3::One<V>;
};
template <class V>
struct Same<Two<V>> {
  template <class X>
  static MERGE3_HD Two<V> of(X x) { return {same<V>(x), same<V>(x)}; }
};
template <class X>
constexpr bool kTwo = false;
template <class V>
constexpr bool kTwo<Two<V>> = true;
// One of the two parts of Two<V>; anything else stands for itself, twice.
template <class V>
MERGE3_HD const V& first(const Two<V>& x) { return x.a; }
template <class V>
MERGE3_HD const V& second(const Two<V>& x) { return x.b; }
template <class X>
MERGE3_HD const X& first(const X& x) { return x; }
template <class X>
MERGE3_HD const X& second(const X& x) { return x; }
template <class Act, class... X>
MERGE3_HD auto both(const Act& act, const X&... x) { return Two<decltype(act(first(x)...))>{act(first(x)...), act(second(x)...)}; }

#define MERGE3_TWO(op)                                                                     \
  template <class X, class Y>                                                              \
    requires(kTwo<X> || kTwo<Y>)                                                           \
  MERGE3_HD auto operator op(const X& x, const Y& y) { return both([](auto p, auto q) { return p op q; }, x, y); }
MERGE3_TWO(+) MERGE3_TWO(-) MERGE3_TWO(*) MERGE3_TWO(/) MERGE3_TWO(&) MERGE3_TWO(|) MERGE3_TWO(^)
MERGE3_TWO(<<) MERGE3_TWO(>>) MERGE3_TWO(>) MERGE3_TWO(<) MERGE3_TWO(>=) MERGE3_TWO(<=) MERGE3_TWO(==)
#undef MERGE3_TWO
template <class V>
MERGE3_HD auto as_uint(const Two<V>& x) { return both([](auto p) { return as_uint(p); }, x); }
template <class V>
MERGE3_HD auto as_float(const Two<V>& x) { return both([](auto p) { return as_float(p); }, x); }
template <class M, class X, class Y>
MERGE3_HD auto select(const Two<M>& mask, const X& x, const Y& y) { return both([](auto m, auto p, auto q) { return select(m, p, q); }, mask, x, y); }
template <class M, class V>
MERGE3_HD Two<V> keep_where(const Two<M>& mask, const Two<V>& x) { return both([](auto m, auto p) { return keep_where(m, p); }, mask, x); }
template <class V>
MERGE3_HD Two<V> positive_part(const Two<V>& x) { return both([](auto p) { return positive_part(p); }, x); }
template <class V>
MERGE3_HD Two<V> flip_sign(const Two<V>& x, const Two<V>& by) { return both([](auto p, auto q) { return flip_sign(p, q); }, x, by); }
template <class M, class V, class X>
MERGE3_HD Two<V> add_where(const Two<M>& mask, const Two<V>& sum, const X& x) {
  return both([](auto m, auto p, auto q) { return add_where(m, p, q); }, mask, sum, x);
}
#endif

}  // namespace merge3
