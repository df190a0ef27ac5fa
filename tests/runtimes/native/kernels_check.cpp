// One unit's kernels against plain scalar references, over random shapes; test_kernels.py compiles it with a unit, for
// other processors and with sanitizers. Buffers have the exact size that a kernel may touch, and what lies unwritten in
// them is NaN.
//
//   kernels_check [rounds [seed]]      prints the unit and the number of checks; exit status 1 after a difference
//
// Only the C library: zig would compile the C++ one first.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "kernels.h"

#define JOIN(a, b) a##b
#define NAME(unit) JOIN(kernels_, unit)
namespace herd { extern const Kernels NAME(UNIT); }

using namespace herd;
static const Kernels& kernel = herd::NAME(UNIT);

// ---- random numbers, buffers, comparisons ------------------------------------------------------------------------------

static uint64_t state = 1;
static uint32_t bits() {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return uint32_t(state >> 33);
}
static int between(int low, int high) { return low + int(bits() % uint32_t(high - low + 1)); }
static float normal() {
  float total = 0;
  for (int i = 0; i < 6; i++) total += float(bits() % 65536) / 65536 - 0.5f;
  return total * 1.4f;
}

template <class T> struct Buffer {   // filled with 0xFF: NaN in floats
  T* data;
  size_t count;
  explicit Buffer(size_t n) : data(static_cast<T*>(malloc(n ? n * sizeof(T) : 1))), count(n) { memset(data, 0xFF, n * sizeof(T)); }
  Buffer(const Buffer&) = delete;
  ~Buffer() { free(data); }
  T& operator[](size_t i) const { return data[i]; }
  void fill() const { for (size_t i = 0; i < count; i++) data[i] = T(normal()); }
};

static long checks = 0, failures = 0;
static void check(bool fine, const char* what, double found, double wanted) {
  checks++;
  if (fine || failures++ > 20) return;
  printf("%s %s: %.9g, should be %.9g\n", kernel.name, what, found, wanted);
}
static void near(double found, double wanted, double tolerance, const char* what) {
  check(fabs(found - wanted) <= tolerance, what, found, wanted);
}
static void same(const float* a, const float* b, size_t n, const char* what) {
  for (size_t i = 0; i < n; i++) check(!memcmp(a + i, b + i, 4), what, a[i], b[i]);
}

// ---- products ----------------------------------------------------------------------------------------------------------

static double weight(const Matrix& a, int tile, int k, int c) {   // the layouts of kernels.h, once more
  const uint8_t* from = a.codes + tile * a.tile_bytes();
  if (a.format == kFloat32) {
    float w;
    memcpy(&w, from + (size_t(k) * kTile + c) * 4, 4);
    return w;
  }
  if (a.format == kInt8Blocks) {
    const uint8_t* record = from + size_t(k / 64) * kInt8Record;
    float scale;
    memcpy(&scale, record + 2048 + c * 4, 4);
    return double(record[(size_t(k % 64 / 4) * kTile + c) * 4 + k % 4] - 128) * scale;
  }
  if (a.format == kInt8) return double(from[(size_t(k / 4) * kTile + c) * 4 + k % 4] - 128) * a.scales[tile * kTile + c];
  if (a.format >= kBits4) {
    int bits = a.format, j = k % 64, place = j / 4 * (bits - 4);
    const uint8_t* record = from + size_t(k / 64) * record_bytes(bits);
    int code = record[(j / 8 * kTile + c) * 4 + j % 4] >> (j / 4 % 2 * 4) & 15;
    if (bits > 4) code |= (record[1024 + (place / 8 * kTile + c) * 4 + j % 4] >> place % 8 & (bits == 5 ? 1 : 3)) << 4;
    _Float16 scale;
    memcpy(&scale, record + bits * 256 + c * 2, 2);
    return double(float(scale)) * (code - record[bits * 256 + 64 + c]);
  }
  const uint8_t* record = from + size_t(k / 64) * kInt4Record;
  int b = k % 64 / 32, i = k % 32 / 8, high = k % 8 / 4;
  int code = record[512 * b + 128 * i + c * 4 + k % 4] >> (high ? 4 : 0) & 15;
  _Float16 scale;
  memcpy(&scale, record + 1024 + 64 * b + c * 2, 2);
  return double(float(scale)) * (code - record[1152 + 32 * b + c]);
}

