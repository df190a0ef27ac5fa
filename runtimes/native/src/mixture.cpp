// Mixture: y = [x +] shared(n) + sum over the chosen experts e of expert_e(sigmoid(l_e) n),  n = norm(x),  l = router n.
// Each of them is down(silu(gate(n)) * up(n)). Without experts it is a dense feed-forward layer.
//
//   inputs      0 x [..., D]; 1 gain [D]; 2 router codes (float32 tiles, absent without experts);
//               3 gate_up codes [E, bytes], 4 scales [E, N]; 5 down codes [E, bytes], 6 scales [E, N];
//               7..10 the same of the shared expert, absent without one. Scales are there for int8 alone.
//               Tiles of gate_up hold 16 gate channels, then the 16 up channels that belong to them.
//   attributes  format, shared_format; width, shared_width (hidden channels); experts (held here), all_experts,
//               first_expert, top_k; hadamard, shared_hadamard (block of the hidden channels' rotation, 0 for none);
//               residual (add x); epsilon
//   output      y [..., D]
//
// A score scales a row, and so the scale of its codes: one quantisation serves the shared expert and the routed ones.
// A token's sum is shared first, then its experts by number: the same order in any company.
#include <math.h>
#include "activations.h"
#include "operators.h"
#include "read_ahead.h"

namespace herd {
namespace {

constexpr int kHidden = kTile / 2;      // hidden channels that a tile of gate_up gives
constexpr int kTilesPerItem = 4;

// One feed-forward block and the rows that go through it.
struct Segment {
  Matrix gate_up, down;
  int first, count;   // rows
  int width, hadamard;
  const int* tokens;  // per row, null where row r is token r
};

struct Layer {
  const ort::Api& api;
  ort::Context* context;
  const Kernels& kernel;
  const RowBuffers &in, &hidden;
  const Segment* segments;
  int count;

