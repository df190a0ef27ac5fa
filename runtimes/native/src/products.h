// Products of a tile of 32 output channels with rows of activations.
//
//   float32  y = sum_k x_k w_k
//   int8     y = s_row s_channel (sum_k q_k c_k - kOffset sum_k q_k)
//   blocks   y = sum over blocks b of s_row,b s_channel,b (sum_k q_k c_k - kOffset sum_k q_k)
//   int4     y = s_row sum over blocks b of s_b (sum_k q_k c_k - z_b sum_k q_k), and so 4, 5 and 6 bits
//
// M rows and V vectors of channels at a time, so that sums stay in registers: every weight loaded meets M rows, every
// activation V vectors. One row takes the whole tile, which reads memory in one stream.
#pragma once
#include "simd.h"

namespace {

using herd::Matrix;
using herd::Rows;
using herd::kTile;

constexpr size_t kAhead = 4096;   // bytes to fetch ahead: the hardware's prefetcher stops at the end of a page
inline void prefetch(const uint8_t* from, int bytes) {
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(from + kAhead + i);
}

template <int V, int M> inline void tile_float32(const Matrix& a, const uint8_t* tile, int v0, const Rows& x, int first, float* y) {
  F acc[M][V] = {};
  const float* w = (const float*)tile + v0 * kLanes;
  const float* rows = x.values + size_t(first) * x.stride;
  for (int k = 0; k < a.inputs; k++, w += kTile) {
    if (M == 1) prefetch((const uint8_t*)w, kTile * 4);
    F weights[V];
    for (int v = 0; v < V; v++) weights[v] = load<F>(w + v * kLanes);
    for (int m = 0; m < M; m++) {
      F value = splat(rows[size_t(m) * x.stride + k]);
      for (int v = 0; v < V; v++) acc[m][v] = fma(value, weights[v], acc[m][v]);
    }
  }
  for (int m = 0; m < M; m++)
    for (int v = 0; v < V; v++) store(y + m * kTile + (v0 + v) * kLanes, acc[m][v] * x.scales[first + m]);
}

// acc += `inputs` codes of M rows times V vectors of channels, [inputs / 4][32][4]
template <int V, int M> inline void multiply_bytes(const uint8_t* w, const int8_t* rows, int stride, int inputs, I (&acc)[M][V]) {
  for (int k = 0; k < inputs; k += 4, w += kTile * 4) {
    if (M == 1) prefetch(w, kTile * 4);
    Weights8 weights[V];
    for (int v = 0; v < V; v++) weights[v] = weights8(load<B>(w + v * kLanes * 4));
    for (int m = 0; m < M; m++) {
      I value = splat_bytes(rows + size_t(m) * stride + k);
      for (int v = 0; v < V; v++) acc[m][v] = multiply8(acc[m][v], weights[v], value);
    }
  }
}

template <int V, int M> inline void tile_int8(const Matrix& a, const uint8_t* tile, int v0, const Rows& x, int first, float* y,
                                              const float* channel_scales) {
  I acc[M][V] = {};
  multiply_bytes<V, M>(tile + v0 * kLanes * 4, x.codes + size_t(first) * x.stride, x.stride, a.inputs, acc);
  int blocks = x.inputs / herd::kScaleBlock;
  for (int m = 0; m < M; m++) {
    int32_t offset = 0;
    if (kOffset) for (int b = 0; b < blocks; b++) offset += kOffset * x.sums[size_t(first + m) * blocks + b];
    for (int v = 0; v < V; v++) {
      F scale = load<F>(channel_scales + (v0 + v) * kLanes) * x.scales[first + m];
      store(y + m * kTile + (v0 + v) * kLanes, to_float(acc[m][v] - offset) * scale);
    }
  }
}

template <int V, int M> inline void tile_int8_blocks(const Matrix& a, const uint8_t* tile, int v0, const Rows& x, int first, float* y) {
  constexpr int kBlock = herd::kInputBlock, kCodes = kBlock * kTile;
  F total[M][V] = {};
  int blocks = a.inputs / kBlock;
  const int8_t* rows = x.codes + size_t(first) * x.stride;
  const float* scales = x.scales + size_t(first) * blocks;
  const int32_t* sums = x.sums + size_t(first) * 2 * blocks;
  for (int b = 0; b < blocks; b++, tile += herd::kInt8Record) {
    I acc[M][V] = {};
    multiply_bytes<V, M>(tile + v0 * kLanes * 4, rows + b * kBlock, x.stride, kBlock, acc);
    for (int m = 0; m < M; m++) {
      const int32_t* sum = sums + size_t(2) * (m * blocks + b);
      int32_t offset = kOffset ? kOffset * (sum[0] + sum[1]) : 0;
      for (int v = 0; v < V; v++) {
        F scale = load<F>(tile + kCodes + (v0 + v) * kLanes * 4) * scales[size_t(m) * blocks + b];
        total[m][v] = fma(to_float(acc[m][v] - offset), scale, total[m][v]);
      }
    }
  }
  for (int m = 0; m < M; m++)
    for (int v = 0; v < V; v++) store(y + m * kTile + (v0 + v) * kLanes, total[m][v]);
}

template <int V, int M> inline void tile_int4(const Matrix& a, const uint8_t* tile, int v0, const Rows& x, int first, float* y) {
  F acc[M][V] = {};
  int blocks = x.inputs / herd::kScaleBlock;
  const int8_t* rows = x.codes + size_t(first) * x.stride;
  const int32_t* sums = x.sums + size_t(first) * blocks;
  for (int k = 0; k < a.inputs; k += herd::kInputBlock, tile += herd::kInt4Record) {
    if (M == 1) prefetch(tile, herd::kInt4Record);
    for (int b = 0; b < 2; b++) {
      Sum4 products[M][V] = {};
      for (int i = 0; i < 4; i++) {
        const int8_t* at = rows + k + 32 * b + 8 * i;
        for (int v = 0; v < V; v++) {
          B pair = load<B>(tile + 512 * b + 128 * i + (v0 + v) * kLanes * 4);
          B low = pair & 15, high = (B)((U)pair >> 4) & 15;
          for (int m = 0; m < M; m++) {
            multiply4(products[m][v], low, splat_bytes(at + size_t(m) * x.stride));
            multiply4(products[m][v], high, splat_bytes(at + size_t(m) * x.stride + 4));
          }
        }
      }
      for (int v = 0; v < V; v++) {
        F scale = half_to_float(tile + 1024 + 64 * b + (v0 + v) * kLanes * 2);
        F zero = __builtin_convertvector(load<Lane8>(tile + 1152 + 32 * b + (v0 + v) * kLanes), F);
        for (int m = 0; m < M; m++) {
          F sum = splat(-float(sums[size_t(m) * blocks + k / herd::kScaleBlock + b]));
          acc[m][v] = fma(fma(sum, zero, to_float(widen4(products[m][v]))), scale, acc[m][v]);
        }
      }
    }
  }
  for (int m = 0; m < M; m++)
    for (int v = 0; v < V; v++) store(y + m * kTile + (v0 + v) * kLanes, acc[m][v] * x.scales[first + m]);
}

// Bits 4 and up, where they belong, of one of the 16 groups of four inputs of a record. `planes` are those of all groups.
template <int kBits> inline B high_bits(const uint8_t* planes, int group) {
  constexpr int kHigh = kBits - 4;
  constexpr uint8_t kMask = ((1 << kHigh) - 1) << 4;
  int at = group * kHigh;
  uint32_t bit = at % 8;
  U raw = (U)load<B>(planes + at / 8 * kTile * 4);
  return (B)(bit < 4 ? raw << (4 - bit) : raw >> (bit - 4)) & kMask;
}

// acc += a record's codes of V vectors of channels times M rows
template <int kBits, int V, int M> inline void multiply_bits(const uint8_t* record, const int8_t* rows, int stride, I (&acc)[M][V]) {
  constexpr int kEights = products_in_sum4(kBits) / 2;   // of inputs, whose products one sum holds
  for (int v = 0; v < V; v++, record += kLanes * 4) {
    for (int first = 0; first < 8; first += kEights) {
      Sum4 products[M] = {};
      for (int i = first; i < first + kEights; i++) {
        B pair = load<B>(record + i * kTile * 4);
        B low = pair & 15, high = (B)((U)pair >> 4) & 15;
        if constexpr (kBits > 4) {
          low |= high_bits<kBits>(record + herd::codes_bytes(4), 2 * i);
          high |= high_bits<kBits>(record + herd::codes_bytes(4), 2 * i + 1);
        }
        for (int m = 0; m < M; m++) {
          multiply4(products[m], low, splat_bytes(rows + size_t(m) * stride + 8 * i));
          multiply4(products[m], high, splat_bytes(rows + size_t(m) * stride + 8 * i + 4));
        }
      }
      for (int m = 0; m < M; m++) acc[m][v] += widen4(products[m]);
    }
  }
}

template <int kBits, int V, int M> inline void tile_bits(const Matrix& a, const uint8_t* tile, int v0, const Rows& x, int first, float* y) {
  constexpr size_t kRecord = herd::record_bytes(kBits), kCodes = herd::codes_bytes(kBits);
  F total[M][V] = {};
  int blocks = a.inputs / herd::kInputBlock, row_sums = x.inputs / herd::kScaleBlock;   // rows may be longer
  const int8_t* rows = x.codes + size_t(first) * x.stride;
  const int32_t* sums = x.sums + size_t(first) * row_sums;
  for (int b = 0; b < blocks; b++, tile += kRecord) {
    if (M == 1) prefetch(tile, kRecord);
    I acc[M][V] = {};
    multiply_bits<kBits, V, M>(tile + v0 * kLanes * 4, rows + b * herd::kInputBlock, x.stride, acc);
    for (int v = 0; v < V; v++) {
      F scale = half_to_float(tile + kCodes + (v0 + v) * kLanes * 2);
      F zero = __builtin_convertvector(load<Lane8>(tile + kCodes + 2 * kTile + (v0 + v) * kLanes), F);
      for (int m = 0; m < M; m++) {
        const int32_t* sum = sums + size_t(m) * row_sums + 2 * b;
        total[m][v] = fma(fma(splat(-float(sum[0] + sum[1])), zero, to_float(acc[m][v])), scale, total[m][v]);
      }
    }
  }
  for (int m = 0; m < M; m++)
    for (int v = 0; v < V; v++) store(y + m * kTile + (v0 + v) * kLanes, total[m][v] * x.scales[first + m]);
}

// Rows at a time, and vectors of channels that they meet: as many sums as the registers hold beside what they are made
// of. Measured (benchmarks in docs/performance.md); one row alone takes the whole tile.
struct Shape {
  int rows, vectors;
};
constexpr bool kMany = kRegisters == 32;
constexpr int at_most(int vectors) { return vectors < kVectors ? vectors : kVectors; }
constexpr Shape kShapes[] = {
  {kMany ? (kLanes == 16 ? 8 : 4) : 2, at_most(4)},                          // float32
  {kMany ? (kLanes == 16 ? 8 : 4) : 4, at_most(kMany ? 4 : 2)},              // int8
  {kMany ? (kLanes == 16 ? 4 : 2) : 2, at_most(4)},                          // int4: two sums per row and vector
  {kMany ? (kLanes == 16 ? 8 : 4) : 4, at_most(kMany ? 4 : 2)},              // int8 in blocks
  {kMany ? 4 : 2, at_most(kMany ? 4 : 2)}, {kMany ? 4 : 2, at_most(kMany ? 4 : 2)}, {kMany ? 4 : 2, at_most(kMany ? 4 : 2)},   // 4 to 6 bits
};

template <herd::Format kFormat, int M> inline void rows_at(const Matrix& a, const uint8_t* codes, const Rows& x, int first, float* y, const float* scales) {
  constexpr int V = M == 1 ? kVectors : kShapes[kFormat].vectors;
  for (int v = 0; v < kVectors; v += V) {
    if constexpr (kFormat == herd::kFloat32) tile_float32<V, M>(a, codes, v, x, first, y);
    else if constexpr (kFormat == herd::kInt8) tile_int8<V, M>(a, codes, v, x, first, y, scales);
    else if constexpr (kFormat == herd::kInt4) tile_int4<V, M>(a, codes, v, x, first, y);
    else if constexpr (kFormat == herd::kInt8Blocks) tile_int8_blocks<V, M>(a, codes, v, x, first, y);
    else tile_bits<kFormat, V, M>(a, codes, v, x, first, y);
  }
}

template <herd::Format kFormat> inline void tile_rows(const Matrix& a, const uint8_t* codes, const Rows& x, int first, int count, float* y, const float* scales) {
  constexpr int kRows = kShapes[kFormat].rows;
  for (; count >= kRows; count -= kRows, first += kRows, y += kRows * kTile) rows_at<kFormat, kRows>(a, codes, x, first, y, scales);
  for (; count >= 2; count -= 2, first += 2, y += 2 * kTile) rows_at<kFormat, 2>(a, codes, x, first, y, scales);
  if (count) rows_at<kFormat, 1>(a, codes, x, first, y, scales);
}

void product(const Matrix& a, int index, const Rows& x, int first, int count, float* y) {
  const uint8_t* codes = a.codes + index * a.tile_bytes();
  if (a.format == herd::kFloat32) tile_rows<herd::kFloat32>(a, codes, x, first, count, y, nullptr);
  else if (a.format == herd::kInt8) tile_rows<herd::kInt8>(a, codes, x, first, count, y, a.scales + index * kTile);
  else if (a.format == herd::kInt4) tile_rows<herd::kInt4>(a, codes, x, first, count, y, nullptr);
  else if (a.format == herd::kInt8Blocks) tile_rows<herd::kInt8Blocks>(a, codes, x, first, count, y, nullptr);
  else if (a.format == herd::kBits4) tile_rows<herd::kBits4>(a, codes, x, first, count, y, nullptr);
  else if (a.format == herd::kBits5) tile_rows<herd::kBits5>(a, codes, x, first, count, y, nullptr);
  else tile_rows<herd::kBits6>(a, codes, x, first, count, y, nullptr);
}

}  // namespace
