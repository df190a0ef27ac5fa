// What the operators ask of an instruction set: one table of functions per unit (unit.cpp), and the layouts of the
// data that they read. docs/native.md says how to add a unit or a format.
//
// Weights [K, N] are cut into tiles of 32 output channels. K is filled up with zeros to a multiple of 64, N to one of 32.
//
//   float32  [N/32][K][32]          float
//   int8     [N/32][K/4][32][4]     uint8, code + 128; a float scale per channel lies beside it
//   int4     [N/32][K/64]           records of 1216 bytes (two blocks b of 32 inputs of 32 channels):
//              [b 2][i 4][32][4]    uint8: inputs 8i .. 8i+3 of the block in the low, 8i+4 .. 8i+7 in the high halves
//              [b 2][32]            float16 scales
//              [b 2][32]            uint8 zero points, 0 .. 15
//   int8 in blocks  [N/32][K/64]    records of 2176 bytes: [16][32][4] uint8 as int8 has them, then [32] float scales
//   n bits, n = 4, 5, 6  [N/32][K/64]  records of 1120, 1376, 1632 bytes (one block of 64 inputs of 32 channels):
//              [i 8][32][4]         uint8: the lowest four bits of inputs 8i .. 8i+3 in the low, 8i+4 .. 8i+7 in the high halves
//              [g][32][4]           uint8: the bits above. Those of input 8i + 4h + e are (n - 4) bits of byte e, from bit
//                                   p % 8 on, in group g = p / 8, where p = (2i + h)(n - 4)
//              [32]                 float16 scales
//              [32]                 uint8 zero points, 0 .. 2^n - 1
//
// Products of codes are sums of integers, hence exact; each row of activations is quantised by itself, and floating-point
// sums run in an order that depends on nothing but the shapes of the weights. So a row's result is the same bits alone
// and among others, and with any number of threads.
//
// Keys and values lie in blocks of 64 tokens, per key/value head; d is the head dimension filled up to a multiple of 16.
//
//   float32  keys [d][64], values [64][d]
//   float16  the same
//   int8     keys [d/4][64][4], values [16][d][4], then a float scale per token [64]
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace herd {

constexpr int kTile = 32;           // output channels of a tile
constexpr int kInputBlock = 64;     // K is a multiple of it
constexpr int kScaleBlock = 32;     // inputs that share a scale in int4
constexpr size_t kInt4Record = 1216, kInt8Record = 2176;
constexpr size_t codes_bytes(int bits) { return size_t(bits) * kInputBlock * kTile / 8; }   // of a record
constexpr size_t record_bytes(int bits) { return codes_bytes(bits) + 3 * kTile; }
constexpr int kCacheBlock = 64;     // tokens of a cache block
constexpr int kSplitBlocks = 16;    // cache blocks whose attention is computed as one partial result

enum Format : int { kFloat32 = 0, kInt8 = 1, kInt4 = 2, kInt8Blocks = 3, kBits4 = 4, kBits5 = 5, kBits6 = 6 };
enum Activation : int { kNone = 0, kGelu = 1 };
enum CacheType : int { kCacheFloat32 = 0, kCacheFloat16 = 1, kCacheInt8 = 2 };
constexpr float kSmallest = 1e-36f; // rows whose values are all smaller are zero: 127 / kSmallest is still finite

inline bool is_format(int number) { return number >= kFloat32 && number <= kBits6; }
inline bool has_row_scale(int number) { return number != kInt8Blocks; }   // rows have one scale, not one per 64 inputs

inline int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

struct Matrix {
  Format format = kFloat32;
  const uint8_t* codes = nullptr;
  const float* scales = nullptr;    // int8 only
  int inputs = 0;                   // K, filled up
  int tiles = 0;

  size_t tile_bytes() const {
    if (format == kFloat32) return size_t(inputs) * kTile * 4;
    if (format == kInt8) return size_t(inputs) * kTile;
    size_t record = format == kInt4 ? kInt4Record : format == kInt8Blocks ? kInt8Record : record_bytes(format);
    return size_t(inputs) / kInputBlock * record;
  }
  size_t bytes() const { return tile_bytes() * tiles; }
};

// Rows of activations as products read them; every row has `inputs` elements.
struct Rows {
  int inputs = 0;
  int stride = 0;                   // elements from one row to the next
  const float* values = nullptr;    // for float32 weights
  const int8_t* codes = nullptr;    // for the others, with
  const int32_t* sums = nullptr;    //   the sum of the codes of every 32 inputs
  const float* scales = nullptr;    // what a row's result is multiplied by; in blocks, one for every 64 inputs of a row
};

// One row group of attention: queries of one key/value head against some of its cache blocks.
struct AttentionTask {
  const float* queries;             // [rows][d], scaled by log2(e) / sqrt(head dimension)
  int rows;                         // any number
  int width;                        // d
  const int* limits;                // per row: tokens that it sees
  CacheType type;
  const uint8_t* keys;              // start of the layer's keys, [block][head][...]
  const uint8_t* values;
  size_t block_stride;              // bytes from one block of the same head to the next
  const int32_t* table;             // block numbers of the sequence
  int first_block, last_block;
};

// The softmax of one row over part of its past: sum of exp2(s - top) v, the sum of the weights, and the largest score.
struct Partial {
  float* top;                       // [rows]
  float* sum;                       // [rows]
  float* values;                    // [rows][d]
};

struct Kernels {
  const char* name;
  // y[r][32] = rows first .. first + count times a tile, scaled
  void (*product)(const Matrix&, int tile, const Rows&, int first, int count, float* y);
  // codes, sums and scale of one row; K is `width`, what lies behind it up to `inputs` becomes zero
  void (*quantize)(const float* x, int width, int inputs, int8_t* codes, int32_t* sums, float* scale);
  // y = x / rms(x) * gain; may be in place
  void (*rms_norm)(const float* x, const float* gain, int width, float epsilon, float* y);
  // y = (x - mean) / deviation * gain + shift; may be in place
  void (*layer_norm)(const float* x, const float* gain, const float* shift, int width, float epsilon, float* y);
  // x[i] = x[i] * (1 + erf(x[i] / sqrt(2))) / 2; `count` is a multiple of 32
  void (*gelu)(float* x, int count);
  // y[i] = silu(gate[i]) * up[i]
  void (*swiglu)(const float* gate, const float* up, int count, float* y);
  // Walsh-Hadamard transform of each `block` (8, 16, 32 or 64) consecutive values, orthonormal, in place
  void (*hadamard)(float* x, int width, int block);
  // pairs (2i, 2i + 1) of a head turned by an angle, in place
  void (*rotate)(float* x, const float* cos, const float* sin, int width);
  // append one token of one head to its cache block
  void (*append)(CacheType, const float* key, const float* value, int width, uint8_t* keys, uint8_t* values, int slot);
  // partial results of a task, started afresh; `scratch` holds attention_scratch(rows, d) floats
  void (*attend)(const AttentionTask&, const Partial&, float* scratch);
  // total = total and part together
  void (*merge)(const Partial& total, const Partial& part, int rows, int width);
};

// Floats: two blocks widened and scores of some rows, or queries in integers.
inline size_t attention_scratch(int rows, int width) {
  size_t floats = size_t(2) * kCacheBlock * width + 16 * kCacheBlock, integers = round_up(rows, 16) + size_t(rows) * (width / 2);
  return floats > integers ? floats : integers;
}
inline size_t keys_bytes(CacheType type, int width) {   // of one head's cache block, and as many for values
  size_t elements = size_t(kCacheBlock) * width;
  if (type == kCacheFloat32) return elements * 4;
  return type == kCacheFloat16 ? elements * 2 : elements + kCacheBlock * 4;
}

// The best unit that this processor runs, or the one that HERDGRAPH_UNIT names.
const Kernels& kernels();

}  // namespace herd