  // hidden = silu(gate) * up of all rows
  void gate_up() const {
    int items = 0;
    for (int s = 0; s < count; s++) items += round_up(segments[s].gate_up.tiles, kTilesPerItem) / kTilesPerItem;
    api.parallel(context, items, [this](int item) {
      int s = 0;
      for (int n; item >= (n = round_up(segments[s].gate_up.tiles, kTilesPerItem) / kTilesPerItem); s++) item -= n;
      const Segment& segment = segments[s];
      int last = (item + 1) * kTilesPerItem;
      for (int tile = item * kTilesPerItem; tile < (last < segment.gate_up.tiles ? last : segment.gate_up.tiles); tile++) hidden_tile(segment, tile);
    });
  }
  void hidden_tile(const Segment& segment, int tile) const {
    alignas(64) float result[kRowGroup * kTile];
    Rows rows = in.rows();
    for (int done = 0; done < segment.count; done += kRowGroup) {
      int n = segment.count - done < kRowGroup ? segment.count - done : kRowGroup;
      kernel.product(segment.gate_up, tile, rows, segment.first + done, n, result);
      for (int r = 0; r < n; r++)
        kernel.swiglu(result + r * kTile, result + r * kTile + kHidden, kHidden, hidden.row(segment.first + done + r) + tile * kHidden);
    }
  }
  // codes of the hidden rows, rotated before
  void requantize(Format format, Format shared_format, int total) const {
    int unused = segments[0].count ? 0 : count > 1 ? segments[1].first : total;   // rows of a shared expert that is not there
    auto one = [&](int index) {
      int row = unused + index, s = 0;
      while (row >= segments[s].first + segments[s].count) s++;
      const Segment& segment = segments[s];
      if (segment.hadamard) kernel.hadamard(hidden.row(row), segment.width, segment.hadamard);
      hidden.prepare(kernel, row, segment.width, segment.tokens ? format : shared_format);
    };
    if (total - unused < 8) for (int i = 0; i < total - unused; i++) one(i);
    else api.parallel(context, total - unused, one);
  }
  void down(const float* x, int width, int tokens, float* y) const {
    api.parallel(context, round_up(width, kTile) / kTile, [&](int tile) {
      int column = tile * kTile, columns = width - column < kTile ? width - column : kTile;
      for (int t = 0; t < tokens; t++) memset(y + size_t(t) * width + column, 0, columns * sizeof(float));
      for (int s = 0; s < count; s++) down_tile(segments[s], tile, width, columns, y);
      if (x) for (int t = 0; t < tokens; t++)
        for (int c = 0; c < columns; c++) y[size_t(t) * width + column + c] += x[size_t(t) * width + column + c];
    });
  }
  void down_tile(const Segment& segment, int tile, int width, int columns, float* y) const {
    alignas(64) float result[kRowGroup * kTile];
    Rows rows = hidden.rows();
    for (int done = 0; done < segment.count; done += kRowGroup) {
      int n = segment.count - done < kRowGroup ? segment.count - done : kRowGroup;
      kernel.product(segment.down, tile, rows, segment.first + done, n, result);
      for (int r = 0; r < n; r++) {
        int token = segment.tokens ? segment.tokens[done + r] : done + r;
        float* to = y + size_t(token) * width + tile * kTile;
        for (int c = 0; c < columns; c++) to[c] += result[r * kTile + c];
      }
    }
  }
};

// The k largest logits of a token, the lower number first among equals, as ONNX's TopK chooses.
void choose(const float* logits, int count, int k, int* chosen) {
  for (int i = 0; i < k; i++) {
    int best = -1;
    for (int e = 0; e < count; e++) {
      bool taken = false;
      for (int j = 0; j < i; j++) taken |= chosen[j] == e;
      if (!taken && (best < 0 || logits[e] > logits[best])) best = e;
    }
    chosen[i] = best;
  }
}

}  // namespace

const ort::Port* Mixture::inputs(size_t* count) {
  static const ort::Port ports[] = {
    {ort::kFloat, ort::kRequired}, {ort::kFloat, ort::kRequired}, {ort::kUInt8, ort::kOptional},
    {ort::kUInt8, ort::kOptional}, {ort::kFloat, ort::kOptional}, {ort::kUInt8, ort::kOptional}, {ort::kFloat, ort::kOptional},
    {ort::kUInt8, ort::kOptional}, {ort::kFloat, ort::kOptional}, {ort::kUInt8, ort::kOptional}, {ort::kFloat, ort::kOptional}};
  *count = sizeof ports / sizeof *ports;
  return ports;
}

const ort::Port* Mixture::outputs(size_t* count) {
  static const ort::Port ports[] = {{ort::kFloat, ort::kRequired}};
  *count = 1;
  return ports;
}

Mixture::Mixture(ort::Api api, const ort::Info* info, bool mapped)
    : api_(api), mapped_(mapped), format_(Format(api.integer(info, "format", 0))), shared_format_(Format(api.integer(info, "shared_format", 0))),
      experts_(int(api.integer(info, "experts", 0))), all_experts_(int(api.integer(info, "all_experts", experts_))),
      first_expert_(int(api.integer(info, "first_expert", 0))), top_k_(int(api.integer(info, "top_k", 1))),
      width_(int(api.integer(info, "width", 0))), shared_width_(int(api.integer(info, "shared_width", 0))),
      hadamard_(int(api.integer(info, "hadamard", 0))), shared_hadamard_(int(api.integer(info, "shared_hadamard", 0))),
      residual_(api.integer(info, "residual", 1) != 0), epsilon_(api.real(info, "epsilon", 0)) {}

ort::Status* Mixture::run(ort::Context* context) const {
  const Kernels& kernel = kernels();
  const ort::Value* x_value = api_.input(context, 0);
  ort::Shape shape = api_.shape(x_value);
  const float *x = api_.data<float>(x_value), *gain = api_.data<float>(api_.input(context, 1));
  auto rotates = [](int block, int width) { return !block || ((block == 8 || block == 16 || block == 32 || block == 64) && width % block == 0); };
  if (!shape.rank || shape.last() < 1 || !is_format(format_) || !is_format(shared_format_) || !has_row_scale(format_) || !has_row_scale(shared_format_) || experts_ < 0 || shared_width_ < 0 ||
      (experts_ && width_ < 1) || !rotates(hadamard_, width_) || !rotates(shared_hadamard_, shared_width_))
    return api_.error("Mixture: no such format or rotation, or no channels");
  if (experts_ && (top_k_ < 1 || top_k_ > all_experts_ || first_expert_ < 0 || first_expert_ > all_experts_ - experts_))
    return api_.error("Mixture: more experts per token, or held here, than there are");
  int dims = int(shape.last()), inputs = round_up(dims, kInputBlock), tokens = int(shape.count() / dims);
  float* y = api_.data<float>(api_.output(context, 0, shape));
  const uint8_t* codes[5];
  const float* scales[4];
  const int code_inputs[] = {3, 5, 7, 9, 2};
  for (int i = 0; i < 5; i++) codes[i] = api_.data<uint8_t>(api_.input(context, code_inputs[i]));
  for (int i = 0; i < 4; i++) scales[i] = api_.data<float>(api_.input(context, 4 + 2 * i));
  Matrix gate_up{format_, codes[0], scales[0], inputs, round_up(width_, kHidden) / kHidden};
  Matrix down{format_, codes[1], scales[1], round_up(width_, kInputBlock), round_up(dims, kTile) / kTile};
  Matrix shared_gate_up{shared_format_, codes[2], scales[2], inputs, round_up(shared_width_, kHidden) / kHidden};
  Matrix shared_down{shared_format_, codes[3], scales[3], round_up(shared_width_, kInputBlock), down.tiles};
  Matrix router{kFloat32, codes[4], nullptr, inputs, round_up(all_experts_, kTile) / kTile};
  auto fits = [&](int input, const Matrix& matrix, int count) {
    return !count || (matrix.codes && api_.shape(api_.input(context, input)).count() == int64_t(matrix.bytes()) * count &&
                      (matrix.format != kInt8 || (matrix.scales && api_.fits(api_.input(context, input + 1), int64_t(matrix.tiles) * kTile * count))));
  };
  if (!fits(3, gate_up, experts_) || !fits(5, down, experts_) || !fits(7, shared_gate_up, shared_width_ > 0) ||
      !fits(9, shared_down, shared_width_ > 0) || !fits(2, router, experts_ > 0))
    return api_.error("Mixture: weights have another size than the attributes say");
  if (!api_.fits(api_.input(context, 1), dims)) return api_.error("Mixture: the gain has another size than the input");
  if (!tokens) return nullptr;

  // Rows: every token for the shared expert, then every assignment of a token to an expert that is held here.
  int assignments = experts_ ? tokens * top_k_ : 0, total = tokens + assignments;
  int hidden_inputs = round_up(width_ > shared_width_ ? width_ : shared_width_, kInputBlock);
  size_t logits_count = experts_ ? size_t(tokens) * router.tiles * kTile : 0;
  Scratch scratch(RowBuffers::needs(total, inputs) + Scratch::needs<float>(logits_count) + 2 * Scratch::needs<int>(assignments) +
                  Scratch::needs<float>(assignments) + Scratch::needs<int>(experts_ + 1) + Scratch::needs<Segment>(experts_ + 1));
  RowBuffers in(scratch, total, inputs);
  float* logits = scratch.take<float>(logits_count);
  int *chosen = scratch.take<int>(assignments), *order = scratch.take<int>(assignments);
  float* scores = scratch.take<float>(assignments);
  int* begin = scratch.take<int>(experts_ + 1);
  Segment* segments = scratch.take<Segment>(experts_ + 1);

  // 1. Norm, router, choice and codes. The router of few tokens is shared out by its channels: with many experts it is
  //    large, and nothing else could be done meanwhile.
  Rows floats = in.rows();
  auto norm = [&](int t) {
    kernel.rms_norm(x + size_t(t) * dims, gain, dims, epsilon_, in.row(t));
    in.prepare(kernel, t, dims, kFloat32);
  };
  auto router_tile = [&](int t, int tile) {
    kernel.product(router, tile, floats, t, 1, logits + (size_t(t) * router.tiles + tile) * kTile);
  };
  auto choose_experts = [&](int t) {
    if (experts_) choose(logits + size_t(t) * router.tiles * kTile, all_experts_, top_k_, chosen + size_t(t) * top_k_);
    for (int k = 0; experts_ && k < top_k_; k++) {
      float logit = logits[size_t(t) * router.tiles * kTile + chosen[size_t(t) * top_k_ + k]];
      scores[size_t(t) * top_k_ + k] = 1 / (1 + expf(-logit));
    }
    in.prepare(kernel, t, dims, format_ == kFloat32 && (shared_width_ == 0 || shared_format_ == kFloat32) ? kFloat32 : kInt8);
  };
  int router_tiles = experts_ ? router.tiles : 0;
  if (tokens < 4) {
    for (int t = 0; t < tokens; t++) norm(t);
    api_.parallel(context, tokens * router_tiles, [&](int item) { router_tile(item / router_tiles, item % router_tiles); });
    for (int t = 0; t < tokens; t++) choose_experts(t);
  } else {
    api_.parallel(context, tokens, [&](int t) {
      norm(t);
      for (int tile = 0; tile < router_tiles; tile++) router_tile(t, tile);
      choose_experts(t);
    });
  }

  // 2. Sort assignments by expert; rows of one expert lie beside each other.
  for (int e = 0; e <= experts_; e++) begin[e] = 0;
  auto own = [&](int a) { return chosen[a] >= first_expert_ && chosen[a] < first_expert_ + experts_; };
  for (int a = 0; a < assignments; a++) if (own(a)) begin[chosen[a] - first_expert_ + 1]++;
  for (int e = 0; e < experts_; e++) begin[e + 1] += begin[e];
  int held = experts_ ? begin[experts_] : 0, used = 0;
  if (shared_width_) segments[used++] = {shared_gate_up, shared_down, 0, tokens, shared_width_, shared_hadamard_, nullptr};
  else segments[used++] = {shared_gate_up, shared_down, 0, 0, 0, 0, nullptr};
  for (int e = 0; e < experts_; e++) {
    if (begin[e] == begin[e + 1]) continue;
    Matrix one = gate_up, two = down;
    one.codes += gate_up.bytes() * e, two.codes += down.bytes() * e;
    if (one.scales) one.scales += size_t(gate_up.tiles) * kTile * e, two.scales += size_t(down.tiles) * kTile * e;
    segments[used++] = {one, two, tokens + begin[e], begin[e + 1] - begin[e], width_, hadamard_, order + begin[e]};
  }
  if (mapped_) {
    if (experts_ && !__atomic_exchange_n(&advised_, true, __ATOMIC_RELAXED))
      used_in_part(gate_up.codes, gate_up.bytes() * experts_), used_in_part(down.codes, down.bytes() * experts_);
    for (int s = 1; s <= used; s++) {   // the shared expert last: every token reads it, so it is there if anything is
      const Segment& segment = segments[s % used];
      read_ahead(segment.gate_up), read_ahead(segment.down);
    }
  }
  for (int a = 0; a < assignments; a++) {
    if (!own(a)) continue;
    int place = begin[chosen[a] - first_expert_]++;
    order[place] = a / top_k_;
    in.copy(a / top_k_, tokens + place, scores[a], format_ == kFloat32);
  }
  for (int t = 0; t < tokens && shared_format_ == kFloat32; t++) in.scales[t] = 1;   // the codes were the routed experts'

  // 3. Feed forward.
  Scratch hidden_scratch(RowBuffers::needs(tokens + held, hidden_inputs));
  RowBuffers hidden(hidden_scratch, tokens + held, hidden_inputs);
  Layer layer{api_, context, kernel, in, hidden, segments, used};
  layer.gate_up();
  layer.requantize(format_, shared_format_, tokens + held);
  layer.down(residual_ ? x : nullptr, dims, tokens, y);
  return nullptr;
}

}  // namespace herd
