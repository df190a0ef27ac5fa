// Attention over caches of bytes, in integers. Every token has a scale k_t for its key and v_t for its value:
//
//   s_t = k_t (q . c_t)               q in 15 bits with a scale per row
//   values' = a values + sum_t w_t c_t,   w_t = p_t v_t, in 15 bits relative to the block's largest
//
// 15 bits are what the 16-bit products of all processors take; they add 3e-5 to what 8 bits of the cache cost. Sums of
// integers are exact, so a row's result does not depend on the rows beside it.
#pragma once
#include "attention.h"

namespace {

constexpr float kTop15 = 32767;

// Rows of 15-bit numbers as pairs: of every 4 numbers (0, 2), then (1, 3), which is how the bytes of a lane are widened.
template <int... N> inline I paired(I a, I b, Lanes<N...>) {
  I low = __builtin_shufflevector(a, b, (N / 2 * 4 + N % 2)...), high = __builtin_shufflevector(a, b, (N / 2 * 4 + N % 2 + 2)...);
  return (low & 0xFFFF) | (I)((U)high << 16);
}
inline void pack_pairs(const float* x, int count, float factor, int32_t* pairs) {
  int i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes)
    store(pairs + i / 2, paired(round_to_int(load<F>(x + i) * factor), round_to_int(load<F>(x + i + kLanes) * factor), AllLanes{}));
  if (i < count) {   // one register is left
    I q = round_to_int(load<F>(x + i) * factor), half = paired(q, q, AllLanes{});
    memcpy(pairs + i / 2, &half, sizeof half / 2);
  }
}

// Codes of one row and what a code is worth; NaN where the row is not finite, and then zeros.
inline float pack_row(const float* x, int count, int32_t* pairs) {
  F tops{};
  I odd{};
  for (int i = 0; i < count; i += kLanes) {
    F v = absolute(load<F>(x + i));
    tops = maximum(tops, v);
    odd |= ~(v <= 3.4028235e38f);
  }
  float top = largest(tops);
  bool finite = sum(odd) == 0, any = finite && top > herd::kSmallest;
  pack_pairs(x, count, any ? kTop15 / top : 0, pairs);
  return !finite ? NAN : any ? top / kTop15 : 0;
}

// A cache block ahead: to the first level, or, where wide registers go through a block too fast for that, to the second.
inline void prefetch_block(const uint8_t* at) { __builtin_prefetch(at, 0, kLanes == 16 ? 2 : 3); }

// acc[m][v] += 4 numbers of each of M rows times the bytes of V vectors
template <int M, int V> inline void multiply_bytes(const int32_t* pairs, size_t stride, const uint8_t* bytes, I (&acc)[M][V]) {
  Widened w[V];
  for (int v = 0; v < V; v++) w[v] = widen(load<I>(bytes + v * kLanes * 4));
  for (int m = 0; m < M; m++) {
    I even = I{} + pairs[m * stride], odd = I{} + pairs[m * stride + 1];
    for (int v = 0; v < V; v++) acc[m][v] = multiply16(multiply16(acc[m][v], w[v].even, even), w[v].odd, odd);
  }
}

// scores [rows][64]: keys are [d / 4][64][4]
template <int M> inline void byte_scores(const int32_t* queries, const float* scales, int width, const uint8_t* keys, const uint8_t* next, float* scores) {
  for (int t = 0; t < kCacheBlock; t += 2 * kLanes) {
    I acc[M][2] = {};
    for (int d = 0; d < width / 4; d++) {
      const uint8_t* at = keys + (size_t(d) * kCacheBlock + t) * 4;
      prefetch_block(next + (at - keys));
      multiply_bytes<M, 2>(queries + 2 * d, width / 2, at, acc);
    }
    for (int m = 0; m < M; m++)
      for (int v = 0; v < 2; v++) store(scores + m * kCacheBlock + t + v * kLanes, to_float(acc[m][v]) * scales[m]);
  }
}

// V vectors of values [rows][d] += weights times the block's first `groups` * 4 tokens, [16][d][4]
template <int M, int V> inline void byte_value_vectors(const int32_t* weights, const float* factors, int width, const uint8_t* bytes, const uint8_t* next, int groups, int d,
                                                       float* values) {
  I acc[M][V] = {};
  for (int g = 0; g < groups; g++) {
    size_t at = (size_t(g) * width + d) * 4;
    prefetch_block(next + at);
    multiply_bytes<M, V>(weights + 2 * g, kCacheBlock / 2, bytes + at, acc);
  }
  for (int m = 0; m < M; m++)
    for (int v = 0; v < V; v++) {
      float* to = values + size_t(m) * width + d + v * kLanes;
      store(to, fma(to_float(acc[m][v]), splat(factors[m]), load<F>(to)));
    }
}

