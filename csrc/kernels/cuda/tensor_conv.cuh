// Convolution on tensor cores: cp.async in several stages, ldmatrix and mma.sync or wgmma, float32 sums, everything else in the
// epilogue.
// Deterministic: the depth is summed in order, a split depth is added up in order by a second kernel.
#pragma once
#include "conv_problems.h"
#include "simt.h"
#include "tensor_layout.h"

namespace lp {
namespace cuda {

struct alignas(8) Pair {
  float a, b;
};
struct alignas(16) Eight {
  float v[8];
};

template <class S>
LP_DEVICE void unpack(const Piece16& piece, float* v) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (S::kLanes == 8) {
      v[2 * i] = S::load(typename S::Element(piece.words[i] & 0xffff));
      v[2 * i + 1] = S::load(typename S::Element(piece.words[i] >> 16));
    } else {
      v[i] = float_of_bits(piece.words[i]);
    }
  }
}

// Eight values in storage.
template <class S>
struct Pieces {
  Piece16 at[8 / S::kLanes];
};

// Those from an element on that lies at a 16-byte boundary; `count` > 0 of them exist. A piece that holds one of these is read
// whole: memory comes in larger units, and what the spare lanes hold (anything) meets no other lane.
template <class S>
LP_DEVICE Pieces<S> read_pieces(const void* from, int64_t offset, int count) {
  const typename S::Element* at = static_cast<const typename S::Element*>(from) + offset;
  Pieces<S> r = {};
#pragma unroll
  for (int i = 0; i < 8 / S::kLanes; ++i)
    if (i == 0 || i * S::kLanes < count) r.at[i] = simt::load16(at + i * S::kLanes);
  return r;
}
template <class S>
LP_DEVICE void unpack(const Pieces<S>& pieces, float* v) {
#pragma unroll
  for (int i = 0; i < 8 / S::kLanes; ++i) unpack<S>(pieces.at[i], v + i * S::kLanes);
}

template <class S>
LP_DEVICE Piece16 pack(const float* v) {
  Piece16 piece;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (S::kLanes == 8)
      piece.words[i] = uint32_t(S::save(v[2 * i])) | uint32_t(S::save(v[2 * i + 1])) << 16;
    else
      piece.words[i] = bits_of_float(v[i]);
  }
  return piece;
}

template <class S>
LP_DEVICE float bias_at(const TensorConv& p, int o) {
  if (p.bias_is_float) return static_cast<const float*>(p.bias)[o];
  return S::load(static_cast<const typename S::Element*>(p.bias)[o]);
}

struct PixelOffset {
  int64_t y, r;
};
LP_DEVICE PixelOffset offset_of(const TensorConv& p, int m) {
  if (p.y_linear) return PixelOffset{int64_t(m) * p.y_w, int64_t(m) * p.r_w};
  const int per_image = p.out_h * p.out_w;
  const int n = m / per_image, rest = m - n * per_image, oh = rest / p.out_w, ow = rest - oh * p.out_w;
  return PixelOffset{n * p.y_n + int64_t(oh) * p.y_h + int64_t(ow) * p.y_w,
                     n * p.r_n + int64_t(oh) * p.r_h + int64_t(ow) * p.r_w};
}

