// Lookup: y[i] = row ids[i] of a table that is stored as the weight [K, N] of a Project: tied embeddings, of which the
// head's packed matrix is the only copy.
//
//   inputs      ids [...] int64, codes uint8 (kernels.h), scales [N] float (int8)
//   attributes  format, channels (N, rows of the table), width (K)
//   output      y [..., K]
//
// A row is one lane of a tile, a few bytes out of every line of its memory. That is little beside what a token costs.
#include <string.h>
#include "operators.h"

namespace herd {
namespace {

float half(const uint8_t* from) {
  _Float16 value;
  memcpy(&value, from, sizeof value);
  return float(value);
}

// Input k of a channel out of a record of 64 inputs; k is below 64.
float of_record(const uint8_t* record, Format format, int k, int lane) {
  if (format == kInt8Blocks) {
    float scale;
    memcpy(&scale, record + kInputBlock * kTile + lane * sizeof scale, sizeof scale);
    return float(record[(k / 4 * kTile + lane) * 4 + k % 4] - 128) * scale;
  }
  int code = record[(k / 8 * kTile + lane) * 4 + k % 4] >> (k / 4 % 2 * 4) & 15;
  if (format == kInt4) {
    const uint8_t *scales = record + codes_bytes(4), *zeros = scales + 4 * kTile;
    int place = k / kScaleBlock * kTile + lane;
    return float(code - zeros[place]) * half(scales + 2 * place);
  }
  int bits = format, at = k / 4 * (bits - 4);
  const uint8_t *planes = record + codes_bytes(4), *scales = record + codes_bytes(bits);
  if (bits > 4) code |= (planes[(at / 8 * kTile + lane) * 4 + k % 4] >> at % 8 & ((1 << (bits - 4)) - 1)) << 4;
  return float(code - scales[2 * kTile + lane]) * half(scales + 2 * lane);
}

void row(const Matrix& table, int64_t id, int width, float* y) {
  int lane = int(id % kTile);
  const uint8_t* tile = table.codes + size_t(id / kTile) * table.tile_bytes();
  if (table.format == kFloat32) {
    for (int k = 0; k < width; k++) memcpy(y + k, tile + (size_t(k) * kTile + lane) * sizeof(float), sizeof(float));
  } else if (table.format == kInt8) {
    float scale = table.scales[id];
    for (int k = 0; k < width; k++) y[k] = float(tile[(size_t(k / 4) * kTile + lane) * 4 + k % 4] - 128) * scale;
  } else {
    size_t record = table.tile_bytes() / (table.inputs / kInputBlock);
    for (int k = 0; k < width; k++) y[k] = of_record(tile + k / kInputBlock * record, table.format, k % kInputBlock, lane);
  }
}

}  // namespace

const ort::Port* Lookup::inputs(size_t* count) {
  static const ort::Port ports[] = {{ort::kInt64, ort::kRequired}, {ort::kUInt8, ort::kRequired}, {ort::kFloat, ort::kOptional}};
  *count = sizeof ports / sizeof *ports;
  return ports;
}

const ort::Port* Lookup::outputs(size_t* count) {
  static const ort::Port ports[] = {{ort::kFloat, ort::kRequired}};
  *count = 1;
  return ports;
}

Lookup::Lookup(ort::Api api, const ort::Info* info)
    : api_(api), format_(Format(api.integer(info, "format", 0))), channels_(int(api.integer(info, "channels", 0))),
      width_(int(api.integer(info, "width", 0))) {}

ort::Status* Lookup::run(ort::Context* context) const {
  const ort::Value *ids_value = api_.input(context, 0), *codes = api_.input(context, 1), *scales = api_.input(context, 2);
  const int64_t* ids = api_.data<int64_t>(ids_value);
  ort::Shape shape = api_.shape(ids_value);
  if (channels_ < 1 || width_ < 1 || !is_format(format_)) return api_.error("Lookup: no such format, no rows or no width");
  if (shape.rank > 7) return api_.error("Lookup: ids have more dimensions than an output can have");
  Matrix table{format_, api_.data<uint8_t>(codes), api_.data<float>(scales), round_up(width_, kInputBlock), round_up(channels_, kTile) / kTile};
  if (api_.shape(codes).count() != int64_t(table.bytes())) return api_.error("Lookup: codes have another size than the attributes say");
  if (format_ == kInt8 && !scales) return api_.error("Lookup: int8 codes come without scales");
  if (!api_.fits(scales, int64_t(table.tiles) * kTile)) return api_.error("Lookup: scales have another size than the attributes say");
  int64_t count = shape.count();
  shape.dims[shape.rank++] = width_;
  float* y = api_.data<float>(api_.output(context, 0, shape));
  for (int64_t i = 0; i < count; i++) {
    if (ids[i] < 0 || ids[i] >= channels_) return api_.error("Lookup: an id is none of the table's rows");
    row(table, ids[i], width_, y + i * width_);
  }
  return nullptr;
}

}  // namespace herd
