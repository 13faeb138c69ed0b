// Winograd F(MxM, 3x3) with a tile in every lane, for maps of few channels: a vector holds one channel of 16 tiles, so that no
// lane is idle at any number of channels. Pixels are turned into such vectors four channels at a time, on the way into the
// transforms and on the way out. Forward and input gradient; and the weight gradient, whose products are summed lane by lane.
// AVX-512 only. Included once per instruction set (see simd.h).

#if defined(__AVX512F__)

constexpr int kTileLanes = 16, kLaneVectors = 2;  // tiles of a vector; vectors that go through a product together
constexpr int64_t kMostLaneChannels = 24;         // on either side: more fill vectors as they are

// The pixels of 16 tiles' patches, Size by Size; what lies outside of the map is elsewhere.
template <int Size>
struct LanePixels {
  float* at[Size * Size][kTileLanes];
};

struct LaneGrid {
  int64_t tiles_h, tiles_w, tiles;  // of an image, an image, and all
};

static LaneGrid lane_grid(const TapConv& p, int M) {
  const int64_t h = (p.rows + M - 1) / M, w = (p.cols + M - 1) / M;
  return {h, w, p.n * h * w};
}

// Where 16 tiles are: their image, and their row and column of tiles; and how many of them there are.
struct LaneTiles {
  alignas(64) int64_t image[kTileLanes], row[kTileLanes], col[kTileLanes];
  int64_t count;
};

static __attribute__((noinline)) void place_lanes(const LaneGrid& grid, int64_t first, LaneTiles& tiles) {
  int64_t col = first % grid.tiles_w, row = first / grid.tiles_w % grid.tiles_h, n = first / (grid.tiles_w * grid.tiles_h);
  tiles.count = std::clamp<int64_t>(grid.tiles - first, 0, kTileLanes);
  for (int t = 0; t < kTileLanes; ++t) {
    tiles.image[t] = n;
    tiles.row[t] = row;
    tiles.col[t] = col;
    const bool last_col = ++col == grid.tiles_w, last_row = last_col && row + 1 == grid.tiles_h;
    col = last_col ? 0 : col;
    row = last_row ? 0 : row + last_col;
    n += last_row;
  }
}

// Patches begin at (first_h, first_w) from their tile's first pixel, which lies M pixels from that of the next tile.
template <int M, int Size>
static __attribute__((noinline)) void lane_pixels(const LaneTiles& tiles, const View& x, int64_t channel, int64_t height,
                                                  int64_t width, int64_t first_h, int64_t first_w, float* elsewhere,
                                                  LanePixels<Size>& pixels) {
  const __m512i other = _mm512_set1_epi64(reinterpret_cast<int64_t>(elsewhere));
  for (int half = 0; half < kTileLanes; half += 8) {
    const auto along = [&](const int64_t* index, int64_t first) {
      return _mm512_add_epi64(_mm512_mullo_epi64(_mm512_load_si512(index + half), _mm512_set1_epi64(M)),
                              _mm512_set1_epi64(first));
    };
    const auto times = [](__m512i v, int64_t step) { return _mm512_mullo_epi64(v, _mm512_set1_epi64(step * 4)); };
    const __m512i h = along(tiles.row, first_h), w = along(tiles.col, first_w);
    const __m512i origin = _mm512_set1_epi64(reinterpret_cast<int64_t>(x.data) + channel * 4);
    const __m512i base = _mm512_add_epi64(_mm512_add_epi64(times(_mm512_load_si512(tiles.image + half), x.n), times(h, x.h)),
                                          _mm512_add_epi64(times(w, x.w), origin));
    const __mmask8 there = __mmask8((1u << std::clamp<int64_t>(tiles.count - half, 0, 8)) - 1);
    const auto inside = [](__m512i at, int step, int64_t size) {  // one comparison: what is negative is large
      return _mm512_cmplt_epu64_mask(_mm512_add_epi64(at, _mm512_set1_epi64(step)), _mm512_set1_epi64(size));
    };
    __mmask8 cols[Size];
    for (int j = 0; j < Size; ++j) cols[j] = inside(w, j, width);
    for (int i = 0; i < Size; ++i) {
      const __mmask8 row = inside(h, i, height) & there;
      for (int j = 0; j < Size; ++j)
        _mm512_storeu_si512(pixels.at[i * Size + j] + half,
                            _mm512_mask_add_epi64(other, row & cols[j], base, _mm512_set1_epi64((i * x.h + j * x.w) * 4)));
    }
  }
}

