// PagedAttention: rotate, normalise, append to the cache, attend. Inputs lie in the order of com.microsoft.PagedAttention.
//
//   inputs      0 query [T, H d], or query, key and value side by side [T, (H + 2 G) d] without inputs 1 and 2;
//               1 key [T, G d]; 2 value [T, G d]; 3 key_cache uint8 [blocks, G * bytes of a head's block]; 4 value_cache;
//               5 cumulative_lengths int32 [B + 1]: tokens of sequence b are rows c[b] .. c[b + 1] - 1 of T;
//               6 past_lengths int32 [B]; 7 block_table int32 [B, M]; 8 cos, 9 sin [T, d / 2] (absent: no rotation);
//               10 temperature [T] (absent: 1)
//   attributes  num_heads (H), kv_num_heads (G), chunk (0: the whole past), cache_type, norm_epsilon (0: no norm)
//   outputs     y [T, H d]; key_cache, value_cache: the inputs after the append, in place where they are bound in place
//
// Caches of bytes hold keys after a Walsh-Hadamard transform of each 64 channels, or of as many as the width allows, and
// queries are transformed alike: their products are the same, and no channel stands out for which a scale has to be large.
//
// A chunked layer's table covers the current chunk alone: position p has slot p % chunk. A call must not cross a multiple
// of the chunk. Blocks of 64 tokens as kernels.h lays them out.
#include <math.h>
#include <string.h>
#include "operators.h"
#include "scratch.h"

