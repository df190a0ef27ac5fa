// Attention over cache blocks, as flash decoding does it. Scores are in powers of two:
//
//   s_t = q . k_t        (q holds log2(e) / sqrt(head dimension) already)
//   top' = max(top, max_t s_t);   a = 2^(top - top');   p_t = 2^(s_t - top')
//   sum' = a sum + sum_t p_t;     values' = a values + sum_t p_t v_t
//
// One cache block after the other; kSplitBlocks blocks make a partial result, and partial results are merged in order.
// The order of all sums depends on positions only. Caches of floats are here, those of bytes in attention_int8.h.
#pragma once
#include "simd.h"

namespace {

using herd::AttentionTask;
using herd::CacheType;
using herd::Partial;
using herd::kCacheBlock;

constexpr int kTokenVectors = kCacheBlock / kLanes;
constexpr int kQueryRows = 4;

// ---- elements of a cache block ----------------------------------------------------------------------------------------

struct Float32Cache {
  static F load(const uint8_t* block, size_t at) { return ::load<F>((const float*)block + at); }
};
struct Float16Cache {
  static F load(const uint8_t* block, size_t at) { return half_to_float((const _Float16*)block + at); }
};

// Sums of M rows and V vectors stay in registers: a number of a row that is loaded meets every vector.
template <class C, int M, int V> inline void multiply_add(const float* rows, size_t stride, const uint8_t* block, size_t at, F (&acc)[M][V]) {
  F value[V];
  for (int v = 0; v < V; v++) value[v] = C::load(block, at + v * kLanes);
  for (int m = 0; m < M; m++) {
    F factor = splat(rows[m * stride]);
    for (int v = 0; v < V; v++) acc[m][v] = fma(factor, value[v], acc[m][v]);
  }
}

// scores [rows][64] of M rows: keys are [d][64]
template <class C, int M> inline void block_scores(const float* queries, int width, const uint8_t* keys, float* scores) {
  for (int t = 0; t < kCacheBlock; t += 2 * kLanes) {
    F acc[M][2] = {};
    for (int d = 0; d < width; d++) multiply_add<C, M, 2>(queries + d, width, keys, size_t(d) * kCacheBlock + t, acc);
    for (int m = 0; m < M; m++)
      for (int v = 0; v < 2; v++) store(scores + m * kCacheBlock + t + v * kLanes, acc[m][v]);
  }
}

// V vectors of values [rows][d] += weights [rows][64] times the block's tokens first .. last - 1, [64][d]
template <class C, int M, int V> inline void value_vectors(const float* weights, int width, const uint8_t* block, int first, int last, int d, float* values) {
  F acc[M][V];
  for (int m = 0; m < M; m++)
    for (int v = 0; v < V; v++) acc[m][v] = load<F>(values + size_t(m) * width + d + v * kLanes);
  for (int t = first; t < last; t++) multiply_add<C, M, V>(weights + t, kCacheBlock, block, size_t(t) * width + d, acc);
  for (int m = 0; m < M; m++)
    for (int v = 0; v < V; v++) store(values + size_t(m) * width + d + v * kLanes, acc[m][v]);
}

template <class C, int M> inline void block_values(const float* weights, int width, const uint8_t* block, int first, int last, float* values) {
  int d = 0;
  for (; d + 2 * kLanes <= width; d += 2 * kLanes) value_vectors<C, M, 2>(weights, width, block, first, last, d, values);
  if (d < width) value_vectors<C, M, 1>(weights, width, block, first, last, d, values);
}

// ---- one cache block, M rows ------------------------------------------------------------------------------------------

// Scores to weights: a row sees `visible` tokens of the block. The row's top and sum move on, its values are rescaled.
inline void softmax_step(float* scores, int visible, const float* key_scales, int width, float* top, float* sum_, float* values) {
  F tops = splat(-INFINITY), sums{};
  I odd{};
  for (int t = 0; t < kTokenVectors; t++) {
    F s = load<F>(scores + t * kLanes);
    if (key_scales) s = s * load<F>(key_scales + t * kLanes);
    I index;
    for (int i = 0; i < kLanes; i++) index[i] = t * kLanes + i;
    s = select(index < visible, s, splat(-INFINITY));
    odd |= s != s;
    tops = maximum(tops, s);
    store(scores + t * kLanes, s);
  }
  float most = sum(odd) ? NAN : largest(tops);   // a maximum may pass over NaN
  most = most > *top || most != most ? most : *top;
  float keep = *top == most ? 1.f : exp2f(*top - most);
  for (int t = 0; t < kTokenVectors; t++) {
    F p = exp2(load<F>(scores + t * kLanes) - most);
    sums += p;
    store(scores + t * kLanes, p);
  }
  *sum_ = *sum_ * keep + sum(sums) + (most != most ? most : 0);
  *top = most;
  if (keep != 1) for (int d = 0; d < width; d += kLanes) store(values + d, load<F>(values + d) * keep);
}

// What M rows see of a block: tokens of each, and the least and the most of them.
template <int M> struct Seen {
  int tokens[M], least = kCacheBlock, most = 0;
  Seen(const int* limits, int first_token) {
    for (int m = 0; m < M; m++) {
      int n = limits[m] - first_token;
      tokens[m] = n = n < 0 ? 0 : n > kCacheBlock ? kCacheBlock : n;
      least = n < least ? n : least;
      most = n > most ? n : most;
    }
  }
};

template <class C, int M> inline void block_rows(const AttentionTask& task, int row, int first_token, const uint8_t* keys, const uint8_t* values,
                                                 const Partial& part, float* scores) {
  int width = task.width;
  Seen<M> seen(task.limits + row, first_token);
  block_scores<C, M>(task.queries + size_t(row) * width, width, keys, scores);
  for (int m = 0; m < M; m++)
    if (seen.tokens[m]) softmax_step(scores + m * kCacheBlock, seen.tokens[m], nullptr, width, part.top + row + m, part.sum + row + m, part.values + size_t(row + m) * width);
  // What a row does not see may be NaN, which times a weight of zero is NaN: nobody reads further than he sees.
  block_values<C, M>(scores, width, values, 0, seen.least, part.values + size_t(row) * width);
  for (int m = 0; m < M; m++)
    if (seen.tokens[m] > seen.least)
      block_values<C, 1>(scores + m * kCacheBlock, width, values, seen.least, seen.tokens[m], part.values + size_t(row + m) * width);
}

template <class C> inline void all_rows(const AttentionTask& task, int first_token, const uint8_t* keys, const uint8_t* values, const Partial& part, float* scores) {
  int row = 0;
  for (; row + kQueryRows <= task.rows; row += kQueryRows) block_rows<C, kQueryRows>(task, row, first_token, keys, values, part, scores);
  for (; row < task.rows; row++) block_rows<C, 1>(task, row, first_token, keys, values, part, scores);
}

// A block in float32, worth it where many rows read it.
inline void widen_block(const uint8_t* keys, const uint8_t* values, int width, float* wide_keys, float* wide_values) {
  for (size_t i = 0; i < size_t(kCacheBlock) * width; i += kLanes) {
    store(wide_keys + i, Float16Cache::load(keys, i));
    store(wide_values + i, Float16Cache::load(values, i));
  }
}

constexpr int kManyRows = 12;

// scratch: wide keys, wide values, scores
inline void float_block(const AttentionTask& task, int first_token, const uint8_t* keys, const uint8_t* values, const Partial& part, float* scratch) {
  float *wide = scratch + size_t(kCacheBlock) * task.width, *scores = wide + size_t(kCacheBlock) * task.width;
  if (task.type == herd::kCacheFloat32) all_rows<Float32Cache>(task, first_token, keys, values, part, scores);
  else if (task.rows < kManyRows) all_rows<Float16Cache>(task, first_token, keys, values, part, scores);
  else {
    widen_block(keys, values, task.width, scratch, wide);
    all_rows<Float32Cache>(task, first_token, (const uint8_t*)scratch, (const uint8_t*)wide, part, scores);
  }
}

void merge(const Partial& total, const Partial& part, int rows, int width) {
  for (int r = 0; r < rows; r++) {
    if (part.top[r] == -INFINITY) continue;   // the row saw nothing there
    float most = part.top[r] > total.top[r] || part.top[r] != part.top[r] ? part.top[r] : total.top[r];
    float a = total.top[r] == -INFINITY ? 0 : exp2f(total.top[r] - most), b = exp2f(part.top[r] - most);
    total.top[r] = most;
    total.sum[r] = total.sum[r] * a + part.sum[r] * b;
    float *to = total.values + size_t(r) * width;
    const float* from = part.values + size_t(r) * width;
    for (int d = 0; d < width; d += kLanes) store(to + d, fma(load<F>(from + d), splat(b), load<F>(to + d) * a));
  }
}

inline void append_floats(CacheType type, const float* key, const float* value, int width, uint8_t* keys, uint8_t* values, int slot) {
  for (int d = 0; d < width; d++) {
    size_t k = size_t(d) * kCacheBlock + slot, v = size_t(slot) * width + d;
    if (type == herd::kCacheFloat32) ((float*)keys)[k] = key[d], ((float*)values)[v] = value[d];
    else ((_Float16*)keys)[k] = _Float16(key[d]), ((_Float16*)values)[v] = _Float16(value[d]);
  }
}

}  // namespace