static void random_matrix(const Matrix& a, uint8_t* codes) {
  for (size_t i = 0; i < a.bytes(); i++) codes[i] = uint8_t(bits());
  bool largest = !between(0, 3);
  if (a.format == kInt8 && largest) memset(codes, 255 * between(0, 1), a.bytes());
  if (a.format == kFloat32) for (size_t i = 0; i < a.bytes() / 4; i++) {
    float w = normal();
    memcpy(codes + i * 4, &w, 4);
  }
  if (a.format == kInt8Blocks) for (size_t r = 0; r < a.bytes(); r += kInt8Record) {
    if (largest) memset(codes + r, 255 * between(0, 1), 2048);
    for (int i = 0; i < kTile; i++) {
      float scale = normal();
      memcpy(codes + r + 2048 + 4 * i, &scale, 4);
    }
  }
  if (a.format == kInt4) for (size_t r = 0; r < a.bytes(); r += kInt4Record) {
    if (largest) memset(codes + r, 0xFF, 1024);
    for (int i = 0; i < 64; i++) {
      _Float16 scale = _Float16(fabsf(normal()) * 0.1f);
      memcpy(codes + r + 1024 + 2 * i, &scale, 2);
      codes[r + 1152 + i] = uint8_t(between(0, 15));
    }
  }
  if (a.format >= kBits4) for (size_t r = 0; r < a.bytes(); r += record_bytes(a.format)) {
    if (largest) memset(codes + r, 0xFF, codes_bytes(a.format));
    for (int i = 0; i < kTile; i++) {
      _Float16 scale = _Float16(fabsf(normal()) * 0.1f);
      memcpy(codes + r + codes_bytes(a.format) + 2 * i, &scale, 2);
      codes[r + codes_bytes(a.format) + 2 * kTile + i] = uint8_t(between(0, (1 << a.format) - 1));
    }
  }
}

static void check_product() {
  Matrix a;
  a.format = Format(between(0, 6));
  a.inputs = 64 * between(1, between(0, 9) ? 4 : 80);
  a.tiles = between(1, 3);
  int total = between(1, 21), first = between(0, total - 1), count = total - first, tile = between(0, a.tiles - 1);
  Buffer<uint8_t> codes(a.bytes());
  Buffer<float> channel_scales(size_t(a.tiles) * kTile), values(size_t(total) * a.inputs), scales(size_t(total) * a.inputs / 64), y(size_t(count) * kTile), alone(kTile);
  Buffer<int8_t> row_codes(size_t(total) * a.inputs);
  Buffer<int32_t> sums(size_t(total) * a.inputs / kScaleBlock);
  random_matrix(a, codes.data);
  channel_scales.fill(), values.fill(), scales.fill();
  bool largest = !between(0, 3);
  for (size_t i = 0; i < row_codes.count; i++) row_codes[i] = int8_t(largest ? 127 : between(-127, 127));
  for (size_t i = 0; i < sums.count; i++) {
    sums[i] = 0;
    for (int j = 0; j < kScaleBlock; j++) sums[i] += row_codes[i * kScaleBlock + j];
  }
  a.codes = codes.data;
  a.scales = a.format == kInt8 ? channel_scales.data : nullptr;
  Rows rows{a.inputs, a.inputs, values.data, row_codes.data, sums.data, scales.data};
  kernel.product(a, tile, rows, first, count, y.data);
  for (int r = 0; r < count; r++) {
    for (int c = 0; c < kTile; c++) {
      double total_sum = 0, magnitude = 0;
      int blocks = a.inputs / 64, each = a.format == kInt8Blocks;   // a scale for each block, or for the row
      for (int k = 0; k < a.inputs; k++) {
        size_t at = size_t(first + r) * a.inputs + k;
        double x = a.format == kFloat32 ? values[at] : row_codes[at], w = weight(a, tile, k, c);
        double product = x * w * scales[each ? (first + r) * blocks + k / 64 : first + r];
        total_sum += product, magnitude += fabs(product);
      }
      near(y[size_t(r) * kTile + c], total_sum, 3e-6 * magnitude + 1e-30, "product");
    }
    kernel.product(a, tile, rows, first + r, 1, alone.data);
    same(alone.data, y.data + size_t(r) * kTile, kTile, "product alone");
  }
}

