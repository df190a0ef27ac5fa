// Project: y = W n(x), or residual + W n(x), where n is an RMS norm with a gain, or nothing.
//
//   inputs      x [..., K] float; codes uint8 (kernels.h); scales [N] float (int8); gain [K] float; residual [..., N] float
//   attributes  format, channels (N), epsilon
//   output      y [..., N]
#include "activations.h"
#include "operators.h"
#include "read_ahead.h"

namespace herd {

const ort::Port* Project::inputs(size_t* count) {
  static const ort::Port ports[] = {{ort::kFloat, ort::kRequired}, {ort::kUInt8, ort::kRequired}, {ort::kFloat, ort::kOptional},
                                    {ort::kFloat, ort::kOptional}, {ort::kFloat, ort::kOptional}};
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
      epsilon_(api.real(info, "epsilon", 0)) {}

ort::Status* Project::run(ort::Context* context) const {
  const Kernels& kernel = kernels();
  const ort::Value* x_value = api_.input(context, 0);
  ort::Shape shape = api_.shape(x_value);
  const float* x = api_.data<float>(x_value);
  const float *scales = api_.data<float>(api_.input(context, 2)), *gain = api_.data<float>(api_.input(context, 3)),
              *residual = api_.data<float>(api_.input(context, 4));
  if (!shape.rank || shape.last() < 1 || channels_ < 1 || !is_format(format_)) return api_.error("Project: no such format, no channels or no inputs");
  int width = int(shape.last()), inputs = round_up(width, kInputBlock), count = int(shape.count() / width);
  Matrix weights{format_, api_.data<uint8_t>(api_.input(context, 1)), scales, inputs, round_up(channels_, kTile) / kTile};
  if (api_.shape(api_.input(context, 1)).count() != int64_t(weights.bytes())) return api_.error("Project: codes have another size than the attributes say");
  if (format_ == kInt8 && !scales) return api_.error("Project: int8 codes come without scales");
  if (!api_.fits(api_.input(context, 2), int64_t(weights.tiles) * kTile) || !api_.fits(api_.input(context, 3), width) ||
      !api_.fits(api_.input(context, 4), int64_t(count) * channels_))
    return api_.error("Project: scales, gain or residual have another size than the input and the attributes say");
  shape.dims[shape.rank - 1] = channels_;
  float* y = api_.data<float>(api_.output(context, 0, shape));
  if (!count) return nullptr;
  if (mapped_) read_ahead(weights);

  Scratch scratch(RowBuffers::needs(count, inputs));
  RowBuffers buffers(scratch, count, inputs);
  auto prepare = [&](int r) {
    if (gain) kernel.rms_norm(x + size_t(r) * width, gain, width, epsilon_, buffers.row(r));
    else memcpy(buffers.row(r), x + size_t(r) * width, size_t(width) * sizeof(float));
    buffers.prepare(kernel, r, width, format_);
  };
  if (count < 8) for (int r = 0; r < count; r++) prepare(r);
  else api_.parallel(context, count, prepare);

  Rows rows = buffers.rows();
  api_.parallel(context, weights.tiles, [&](int tile) {
    alignas(64) float result[kRowGroup * kTile];
    int columns = channels_ - tile * kTile < kTile ? channels_ - tile * kTile : kTile;
    for (int first = 0; first < count; first += kRowGroup) {
      int n = count - first < kRowGroup ? count - first : kRowGroup;
      kernel.product(weights, tile, rows, first, n, result);
      for (int r = 0; r < n; r++) {
        size_t at = size_t(first + r) * channels_ + size_t(tile) * kTile;
        for (int c = 0; c < columns; c++) y[at + c] = result[r * kTile + c] + (residual ? residual[at + c] : 0);
      }
    }
  });
  return nullptr;
}

}  // namespace herd
