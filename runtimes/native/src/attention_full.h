// Attention of some queries to all tokens. Nothing is appended later, so a row's scores are made at once, and its largest
// score is known before the first weight:
//
//   s_t = q . k_t;   p_t = 2^(s_t - max s);   y = sum_t p_t v_t / sum_t p_t
//
// The order of all sums depends on the tokens only, so a row's result is the same bits in any company.
#pragma once
#include "attention.h"

namespace {

constexpr int kFullRows = kRegisters == 32 ? 8 : 6;   // with two vectors of tokens or channels, as many sums as registers hold

// scores [M][stride]: keys are [tokens / 64][d][64]
template <int M> inline void full_scores(const float* queries, int width, const float* keys, int stride, float* scores) {
  for (int t = 0; t < stride; t += 2 * kLanes) {
    F acc[M][2] = {};
    const float* at = keys + size_t(t / kCacheBlock) * kCacheBlock * width + t % kCacheBlock;
    for (int d = 0; d < width; d++) multiply_add<Float32Cache, M, 2>(queries + d, width, (const uint8_t*)at, size_t(d) * kCacheBlock, acc);
    for (int m = 0; m < M; m++)
      for (int v = 0; v < 2; v++) store(scores + size_t(m) * stride + t + v * kLanes, acc[m][v]);
  }
}

// Scores to weights; returns 1 / their sum. Behind the last token there are zeros.
inline float full_softmax(float* scores, int tokens, int stride) {
  F tops = splat(-INFINITY), sums{};
  I odd{};
  for (int t = tokens; t < stride; t++) scores[t] = -INFINITY;
  for (int t = 0; t < stride; t += kLanes) {
    F s = load<F>(scores + t);
    odd |= s != s;
    tops = maximum(tops, s);
  }
  float most = sum(odd) ? NAN : largest(tops);   // a maximum may pass over NaN
  for (int t = 0; t < stride; t += kLanes) {
    F p = exp2(load<F>(scores + t) - most);
    sums += p;
    store(scores + t, p);
  }
  return 1 / (sum(sums) + (most != most ? most : 0));
}

// V vectors of y, from channel d on: values are [tokens][d]
template <int M, int V> inline void full_values(const float* weights, int stride, int tokens, const float* values, int width, int d, const float* factors, float* y) {
  F acc[M][V] = {};
  for (int t = 0; t < tokens; t++) multiply_add<Float32Cache, M, V>(weights + t, stride, (const uint8_t*)values, size_t(t) * width + d, acc);
  for (int m = 0; m < M; m++)
    for (int v = 0; v < V; v++) store(y + size_t(m) * width + d + v * kLanes, acc[m][v] * factors[m]);
}

template <int M> inline void full_rows(const float* queries, int width, int tokens, const float* keys, const float* values, float* y, float* scores) {
  int stride = herd::round_up(tokens, kCacheBlock), d = 0;
  float factors[M];
  full_scores<M>(queries, width, keys, stride, scores);
  for (int m = 0; m < M; m++) factors[m] = full_softmax(scores + size_t(m) * stride, tokens, stride);
  for (; d + 2 * kLanes <= width; d += 2 * kLanes) full_values<M, 2>(scores, stride, tokens, values, width, d, factors, y);
  if (d < width) full_values<M, 1>(scores, stride, tokens, values, width, d, factors, y);
}

void attend_all(const float* queries, int rows, int width, int tokens, const float* keys, const float* values, float* y, float* scratch) {
  int r = 0;
  for (; r + kFullRows <= rows; r += kFullRows) full_rows<kFullRows>(queries + size_t(r) * width, width, tokens, keys, values, y + size_t(r) * width, scratch);
  for (; r < rows; r++) full_rows<1>(queries + size_t(r) * width, width, tokens, keys, values, y + size_t(r) * width, scratch);
}

}  // namespace
