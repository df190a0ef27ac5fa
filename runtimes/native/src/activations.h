// Rows of activations, prepared for products: normed, and quantised where weights are integers.
#pragma once
#include <string.h>
#include "kernels.h"
#include "scratch.h"

namespace herd {

constexpr int kRowPadding = 64; // elements between rows: rows a multiple of 4 KB apart would share a few places of the cache
constexpr int kRowGroup = 64;   // rows whose products wait in one buffer [kRowGroup][kTile]

// Buffers for `count` rows of `inputs` elements (a multiple of kInputBlock), of floats or codes.
struct RowBuffers {
  int inputs, stride;
  float* values;
  int8_t* codes;
  int32_t* sums;
  float* scales;

  static size_t needs(int count, int inputs) {
    size_t n = size_t(count) * (inputs + kRowPadding);
    return Scratch::needs<float>(n) + Scratch::needs<int8_t>(n) + Scratch::needs<int32_t>(n / kScaleBlock) + Scratch::needs<float>(n / kInputBlock);
  }
  RowBuffers(Scratch& scratch, int count, int inputs)
      : inputs(inputs), stride(inputs + kRowPadding), values(scratch.take<float>(size_t(count) * stride)),
        codes(scratch.take<int8_t>(size_t(count) * stride)), sums(scratch.take<int32_t>(size_t(count) * inputs / kScaleBlock)),
        scales(scratch.take<float>(size_t(count) * inputs / kInputBlock)) {}

  float* row(int r) const { return values + size_t(r) * stride; }
  Rows rows() const { return {inputs, stride, values, codes, sums, scales}; }

  // What a product with weights of a format needs of row r, whose `width` values are in place.
  void prepare(const Kernels& kernels, int r, int width, Format format) const {
    memset(row(r) + width, 0, size_t(inputs - width) * sizeof(float));
    if (format == kInt8Blocks) {
      float* block_scales = scales + size_t(r) * (inputs / kInputBlock);
      for (int k = 0; k < inputs; k += kInputBlock) quantize(kernels, r, k, kInputBlock, kInputBlock, block_scales++);
      return;
    }
    scales[r] = 1;
    if (format != kFloat32) quantize(kernels, r, 0, width, inputs, scales + r);
  }
  // Inputs first .. first + count of row r under one scale; those behind the first `width` of them are zero.
  void quantize(const Kernels& kernels, int r, int first, int width, int count, float* scale) const {
    size_t at = size_t(r) * stride + first, sum = (size_t(r) * inputs + first) / kScaleBlock;
    kernels.quantize(values + at, width, count, codes + at, sums + sum, scale);
  }
  // Row `to` becomes row `from`, times a factor: its values, or its codes.
  void copy(int from, int to, float factor, bool with_values) const {
    size_t n = inputs, blocks = inputs / kScaleBlock;
    scales[to] = with_values ? factor : scales[from] * factor;
    if (with_values) memcpy(row(to), row(from), n * sizeof(float));
    else {
      memcpy(codes + size_t(to) * stride, codes + size_t(from) * stride, n);
      memcpy(sums + to * blocks, sums + from * blocks, blocks * sizeof(int32_t));
    }
  }
};

}  // namespace herd
