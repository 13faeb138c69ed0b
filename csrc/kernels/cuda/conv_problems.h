// The convolutions of this library as matrix products: which tensor element each (row, depth, column) reads and writes.
// Free of CUDA calls, so that a test compiles the same index arithmetic for the host and checks it without a GPU.
#pragma once
#include <cmath>

#include "../../include/lp_params.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace lp {
namespace cuda {

LP_HD float load(const float* p) { return *p; }
LP_HD double load(const double* p) { return *p; }
LP_HD void save(float* p, float v) { *p = v; }
LP_HD void save(double* p, double v) { *p = v; }
#if defined(__CUDACC__)
LP_HD float load(const __half* p) { return __half2float(*p); }
LP_HD float load(const __nv_bfloat16* p) { return __bfloat162float(*p); }
LP_HD void save(__half* p, float v) { *p = __float2half(v); }
LP_HD void save(__nv_bfloat16* p, float v) { *p = __float2bfloat16(v); }
#endif

template <class T>
LP_HD T sigmoid_of(T v) {
  return T(1) / (T(1) + exp(-v));
}

template <class T>
LP_HD T activate(Act act, T v) {
  switch (act) {
    case Act::relu:
      return v < T(0) ? T(0) : v;
    case Act::relu6:
      return v < T(0) ? T(0) : (v > T(6) ? T(6) : v);
    case Act::silu:
      return v * sigmoid_of(v);
    case Act::hardswish: {
      const T u = v + T(3);
      return v * (u < T(0) ? T(0) : (u > T(6) ? T(6) : u)) / T(6);
    }
    case Act::gelu:
      return T(0.5) * v * (T(1) + erf(v * T(0.70710678118654752440)));
    case Act::sigmoid:
      return sigmoid_of(v);
    default:
      return v;
  }
}

// `s` is the output for relu, relu6 and sigmoid, else the value before the activation.
template <class T>
LP_HD T activate_grad(Act act, T s) {
  switch (act) {
    case Act::relu:
      return s > T(0) ? T(1) : T(0);
    case Act::relu6:
      return s > T(0) && s < T(6) ? T(1) : T(0);
    case Act::silu: {
      const T g = sigmoid_of(s);
      return g * (T(1) + s * (T(1) - g));
    }
    case Act::hardswish:
      return s <= T(-3) ? T(0) : (s < T(3) ? s / T(3) + T(0.5) : T(1));
    case Act::gelu:
      return T(0.5) * (T(1) + erf(s * T(0.70710678118654752440))) + s * T(0.39894228040143267794) * exp(T(-0.5) * s * s);
    case Act::sigmoid:
      return s * (T(1) - s);
    default:
      return T(1);
  }
}

LP_HD int64_t at(const View& v, int64_t n, int64_t c, int64_t h, int64_t w) { return n * v.n + c * v.c + h * v.h + w * v.w; }

// First position of a sorted list whose entry is >= value: where a group's channels begin, without a host round trip.
LP_HD int64_t lower_bound(const IndexList& list, int64_t value) {
  int64_t lo = 0, hi = list.count;
  while (lo < hi) {
    const int64_t mid = (lo + hi) / 2;
    if (list[mid] < value)
      lo = mid + 1;
    else
      hi = mid;
  }
  return lo;
}

struct Group {
  int64_t index, in_begin, in_count, out_begin, out_count;
};
struct Row {
  int64_t n, h, w;  // pixel; or, in the weight gradient, n = output channel, h = its place in the maps
};
struct Depth {
  int64_t channel, kh, kw, local;  // local: place in the maps or the weight; or, in the weight gradient, (n, h, w) of the pixel
};

LP_HD Group group_of(const ConvShape& s, const IndexList& in, const IndexList& out, int64_t g) {
  const int64_t in_per = s.channels / s.groups, out_per = s.outputs / s.groups;
  Group r;
  r.index = g;
  r.in_begin = lower_bound(in, g * in_per);
  r.in_count = lower_bound(in, (g + 1) * in_per) - r.in_begin;
  r.out_begin = lower_bound(out, g * out_per);
  r.out_count = lower_bound(out, (g + 1) * out_per) - r.out_begin;
  return r;
}

LP_HD bool valid(int64_t channel, int64_t channels) { return channel >= 0 && channel < channels; }

// Where the channel at a position of a list is in the maps: compact ones hold these channels alone.
template <class F>
LP_HD int64_t map_channel(const F& f, const IndexList& list, int64_t position) {
  return f.compact_maps ? position : list[position];
}

// A weight with the factor of its input, if there is one.
template <class T, class F>
LP_HD T weight_at(const F& f, int64_t o, int64_t c, int64_t kh, int64_t kw) {
  const T w = static_cast<const T*>(f.weight.data)[at(f.weight, o, c % (f.shape.channels / f.shape.groups), kh, kw)];
  return f.in_gate ? w * static_cast<const T*>(f.in_gate)[c] : w;
}

// x at the position that output pixel (row) reads through tap (kh, kw); zero outside.
template <class T, class S>
LP_HD T input_at(const ConvShape& s, const View& x, int64_t channel, const Row& row, int64_t kh, int64_t kw) {
  const int64_t h = row.h * s.stride_h - s.pad_h + kh * s.dil_h, w = row.w * s.stride_w - s.pad_w + kw * s.dil_w;
  if (h < 0 || h >= s.height || w < 0 || w >= s.width) return T(0);
  return load(static_cast<const S*>(x.data) + at(x, row.n, channel, h, w));
}

LP_HD Row pixel_of(int64_t m, int64_t height, int64_t width) {
  return Row{m / (height * width), m / width % height, m % width};
}

// Rows: output pixels. Columns: live outputs of the group. Depth: (tap, live input).
template <class T>
struct MaskedForwardProblem {
  MaskedForward f;
  LP_HD Group group(int64_t g) const { return group_of(f.shape, f.live_in, f.live_out, g); }
  LP_HD int64_t rows(const Group&) const { return f.shape.n * f.shape.out_h * f.shape.out_w; }
  LP_HD int64_t cols(const Group& g) const { return g.out_count; }
  LP_HD int64_t depth(const Group& g) const { return g.in_count * f.shape.kh * f.shape.kw; }
  LP_HD Row row(const Group&, int64_t m) const { return pixel_of(m, f.shape.out_h, f.shape.out_w); }
  LP_HD Depth at_depth(const Group& g, int64_t k) const {
    const int64_t tap = k / g.in_count, position = g.in_begin + k % g.in_count;
    return Depth{f.live_in[position], tap / f.shape.kw, tap % f.shape.kw, map_channel(f, f.live_in, position)};
  }
  LP_HD T a(const Group&, const Row& r, const Depth& d) const {
    return valid(d.channel, f.shape.channels) ? input_at<T, T>(f.shape, f.x, d.local, r, d.kh, d.kw) : T(0);
  }
  LP_HD T b(const Group& g, const Depth& d, int64_t col) const {
    const int64_t o = f.live_out[g.out_begin + col];
    if (!valid(o, f.shape.outputs) || !valid(d.channel, f.shape.channels)) return T(0);
    return weight_at<T>(f, o, d.channel, d.kh, d.kw);
  }
  LP_HD void store(const Group& g, const Row& r, int64_t col, T sum) const {
    const int64_t o = f.live_out[g.out_begin + col];
    if (!valid(o, f.shape.outputs)) return;
    if (f.bias) sum += static_cast<const T*>(f.bias)[o];
    if (f.gate) sum *= static_cast<const T*>(f.gate)[o];
    const int64_t place = map_channel(f, f.live_out, g.out_begin + col);
    static_cast<T*>(f.y.data)[at(f.y, r.n, place, r.h, r.w)] = activate(f.act, sum);
  }
};

// Rows: output pixels. Columns: outputs of the group. Depth: (tap, input). S: storage type of x, residual and y.
template <class S, class T>
struct CompactProblem {
  CompactForward f;
  LP_HD Group group(int64_t g) const {
    const int64_t in = f.shape.channels / f.shape.groups, out = f.shape.outputs / f.shape.groups;
    return Group{g, g * in, in, g * out, out};
  }
  LP_HD int64_t rows(const Group&) const { return f.shape.n * f.shape.out_h * f.shape.out_w; }
  LP_HD int64_t cols(const Group& g) const { return g.out_count; }
  LP_HD int64_t depth(const Group& g) const { return g.in_count * f.shape.kh * f.shape.kw; }
  LP_HD Row row(const Group&, int64_t m) const { return pixel_of(m, f.shape.out_h, f.shape.out_w); }
  LP_HD Depth at_depth(const Group& g, int64_t k) const {
    const int64_t tap = k / g.in_count, local = k % g.in_count;
    return Depth{f.in_index[g.in_begin + local], tap / f.shape.kw, tap % f.shape.kw, local};
  }
  LP_HD T a(const Group&, const Row& r, const Depth& d) const {
    return valid(d.channel, f.x_channels) ? input_at<T, S>(f.shape, f.x, d.channel, r, d.kh, d.kw) : T(0);
  }
  LP_HD T b(const Group& g, const Depth& d, int64_t col) const {
    return static_cast<const T*>(f.packed)[packed_offset(g.out_begin + col, d.local, d.kh * f.shape.kw + d.kw, f.shape.outputs,
                                                         g.in_count, f.shape.kh * f.shape.kw, f.shape.groups)];
  }
  LP_HD void store(const Group& g, const Row& r, int64_t col, T sum) const {
    const int64_t o = g.out_begin + col, c = f.out_index[o];
    if (!valid(c, f.y_channels)) return;
    if (f.bias) sum += static_cast<const T*>(f.bias)[o];
    if (f.residual.data) sum += load(static_cast<const S*>(f.residual.data) + at(f.residual, r.n, c, r.h, r.w));
    save(static_cast<S*>(f.y.data) + at(f.y, r.n, c, r.h, r.w), activate(f.act, sum));
  }
};

// grad_y * act'(saved) of channel o of the maps at an output pixel: the gradient before the gate.
template <class T>
LP_HD T output_grad(const MaskedBackward& f, int64_t n, int64_t o, int64_t h, int64_t w) {
  const T g = static_cast<const T*>(f.grad_y.data)[at(f.grad_y, n, o, h, w)];
  if (f.act == Act::none) return g;
  return g * activate_grad(f.act, static_cast<const T*>(f.saved.data)[at(f.saved, n, o, h, w)]);
}

// Rows: input pixels. Columns: live inputs of the group. Depth: (tap, live output).
template <class T>
struct InputGradProblem {
  MaskedBackward f;
  LP_HD Group group(int64_t g) const { return group_of(f.shape, f.live_in, f.live_out, g); }
  LP_HD int64_t rows(const Group&) const { return f.shape.n * f.shape.height * f.shape.width; }
  LP_HD int64_t cols(const Group& g) const { return g.in_count; }
  LP_HD int64_t depth(const Group& g) const { return g.out_count * f.shape.kh * f.shape.kw; }
  LP_HD Row row(const Group&, int64_t m) const { return pixel_of(m, f.shape.height, f.shape.width); }
  LP_HD Depth at_depth(const Group& g, int64_t k) const {
    const int64_t tap = k / g.out_count, position = g.out_begin + k % g.out_count;
    return Depth{f.live_out[position], tap / f.shape.kw, tap % f.shape.kw, map_channel(f, f.live_out, position)};
  }
  LP_HD T a(const Group&, const Row& r, const Depth& d) const {
    const ConvShape& s = f.shape;
    const int64_t h = r.h + s.pad_h - d.kh * s.dil_h, w = r.w + s.pad_w - d.kw * s.dil_w;
    if (h < 0 || w < 0 || h % s.stride_h || w % s.stride_w || !valid(d.channel, s.outputs)) return T(0);
    if (h / s.stride_h >= s.out_h || w / s.stride_w >= s.out_w) return T(0);
    const T g = output_grad<T>(f, r.n, d.local, h / s.stride_h, w / s.stride_w);
    return f.gate ? g * static_cast<const T*>(f.gate)[d.channel] : g;
  }
  LP_HD T b(const Group& g, const Depth& d, int64_t col) const {
    const int64_t c = f.live_in[g.in_begin + col];
    if (!valid(c, f.shape.channels) || !valid(d.channel, f.shape.outputs)) return T(0);
    return weight_at<T>(f, d.channel, c, d.kh, d.kw);
  }
  LP_HD void store(const Group& g, const Row& r, int64_t col, T sum) const {
    const int64_t place = map_channel(f, f.live_in, g.in_begin + col);
    if (valid(place, f.shape.channels)) static_cast<T*>(f.grad_x.data)[at(f.grad_x, r.n, place, r.h, r.w)] = sum;
  }
};

// Rows: live outputs of the group. Columns: (tap, live input). Depth: output pixels. Writes the gradient before the gate
// to `raw`, shaped and laid out like a contiguous weight.
template <class T>
struct WeightGradProblem {
  MaskedBackward f;
  T* raw;
  LP_HD Group group(int64_t g) const { return group_of(f.shape, f.live_in, f.live_out, g); }
  LP_HD int64_t rows(const Group& g) const { return g.out_count; }
  LP_HD int64_t cols(const Group& g) const { return g.in_count * f.shape.kh * f.shape.kw; }
  LP_HD int64_t depth(const Group&) const { return f.shape.n * f.shape.out_h * f.shape.out_w; }
  LP_HD Row row(const Group& g, int64_t m) const {
    return Row{f.live_out[g.out_begin + m], map_channel(f, f.live_out, g.out_begin + m), 0};
  }
  LP_HD Depth at_depth(const Group&, int64_t k) const {
    const Row p = pixel_of(k, f.shape.out_h, f.shape.out_w);
    return Depth{p.n, p.h, p.w, 0};
  }
  LP_HD T a(const Group&, const Row& r, const Depth& d) const {
    return valid(r.n, f.shape.outputs) ? output_grad<T>(f, d.channel, r.h, d.kh, d.kw) : T(0);
  }
  LP_HD T b(const Group& g, const Depth& d, int64_t col) const {
    const int64_t tap = col / g.in_count, place = map_channel(f, f.live_in, g.in_begin + col % g.in_count);
    if (!valid(place, f.shape.channels)) return T(0);
    return input_at<T, T>(f.shape, f.x, place, Row{d.channel, d.kh, d.kw}, tap / f.shape.kw, tap % f.shape.kw);
  }
  LP_HD void store(const Group& g, const Row& r, int64_t col, T sum) const {
    const int64_t tap = col / g.in_count, c = f.live_in[g.in_begin + col % g.in_count];
    const int64_t in_per = f.shape.channels / f.shape.groups;
    if (valid(c, f.shape.channels) && valid(r.n, f.shape.outputs))
      raw[(r.n * in_per + c % in_per) * f.shape.kh * f.shape.kw + tap] = sum;
  }
};

// From the raw weight gradient and the summed output gradient of one output to the gradients that the op returns.
template <class T>
struct FinishGrad {
  MaskedBackward f;
  const T* raw;  // zero where an input is dead
  LP_HD int64_t per_output() const { return f.shape.channels / f.shape.groups * f.shape.kh * f.shape.kw; }
  LP_HD T gate(int64_t o) const { return f.gate ? static_cast<const T*>(f.gate)[o] : T(1); }
  LP_HD int64_t channel(int64_t o, int64_t i) const {
    const ConvShape& s = f.shape;
    return o / (s.outputs / s.groups) * (s.channels / s.groups) + i / (s.kh * s.kw);
  }
  // The gradient of the output at a position of the list.
  LP_HD T output(const Row& r, int64_t position) const {
    return output_grad<T>(f, r.n, map_channel(f, f.live_out, position), r.h, r.w);
  }
  // Writes one weight gradient, returns its share of the gate's.
  LP_HD T weight(int64_t o, int64_t i) const {
    const T value = raw[o * per_output() + i];
    const int64_t tap = i % (f.shape.kh * f.shape.kw), c = channel(o, i);
    const T factor = f.in_gate ? static_cast<const T*>(f.in_gate)[c] : T(1);
    if (f.grad_weight) static_cast<T*>(f.grad_weight)[o * per_output() + i] = value * gate(o) * factor;
    return value * weight_at<T>(f, o, c, tap / f.shape.kw, tap % f.shape.kw);
  }
  // What one weight of input c adds to the gradient of its factor; there are `per_input` of them.
  LP_HD int64_t per_input() const { return f.shape.outputs / f.shape.groups * f.shape.kh * f.shape.kw; }
  LP_HD T input(int64_t c, int64_t i) const {
    const ConvShape& s = f.shape;
    const int64_t in_per = s.channels / s.groups, taps = s.kh * s.kw, tap = i % taps;
    const int64_t o = c / in_per * (s.outputs / s.groups) + i / taps, local = c % in_per;
    const T w = static_cast<const T*>(f.weight.data)[at(f.weight, o, local, tap / s.kw, tap % s.kw)];
    return raw[(o * in_per + local) * taps + tap] * gate(o) * w;
  }
  LP_HD void finish(int64_t o, T grad_sum, T gate_sum) const {
    if (f.grad_bias) static_cast<T*>(f.grad_bias)[o] = grad_sum * gate(o);
    if (f.grad_gate) static_cast<T*>(f.grad_gate)[o] = gate_sum + (f.bias ? grad_sum * static_cast<const T*>(f.bias)[o] : T(0));
  }
};

}  // namespace cuda
}  // namespace lp
