// Runs the source of the avx512vnni unit, its wide vectors and unsigned weights, on any processor: Clang splits the
// vectors, and the one instruction that it cannot split is spelled out here. Proves the source, not the instructions.
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