// ---- rows --------------------------------------------------------------------------------------------------------------

static void check_quantize() {
  int width = between(1, 300), inputs = round_up(width, kInputBlock), kind = between(0, 9);
  Buffer<float> x(width);
  Buffer<int8_t> codes(inputs);
  Buffer<int32_t> sums(inputs / kScaleBlock);
  float scale, size = powf(10, float(between(-30, 30))), top = 0;
  for (int i = 0; i < width; i++) x[i] = normal() * (kind == 9 ? 0 : kind == 8 ? 2e-37f : size);
  if (kind == 7) x[between(0, width - 1)] = between(0, 1) ? NAN : -INFINITY;
  for (int i = 0; i < width; i++) top = fabsf(x[i]) > top ? fabsf(x[i]) : top;
  kernel.quantize(x.data, width, inputs, codes.data, sums.data, &scale);
  bool zero = kind >= 7 || top < kSmallest;
  if (kind == 7) check(scale != scale, "scale of a row that is not finite", scale, NAN);
  else near(scale, zero ? 0 : top / 127, top * 1e-8, "scale");
  for (int k = 0; k < inputs; k++)
    near(codes[k], zero || k >= width ? 0 : double(x[k]) / top * 127, zero || k >= width ? 0 : 0.5001, "code");
  for (int b = 0; b < inputs / kScaleBlock; b++) {
    int total = 0;
    for (int j = 0; j < kScaleBlock; j++) total += codes[b * kScaleBlock + j];
    near(sums[b], total, 0, "sum of codes");
  }
}

static void check_rms_norm() {
  int width = between(1, 300);
  bool in_place = between(0, 1), with_gain = between(0, 1);
  Buffer<float> x(width), before(width), gain(width), apart(width);
  x.fill(), gain.fill();
  memcpy(before.data, x.data, width * sizeof(float));
  float* y = in_place ? x.data : apart.data;
  kernel.rms_norm(x.data, with_gain ? gain.data : nullptr, width, 1e-5f, y);
  double squares = 0;
  for (int i = 0; i < width; i++) squares += double(before[i]) * before[i];
  for (int i = 0; i < width; i++) {
    double wanted = before[i] / sqrt(squares / width + 1e-5f) * (with_gain ? gain[i] : 1);
    near(y[i], wanted, fabs(wanted) * 2e-6, "rms_norm");
  }
}

static void check_layer_norm() {
  int width = between(1, 300);
  bool in_place = between(0, 1);
  Buffer<float> x(width), before(width), gain(width), shift(width), apart(width);
  x.fill(), gain.fill(), shift.fill();
  for (int i = 0; i < width; i++) x[i] += 5;
  memcpy(before.data, x.data, width * sizeof(float));
  float* y = in_place ? x.data : apart.data;
  kernel.layer_norm(x.data, gain.data, shift.data, width, 1e-3f, y);
  double mean = 0, squares = 0;
  for (int i = 0; i < width; i++) mean += before[i] / double(width);
  for (int i = 0; i < width; i++) squares += (before[i] - mean) * (before[i] - mean);
  for (int i = 0; i < width; i++) near(y[i], (before[i] - mean) / sqrt(squares / width + 1e-3f) * gain[i] + shift[i], 1e-4, "layer_norm");
}

static void check_gelu() {
  int count = 32 * between(1, 4);
  Buffer<float> x(count), before(count);
  float size = between(0, 1) ? 2 : 40;
  for (int i = 0; i < count; i++) before[i] = x[i] = normal() * size;
  kernel.gelu(x.data, count);
  for (int i = 0; i < count; i++) {
    double wanted = before[i] * erfc(-double(before[i]) / sqrt(2)) / 2;
    near(x[i], wanted, fabs(wanted) * 1e-5 + 1e-30, "gelu");   // the exponent of a large value is itself rounded
  }
}

