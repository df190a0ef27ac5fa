// Project: y = [residual +] a(W n(x) [+ bias]). The norm n is an RMS norm with a gain, a layer norm with a gain and a
// shift, or nothing; a is the exact GELU or nothing.
//
//   inputs      x [..., K] float; codes uint8 (kernels.h); scales [N] float (int8); gain [K] float; residual [..., N] float;
//               shift [K] float; bias [N] float
//   attributes  format, channels (N), epsilon, activation
//   output      y [..., N]
#include "activations.h"
#include "operators.h"
#include "read_ahead.h"

namespace herd {

constexpr int kManyRows = 16 * kRowGroup;   // enough groups of rows to keep threads busy

const ort::Port* Project::inputs(size_t* count) {
  static const ort::Port ports[] = {{ort::kFloat, ort::kRequired}, {ort::kUInt8, ort::kRequired}, {ort::kFloat, ort::kOptional},
                                    {ort::kFloat, ort::kOptional}, {ort::kFloat, ort::kOptional}, {ort::kFloat, ort::kOptional},
                                    {ort::kFloat, ort::kOptional}};
  *count = sizeof ports / sizeof *ports;
  return ports;
}

const ort::Port* Project::outputs(size_t* count) {
  static const ort::Port ports[] = {{ort::kFloat, ort::kRequired}};
  *count = 1;
  return ports;
}

Project::Project(ort::Api api, const ort::Info* info, bool mapped)
    : api_(api), mapped_(mapped), format_(Format(api.integer(info, "format", 0))), channels_(int(api.integer(info, "channels", 0))),
      epsilon_(api.real(info, "epsilon", 0)), activation_(Activation(api.integer(info, "activation", kNone))) {}

// What a call computes; rows and tiles in any order.
struct Projection {
  const Kernels& kernel;
  const Matrix& weights;
  int width, channels;
  float epsilon;
  Activation activation;
  const float *x, *gain, *shift, *bias, *residual;
  float* y;

  // Row r of x to place `to`.
  void prepare(const RowBuffers& buffers, int to, int r) const {
    const float* from = x + size_t(r) * width;
    if (shift) kernel.layer_norm(from, gain, shift, width, epsilon, buffers.row(to));
    else if (gain) kernel.rms_norm(from, gain, width, epsilon, buffers.row(to));
    else memcpy(buffers.row(to), from, size_t(width) * sizeof(float));
    buffers.prepare(kernel, to, width, weights.format);
  }
  // A tile of `count` rows, at most kRowGroup of them, prepared at places from `first` on; row r of y is the first one's.
  void multiply(const Rows& rows, int first, int count, int tile, int r) const {
    alignas(64) float result[kRowGroup * kTile];
    int columns = channels - tile * kTile < kTile ? channels - tile * kTile : kTile;
    kernel.product(weights, tile, rows, first, count, result);
    for (int i = 0; bias && i < count; i++)
      for (int c = 0; c < columns; c++) result[i * kTile + c] += bias[tile * kTile + c];
    if (activation == kGelu) kernel.gelu(result, count * kTile);
    for (int i = 0; i < count; i++) {
      size_t at = size_t(r + i) * channels + size_t(tile) * kTile;
      for (int c = 0; c < columns; c++) y[at + c] = result[i * kTile + c] + (residual ? residual[at + c] : 0);
    }
  }
};

ort::Status* Project::run(ort::Context* context) const {
  const Kernels& kernel = kernels();
  const ort::Value* x_value = api_.input(context, 0);
  ort::Shape shape = api_.shape(x_value);
  const float* x = api_.data<float>(x_value);
  const float *scales = api_.data<float>(api_.input(context, 2)), *gain = api_.data<float>(api_.input(context, 3)),
              *residual = api_.data<float>(api_.input(context, 4)), *shift = api_.data<float>(api_.input(context, 5)),
              *bias = api_.data<float>(api_.input(context, 6));
  if (!shape.rank || shape.last() < 1 || channels_ < 1 || !is_format(format_)) return api_.error("Project: no such format, no channels or no inputs");
  if ((activation_ != kNone && activation_ != kGelu) || (shift && !gain)) return api_.error("Project: no such activation, or a shift without a gain");
  int width = int(shape.last()), inputs = round_up(width, kInputBlock), count = int(shape.count() / width);
  Matrix weights{format_, api_.data<uint8_t>(api_.input(context, 1)), scales, inputs, round_up(channels_, kTile) / kTile};
  if (api_.shape(api_.input(context, 1)).count() != int64_t(weights.bytes())) return api_.error("Project: codes have another size than the attributes say");
  if (format_ == kInt8 && !scales) return api_.error("Project: int8 codes come without scales");
  if (!api_.fits(api_.input(context, 2), int64_t(weights.tiles) * kTile) || !api_.fits(api_.input(context, 3), width) ||
      !api_.fits(api_.input(context, 4), int64_t(count) * channels_) || !api_.fits(api_.input(context, 5), width) || !api_.fits(api_.input(context, 6), channels_))
    return api_.error("Project: scales, gain, residual, shift or bias have another size than the input and the attributes say");
  shape.dims[shape.rank - 1] = channels_;
  float* y = api_.data<float>(api_.output(context, 0, shape));
  if (!count) return nullptr;
  if (mapped_) read_ahead(weights);

  Projection all{kernel, weights, width, channels_, epsilon_, activation_, x, gain, shift, bias, residual, y};
  auto group_size = [&](int first) { return count - first < kRowGroup ? count - first : kRowGroup; };
  if (count >= kManyRows) {   // a group of rows stays in the cache while all the weights pass by
    api_.parallel(context, (count + kRowGroup - 1) / kRowGroup, [&](int group) {
      int first = group * kRowGroup, n = group_size(first);
      Scratch scratch(RowBuffers::needs(n, inputs));
      RowBuffers buffers(scratch, n, inputs);
      for (int r = 0; r < n; r++) all.prepare(buffers, r, first + r);
      for (int tile = 0; tile < weights.tiles; tile++) all.multiply(buffers.rows(), 0, n, tile, first);
    });
    return nullptr;
  }
  Scratch scratch(RowBuffers::needs(count, inputs));
  RowBuffers buffers(scratch, count, inputs);
  auto prepare = [&](int r) { all.prepare(buffers, r, r); };
  if (count < 8) for (int r = 0; r < count; r++) prepare(r);
  else api_.parallel(context, count, prepare);
  Rows rows = buffers.rows();
  api_.parallel(context, weights.tiles, [&](int tile) {
    for (int first = 0; first < count; first += kRowGroup) all.multiply(rows, first, group_size(first), tile, first);
  });
  return nullptr;
}

}  // namespace herd