// Cache lines that are needed soon, fetched a few at a time between products: tiles jump about in their rows.
class LinesAhead {
 public:
  // Of the rows of tiles from that of tile `first` to that of tile `last`, in `shares` shares.
  LinesAhead(const LaneGrid& grid, const View& x, int64_t M, int64_t first, int64_t last, int64_t shares)
      : at_(row(grid, x, M, first)), end_(row(grid, x, M, last)), share_(((end_ - at_) / 64 / shares + 1) * 64) {}
  template <int Write>
  void fetch() {
    for (const char* const stop = std::min(end_, at_ + share_); at_ < stop; at_ += 64) __builtin_prefetch(at_, Write);
  }

 private:
  static const char* row(const LaneGrid& grid, const View& x, int64_t M, int64_t tile) {
    const int64_t line = std::min(tile, grid.tiles) / grid.tiles_w, n = line / grid.tiles_h;
    return static_cast<const char*>(x.data) + (n * x.n + line % grid.tiles_h * M * x.h) * 4;
  }
  const char *at_, *end_;
  int64_t share_;
};

// Neighbours of two vectors one after the other, by 4 or 8 bytes within 16. With a mask of all lanes, because GCC warns of what
// the plain ones leave undefined.
static inline __m512 low_words(__m512 a, __m512 b) { return _mm512_maskz_unpacklo_ps(0xffff, a, b); }
static inline __m512 high_words(__m512 a, __m512 b) { return _mm512_maskz_unpackhi_ps(0xffff, a, b); }
static inline __m512 low_pairs(__m512 a, __m512 b) {
  return _mm512_castpd_ps(_mm512_maskz_unpacklo_pd(0xff, _mm512_castps_pd(a), _mm512_castps_pd(b)));
}
static inline __m512 high_pairs(__m512 a, __m512 b) {
  return _mm512_castpd_ps(_mm512_maskz_unpackhi_pd(0xff, _mm512_castps_pd(a), _mm512_castps_pd(b)));
}

// Four channels of four tiles in each vector to one channel of 16 tiles in each, and back.
static inline __attribute__((always_inline)) void turn_lanes(__m512* r) {
  const __m512 a = low_words(r[0], r[1]), b = high_words(r[0], r[1]), c = low_words(r[2], r[3]), d = high_words(r[2], r[3]);
  r[0] = low_pairs(a, c);
  r[1] = high_pairs(a, c);
  r[2] = low_pairs(b, d);
  r[3] = high_pairs(b, d);
}
static inline __attribute__((always_inline)) __m512 four_blocks(const float* a, const float* b, const float* c,
                                                                const float* d) {
  __m512 r = _mm512_castps128_ps512(_mm_loadu_ps(a));
  r = _mm512_insertf32x4(r, _mm_loadu_ps(b), 1);
  r = _mm512_insertf32x4(r, _mm_loadu_ps(c), 2);
  return _mm512_insertf32x4(r, _mm_loadu_ps(d), 3);
}
static inline __attribute__((always_inline)) void load_lanes(float* const* p, int64_t channel, __m512* r) {
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) r[k] = four_blocks(p[k] + channel, p[k + 4] + channel, p[k + 8] + channel, p[k + 12] + channel);
  turn_lanes(r);
}
static inline __attribute__((always_inline)) void store_lanes(float* const* p, int64_t channel, __m512* r) {
  turn_lanes(r);
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    _mm_storeu_ps(p[k] + channel, _mm512_castps512_ps128(r[k]));
    _mm_storeu_ps(p[k + 4] + channel, _mm512_maskz_extractf32x4_ps(0xf, r[k], 1));
    _mm_storeu_ps(p[k + 8] + channel, _mm512_maskz_extractf32x4_ps(0xf, r[k], 2));
    _mm_storeu_ps(p[k + 12] + channel, _mm512_maskz_extractf32x4_ps(0xf, r[k], 3));
  }
}

