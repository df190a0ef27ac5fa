// Vectors of one register, in Clang's vector extensions, and the few instructions that the extensions do not cover:
// products of 8-bit integers. Everything is static: a function shared between units would be compiled for one of them
// and then run on processors that do not have its instructions.
//
// Weights are unsigned bytes (code + 128), activations signed ones within -127 .. 127.
//   VNNI        multiplies unsigned by signed bytes; kOffset times the sum of a row's codes is subtracted at the end
//   AVX2        has such a product with 16-bit sums that saturate: |w| times x with w's sign stays within 2 * 127 * 128
//   dotprod     multiplies signed bytes, as do the plain units in 16 bits: the offset is taken off while loading
#pragma once
#include <math.h>
#include <string.h>
#include "kernels.h"
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512VNNI__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kVectors = herd::kTile / kLanes;   // of a tile
#if defined(__AVX512VNNI__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

typedef float F __attribute__((vector_size(4 * kLanes)));
typedef int32_t I __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U __attribute__((vector_size(4 * kLanes)));
typedef uint8_t B __attribute__((vector_size(4 * kLanes)));       // 4 bytes of each lane
typedef uint8_t Lane8 __attribute__((vector_size(kLanes)));       // 1 byte of each lane
typedef _Float16 Half __attribute__((vector_size(2 * kLanes)));

// The numbers of the lanes, 0 .. kLanes - 1, as a pack of template arguments.
template <int... I> struct Lanes {};
template <int N, int... I> struct CountLanes : CountLanes<N - 1, N - 1, I...> {};
template <int... I> struct CountLanes<0, I...> { using Type = Lanes<I...>; };
using AllLanes = CountLanes<kLanes>::Type;

template <class V> inline V load(const void* from) {
  V v;
  memcpy(&v, from, sizeof v);
  return v;
}
template <class V> inline void store(void* to, V v) { memcpy(to, &v, sizeof v); }
inline F splat(float x) { return x - F{}; }   // 0 + x would be computed, for it is not x where that is -0
inline I splat_bytes(const int8_t* four) {
  int32_t x;
  memcpy(&x, four, 4);
  return I{} + x;
}
inline F to_float(I v) { return __builtin_convertvector(v, F); }
inline F half_to_float(const void* from) { return __builtin_convertvector(load<Half>(from), F); }
inline F select(I condition, F yes, F no) { return (F)((condition & (I)yes) | (~condition & (I)no)); }
inline F maximum(F a, F b) { return select(a > b, a, b); }
inline F absolute(F v) { return (F)((I)v & 0x7FFFFFFF); }

inline F fma(F a, F b, F c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_elementwise_fma(a, b, c);
#else
  return a * b + c;   // without the instruction a fused product is a call of the C library
#endif
}

// Sums and maxima over lanes, pairwise: the order is the same everywhere.
inline float sum(F v) {
  float x[kLanes];
  store(x, v);
  for (int n = kLanes / 2; n; n /= 2) for (int i = 0; i < n; i++) x[i] += x[i + n];
  return x[0];
}
inline int32_t sum(I v) {
  int32_t total = 0;
  for (int i = 0; i < kLanes; i++) total += v[i];
  return total;
}
inline float largest(F v) {
  float top = v[0];
  for (int i = 1; i < kLanes; i++) top = v[i] > top ? v[i] : top;
  return top;
}

// To the nearest integer, ties to even, for |v| < 2^22.
constexpr float kRoundingMagic = 12582912.f;   // 1.5 * 2^23: its last bit is worth one
inline I round_to_int(F v) { return (I)(v + kRoundingMagic) - (I)splat(kRoundingMagic); }

// 2^x, relative error 2e-7. Below 2^-126 the result is 0.
inline F exp2(F x) {
  F clamped = maximum(x, splat(-127.f));
  clamped = select(clamped > 127.f, splat(127.f), clamped);
  F whole = (clamped + kRoundingMagic) - kRoundingMagic, rest = clamped - whole;   // rest within -0.5 .. 0.5
  F p = splat(1.535336188319500e-4f);
  p = fma(p, rest, splat(1.339887440266574e-3f));
  p = fma(p, rest, splat(9.618437357674640e-3f));
  p = fma(p, rest, splat(5.550332471162809e-2f));
  p = fma(p, rest, splat(2.402264791363012e-1f));
  p = fma(p, rest, splat(6.931472028550421e-1f));
  p = fma(p, rest, splat(1.f));
  F power = (F)((__builtin_convertvector(whole, I) + 127) << 23);
  return select(x < -126.f, F{}, p * power);
}

// ---- products of bytes: acc[lane] += sum of 4 weights times 4 activations -------------------------------------------