// One branch for eight values.
LP_DEVICE void activate_eight(Act act, float* v) {
  if (act == Act::none) return;
  if (act == Act::relu) {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = activate(Act::relu, v[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = activate(act, v[i]);
}

// Bias, residual, activation and store of one sum.
template <class S>
LP_DEVICE void finish_one(const TensorConv& p, int m, int o, float v) {
  using E = typename S::Element;
  if (o >= p.outputs) return;
  const int64_t c = p.out_index ? p.out_index[o] : o;
  if (c < 0 || c >= p.y_channels) return;
  const PixelOffset at = offset_of(p, m);
  if (p.bias) v += bias_at<S>(p, o);
  if (p.residual) v += S::load(static_cast<const E*>(p.residual)[at.r + c * p.r_c]);
  static_cast<E*>(p.y)[at.y + c * p.y_c] = S::save(activate(p.act, v));
}

// The bias of outputs o .. o + 7; zeros where there is none.
template <class S>
LP_DEVICE Eight bias_of(const TensorConv& p, int o) {
  Eight r = {};
  if (!p.bias) return r;
  if (!p.bias_vector) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (o + i < p.outputs) r.v[i] = bias_at<S>(p, o + i);
  } else if (S::kLanes == 4 || p.bias_is_float) {
    unpack<F32>(read_pieces<F32>(p.bias, o, p.outputs - o), r.v);
  } else {
    unpack<S>(read_pieces<S>(p.bias, o, p.outputs - o), r.v);
  }
  return r;
}

// The residual of outputs o .. o + 7 at pixel m, as it lies in rows of channels; nothing where it lies otherwise.
template <class S>
LP_DEVICE Pieces<S> residual_of(const TensorConv& p, int m, int o) {
  if (!p.r_vector) return Pieces<S>{};
  return read_pieces<S>(p.residual, offset_of(p, m).r + o, p.outputs - o);
}

// The same for outputs o .. o + 7 of pixel m, which exist in y's rows; those past the last output are zero. What it adds was
// read before, so that nobody waits for it here.
template <class S>
LP_DEVICE void finish_eight(const TensorConv& p, int m, int o, Eight sums, const Eight& bias, const Pieces<S>& residual) {
  float* v = sums.v;
  using E = typename S::Element;
  const PixelOffset at = offset_of(p, m);
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] += bias.v[i];
  if (p.r_vector) {
    float add[8];
    unpack<S>(residual, add);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] += add[i];
  } else if (p.residual) {
    const E* r = static_cast<const E*>(p.residual) + at.r + o * p.r_c;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (o + i < p.outputs) v[i] += S::load(r[i * p.r_c]);
  }
  activate_eight(p.act, v);
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = o + i < p.outputs ? v[i] : 0.f;
  E* y = static_cast<E*>(p.y) + at.y + o;
#pragma unroll
  for (int i = 0; i < 8 / S::kLanes; ++i) simt::store16(y + i * S::kLanes, pack<S>(v + i * S::kLanes));
}

// Eight outputs one by one, wherever they belong. A function of its own: it is large and rare.
template <class S>
LP_DEVICE_CALL void finish_each(const TensorConv& p, int m, int o, Eight sums) {
#pragma unroll 1
  for (int i = 0; i < 8; ++i) finish_one<S>(p, m, o + i, sums.v[i]);
}

template <class T>
struct TensorConvKernel {
  using S = typename T::S;
  using E = typename S::Element;

  const TensorConv& p;
  char* memory;
  int tid, lane, warp_m, warp_n;
  int first_column;
  Window windows[T::kRows];
  DepthCursor cursor;
  uint32_t weights[T::kWeights];  // bytes from the first piece of a step's weights
  int weights_end[T::kWeights];   // the first step whose piece does not exist, times CH
  float sums[T::MI][T::NI][4];

  LP_DEVICE TensorConvKernel(const TensorConv& params, char* shared) : p(params), memory(shared) {
    tid = simt::thread();
    lane = tid % 32;
    const int warp = tid / 32;
    warp_m = warp % T::kWarpsM * T::WM;
    warp_n = warp / T::kWarpsM * T::WN;
    first_column = simt::block_x() % p.blocks_n * T::BN;
#pragma unroll
    for (int i = 0; i < T::kRows; ++i) windows[i] = window_of<S>(p, first_row() + row_of(i));
#pragma unroll
    for (int i = 0; i < T::kWeights; ++i) {
      const int u = i * T::kThreads + tid, j = u / T::BN, column = first_column + u % T::BN;
      weights_end[i] = column < p.columns ? p.taps * p.chunks - j : 0;
      weights[i] = (uint32_t(j) * p.columns + column) * 16;
    }
#pragma unroll
    for (int i = 0; i < T::MI; ++i)
#pragma unroll
      for (int j = 0; j < T::NI; ++j)
#pragma unroll
        for (int k = 0; k < 4; ++k) sums[i][j][k] = 0.f;
  }

  LP_DEVICE int first_row() const { return simt::block_x() / p.blocks_n * T::BM; }
  // Neighbouring threads copy neighbouring chunks of one row.
  LP_DEVICE int row_of(int i) const { return tid / T::CH + i * (T::kThreads / T::CH); }

  // Copies of one step: depth chunks q0 .. q0 + CH - 1 into a slot.
  LP_DEVICE void copy_step(int q0, int slot) {
    char* a = memory + slot * T::kStageBytes + tid % T::CH * T::kPlaneA + row_of(0) * 16;
    char* b = memory + slot * T::kStageBytes + T::CH * T::kPlaneA + tid * 16;
    const Reach reach = reach_of<S>(p, cursor);
#pragma unroll
    for (int i = 0; i < T::kRows; ++i)
      simt::copy16_unless(windows[i].outside & reach.bits, a + i * (T::kThreads / T::CH) * 16,
                          reinterpret_cast<const void*>(windows[i].corner + reach.way), reach.bytes);
    cursor.advance(p);
    const char* w = static_cast<const char*>(p.weight) + int64_t(q0) * p.columns * 16;
#pragma unroll
    for (int i = 0; i < T::kWeights; ++i) {
      const bool mine = (i + 1) * T::kThreads <= T::CH * T::BN || i * T::kThreads + tid < T::CH * T::BN;
      simt::copy16_if(mine, b + i * T::kThreads * 16, w + weights[i], q0 < weights_end[i] ? 16 : 0);
    }
  }

