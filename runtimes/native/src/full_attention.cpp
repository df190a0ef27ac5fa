// FullAttention: every token of a row of tokens attends to all of them, as the patches of an image do.
//
//   inputs      qkv [B, T, 3 H d] float, queries, keys and values side by side; cos, sin [T, d / 2] float, optional:
//               rotation of the pairs (2i, 2i + 1) of queries and keys
//   attributes  num_heads (H)
//   output      y [B, T, H d]
//
// Keys and values of one head become cache blocks, which the kernels of paged attention then read.
#include <math.h>
#include <string.h>
#include "operators.h"
#include "scratch.h"

namespace herd {

constexpr int kQueries = 64;   // whose results wait in one buffer
constexpr float kLog2E = 1.44269504088896341f;

const ort::Port* FullAttention::inputs(size_t* count) {
  static const ort::Port ports[] = {{ort::kFloat, ort::kRequired}, {ort::kFloat, ort::kOptional}, {ort::kFloat, ort::kOptional}};
  *count = sizeof ports / sizeof *ports;
  return ports;
}

const ort::Port* FullAttention::outputs(size_t* count) {
  static const ort::Port ports[] = {{ort::kFloat, ort::kRequired}};
  *count = 1;
  return ports;
}

FullAttention::FullAttention(ort::Api api, const ort::Info* info) : api_(api), heads_(int(api.integer(info, "num_heads", 0))) {}

// One head of one row of tokens; pointers are to its first token.
struct FullHead {
  const Kernels& kernel;
  const float *qkv, *cos, *sin;
  int tokens, dims, heads;
  float* y;

  void run() const {
    int width = round_up(dims, 16), blocks = round_up(tokens, kCacheBlock) / kCacheBlock;
    size_t block_bytes = keys_bytes(kCacheFloat32, width), space = attention_scratch(kQueries, width);
    Scratch scratch(2 * Scratch::needs<uint8_t>(blocks * block_bytes) + Scratch::needs<int>(blocks) + Scratch::needs<int>(kQueries) +
                    2 * Scratch::needs<float>(kQueries * width) + 2 * Scratch::needs<float>(kQueries) + Scratch::needs<float>(space) +
                    2 * Scratch::needs<float>(width));
    uint8_t *keys = scratch.take<uint8_t>(blocks * block_bytes), *values = scratch.take<uint8_t>(blocks * block_bytes);
    int *table = scratch.take<int>(blocks), *limits = scratch.take<int>(kQueries);
    float *queries = scratch.take<float>(kQueries * width), *results = scratch.take<float>(kQueries * width);
    Partial part{scratch.take<float>(kQueries), scratch.take<float>(kQueries), results};
    float *buffer = scratch.take<float>(space), *key = scratch.take<float>(width), *value = scratch.take<float>(width);
    for (int b = 0; b < blocks; b++) table[b] = b;
    for (int i = 0; i < kQueries; i++) limits[i] = tokens;
    for (int t = 0; t < tokens; t++) {
      take(t, 1, 1, key, width);
      take(t, 2, 1, value, width);
      size_t at = t / kCacheBlock * block_bytes;
      kernel.append(kCacheFloat32, key, value, width, keys + at, values + at, t % kCacheBlock);
    }
    for (int first = 0; first < tokens; first += kQueries) {
      int n = tokens - first < kQueries ? tokens - first : kQueries;
      for (int r = 0; r < n; r++) take(first + r, 0, kLog2E / sqrtf(float(dims)), queries + size_t(r) * width, width);
      kernel.attend({queries, n, width, limits, kCacheFloat32, keys, values, block_bytes, table, 0, blocks}, part, buffer);
      for (int r = 0; r < n; r++)
        for (int d = 0; d < dims; d++) y[size_t(first + r) * heads * dims + d] = results[size_t(r) * width + d] / part.sum[r];
    }
  }

 private:
  // Query (0), key (1) or value (2) of a token, rotated unless it is a value.
  void take(int token, int which, float factor, float* to, int width) const {
    const float* from = qkv + (size_t(token) * 3 + which) * heads * dims;
    for (int d = 0; d < dims; d++) to[d] = from[d] * factor;
    memset(to + dims, 0, size_t(width - dims) * sizeof(float));
    if (cos && which < 2) kernel.rotate(to, cos + size_t(token) * (dims / 2), sin + size_t(token) * (dims / 2), dims);
  }
};

ort::Status* FullAttention::run(ort::Context* context) const {
  ort::Shape shape = api_.shape(api_.input(context, 0));
  const float *qkv = api_.data<float>(api_.input(context, 0)), *cos = api_.data<float>(api_.input(context, 1)), *sin = api_.data<float>(api_.input(context, 2));
  if (shape.rank != 3 || heads_ < 1 || shape.last() < 1 || shape.last() % (int64_t(3) * heads_)) return api_.error("FullAttention: the input is not [B, T, 3 heads]");
  int batch = int(shape.dims[0]), tokens = int(shape.dims[1]), dims = int(shape.last() / (int64_t(3) * heads_));
  if (dims > 512) return api_.error("FullAttention: a head is wider than 512");
  if (!cos != !sin || (cos && dims % 2) || !api_.fits(api_.input(context, 1), int64_t(tokens) * (dims / 2)) || !api_.fits(api_.input(context, 2), int64_t(tokens) * (dims / 2)))
    return api_.error("FullAttention: rotations are not of every token and pair");
  shape.dims[2] = int64_t(heads_) * dims;
  float* y = api_.data<float>(api_.output(context, 0, shape));
  if (!batch || !tokens) return nullptr;
  api_.parallel(context, batch * heads_, [&](int item) {
    size_t first = size_t(item / heads_) * tokens, head = size_t(item % heads_) * dims;
    FullHead{kernels(), qkv + first * 3 * heads_ * dims + head, cos, sin, tokens, dims, heads_, y + first * heads_ * dims + head}.run();
  });
  return nullptr;
}

}  // namespace herd
