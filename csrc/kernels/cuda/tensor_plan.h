// What to launch for a convolution: free of CUDA calls, so that a test checks the same decisions without a GPU.
#pragma once
#include "tensor_layout.h"

namespace lp {
namespace cuda {

struct TileShape {
  int bm, bn, ch, warps_m, warps_n, stages;
  bool group;  // products of warp groups: 16-bit types on sm_90a
};

// Widths in steps of 8 where pruned layers lie, so that a ragged width costs little more than itself; low tiles for small maps.
constexpr TileShape kTiles[] = {
    {128, 128, 4, 2, 4, 4},
    {128, 112, 4, 4, 1, 4},
    {128, 104, 4, 4, 1, 4},
    {128, 96, 4, 4, 2, 4},
    {128, 80, 4, 4, 2, 4},
    {128, 64, 8, 4, 2, 3},
    {128, 56, 8, 4, 1, 3},
    {128, 48, 8, 4, 1, 3},
    {128, 40, 8, 4, 1, 3},
    {128, 32, 8, 4, 1, 3},
    {64, 64, 8, 2, 2, 4},
    {64, 40, 8, 4, 1, 4},
    {64, 24, 8, 4, 1, 4},
    {32, 64, 8, 2, 2, 4},
    {16, 64, 8, 1, 4, 4},
    // of warp groups
    {128, 256, 4, 8, 1, 6, true},
    {128, 192, 4, 8, 1, 6, true},
    {128, 128, 4, 8, 1, 6, true},
    {128, 104, 4, 8, 1, 6, true},
    {128, 96, 4, 8, 1, 6, true},
    {128, 80, 4, 8, 1, 6, true},
    {128, 64, 8, 8, 1, 4, true},
    {128, 56, 8, 8, 1, 4, true},
    {128, 48, 8, 8, 1, 4, true},
    {128, 40, 8, 8, 1, 4, true},
    {128, 32, 8, 8, 1, 4, true},
    {64, 128, 8, 4, 1, 4, true},
    {64, 64, 8, 4, 1, 5, true},
    {64, 40, 8, 4, 1, 5, true},
};
constexpr int kTileCount = int(sizeof(kTiles) / sizeof(kTiles[0]));

// Whether there is a kernel of this tile and type.
template <class S>
constexpr bool has_tile(int tile) {
#if defined(LP_FEW_TILES)  // for a quick check that everything compiles: one of each kind
  if (tile != 0 && tile != kTileCount - 1) return false;
#endif
  return !kTiles[tile].group || S::kLanes == 8;
}

template <class S, int I>
using TileAt =
    Tile<S, kTiles[I].bm, kTiles[I].bn, kTiles[I].ch, kTiles[I].warps_m, kTiles[I].warps_n, kTiles[I].stages, kTiles[I].group>;

struct Launch {
  int tile, splits, blocks_m, blocks_n;
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Relative time of a tile: products, traffic of its edges, and sums that leave it; times how often the chip must be filled.
// The weights are estimates: nobody has measured them. LIGHTNING_PRUNE_CUDA_TILE overrides the choice.
inline double launch_cost(const TileShape& t, int64_t pixels, int64_t columns, int64_t depth, int splits, int processors) {
  const int64_t blocks = divide_up(pixels, t.bm) * divide_up(columns, t.bn) * splits;
  const double rounds = double(divide_up(blocks, processors));
  const double steps = double(divide_up(divide_up(depth, t.ch), splits)) * t.ch;
  const double products = (t.group ? 0.5 : 1.0) * t.bm * t.bn;
  const double per_block = steps * (products + 40.0 * (t.bm + t.bn)) + 12.0 * t.bm * t.bn + 40000.0;
  const double adding = splits > 1 ? 60000.0 + 0.5 * double(pixels) * double(columns) * splits / processors : 0.0;
  return rounds * per_block + adding;
}

// `groups`: tiles of warp groups may be chosen; `tile` and `splits` fix the choice.
inline Launch choose_launch(int64_t pixels, int64_t columns, int64_t depth, int processors, bool groups, int tile = -1,
                            int splits = 0) {
  Launch best{0, 1, 0, 0};
  double least = -1;
  for (int i = 0; i < kTileCount; ++i) {
    if (tile >= 0 ? i != tile : kTiles[i].group && !groups) continue;
    const TileShape& t = kTiles[i];
    const int64_t steps = divide_up(depth, t.ch), blocks = divide_up(pixels, t.bm) * divide_up(columns, t.bn);
    for (int s = splits > 0 ? splits : 1; s <= (splits > 0 ? splits : 16); s *= 2) {
      if (s > 1 && splits == 0 && (steps < 4 * s || blocks * s > 2 * processors)) break;
      const double cost = launch_cost(t, pixels, columns, depth, s, processors);
      if (least < 0 || cost < least) {
        least = cost;
        const int used = int(divide_up(steps, divide_up(steps, s)));  // no part is empty
        best = Launch{i, used, int(divide_up(pixels, t.bm)), int(divide_up(columns, t.bn))};
      }
    }
  }
  return best;
}

inline bool aligned_rows(const View& v, const ConvShape& s, int64_t height, int64_t width, int lanes) {
  return v.c == 1 && reinterpret_cast<uintptr_t>(v.data) % 16 == 0 && (width == 1 || v.w % lanes == 0) &&
         (height == 1 || v.h % lanes == 0) && (s.n == 1 || v.n % lanes == 0);
}

// Offsets inside an image and numbers of pixels must fit 32 bits.
inline bool tensor_cores_take(const CompactForward& f) {
  const ConvShape& s = f.shape;
  const int64_t limit = int64_t(1) << 31, taps = s.kh * s.kw, span = int64_t(1) << 24;
  const auto fits = [&](const View& v, int64_t height, int64_t width) {
    return !v.data || (v.h >= 0 && v.w >= 0 && v.h * height < limit && v.w * width < limit);
  };
  return f.lanes > 0 && reinterpret_cast<uintptr_t>(f.tensor_weight) % 16 == 0 && f.dtype != DType::f64 && s.channels > 0 &&
         (s.groups > 1 ? taps <= 256 : s.kh <= kMostTaps && s.kw <= kMostTaps) && s.n * s.out_h * s.out_w < limit &&
         s.height * s.width * round_up(s.channels, 8) < limit && taps * round_up(s.channels, 8) < limit / 16 &&
         s.outputs < span && s.height < span && s.width < span && s.pad_h < span && s.pad_w < span && s.kh * s.dil_h < span &&
         s.kw * s.dil_w < span && fits(f.x, s.height, s.width) && fits(f.y, s.out_h, s.out_w) &&
         fits(f.residual, s.out_h, s.out_w);
}

// Whether the kernel can read x where it lies; otherwise a copy comes first (staged_view).
inline bool reads_in_place(const CompactForward& f) {
  return !f.in_index.index && aligned_rows(f.x, f.shape, f.shape.height, f.shape.width, f.lanes);
}

inline View staged_view(const CompactForward& f, void* memory) {
  const int64_t row = round_up(f.shape.channels, 8);
  return View{memory, f.shape.height * f.shape.width * row, 1, f.shape.width * row, row};
}
inline int64_t staged_elements(const CompactForward& f) {
  return f.shape.n * f.shape.height * f.shape.width * round_up(f.shape.channels, 8);
}

// `x` is f.x or the staged copy; `launch` from choose_launch, `partial` with splits * pixels * columns floats, or null.
inline TensorConv tensor_params(const CompactForward& f, const View& x, const Launch& launch, float* partial) {
  const ConvShape& s = f.shape;
  TensorConv p{};
  p.x = x.data, p.weight = f.tensor_weight, p.bias = f.bias, p.residual = f.residual.data, p.y = f.y.data;
  p.partial = partial, p.out_index = f.out_index.index;
  // The stride of a single row may be anything, and addresses beyond it, which are made but not read, keep to 16 bytes.
  p.x_n = s.n > 1 ? x.n : 0, p.x_h = s.height > 1 ? int(x.h) : 0, p.x_w = s.width > 1 ? int(x.w) : 0;
  p.y_n = f.y.n, p.y_c = f.y.c, p.y_h = int(f.y.h), p.y_w = int(f.y.w);
  p.r_n = f.residual.n, p.r_c = f.residual.c, p.r_h = int(f.residual.h), p.r_w = int(f.residual.w);
  p.height = int(s.height), p.width = int(s.width), p.out_h = int(s.out_h), p.out_w = int(s.out_w);
  p.pixels = int(s.n * s.out_h * s.out_w);
  p.channels = int(s.channels), p.chunks = int(round_up(s.channels, 8) / f.lanes);
  p.taps = int(s.kh * s.kw), p.kh = int(s.kh), p.kw = int(s.kw);
  const int step_chunks = kTiles[launch.tile].ch, step_taps = step_chunks / p.chunks;
  p.step.row = step_taps / p.kw, p.step.column = step_taps % p.kw, p.step.chunk = step_chunks % p.chunks;
  p.stride_h = int(s.stride_h), p.stride_w = int(s.stride_w), p.pad_h = int(s.pad_h), p.pad_w = int(s.pad_w);
  p.dil_h = int(s.dil_h), p.dil_w = int(s.dil_w);
  p.outputs = int(s.outputs), p.columns = int(round_up(s.outputs, 8)), p.y_channels = int(f.y_channels);
  p.splits = launch.splits, p.blocks_n = launch.blocks_n;
  p.steps_per_split = int(divide_up(divide_up(int64_t(p.taps) * p.chunks, kTiles[launch.tile].ch), launch.splits));
  p.act = f.act, p.bias_is_float = f.bias_is_float;
  p.bias_vector = reinterpret_cast<uintptr_t>(f.bias) % 16 == 0;
  p.y_vector = aligned_rows(f.y, s, s.out_h, s.out_w, f.lanes) && (s.outputs % 8 == 0 || f.y_has_room);
  p.r_vector = f.residual.data && aligned_rows(f.residual, s, s.out_h, s.out_w, f.lanes);
  const auto linear = [&](const View& v) {
    return (s.out_h == 1 || s.out_w == 1 || v.h == s.out_w * v.w) &&
           (s.n == 1 || (v.w > 0 && v.n == s.out_h * s.out_w * v.w)) && (s.out_w > 1 || s.out_h == 1 || v.h == v.w);
  };
  p.x_linear = p.taps == 1 && s.stride_h * s.stride_w == 1 && s.pad_h == 0 && s.pad_w == 0 && linear(x) && s.out_w > 1;
  p.y_linear = linear(f.y) && (!f.residual.data || linear(f.residual)) && s.out_w > 1;
  p.pixels_first = f.y.w < f.y.c;
  return p;
}

}  // namespace cuda
}  // namespace lp
