// What happens to rows of activations between products: norms, 8-bit codes, GELU, SwiGLU, Hadamard, rotation.
#pragma once
#include "simd.h"

namespace {

void rms_norm(const float* x, const float* gain, int width, float epsilon, float* y) {
  F squares{};
  float rest = 0;
  int i = 0;
  for (; i + kLanes <= width; i += kLanes) squares = fma(load<F>(x + i), load<F>(x + i), squares);
  for (int j = i; j < width; j++) rest += x[j] * x[j];
  float factor = 1 / sqrtf((sum(squares) + rest) / width + epsilon);
  for (i = 0; i + kLanes <= width; i += kLanes) store(y + i, load<F>(x + i) * factor * (gain ? load<F>(gain + i) : splat(1)));
  for (; i < width; i++) y[i] = x[i] * factor * (gain ? gain[i] : 1);
}

// The mean first: squares of what lies far from zero would lose the digits that matter.
void layer_norm(const float* x, const float* gain, const float* shift, int width, float epsilon, float* y) {
  F total{}, squares{};
  float mean = 0, variance = 0;
  int whole = width / kLanes * kLanes;
  for (int i = 0; i < whole; i += kLanes) total += load<F>(x + i);
  for (int i = whole; i < width; i++) mean += x[i];
  mean = (sum(total) + mean) / width;
  for (int i = 0; i < whole; i += kLanes) {
    F v = load<F>(x + i) - mean;
    squares = fma(v, v, squares);
  }
  for (int i = whole; i < width; i++) variance += (x[i] - mean) * (x[i] - mean);
  float factor = 1 / sqrtf((sum(squares) + variance) / width + epsilon);
  for (int i = 0; i < whole; i += kLanes) store(y + i, fma((load<F>(x + i) - mean) * factor, load<F>(gain + i), load<F>(shift + i)));
  for (int i = whole; i < width; i++) y[i] = (x[i] - mean) * factor * gain[i] + shift[i];
}

// max(x, 0) - |x| erfc(z) / 2 with z = |x| / sqrt(2), which loses no digits where x is negative. With t = 1 / (1 + z / 2),
// erfc(z) = t p(t) exp(-z^2); p is a fit of relative error 2e-7.
void gelu(float* x, int count) {
  constexpr float kFit[] = {-0.059364628f, 0.286017656f, -0.49018687f, 0.281483114f, -0.0289770514f, 0.203680456f, 0.242853165f, 0.282409638f, 0.282084465f};
  for (int i = 0; i < count; i += kLanes) {
    F v = load<F>(x + i), magnitude = absolute(v), t = 1.f / (1.f + magnitude * 0.35355339059f), p = splat(kFit[0]);
    for (int k = 1; k < 9; k++) p = fma(p, t, splat(kFit[k]));
    F rest = magnitude * 0.5f * t * p * exp2(v * v * -0.72134752044f);
    store(x + i, maximum(v, F{}) - rest);
  }
}

// codes = round(127 x / max|x|); a row that is not finite gets a scale that is not, so that its result shows it.
void quantize(const float* x, int width, int inputs, int8_t* codes, int32_t* sums, float* scale) {
  float top = 0;
  bool finite = true;
  int i = 0;
  F tops{};
  I odd{};
  for (; i + kLanes <= width; i += kLanes) {
    F v = load<F>(x + i);
    tops = maximum(tops, absolute(v));
    odd |= ~(absolute(v) <= 3.4028235e38f);
  }
  top = largest(tops);
  finite = sum(odd) == 0;
  for (; i < width; i++) {
    float magnitude = fabsf(x[i]);
    finite &= magnitude <= 3.4028235e38f;
    top = magnitude > top ? magnitude : top;
  }
  float factor = top > herd::kSmallest && finite ? 127 / top : 0;
  *scale = finite ? (factor ? top / 127 : 0) : NAN;
  for (int b = 0; b < inputs; b += herd::kScaleBlock) {
    int end = b + herd::kScaleBlock < width ? b + herd::kScaleBlock : width;
    int k = b;
    I totals{};
    for (; factor && k + kLanes <= end; k += kLanes) {
      I q = round_to_int(load<F>(x + k) * factor);
      store(codes + k, __builtin_convertvector(q, Lane8));
      totals += q;
    }
    int32_t total = sum(totals);
    for (; factor && k < end; k++) {
      int32_t q = int32_t(rintf(x[k] * factor));
      codes[k] = int8_t(q);
      total += q;
    }
    for (; k < b + herd::kScaleBlock; k++) codes[k] = 0;
    sums[b / herd::kScaleBlock] = total;
  }
}

void swiglu(const float* gate, const float* up, int count, float* y) {
  for (int i = 0; i < count; i += kLanes) {   // buffers are whole tiles
    F g = load<F>(gate + i);
    store(y + i, g * load<F>(up + i) / (exp2(g * -1.44269504088896341f) + 1.f));
  }
}

inline void hadamard_8(float* v) {   // narrower than a register may be
  for (int n = 1; n < 8; n *= 2)
    for (int i = 0; i < 8; i++)
      if (!(i & n)) {
        float a = v[i], b = v[i + n];
        v[i] = a + b;
        v[i + n] = a - b;
      }
  for (int i = 0; i < 8; i++) v[i] *= 0.35355339f;
}

// Lane i becomes v[i] + v[i ^ N], or v[i ^ N] - v[i] where bit N of i is set: one step of the transform inside a register.
template <int N, int... I> inline F butterfly(F v, Lanes<I...>) {
  F other = __builtin_shufflevector(v, v, (I ^ N)...), sign = {((I & N) ? -1.f : 1.f)...};
  return v * sign + other;
}
template <int N> inline F butterflies(F v) {
  if constexpr (N < kLanes) return butterflies<2 * N>(butterfly<N>(v, AllLanes{}));
  else return v;
}

template <int kVectorsOfBlock> inline void hadamard_block(float* x) {
  F v[kVectorsOfBlock];
  for (int i = 0; i < kVectorsOfBlock; i++) v[i] = butterflies<1>(load<F>(x + i * kLanes));
  for (int n = 1; n < kVectorsOfBlock; n *= 2)
    for (int i = 0; i < kVectorsOfBlock; i++)
      if (!(i & n)) {
        F a = v[i], b = v[i + n];
        v[i] = a + b;
        v[i + n] = a - b;
      }
  F norm = splat(1 / sqrtf(float(kVectorsOfBlock * kLanes)));
  for (int i = 0; i < kVectorsOfBlock; i++) store(x + i * kLanes, v[i] * norm);
}

void hadamard(float* x, int width, int block) {
  for (int first = 0; first < width; first += block) {
    if (block == 64) hadamard_block<64 / kLanes>(x + first);
    else if (block == 32) hadamard_block<32 / kLanes>(x + first);
    else if (block == 16) hadamard_block<16 / kLanes>(x + first);
    else hadamard_8(x + first);
  }
}

void rotate(float* x, const float* cos, const float* sin, int width) {
  for (int i = 0; i < width / 2; i++) {
    float even = x[2 * i], odd = x[2 * i + 1];
    x[2 * i] = even * cos[i] - odd * sin[i];
    x[2 * i + 1] = odd * cos[i] + even * sin[i];
  }
}

}  // namespace