  LP_DEVICE void multiply_step(int slot) {
    const char* a = memory + slot * T::kStageBytes + (warp_m + lane % 16) * 16 + lane / 16 * T::kPlaneA;
    const char* b = memory + slot * T::kStageBytes + T::CH * T::kPlaneA + warp_n * 16;
    const char* b4 = b + (lane % 8 + lane / 16 * 8) * 16 + lane / 8 % 2 * T::kPlaneB;
    const char* b2 = b + lane % 8 * 16 + lane / 8 % 2 * T::kPlaneB;
#pragma unroll
    for (int k = 0; k < T::CH; k += 2) {
      uint32_t fa[T::MI][4], fb[T::NI][2];
#pragma unroll
      for (int i = 0; i < T::MI; ++i) simt::load4(fa[i], a + k * T::kPlaneA + i * 256);
#pragma unroll
      for (int j = 0; j + 1 < T::NI; j += 2) {
        uint32_t both[4];
        simt::load4(both, b4 + k * T::kPlaneB + j * 128);
        fb[j][0] = both[0], fb[j][1] = both[1], fb[j + 1][0] = both[2], fb[j + 1][1] = both[3];
      }
      if constexpr (T::NI % 2 == 1) simt::load2(fb[T::NI - 1], b2 + k * T::kPlaneB + (T::NI - 1) * 128);
      if constexpr (S::kLanes == 4) {
#pragma unroll
        for (int i = 0; i < T::MI; ++i)
#pragma unroll
          for (int r = 0; r < 4; ++r) fa[i][r] = simt::rounded_tf32(fa[i][r]);
#pragma unroll
        for (int j = 0; j < T::NI; ++j) fb[j][0] = simt::rounded_tf32(fb[j][0]), fb[j][1] = simt::rounded_tf32(fb[j][1]);
      }
#pragma unroll
      for (int i = 0; i < T::MI; ++i)
#pragma unroll
        for (int j = 0; j < T::NI; ++j) simt::multiply<S>(sums[i][j], fa[i], fb[j]);
    }
  }

  // The planes of a slot are what a group's product reads: eight rows of 16 bytes side by side.
  LP_DEVICE void multiply_step_group(int slot) {
    const char* a = memory + slot * T::kStageBytes + tid / 128 * 64 * 16;
    const char* b = memory + slot * T::kStageBytes + T::CH * T::kPlaneA;
    simt::products_begin();
#pragma unroll
    for (int k = 0; k < T::CH; k += 2)
      simt::multiply_group<S, T::NI>(sums[0], factor_of(simt::address(a + k * T::kPlaneA), T::kPlaneA, 128),
                                     factor_of(simt::address(b + k * T::kPlaneB), T::kPlaneB, 128));
    simt::products_end_group();
  }

  LP_DEVICE void run() {
    const int first = simt::block_y() * p.steps_per_split;
    const int all = (p.taps * p.chunks + T::CH - 1) / T::CH;
    const int last = first + p.steps_per_split < all ? first + p.steps_per_split : all;
    const int steps = last - first;
    cursor = DepthCursor::at(p, first * T::CH + tid % T::CH);
#pragma unroll
    for (int s = 0; s < T::kAhead; ++s) {
      if (s < steps) copy_step((first + s) * T::CH, s);
      simt::copies_end_group();
    }
    int slot = 0, next = T::kAhead;
    for (int s = 0; s < steps; ++s) {
      simt::copies_wait<T::kAhead - 1>();
      if constexpr (T::kGroup) {
        simt::show_copies();
        simt::products_wait<1>(sums[0]);  // those of the last step may go on: they read neither this slot nor the next
      }
      simt::sync_block();  // the copies of all threads are here, and nobody reads slot `next` any more
      if constexpr (T::kGroup) multiply_step_group(slot);
      if (s + T::kAhead < steps) copy_step((first + s + T::kAhead) * T::CH, next);
      simt::copies_end_group();
      if constexpr (!T::kGroup) multiply_step(slot);
      slot = slot + 1 == T::STAGES ? 0 : slot + 1;
      next = next + 1 == T::STAGES ? 0 : next + 1;
    }
    if constexpr (T::kGroup) simt::products_wait<0>(sums[0]);
    simt::copies_wait<0>();
    simt::sync_block();
    finish();
  }

