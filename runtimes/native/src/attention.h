// Attention over cache blocks, as flash decoding does it. Scores are in powers of two:
//
//   s_t = q . k_t        (q holds log2(e) / sqrt(head dimension) already)
//   top' = max(top, max_t s_t);   a = 2^(top - top');   p_t = 2^(s_t - top')
//   sum' = a sum + sum_t p_t;     values' = a values + sum_t p_t v_t
//
// One cache block after the other; kSplitBlocks blocks make a partial result, and partial results are merged in order.
// The order of all sums depends on positions only. In 8-bit caches a token's scale multiplies its score, and its weight.
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
  static constexpr int kGroup = 1;   // dimensions (of keys) or tokens (of values) that lie beside each other
  static void load(const uint8_t* block, int row, int stride, int at, F out[1]) { out[0] = ::load<F>((const float*)block + row * stride + at); }
};
struct Float16Cache {
  static constexpr int kGroup = 1;
  static void load(const uint8_t* block, int row, int stride, int at, F out[1]) { out[0] = half_to_float((const _Float16*)block + row * stride + at); }
};
struct Int8Cache {
  static constexpr int kGroup = 4;
  static void load(const uint8_t* block, int row, int stride, int at, F out[4]) {
    I four = ::load<I>(block + (size_t(row) * stride + at) * 4);
    for (int j = 0; j < 4; j++) out[j] = to_float((I)(four << (24 - 8 * j)) >> 24);
  }
};

// Sums of M rows and V vectors stay in registers. Bytes are widened one vector after the other, floats all at once, so
// that a value of the row that is loaded meets every vector.
template <class C, int M, int V> inline void multiply_add(const float* rows, size_t stride, const uint8_t* block, int group, int block_stride, int at,
                                                          F (&acc)[M][V]) {
  if constexpr (C::kGroup == 1) {
    F value[V][1];
    for (int v = 0; v < V; v++) C::load(block, group, block_stride, at + v * kLanes, value[v]);
    for (int m = 0; m < M; m++) {
      F factor = splat(rows[m * stride]);
      for (int v = 0; v < V; v++) acc[m][v] = fma(factor, value[v][0], acc[m][v]);
    }
  } else {
    for (int v = 0; v < V; v++) {
      F value[C::kGroup];
      C::load(block, group, block_stride, at + v * kLanes, value);
      for (int j = 0; j < C::kGroup; j++)
        for (int m = 0; m < M; m++) acc[m][v] = fma(splat(rows[m * stride + j]), value[j], acc[m][v]);
    }
  }
}

// scores [rows][64] of M rows: keys are [d / group][64][group]
template <class C, int M> inline void block_scores(const float* queries, int width, const uint8_t* keys, float* scores) {
  for (int t = 0; t < kCacheBlock; t += 2 * kLanes) {
    F acc[M][2] = {};
    for (int d = 0; d < width; d += C::kGroup) multiply_add<C, M, 2>(queries + d, width, keys, d / C::kGroup, kCacheBlock, t, acc);
    for (int m = 0; m < M; m++)
      for (int v = 0; v < 2; v++) store(scores + m * kCacheBlock + t + v * kLanes, acc[m][v]);
  }
}

// V vectors of values [rows][d] += weights [rows][64] times the block's tokens first .. last - 1, [64 / group][d][group]
template <class C, int M, int V> inline void value_vectors(const float* weights, int width, const uint8_t* block, int first, int last, int d, float* values) {
  F acc[M][V];
  for (int m = 0; m < M; m++)
    for (int v = 0; v < V; v++) acc[m][v] = load<F>(values + size_t(m) * width + d + v * kLanes);
  for (int t = first; t < last; t += C::kGroup) multiply_add<C, M, V>(weights + t, kCacheBlock, block, t / C::kGroup, width, d, acc);
  for (int m = 0; m < M; m++)
    for (int v = 0; v < V; v++) store(values + size_t(m) * width + d + v * kLanes, acc[m][v]);
}

template <class C, int M> inline void block_values(const float* weights, int width, const uint8_t* block, int first, int last, float* values) {
  int d = 0;
  for (; d + 2 * kLanes <= width; d += 2 * kLanes) value_vectors<C, M, 2>(weights, width, block, first, last, d, values);
  if (d < width) value_vectors<C, M, 1>(weights, width, block, first, last, d, values);
}

// ---- one cache block, M rows ------------------------------------------------------------------------------------------

// Scores to weights: a row sees `visible` tokens of the block. Returns nothing; top and sum move on, values are rescaled.
inline void softmax_step(float* scores, int visible, const float* key_scales, const float* value_scales, int width, float* top, float* sum_, float* values) {
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
    if (value_scales) {   // slots that were never written may hold anything
      F scaled = p * load<F>(value_scales + t * kLanes);
      p = select(p > 0.f, scaled, F{});
    }
    store(scores + t * kLanes, p);
  }
  *sum_ = *sum_ * keep + sum(sums) + (most != most ? most : 0);
  *top = most;
  if (keep != 1) for (int d = 0; d < width; d += kLanes) store(values + d, load<F>(values + d) * keep);
}