static void check_swiglu() {
  int count = 16 * between(1, 4);
  Buffer<float> gate(count), up(count), y(count);
  up.fill();
  float size = between(0, 1) ? 2 : 40;
  for (int i = 0; i < count; i++) gate[i] = normal() * size;
  kernel.swiglu(gate.data, up.data, count, y.data);
  for (int i = 0; i < count; i++) {
    double wanted = double(gate[i]) / (1 + exp(-double(gate[i]))) * up[i];
    near(y[i], wanted, fabs(wanted) * 1e-5 + 1e-30, "swiglu");   // the exponent of a large gate is itself rounded
  }
}

static void check_hadamard() {
  int block = 8 << between(0, 3), width = block * between(1, 4);
  Buffer<float> x(width), y(width);
  x.fill();
  memcpy(y.data, x.data, width * sizeof(float));
  kernel.hadamard(y.data, width, block);
  for (int i = 0; i < width; i++) {
    double wanted = 0;
    for (int j = 0; j < block; j++) wanted += x[i / block * block + j] * (__builtin_popcount(unsigned(i % block & j)) % 2 ? -1 : 1);
    near(y[i], wanted / sqrt(block), 1e-5, "hadamard");
  }
}

static void check_rotate() {
  int width = 2 * between(1, 80);
  Buffer<float> x(width), y(width), cosine(width / 2), sine(width / 2);
  x.fill(), cosine.fill(), sine.fill();
  memcpy(y.data, x.data, width * sizeof(float));
  kernel.rotate(y.data, cosine.data, sine.data, width);
  for (int i = 0; i < width / 2; i++) {
    near(y[2 * i], double(x[2 * i]) * cosine[i] - double(x[2 * i + 1]) * sine[i], 1e-5, "rotate");
    near(y[2 * i + 1], double(x[2 * i + 1]) * cosine[i] + double(x[2 * i]) * sine[i], 1e-5, "rotate");
  }
}

// ---- caches ------------------------------------------------------------------------------------------------------------

static double cached(CacheType type, const uint8_t* block, int width, int token, int d, bool is_key) {
  if (type == kCacheInt8) {
    size_t at = is_key ? (size_t(d / 4) * kCacheBlock + token) * 4 + d % 4 : (size_t(token / 4) * width + d) * 4 + token % 4;
    float scale;
    memcpy(&scale, block + size_t(kCacheBlock) * width + token * 4, 4);
    return double(int8_t(block[at])) * scale;
  }
  size_t at = is_key ? size_t(d) * kCacheBlock + token : size_t(token) * width + d;
  float wide;
  _Float16 half;
  if (type == kCacheFloat32) return memcpy(&wide, block + at * 4, 4), wide;
  return memcpy(&half, block + at * 2, 2), float(half);
}

// Sequences of one head in shuffled blocks that lie some stride apart.
struct Cache {
  CacheType type;
  int width, tokens, blocks;
  size_t stride;
  Buffer<uint8_t> keys, values;
  Buffer<int32_t> table;
  Cache(CacheType t, int w, int n, size_t gap)
      : type(t), width(w), tokens(n), blocks(round_up(n, kCacheBlock) / kCacheBlock), stride(keys_bytes(t, w) + gap),
        keys(stride * blocks - gap), values(stride * blocks - gap), table(blocks) {
    for (int b = 0; b < blocks; b++) table[b] = b;
    for (int b = blocks - 1; b > 0; b--) {
      int other = between(0, b), kept = table[b];
      table[b] = table[other], table[other] = kept;
    }
    Buffer<float> key(width), value(width);
    for (int i = 0; i < tokens; i++) {
      key.fill(), value.fill();
      size_t at = table[i / kCacheBlock] * stride;
      kernel.append(type, key.data, value.data, width, keys.data + at, values.data + at, i % kCacheBlock);
      for (int d = 0; d < width; d++) {
        double step = type == kCacheFloat32 ? 0 : type == kCacheFloat16 ? 2e-3 : 3.0 / 127 / 2 * 1.5;
        near(this->key(i, d), key[d], step, "cached key");
        near(this->value(i, d), value[d], step, "cached value");
      }
    }
  }
  double key(int token, int d) const { return cached(type, keys.data + table[token / kCacheBlock] * stride, width, token % kCacheBlock, d, true); }
  double value(int token, int d) const { return cached(type, values.data + table[token / kCacheBlock] * stride, width, token % kCacheBlock, d, false); }
};

