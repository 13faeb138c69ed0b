// Depthwise convolution over rows of channels: eight channels of four neighbouring outputs per thread, float32 sums. Every
// input of a window row is read once for all four.
#pragma once
#include "tensor_conv.cuh"

namespace lp {
namespace cuda {

constexpr int kStrip = 4;

LP_HD int64_t depthwise_units(const TensorConv& p) {
  const int64_t images = p.pixels / (p.out_h * p.out_w);
  return images * p.out_h * ((p.out_w + kStrip - 1) / kStrip) * (p.columns / 8);
}

struct Strip {
  int n, oh, ow, channel;
};

// KW, STRIDE > 0: width of the window and its step, dilation 1; KW = 0: any.
template <class S, int KW, int STRIDE>
LP_DEVICE void depthwise_strip(const TensorConv& p, const Strip& at) {
  const int left = p.channels - at.channel;
  const int64_t image = at.n * p.x_n + at.channel;
  const int kh = p.taps / p.kw, h0 = at.oh * p.stride_h - p.pad_h, w0 = at.ow * p.stride_w - p.pad_w;
  Eight sums[kStrip] = {};
  for (int r = 0; r < kh; ++r) {
    const int h = h0 + r * p.dil_h;
    if (unsigned(h) >= unsigned(p.height)) continue;
    const int64_t row = image + int64_t(h) * p.x_h, weights = int64_t(r) * p.kw * p.columns + at.channel;
    if constexpr (KW > 0) {
      float w[KW][8];
#pragma unroll
      for (int k = 0; k < KW; ++k) unpack<S>(read_pieces<S>(p.weight, weights + k * p.columns, 8), w[k]);
      // All of the row before its first use, zeros outside: without branches between them the loads overlap.
      constexpr int kColumns = (kStrip - 1) * STRIDE + KW;
      Pieces<S> columns[kColumns] = {};
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        if (unsigned(w0 + c) < unsigned(p.width)) columns[c] = read_pieces<S>(p.x, row + int64_t(w0 + c) * p.x_w, left);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        float v[8];
        unpack<S>(columns[c], v);
#pragma unroll
        for (int j = 0; j < kStrip; ++j) {
          if (c - j * STRIDE < 0 || c - j * STRIDE >= KW) continue;
#pragma unroll
          for (int i = 0; i < 8; ++i) sums[j].v[i] += v[i] * w[c - j * STRIDE][i];
        }
      }
    } else {
      for (int k = 0; k < p.kw; ++k) {
        float w[8], v[8];
        unpack<S>(read_pieces<S>(p.weight, weights + int64_t(k) * p.columns, 8), w);
#pragma unroll
        for (int j = 0; j < kStrip; ++j) {
          const int column = w0 + j * p.stride_w + k * p.dil_w;
          if (unsigned(column) >= unsigned(p.width)) continue;
          unpack<S>(read_pieces<S>(p.x, row + int64_t(column) * p.x_w, left), v);
#pragma unroll
          for (int i = 0; i < 8; ++i) sums[j].v[i] += v[i] * w[i];
        }
      }
    }
  }
  const int m = (at.n * p.out_h + at.oh) * p.out_w + at.ow, count = p.out_w - at.ow < kStrip ? p.out_w - at.ow : kStrip;
  const bool in_rows = writes_rows(p);
  const Eight bias = in_rows ? bias_of<S>(p, at.channel) : Eight{};
  Pieces<S> residual[kStrip] = {};
#pragma unroll
  for (int j = 0; j < kStrip; ++j)
    if (in_rows && j < count) residual[j] = residual_of<S>(p, m + j, at.channel);
  // One copy of the long epilogue: what belongs to the next output moves to the front.
#pragma unroll 1
  for (int j = 0; j < count; ++j) {
    if (in_rows)
      finish_eight<S>(p, m + j, at.channel, sums[0], bias, residual[0]);
    else
      finish_each<S>(p, m + j, at.channel, sums[0]);
#pragma unroll
    for (int k = 1; k < kStrip; ++k) sums[k - 1] = sums[k], residual[k - 1] = residual[k];
  }
}

// Units in the order of memory: channels, then columns, rows, images.
LP_HD Strip strip_of(const TensorConv& p, int64_t unit) {
  const int chunks = p.columns / 8, strips = (p.out_w + kStrip - 1) / kStrip;
  const int64_t row = unit / chunks / strips;
  return Strip{int(row / p.out_h), int(row % p.out_h), int(unit / chunks % strips) * kStrip, int(unit % chunks) * 8};
}

template <class S, int KW, int STRIDE>
LP_DEVICE void depthwise_unit_of(const TensorConv& p, int64_t unit) {
  if (unit >= 0 && unit < depthwise_units(p)) depthwise_strip<S, KW, STRIDE>(p, strip_of(p, unit));
}

// Calls `with` for the variant that fits.
template <class F>
void with_depthwise_variant(const TensorConv& p, F&& with) {
  const bool plain = p.dil_w == 1;
  if (plain && p.kw == 3 && p.stride_w == 1) return with.template operator()<3, 1>();
  if (plain && p.kw == 3 && p.stride_w == 2) return with.template operator()<3, 2>();
  if (plain && p.kw == 5 && p.stride_w == 1) return with.template operator()<5, 1>();
  return with.template operator()<0, 0>();
}

}  // namespace cuda
}  // namespace lp