// queries: pairs [rows][d / 2] and scales of all rows of the task; next: the block after this one
template <int M> inline void byte_rows(const AttentionTask& task, int row, int first_token, const uint8_t* keys, const uint8_t* values, const uint8_t* next_keys,
                                       const uint8_t* next_values, const int32_t* queries, const float* query_scales, const Partial& part) {
  int width = task.width;
  size_t codes = size_t(kCacheBlock) * width;
  const float *key_scales = (const float*)(keys + codes), *value_scales = (const float*)(values + codes);
  alignas(64) float scores[M * kCacheBlock];
  alignas(64) int32_t weights[M * kCacheBlock / 2];
  float factors[M];
  Seen<M> seen(task.limits + row, first_token);
  byte_scores<M>(queries + size_t(row) * (width / 2), query_scales + row, width, keys, next_keys, scores);
  for (int m = 0; m < M; m++) {
    float* p = scores + m * kCacheBlock;
    if (!seen.tokens[m]) memset(p, 0, kCacheBlock * sizeof(float));
    else softmax_step(p, seen.tokens[m], key_scales, width, part.top + row + m, part.sum + row + m, part.values + size_t(row + m) * width);
    for (int t = 0; t < kCacheBlock; t += kLanes) {   // slots that were never written may have any scale
      F weight = load<F>(p + t);
      store(p + t, select(weight > 0.f, weight * load<F>(value_scales + t), F{}));
    }
    factors[m] = pack_row(p, kCacheBlock, weights + m * kCacheBlock / 2);
  }
  int groups = (seen.most + 3) / 4, d = 0;
  float* to = part.values + size_t(row) * width;
  for (; d + 2 * kLanes <= width; d += 2 * kLanes) byte_value_vectors<M, 2>(weights, factors, width, values, next_values, groups, d, to);
  if (d < width) byte_value_vectors<M, 1>(weights, factors, width, values, next_values, groups, d, to);
}

// scratch: pairs and scales of the queries, made before the first block
inline void byte_block(const AttentionTask& task, int block, const Partial& part, const float* scratch) {
  auto place = [&](const uint8_t* pool, int b) { return pool + size_t(task.table[b < task.last_block ? b : block]) * task.block_stride; };
  const uint8_t *keys = place(task.keys, block), *values = place(task.values, block), *next_keys = place(task.keys, block + 1), *next_values = place(task.values, block + 1);
  const float* scales = scratch;
  const int32_t* queries = (const int32_t*)(scratch + herd::round_up(task.rows, 16));
  int row = 0;
  for (; row + kQueryRows <= task.rows; row += kQueryRows) byte_rows<kQueryRows>(task, row, block * kCacheBlock, keys, values, next_keys, next_values, queries, scales, part);
  for (; row < task.rows; row++) byte_rows<1>(task, row, block * kCacheBlock, keys, values, next_keys, next_values, queries, scales, part);
}

inline void pack_queries(const AttentionTask& task, float* scratch) {
  int32_t* pairs = (int32_t*)(scratch + herd::round_up(task.rows, 16));
  for (int r = 0; r < task.rows; r++) scratch[r] = pack_row(task.queries + size_t(r) * task.width, task.width, pairs + size_t(r) * (task.width / 2));
}

void attend(const AttentionTask& task, const Partial& part, float* scratch) {
  for (int r = 0; r < task.rows; r++) part.top[r] = -INFINITY, part.sum[r] = 0;
  memset(part.values, 0, size_t(task.rows) * task.width * sizeof(float));
  if (task.type == herd::kCacheInt8) pack_queries(task, scratch);
  for (int block = task.first_block; block < task.last_block; block++) {
    size_t at = size_t(task.table[block]) * task.block_stride;
    if (task.type == herd::kCacheInt8) byte_block(task, block, part, scratch);
    else float_block(task, block * kCacheBlock, task.keys + at, task.values + at, part, scratch);
  }
}

inline float token_scale(const float* x, int width) {
  float top = 0;
  for (int d = 0; d < width; d++) {
    float magnitude = fabsf(x[d]);
    if (!(magnitude <= 3.4028235e38f)) return NAN;
    top = magnitude > top ? magnitude : top;
  }
  return top > herd::kSmallest ? top / 127 : 0;
}

inline void append_bytes(const float* key, const float* value, int width, uint8_t* keys, uint8_t* values, int slot) {
  size_t codes = size_t(kCacheBlock) * width;
  float key_scale = token_scale(key, width), value_scale = token_scale(value, width);
  ((float*)(keys + codes))[slot] = key_scale;
  ((float*)(values + codes))[slot] = value_scale;
  float k = key_scale > 0 ? 1 / key_scale : 0, v = value_scale > 0 ? 1 / value_scale : 0;
  for (int d = 0; d < width; d++) {
    keys[(size_t(d / 4) * kCacheBlock + slot) * 4 + d % 4] = uint8_t(int8_t(k ? rintf(key[d] * k) : 0));
    values[(size_t(slot / 4) * width + d) * 4 + slot % 4] = uint8_t(int8_t(v ? rintf(value[d] * v) : 0));
  }
}

void append(CacheType type, const float* key, const float* value, int width, uint8_t* keys, uint8_t* values, int slot) {
  if (type == herd::kCacheInt8) append_bytes(key, value, width, keys, values, slot);
  else append_floats(type, key, value, width, keys, values, slot);
}

}  // namespace