struct Results {
  Buffer<float> top, sum, values;
  Results(int rows, int width) : top(rows), sum(rows), values(size_t(rows) * width) {}
  Partial partial() const { return {top.data, sum.data, values.data}; }
};

static void attend(AttentionTask task, int split, int blocks, const Results& total) {
  Results part(task.rows, task.width);
  Buffer<float> scratch(attention_scratch(task.rows, task.width));
  for (int first = 0; first < blocks; first += split) {
    task.first_block = first, task.last_block = first + split < blocks ? first + split : blocks;
    kernel.attend(task, first ? part.partial() : total.partial(), scratch.data);
    if (first) kernel.merge(total.partial(), part.partial(), task.rows, task.width);
  }
}

static void check_attention() {
  int width = 16 * between(1, 5), rows = between(1, 30);
  Cache cache(CacheType(between(0, 2)), width, between(1, 400), size_t(4) * between(0, 9));
  Buffer<float> queries(size_t(rows) * width);
  Buffer<int> limits(rows);
  queries.fill();
  for (int r = 0; r < rows; r++) limits[r] = between(1, cache.tokens);
  AttentionTask task{queries.data, rows, width, limits.data, cache.type, cache.keys.data, cache.values.data, cache.stride, cache.table.data, 0, 0};
  int split = between(1, 4);
  Results found(rows, width), alone(1, width);
  attend(task, split, cache.blocks, found);
  for (int r = 0; r < rows; r++) {
    Buffer<double> scores(limits[r]);
    double top = -INFINITY, sum = 0, query = 0, keys = 0, value = 0;   // the largest query, sum of a key's magnitudes, value
    for (int t = 0; t < limits[r]; t++) {
      double magnitude = scores[t] = 0;
      for (int d = 0; d < width; d++) {
        double q = queries[size_t(r) * width + d], k = cache.key(t, d), v = fabs(double(cache.value(t, d)));
        scores[t] += q * k, magnitude += fabs(k);
        query = fabs(q) > query ? fabs(q) : query, value = v > value ? v : value;
      }
      top = scores[t] > top ? scores[t] : top, keys = magnitude > keys ? magnitude : keys;
    }
    for (int t = 0; t < limits[r]; t++) sum += scores[t] = exp2(scores[t] - top);
    // Over bytes, queries are rounded to 15 bits, and so are weights, relative to the largest of a block.
    double step = cache.type == kCacheInt8 ? 0.5 / 32767 : 0, slack = step * query * keys;
    near(found.top[r], top, 2e-5 + slack, "largest score");
    near(found.sum[r] / sum, 1, 2e-5 + 2 * slack, "sum of weights");
    for (int d = 0; d < width; d++) {
      double wanted = 0;
      for (int t = 0; t < limits[r]; t++) wanted += scores[t] * cache.value(t, d);
      near(found.values[size_t(r) * width + d] / found.sum[r], wanted / sum, 3e-5 + value * (4 * slack + 2 * step * limits[r] / sum), "attention");
    }
    AttentionTask one = task;
    one.queries += size_t(r) * width, one.limits += r, one.rows = 1;
    attend(one, split, cache.blocks, alone);
    same(alone.values.data, found.values.data + size_t(r) * width, width, "attention alone");
    same(alone.sum.data, found.sum.data + r, 1, "sum alone");
  }
}

int main(int count, char** arguments) {
  int rounds = count > 1 ? atoi(arguments[1]) : 200;
  if (count > 2) state = strtoull(arguments[2], nullptr, 10);
  void (*all[])() = {check_product, check_quantize, check_rms_norm, check_layer_norm, check_gelu, check_swiglu, check_hadamard, check_rotate, check_attention};
  for (int i = 0; i < rounds; i++) for (auto each : all) each();
  printf("%s: %ld checks, %ld failures\n", kernel.name, checks, failures);
  return failures != 0;
}