#if defined(__AVX512VNNI__)
constexpr int32_t kOffset = 128;
struct Weights8 { __m512i bytes; };
inline Weights8 weights8(B raw) { return {(__m512i)raw}; }
inline I multiply8(I acc, Weights8 w, I x) { return (I)_mm512_dpbusd_epi32((__m512i)acc, w.bytes, (__m512i)x); }
#elif defined(__AVX2__)
constexpr int32_t kOffset = 0;
struct Weights8 { __m256i signed_, magnitude; };
inline Weights8 weights8(B raw) {
  __m256i w = (__m256i)(raw ^ 0x80);
  return {w, _mm256_abs_epi8(w)};
}
inline I multiply8(I acc, Weights8 w, I x) {
  __m256i pairs = _mm256_maddubs_epi16(w.magnitude, _mm256_sign_epi8((__m256i)x, w.signed_));
  return acc + (I)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr int32_t kOffset = 0;
struct Weights8 { int8x16_t bytes; };
inline Weights8 weights8(B raw) { return {(int8x16_t)(raw ^ 0x80)}; }
inline I multiply8(I acc, Weights8 w, I x) { return (I)vdotq_s32((int32x4_t)acc, w.bytes, (int8x16_t)x); }
#elif defined(__aarch64__)
constexpr int32_t kOffset = 0;
struct Weights8 { int8x16_t bytes; };
inline Weights8 weights8(B raw) { return {(int8x16_t)(raw ^ 0x80)}; }
inline I multiply8(I acc, Weights8 w, I x) {
  int8x16_t v = (int8x16_t)x;
  int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(w.bytes), vget_low_s8(v)));
  int32x4_t high = vpaddlq_s16(vmull_high_s8(w.bytes, v));
  return acc + (I)vpaddq_s32(low, high);
}
#else   // x86-64 without extensions
constexpr int32_t kOffset = 0;
typedef int16_t Words __attribute__((vector_size(16)));
struct Weights8 { Words even, odd; };
inline Weights8 weights8(B raw) {
  Words w = (Words)(raw ^ 0x80);
  return {(Words)(w << 8) >> 8, w >> 8};
}
inline I multiply8(I acc, Weights8 w, I x) {
  Words v = (Words)x, even = (Words)(v << 8) >> 8, odd = v >> 8;
  return acc + (I)_mm_madd_epi16((__m128i)w.even, (__m128i)even) + (I)_mm_madd_epi16((__m128i)w.odd, (__m128i)odd);
}
#endif

// ---- products of weights of 4 to 6 bits, at most 8 of 4 bits to a sum, then widened to 32 bits ------------------------

#if defined(__AVX512VNNI__)
typedef I Sum4;
inline void multiply4(Sum4& acc, B w, I x) { acc = (I)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x); }
inline I widen4(Sum4 acc) { return acc; }
#elif defined(__AVX2__)
typedef int16_t Sum4 __attribute__((vector_size(32)));   // 8 * 2 * 15 * 127 = 30480 fits
inline void multiply4(Sum4& acc, B w, I x) { acc += (Sum4)_mm256_maddubs_epi16((__m256i)w, (__m256i)x); }
inline I widen4(Sum4 acc) { return (I)_mm256_madd_epi16((__m256i)acc, _mm256_set1_epi16(1)); }
#else
typedef I Sum4;
inline void multiply4(Sum4& acc, B w, I x) { acc = multiply8(acc, weights8(w ^ 0x80), x); }
inline I widen4(Sum4 acc) { return acc; }
#endif
// Products of weights 0 .. 2^bits - 1 that one sum holds.
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
constexpr int products_in_sum4(int bits) { return 8 >> (bits - 4); }   // 2 * 2 * 63 * 127 = 32004 fits
#else
constexpr int products_in_sum4(int) { return 16; }
#endif

// ---- products of signed bytes with 15-bit numbers: bytes 0 and 2 of a lane, then 1 and 3 -------------------------------

typedef int16_t Short __attribute__((vector_size(4 * kLanes)));
struct Widened { Short even, odd; };
inline Widened widen(I four) {
  Short v = (Short)four;
  return {(Short)(v << 8) >> 8, v >> 8};
}
// acc[lane] += sum of 2 products; 2^31 is far: 127 * 32767 * 2 * 128 fits
inline I multiply16(I acc, Short a, I pair) {
#if defined(__AVX512VNNI__)
  return (I)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)pair);
#elif defined(__AVX2__)
  return acc + (I)_mm256_madd_epi16((__m256i)a, (__m256i)pair);
#elif defined(__x86_64__)
  return acc + (I)_mm_madd_epi16((__m128i)a, (__m128i)pair);
#else
  int16x8_t x = (int16x8_t)a, y = (int16x8_t)pair;
  return acc + (I)vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y));
#endif
}

}  // namespace