namespace herd {
namespace {

constexpr int kTokensPerTile = 16;
constexpr float kLog2E = 1.44269504088896341f;

// Some consecutive tokens of one sequence, for one key/value head.
struct TokenTile {
  int sequence, head, first, count;   // first: row of T
  int slot;                           // of the first token
  int splits, partial;                // partial results: their number, 0 where one item computes them all; the first one's place
};

}  // namespace

const ort::Port* PagedAttention::inputs(size_t* count) {
  static const ort::Port ports[] = {
    {ort::kFloat, ort::kRequired}, {ort::kFloat, ort::kOptional}, {ort::kFloat, ort::kOptional}, {ort::kUInt8, ort::kRequired},
    {ort::kUInt8, ort::kRequired}, {ort::kInt32, ort::kRequired}, {ort::kInt32, ort::kRequired}, {ort::kInt32, ort::kRequired},
    {ort::kFloat, ort::kOptional}, {ort::kFloat, ort::kOptional}, {ort::kFloat, ort::kOptional}};
  *count = sizeof ports / sizeof *ports;
  return ports;
}

const ort::Port* PagedAttention::outputs(size_t* count) {
  static const ort::Port ports[] = {{ort::kFloat, ort::kRequired}, {ort::kUInt8, ort::kRequired}, {ort::kUInt8, ort::kRequired}};
  *count = sizeof ports / sizeof *ports;
  return ports;
}

PagedAttention::PagedAttention(ort::Api api, const ort::Info* info)
    : api_(api), heads_(int(api.integer(info, "num_heads", 1))), kv_heads_(int(api.integer(info, "kv_num_heads", 1))),
      chunk_(int(api.integer(info, "chunk", 0))), cache_type_(CacheType(api.integer(info, "cache_type", 0))),
      norm_epsilon_(api.real(info, "norm_epsilon", 0)) {}

ort::Status* PagedAttention::run(ort::Context* context) const {
  const Kernels& kernel = kernels();
  auto input = [&](size_t i) { return api_.input(context, i); };
  ort::Shape shape = api_.shape(input(0)), table_shape = api_.shape(input(7)), cache_shape = api_.shape(input(3));
  const float *query = api_.data<float>(input(0)), *key = api_.data<float>(input(1)), *value = api_.data<float>(input(2));
  const int32_t *cumulative = api_.data<int32_t>(input(5)), *past = api_.data<int32_t>(input(6)), *table = api_.data<int32_t>(input(7));
  const float *cos = api_.data<float>(input(8)), *sin = api_.data<float>(input(9)), *temperature = api_.data<float>(input(10));
  if (!shape.rank || shape.last() < 1 || table_shape.rank != 2 || !cache_shape.rank || heads_ < 1 || kv_heads_ < 1 || heads_ % kv_heads_ || chunk_ < 0 ||
      cache_type_ < kCacheFloat32 || cache_type_ > kCacheInt8 || !key != !value || !cos != !sin)
    return api_.error("PagedAttention: attributes and inputs do not make an attention");
  int tokens = int(shape.count() / shape.last()), sequences = int(table_shape.dims[0]), table_width = int(table_shape.dims[1]);
  int group = heads_ / kv_heads_, packed = key ? heads_ : heads_ + 2 * kv_heads_, dims = int(shape.last()) / packed, width = round_up(dims, 16);
  size_t head_bytes = keys_bytes(cache_type_, width), block_bytes = head_bytes * kv_heads_;
  int64_t blocks = cache_shape.dims[0];

  // 1. What would be read or written out of bounds is refused.
  if (dims < 1 || int64_t(dims) * packed != shape.last() || (cos && dims % 2)) return api_.error("PagedAttention: the query has another width than its heads");
  if (width > 512) return api_.error("PagedAttention: a head is wider than 512");
  if (!api_.fits(input(1), int64_t(tokens) * kv_heads_ * dims) || !api_.fits(input(2), int64_t(tokens) * kv_heads_ * dims) ||
      !api_.fits(input(8), int64_t(tokens) * (dims / 2)) || !api_.fits(input(9), int64_t(tokens) * (dims / 2)) || !api_.fits(input(10), tokens))
    return api_.error("PagedAttention: keys, values, rotations or temperatures are not of every token");
  if (!api_.fits(input(5), int64_t(sequences) + 1) || !api_.fits(input(6), sequences))
    return api_.error("PagedAttention: lengths are not of every sequence of the block table");
  if (cache_shape.count() != blocks * int64_t(block_bytes) || api_.shape(input(4)).count() != cache_shape.count())
    return api_.error("PagedAttention: the caches have another block size than the attributes say");
  if (cumulative[0] != 0 || cumulative[sequences] != tokens) return api_.error("PagedAttention: cumulative lengths do not cover the tokens");
  for (int b = 0; b < sequences; b++) {
    int64_t slot = chunk_ ? past[b] % chunk_ : past[b], count = int64_t(cumulative[b + 1]) - cumulative[b];
    if (count < 0 || past[b] < 0 || (slot + count + kCacheBlock - 1) / kCacheBlock > table_width || (chunk_ && slot + count > chunk_))
      return api_.error("PagedAttention: a sequence has more tokens than its block table or chunk");
    for (int i = 0; i < (slot + count + kCacheBlock - 1) / kCacheBlock; i++)
      if (table[size_t(b) * table_width + i] < 0 || table[size_t(b) * table_width + i] >= blocks)
        return api_.error("PagedAttention: a block table names a block that is not there");
  }
  ort::Shape y_shape = shape;
  y_shape.dims[y_shape.rank - 1] = int64_t(heads_) * dims;
  float* y = api_.data<float>(api_.output(context, 0, y_shape));
  uint8_t* caches[2];
  for (int i = 0; i < 2; i++) {
    const uint8_t* before = api_.data<uint8_t>(input(3 + i));
    caches[i] = api_.data<uint8_t>(api_.output(context, 1 + i, cache_shape));
    if (caches[i] != before) memcpy(caches[i], before, size_t(cache_shape.count()));
  }
  if (!tokens) return nullptr;

  // 2. Tiles of tokens. Few rows: every partial result is an item of its own, for a long past would keep one thread busy.
  int most_tiles = 0;
  for (int b = 0; b < sequences; b++) most_tiles += (cumulative[b + 1] - cumulative[b] + kTokensPerTile - 1) / kTokensPerTile * kv_heads_;
  size_t rows = size_t(tokens) * heads_;
  Scratch scratch(Scratch::needs<float>(rows * width) + Scratch::needs<int>(rows) + Scratch::needs<TokenTile>(most_tiles) + Scratch::needs<int>(tokens));
  float* queries = scratch.take<float>(rows * width);   // [kv head][token][head of the group][width]
  int* limits = scratch.take<int>(rows);                // the same order
  TokenTile* tiles = scratch.take<TokenTile>(most_tiles);
  int* sequence_of = scratch.take<int>(tokens);
  int tile_count = 0, items = 0;
  size_t partial_rows = 0;
  for (int b = 0; b < sequences; b++) {
    int count = cumulative[b + 1] - cumulative[b], slot = chunk_ ? past[b] % chunk_ : past[b];
    for (int t = cumulative[b]; t < cumulative[b + 1]; t++) sequence_of[t] = b;
    for (int done = 0; done < count; done += kTokensPerTile) {
      int n = count - done < kTokensPerTile ? count - done : kTokensPerTile;
      int used = (slot + done + n + kCacheBlock - 1) / kCacheBlock, splits = (used + kSplitBlocks - 1) / kSplitBlocks;
      for (int h = 0; h < kv_heads_; h++) {
        bool apart = count <= 4;
        tiles[tile_count++] = {b, h, cumulative[b] + done, n, slot + done, apart ? splits : 0, int(partial_rows)};
        items += apart ? splits : 1;
        partial_rows += size_t(apart ? splits : 1) * n * group;
      }
    }
  }

  // 3. Queries, keys and values of every token; append.
  float scale = kLog2E / sqrtf(float(dims));
  int mixed = cache_type_ == kCacheInt8 ? dims & -dims : 0;   // channels, a power of two
  if (mixed > 64) mixed = 64;
  auto append = [&](int t) {
    float head[2][512];   // key and value of one head
    auto turn = [&](float* x) {
      if (cos) kernel.rotate(x, cos + size_t(t) * (dims / 2), sin + size_t(t) * (dims / 2), dims);
      if (norm_epsilon_ > 0) kernel.rms_norm(x, nullptr, dims, norm_epsilon_, x);
      if (mixed >= 8) kernel.hadamard(x, dims, mixed);
    };
    const float* q = query + size_t(t) * shape.last();
    const float *k = key ? key + size_t(t) * kv_heads_ * dims : q + size_t(heads_) * dims, *v = value ? value + size_t(t) * kv_heads_ * dims : k + size_t(kv_heads_) * dims;
    int b = sequence_of[t], slot = (chunk_ ? past[b] % chunk_ : past[b]) + t - cumulative[b];
    size_t block = table[size_t(b) * table_width + slot / kCacheBlock];
    for (int h = 0; h < kv_heads_; h++) {
      for (int j = 0; j < group; j++) {
        size_t row = (size_t(h) * tokens + t) * group + j;
        float* to = queries + row * width;
        memcpy(to, q + size_t(h * group + j) * dims, dims * sizeof(float));
        memset(to + dims, 0, (width - dims) * sizeof(float));
        turn(to);
        float factor = scale * (temperature ? temperature[t] : 1);
        for (int d = 0; d < dims; d++) to[d] *= factor;
        limits[row] = slot + 1;
      }
      memset(head, 0, sizeof head);
      memcpy(head[0], k + size_t(h) * dims, dims * sizeof(float));
      memcpy(head[1], v + size_t(h) * dims, dims * sizeof(float));
      turn(head[0]);
      size_t at = block * block_bytes + h * head_bytes;
      kernel.append(cache_type_, head[0], head[1], width, caches[0] + at, caches[1] + at, slot % kCacheBlock);
    }
  };
  if (tokens < 8) for (int t = 0; t < tokens; t++) append(t);
  else api_.parallel(context, tokens, append);

  // 4. Attend.
  Scratch results(Scratch::needs<float>(partial_rows * width) + 2 * Scratch::needs<float>(partial_rows));
  Partial all{results.take<float>(partial_rows), results.take<float>(partial_rows), results.take<float>(partial_rows * width)};
  auto part_at = [&](size_t row) { return Partial{all.top + row, all.sum + row, all.values + row * width}; };
  auto task_of = [&](const TokenTile& tile, int split) {
    size_t row = (size_t(tile.head) * tokens + tile.first) * group, at = tile.head * head_bytes;
    int used = (tile.slot + tile.count + kCacheBlock - 1) / kCacheBlock, last = (split + 1) * kSplitBlocks;
    return AttentionTask{queries + row * width, tile.count * group, width, limits + row, cache_type_, caches[0] + at, caches[1] + at, block_bytes,
                         table + size_t(tile.sequence) * table_width, split * kSplitBlocks, last < used ? last : used};
  };
  api_.parallel(context, items, [&](int item) {
    int i = 0;
    for (int n; item >= (n = tiles[i].splits ? tiles[i].splits : 1); i++) item -= n;
    const TokenTile& tile = tiles[i];
    int count = tile.count * group;
    if (tile.splits) {
      Scratch local(Scratch::needs<float>(attention_scratch(count, width)));
      return kernel.attend(task_of(tile, item), part_at(tile.partial + size_t(item) * count), local.take<float>(attention_scratch(count, width)));
    }
    Scratch local(Scratch::needs<float>(attention_scratch(count, width)) + 2 * Scratch::needs<float>(count) + Scratch::needs<float>(size_t(count) * width));
    float* space = local.take<float>(attention_scratch(count, width));
    Partial part{local.take<float>(count), local.take<float>(count), local.take<float>(size_t(count) * width)}, total = part_at(tile.partial);
    int used = (tile.slot + tile.count + kCacheBlock - 1) / kCacheBlock;
    kernel.attend(task_of(tile, 0), total, space);
    for (int split = 1; split * kSplitBlocks < used; split++) {
      kernel.attend(task_of(tile, split), part, space);
      kernel.merge(total, part, count, width);
    }
  });

  // 5. Merge partial results, in order, and divide by the sum of the weights.
  auto finish = [&](int i) {
    const TokenTile& tile = tiles[i];
    int count = tile.count * group;
    Partial total = part_at(tile.partial);
    for (int split = 1; split < tile.splits; split++) kernel.merge(total, part_at(tile.partial + size_t(split) * count), count, width);
    for (int r = 0; r < count; r++) {
      float* to = y + (size_t(tile.first + r / group) * heads_ + tile.head * group + r % group) * dims;
      float factor = 1 / total.sum[r];
      for (int d = 0; d < dims; d++) to[d] = total.values[size_t(r) * width + d] * factor;
    }
  };
  if (tile_count < 16) for (int i = 0; i < tile_count; i++) finish(i);
  else api_.parallel(context, tile_count, finish);
  return nullptr;
}

}  // namespace herd