// Patches of 16 tiles to their points: [point][channel], with steps in floats.
template <int In, int Out, class F>
static __attribute__((noinline)) void transform_lanes(const LanePixels<In>& pixels, int64_t channels, float* dst,
                                                      int64_t point_step, int64_t channel_step, const F& transform) {
  using V = Simd<float, 64>::reg;
  for (int64_t c = 0; c < channels; c += 4) {
    const int64_t first = std::min(c, channels - 4);  // the last four overlap those before
    V t[4][Out][In], out[Out];
    for (int j = 0; j < In; ++j) {
      V in[4][In];
#pragma GCC unroll 6
      for (int i = 0; i < In; ++i) {
        __m512 r[4];
        load_lanes(pixels.at[i * In + j], first, r);
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) in[k][i] = V(r[k]);
      }
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        transform(in[k], out);
#pragma GCC unroll 6
        for (int i = 0; i < Out; ++i) t[k][i][j] = out[i];
      }
    }
    for (int k = 0; k < 4; ++k)
#pragma GCC unroll 6
      for (int i = 0; i < Out; ++i) {
        transform(t[k][i], out);
        float* to = dst + (first + k) * channel_step + i * Out * point_step;
#pragma GCC unroll 6
        for (int j = 0; j < Out; ++j) store<V>(to + j * point_step, out[j]);
      }
  }
}

// products[o][vector][tile] = sum over channels of x[channel][vector][tile] * weight[channel][o]
template <int... I>
static inline __attribute__((always_inline)) void lane_product_body(const float* x, int64_t channels, const float* weight,
                                                                    int64_t weight_step, float* products,
                                                                    std::integer_sequence<int, I...>) {
  using V = Simd<float, 64>::reg;
  constexpr int NV = kLaneVectors, outputs = int(sizeof...(I)) / NV;
  V acc[sizeof...(I)] = {};
  for (int64_t c = 0; c < channels; ++c, x += NV * kTileLanes, weight += weight_step) {
    V in[NV], w[outputs];
    for (int v = 0; v < NV; ++v) in[v] = load<V>(x + v * kTileLanes);
    for (int o = 0; o < outputs; ++o) w[o] = in_register(V{} + weight[o]);
    ((acc[I] += in[I % NV] * w[I / NV]), ...);
  }
  (store<V>(products + I * kTileLanes, acc[I]), ...);
}
using LaneProductFn = void (*)(const float* x, int64_t channels, const float* weight, int64_t weight_step, float* products);
template <int Outputs>
static void lane_product(const float* x, int64_t channels, const float* weight, int64_t weight_step, float* products) {
  lane_product_body(x, channels, weight, weight_step, products, std::make_integer_sequence<int, Outputs * kLaneVectors>());
}
constexpr int64_t kLaneOutputs = 8;  // that go through a product together where they are there, else half as many
constexpr LaneProductFn kLaneProducts[] = {nullptr, lane_product<1>, lane_product<2>, lane_product<3>, lane_product<4>};

// Lanes of the panel that begins with this output.
static int64_t panel_step(int64_t outputs, int64_t panel) { return packed_width(outputs) - panel < kPanel ? 8 : kPanel; }

// Products of 16 tiles for four outputs back to pixels, shifted.
template <int M>
static __attribute__((noinline)) void output_lanes(const float* products, int64_t point_step, int64_t output_step,
                                                   int64_t first, const float* shift, const LanePixels<M>& pixels) {
  constexpr int N = M + 2;
  using V = Simd<float, 64>::reg;
  V y[M * M][4];
  for (int k = 0; k < 4; ++k, products += output_step) {
    const V add = V{} + (shift ? shift[first + k] : 0.0f);
    V t[M][N], in[N], out[M];
#pragma GCC unroll 6
    for (int j = 0; j < N; ++j) {
#pragma GCC unroll 6
      for (int i = 0; i < N; ++i) in[i] = load<V>(products + (i * N + j) * point_step);
      Winograd<M>::output(in, out);
#pragma GCC unroll 4
      for (int i = 0; i < M; ++i) t[i][j] = out[i];
    }
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
      Winograd<M>::output(t[i], out);
#pragma GCC unroll 4
      for (int j = 0; j < M; ++j) y[i * M + j][k] = out[j] + add;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M * M; ++i) {
    __m512 r[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) r[k] = __m512(y[i][k]);
    store_lanes(pixels.at[i], first, r);
  }
}