  // Through shared memory, each warp for itself, so that rows of channels are read and written in 16 bytes.
  LP_DEVICE void finish() {
    constexpr int kStride = T::kSumStride;
    float* rows = reinterpret_cast<float*>(memory) + (tid / 32) * T::WM * kStride;
    float* at = rows + lane / 4 * kStride + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < T::MI; ++i)
#pragma unroll
      for (int j = 0; j < T::NI; ++j) {
        *reinterpret_cast<Pair*>(at + i * 16 * kStride + j * 8) = Pair{sums[i][j][0], sums[i][j][1]};
        *reinterpret_cast<Pair*>(at + (i * 16 + 8) * kStride + j * 8) = Pair{sums[i][j][2], sums[i][j][3]};
      }
    simt::sync_warp();
    const int row = first_row() + warp_m, column = first_column + warp_n;
    if (p.partial || writes_rows(p)) {
      finish_units(rows, row, column);
    } else {
#pragma unroll 1
      for (int e = lane; e < T::WM * T::WN; e += 32) {
        const int r = p.pixels_first ? e % T::WM : e / T::WN, c = p.pixels_first ? e / T::WM : e % T::WN;
        if (row + r < p.pixels) finish_one<S>(p, row + r, column + c, rows[r * kStride + c]);
      }
    }
  }

  // Units of eight outputs of a pixel. The residuals of the next few are on their way while one is finished.
  LP_DEVICE void finish_units(const float* rows, int row, int column) {
    constexpr int kUnits = T::WM * T::NI, kRounds = (kUnits + 31) / 32, kNext = kRounds < 4 ? kRounds : 4;
    const auto exists = [&](int u) { return u < kUnits && row + u / T::NI < p.pixels && column + u % T::NI * 8 < p.columns; };
    const auto read = [&](int u) {
      if (p.partial || !exists(u)) return Pieces<S>{};
      return residual_of<S>(p, row + u / T::NI, column + u % T::NI * 8);
    };
    Pieces<S> next[kNext];
#pragma unroll
    for (int k = 0; k < kNext; ++k) next[k] = read(lane + 32 * k);
#pragma unroll 1
    for (int u = lane; u < kUnits; u += 32) {
      const Pieces<S> residual = next[0];
#pragma unroll
      for (int k = 1; k < kNext; ++k) next[k - 1] = next[k];
      next[kNext - 1] = read(u + 32 * kNext);
      if (!exists(u)) continue;
      const int m = row + u / T::NI, o = column + u % T::NI * 8;
      const Eight v = *reinterpret_cast<const Eight*>(rows + u / T::NI * T::kSumStride + u % T::NI * 8);
      if (p.partial)
        *reinterpret_cast<Eight*>(p.partial + (int64_t(simt::block_y()) * p.pixels + m) * p.columns + o) = v;
      else
        finish_eight<S>(p, m, o, v, bias_of<S>(p, o), residual);
    }
  }
};

// Adds up the parts of a split depth; one thread per eight outputs of a pixel.
template <class S>
LP_DEVICE void add_parts(const TensorConv& p, int64_t unit) {
  const int per_pixel = p.columns / 8;
  if (unit >= int64_t(p.pixels) * per_pixel) return;
  const int m = int(p.pixels_first ? unit % p.pixels : unit / per_pixel);
  const int o = int(p.pixels_first ? unit / p.pixels : unit % per_pixel) * 8;
  const bool in_rows = writes_rows(p);
  const Eight bias = in_rows ? bias_of<S>(p, o) : Eight{};
  const Pieces<S> residual = in_rows ? residual_of<S>(p, m, o) : Pieces<S>{};
  Eight sum = {};
  for (int s = 0; s < p.splits; ++s) {
    const Eight part = *reinterpret_cast<const Eight*>(p.partial + (int64_t(s) * p.pixels + m) * p.columns + o);
#pragma unroll
    for (int k = 0; k < 8; ++k) sum.v[k] += part.v[k];
  }
  if (in_rows)
    finish_eight<S>(p, m, o, sum, bias, residual);
  else
    finish_each<S>(p, m, o, sum);
}

}  // namespace cuda
}  // namespace lp
