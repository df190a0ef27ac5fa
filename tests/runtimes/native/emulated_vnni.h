// Runs the source of the avx512vnni unit, its wide vectors and unsigned weights, on any processor: Clang splits the
// vectors, and the two instructions that it cannot split are spelled out here. Proves the source, not the instructions.
#pragma once
#include <immintrin.h>
#include <string.h>
#define __AVX512VNNI__ 1

static inline __m512i emulated_dpbusd(__m512i sums, __m512i weights, __m512i activations) {
  int total[16];
  unsigned char w[64];
  signed char x[64];
  memcpy(total, &sums, 64), memcpy(w, &weights, 64), memcpy(x, &activations, 64);
  for (int i = 0; i < 64; i++) total[i / 4] += w[i] * x[i];
  memcpy(&sums, total, 64);
  return sums;
}
#define _mm512_dpbusd_epi32 emulated_dpbusd

static inline __m512i emulated_dpwssd(__m512i sums, __m512i left, __m512i right) {
  int total[16];
  short a[32], b[32];
  memcpy(total, &sums, 64), memcpy(a, &left, 64), memcpy(b, &right, 64);
  for (int i = 0; i < 32; i++) total[i / 2] += a[i] * b[i];
  memcpy(&sums, total, 64);
  return sums;
}
#define _mm512_dpwssd_epi32 emulated_dpwssd