template <int M>
static void winograd_lanes(const TapConv& p, const Env& env) {
  constexpr int N = M + 2, points = N * N;
  constexpr int64_t tiles = kTileLanes * kLaneVectors;
  const int64_t channels = p.in_begin[1], outputs = p.out_begin[1];
  const LaneGrid grid = lane_grid(p, M);
  // Steps of whole pages fall into one cache set.
  const int64_t in_point = channels * tiles + kTileLanes, out_point = kLaneOutputs * tiles + kTileLanes;
  const int64_t elsewhere = round_up(std::max(channels, outputs), kPanel);
  const int64_t slot_floats = points * (in_point + out_point) + 2 * elsewhere;
  const int64_t tasks = (grid.tiles + tiles - 1) / tiles;
  float* const scratch = reinterpret_cast<float*>(
      aligned(static_cast<char*>(env.alloc(env.owner, size_t(task_slots(env, tasks) * slot_floats) * 4 + 64))));
  const float *weight = static_cast<const float*>(p.weight), *shift = static_cast<const float*>(p.shift);
  run_tasks(env, tasks, [&](int slot, int64_t task) {
    float* const x = scratch + slot * slot_floats;
    float *const products = x + points * in_point, *const zeros = products + points * out_point,
                 *const nowhere = zeros + elsewhere;
    memset(zeros, 0, size_t(elsewhere) * 4);
    LaneTiles places[kLaneVectors];
    for (int v = 0; v < kLaneVectors; ++v) {
      LanePixels<N> pixels;
      place_lanes(grid, task * tiles + v * kTileLanes, places[v]);
      lane_pixels<M>(places[v], p.x, p.in_channel[0], p.height, p.width, p.tap_h[0], p.tap_w[0], zeros, pixels);
      transform_lanes<N, N>(pixels, channels, x + v * kTileLanes, in_point, tiles,
                            [](const auto* in, auto* out) { Winograd<M>::input(in, out); });
    }
    // A few outputs at a time, so that their products stay in the L1 cache.
    LanePixels<M> pixels[kLaneVectors];
    for (int v = 0; v < kLaneVectors; ++v)
      lane_pixels<M>(places[v], p.out, p.out_channel[0], p.rows, p.cols, 0, 0, nowhere, pixels[v]);
    const int64_t shares = points * ((outputs + kLaneOutputs - 1) / kLaneOutputs);
    LinesAhead written(grid, p.out, M, task * tiles, (task + 1) * tiles, points);
    LinesAhead next_x(grid, p.x, M, (task + 1) * tiles, (task + 2) * tiles, shares);
    for (int64_t o = 0; o < outputs;) {
      const bool whole = o + kLaneOutputs <= outputs;  // within a panel
      const int64_t count = whole ? kLaneOutputs : kLaneOutputs / 2;
      const int64_t first = std::min(o, outputs - count), panel = first / kPanel * kPanel;
      const int64_t own = std::min<int64_t>(count, panel + kPanel - first), step = panel_step(outputs, panel);
      const float* const weights = weight + panel * channels * points + first - panel;
      const float* const more = weight + (panel + kPanel) * channels * points;
      for (int point = 0; point < points; ++point) {
        written.fetch<1>();
        next_x.fetch<0>();
        const float* const in = x + point * in_point;
        float* const out = products + point * out_point;
        if (whole) {
          lane_product<kLaneOutputs>(in, channels, weights + point * channels * step, step, out);
          continue;
        }
        kLaneProducts[own](in, channels, weights + point * channels * step, step, out);
        if (own < count) {
          const int64_t next = panel_step(outputs, panel + kPanel);
          kLaneProducts[count - own](in, channels, more + point * channels * next, next, out + own * tiles);
        }
      }
      for (int64_t k = 0; k < count; k += 4)
        for (int v = 0; v < kLaneVectors; ++v)
          output_lanes<M>(products + k * tiles + v * kTileLanes, out_point, tiles, first + k, shift, pixels[v]);
      o += count;
    }
  });
}

// Whether a convolution is one of those.
static bool lanes_fit(const TapConv& p, const View& out) {
  const int64_t channels = p.in_begin[1], outputs = p.out_begin[1];
  return std::min(channels, outputs) >= kLeastLaneChannels && std::max(channels, outputs) <= kMostLaneChannels && p.taps == 9 &&
         p.step_h == 1 && p.step_w == 1 && p.tap_h[3] - p.tap_h[0] == 1 && p.tap_w[1] - p.tap_w[0] == 1 && p.x.c == 1 &&
         out.c == 1 && !p.residual.data && !p.scale && p.act == Act::none && is_run(p.in_channel, channels) &&
         is_run(p.out_channel, outputs);
}

#else
constexpr int64_t kMostLaneChannels = 0;
#endif