template <class C, int M> inline void block_rows(const AttentionTask& task, int row, int first_token, const uint8_t* keys, const uint8_t* values,
                                                 const float* key_scales, const float* value_scales, const Partial& part, float* scores) {
  int seen[M], least = kCacheBlock, most = 0;
  block_scores<C, M>(task.queries + size_t(row) * task.width, task.width, keys, scores);
  for (int m = 0; m < M; m++) {
    int visible = task.limits[row + m] - first_token;
    visible = visible < 0 ? 0 : visible > kCacheBlock ? kCacheBlock : visible;
    seen[m] = visible;
    least = visible < least ? visible : least;
    most = visible > most ? visible : most;
    if (visible) softmax_step(scores + m * kCacheBlock, visible, key_scales, value_scales, task.width, part.top + row + m, part.sum + row + m,
                              part.values + size_t(row + m) * task.width);
    else memset(scores + m * kCacheBlock, 0, kCacheBlock * sizeof(float));
  }
  // Codes times a weight of zero are zero. Floats that a row does not see may be NaN, so it must not read them.
  int together = C::kGroup == 4 ? most : least;
  block_values<C, M>(scores, task.width, values, 0, together, part.values + size_t(row) * task.width);
  for (int m = 0; m < M; m++)
    if (seen[m] > together) block_values<C, 1>(scores + m * kCacheBlock, task.width, values, together, seen[m], part.values + size_t(row + m) * task.width);
}

template <class C> inline void block_all_rows(const AttentionTask& task, int first_token, const uint8_t* keys, const uint8_t* values,
                                              const float* key_scales, const float* value_scales, const Partial& part, float* scores) {
  int row = 0;
  for (; row + kQueryRows <= task.rows; row += kQueryRows) block_rows<C, kQueryRows>(task, row, first_token, keys, values, key_scales, value_scales, part, scores);
  for (; row < task.rows; row++) block_rows<C, 1>(task, row, first_token, keys, values, key_scales, value_scales, part, scores);
}

// A block in float32: [d][64] and [64][d]. Worth it where many rows read it.
template <class C> inline void widen_block(const uint8_t* keys, const uint8_t* values, int width, float* wide_keys, float* wide_values) {
  F out[C::kGroup];
  for (int d = 0; d < width / C::kGroup; d++)
    for (int t = 0; t < kCacheBlock; t += kLanes) {
      C::load(keys, d, kCacheBlock, t, out);
      for (int j = 0; j < C::kGroup; j++) store(wide_keys + (d * C::kGroup + j) * kCacheBlock + t, out[j]);
    }
  for (int t = 0; t < kCacheBlock / C::kGroup; t++)
    for (int d = 0; d < width; d += kLanes) {
      C::load(values, t, width, d, out);
      for (int j = 0; j < C::kGroup; j++) store(wide_values + size_t(t * C::kGroup + j) * width + d, out[j]);
    }
}

constexpr int kManyRows = 12;

template <class C> inline void one_block(const AttentionTask& task, int block, const Partial& part, float* scratch) {
  size_t at = size_t(task.table[block]) * task.block_stride;
  const uint8_t *keys = task.keys + at, *values = task.values + at;
  const float *key_scales = nullptr, *value_scales = nullptr;
  if (C::kGroup == 4) {
    key_scales = (const float*)(keys + size_t(kCacheBlock) * task.width);
    value_scales = (const float*)(values + size_t(kCacheBlock) * task.width);
  }
  float* scores = scratch + size_t(2) * kCacheBlock * task.width;
  if (sizeof(C) && task.type != herd::kCacheFloat32 && task.rows >= kManyRows) {
    float* wide = scratch + size_t(kCacheBlock) * task.width;
    widen_block<C>(keys, values, task.width, scratch, wide);
    block_all_rows<Float32Cache>(task, block * kCacheBlock, (const uint8_t*)scratch, (const uint8_t*)wide, key_scales, value_scales, part, scores);
  } else block_all_rows<C>(task, block * kCacheBlock, keys, values, key_scales, value_scales, part, scores);
}

void attend(const AttentionTask& task, const Partial& part, float* scratch) {
  for (int r = 0; r < task.rows; r++) part.top[r] = -INFINITY, part.sum[r] = 0;
  memset(part.values, 0, size_t(task.rows) * task.width * sizeof(float));
  for (int block = task.first_block; block < task.last_block; block++) {
    if (task.type == herd::kCacheFloat32) one_block<Float32Cache>(task, block, part, scratch);
    else if (task.type == herd::kCacheFloat16) one_block<Float16Cache>(task, block, part, scratch);
    else one_block<Int8Cache>(task, block, part, scratch);
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

// ---- appending --------------------------------------------------------------------------------------------------------

inline float token_scale(const float* x, int width) {
  float top = 0;
  for (int d = 0; d < width; d++) {
    float magnitude = fabsf(x[d]);
    if (!(magnitude <= 3.4028235e38f)) return NAN;
    top = magnitude > top ? magnitude : top;
  }
  return top > herd::kSmallest ? top / 127 : 0;
}

void append(CacheType type, const float* key, const float* value, int width, uint8_t* keys, uint8_t* values, int slot) {
  if (type == herd::kCacheInt8) {
    float key_scale = token_scale(key, width), value_scale = token_scale(value, width);
    ((float*)(keys + size_t(kCacheBlock) * width))[slot] = key_scale;
    ((float*)(values + size_t(kCacheBlock) * width))[slot] = value_scale;
    float k = key_scale > 0 ? 1 / key_scale : 0, v = value_scale > 0 ? 1 / value_scale : 0;
    for (int d = 0; d < width; d++) {
      keys[(size_t(d / 4) * kCacheBlock + slot) * 4 + d % 4] = uint8_t(int8_t(k ? rintf(key[d] * k) : 0));
      values[(size_t(slot / 4) * width + d) * 4 + slot % 4] = uint8_t(int8_t(v ? rintf(value[d] * v) : 0));
    }
    return;
  }
  for (int d = 0; d < width; d++) {
    size_t k = size_t(d) * kCacheBlock + slot, v = size_t(slot) * width + d;
    if (type == herd::kCacheFloat32) ((float*)keys)[k] = key[d], ((float*)values)[v] = value[d];
    else ((_Float16*)keys)[k] = _Float16(key[d]), ((_Float16*)values)[v] = _Float16(value[d]);
  }
}

}  // namespace
