// What training adds to Winograd F(MxM, 3x3): the weight transform of every step, and the weight gradient in the same
// domain. y = A^T [(G g G^T) . (B^T d B)] A, so dL/dg = G^T [(A dy A^T) . (B^T d B)] G, summed over all tiles: one matrix
// product per point. Included once per instruction set (see simd.h).

template <int M>
struct WinogradAdjoint;

template <>
struct WinogradAdjoint<2> {
  // G: three taps to the points, and its transpose.
  template <class V>
  static inline __attribute__((always_inline)) void weight(const V* g, V* o) {
    const V s = 0.5f * (g[0] + g[2]), d = 0.5f * g[1];
    o[0] = g[0];
    o[1] = s + d;
    o[2] = s - d;
    o[3] = g[2];
  }
  template <class V>
  static inline __attribute__((always_inline)) void weight_grad(const V* u, V* g) {
    const V s = 0.5f * (u[1] + u[2]);
    g[0] = u[0] + s;
    g[1] = 0.5f * (u[1] - u[2]);
    g[2] = s + u[3];
  }
  // A: the transpose of the output transform.
  template <class V>
  static inline __attribute__((always_inline)) void grad(const V* y, V* o) {
    o[0] = y[0];
    o[1] = y[0] + y[1];
    o[2] = y[0] - y[1];
    o[3] = y[1];
  }
};

template <>
struct WinogradAdjoint<4> {
  static constexpr float a = 0.70710678118654752f, b = 1.41421356237309505f;
  template <class V>
  static inline __attribute__((always_inline)) void weight(const V* g, V* o) {
    const V e = (-1 / 1.5f) * (g[0] + 0.5f * g[2]), f = (-a / 1.5f) * g[1];
    const V h = (1 / 6.0f) * (g[0] + 2.0f * g[2]), i = (b / 6) * g[1];
    o[0] = g[0];
    o[1] = e + f;
    o[2] = e - f;
    o[3] = h + i;
    o[4] = h - i;
    o[5] = g[2];
  }
  template <class V>
  static inline __attribute__((always_inline)) void weight_grad(const V* u, V* g) {
    const V s1 = (1 / 1.5f) * (u[1] + u[2]), d1 = (a / 1.5f) * (u[1] - u[2]);
    const V s2 = (1 / 6.0f) * (u[3] + u[4]), d2 = (b / 6) * (u[3] - u[4]);
    g[0] = u[0] + (s2 - s1);
    g[1] = d2 - d1;
    g[2] = u[5] + (2.0f * s2 - 0.5f * s1);
  }
  template <class V>
  static inline __attribute__((always_inline)) void grad(const V* y, V* o) {
    constexpr float a3 = 0.35355339059327376f, b3 = 2.82842712474619010f;
    const V e1 = y[0] + 0.5f * y[2], f1 = a * y[1] + a3 * y[3];
    const V e2 = y[0] + 2.0f * y[2], f2 = b * y[1] + b3 * y[3];
    o[0] = y[0];
    o[1] = e1 + f1;
    o[2] = e1 - f1;
    o[3] = e2 + f2;
    o[4] = e2 - f2;
    o[5] = y[3];
  }
};

// ---- weights -------------------------------------------------------------------------------------------------------

// Eight channels at a time through a buffer: the points of one channel lie a power of two apart, in one cache set.
template <int M, int Step>
static void winograd_weight_panel(const PanelSource<float>& w, int64_t panel, int64_t begin, int64_t end) {
  constexpr int N = M + 2, run = 8;
  const int64_t first = panel * kPanel, count = std::min<int64_t>(Step, w.lanes - first);
  float* const dst = w.out + first * w.reds * N * N;
  alignas(64) float taps[9][Step] = {};
  alignas(64) float points[N * N][run][Step];
  for (int64_t r = begin; r < end; ++r) {
    const float* src = w.weight + w.red_at[r];
    const float scale = w.red_scale ? w.red_scale[r] : 1.0f;
    for (int64_t i = 0; i < count; ++i) {
      const float* from = src + w.lane_at[first + i];
      const float factor = w.lane_scale ? scale * w.lane_scale[first + i] : scale;
#pragma GCC unroll 9
      for (int t = 0; t < 9; ++t) taps[t][i] = from[w.tap_at[t]] * factor;
    }
    using V = typename Simd<float, vector_bytes<float, Step>()>::reg;
    constexpr int L = sizeof(V) / 4;
    for (int64_t v = 0; v < Step; v += L) {
      V t[N][3], in[3], out[N];
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j) {
        for (int i = 0; i < 3; ++i) in[i] = load<V>(&taps[i * 3 + j][v]);
        WinogradAdjoint<M>::weight(in, out);
#pragma GCC unroll 6
        for (int i = 0; i < N; ++i) t[i][j] = out[i];
      }
#pragma GCC unroll 6
      for (int i = 0; i < N; ++i) {
        WinogradAdjoint<M>::weight(t[i], out);
#pragma GCC unroll 6
        for (int j = 0; j < N; ++j) store<V>(&points[i * N + j][(r - begin) % run][v], out[j]);
      }
    }
    if (const int64_t filled = (r - begin) % run + 1; filled == run || r + 1 == end)
      for (int i = 0; i < N * N; ++i) memcpy(dst + (i * w.reds + r + 1 - filled) * Step, points[i], size_t(filled * Step) * 4);
  }
}

static void winograd_weight(const PanelSource<float>& w, int tile, const Env& env) {
  constexpr int64_t chunk = 32;
  const int64_t panels = (w.lanes + kPanel - 1) / kPanel, chunks = (w.reds + chunk - 1) / chunk;
  run_tasks(env, panels * chunks, [&](int, int64_t task) {
    const int64_t panel = task / chunks, begin = task % chunks * chunk, end = std::min(w.reds, begin + chunk);
    const bool narrow = packed_width(w.lanes) - panel * kPanel < kPanel;
    const auto run = tile == 2 ? (narrow ? winograd_weight_panel<2, 8> : winograd_weight_panel<2, 16>)
                               : (narrow ? winograd_weight_panel<4, 8> : winograd_weight_panel<4, 16>);
    run(w, panel, begin, end);
  });
}

// ---- weight gradient -----------------------------------------------------------------------------------------------

// Transformed tiles lie as [point][block of 16 channels][tile][16]: the product reads two or three streams.
struct TileBuffer {
  float* data;
  int64_t blocks, block, point;  // strides in floats
};

static TileBuffer tile_buffer(int64_t channels, int64_t tiles) {
  TileBuffer b{};
  b.blocks = (channels + kPanel - 1) / kPanel;
  b.block = tiles * kPanel;
  b.point = b.blocks * b.block;
  if (b.point % 1024 == 0) b.point += kPanel;  // strides of whole pages fall into one cache set
  return b;
}

template <int In, int Out, class F>
static void transform_tile(const float* src, int64_t row, int64_t col, const TileBuffer& b, int64_t tile, F&& transform) {
  using V = Simd<float, LP_VECTOR_BYTES>::reg;
  constexpr int L = Simd<float, LP_VECTOR_BYTES>::lanes;
  for (int64_t block = 0; block < b.blocks; ++block)
    for (int64_t v = 0; v < kPanel; v += L) {
      const float* from = src + block * kPanel + v;
      float* dst = b.data + block * b.block + tile * kPanel + v;
      V t[Out][In], in[In], out[Out];
#pragma GCC unroll 6
      for (int j = 0; j < In; ++j) {
#pragma GCC unroll 6
        for (int i = 0; i < In; ++i) in[i] = load<V>(from + i * row + j * col);
        transform(in, out);
#pragma GCC unroll 6
        for (int i = 0; i < Out; ++i) t[i][j] = out[i];
      }
#pragma GCC unroll 6
      for (int i = 0; i < Out; ++i) {
        transform(t[i], out);
#pragma GCC unroll 6
        for (int j = 0; j < Out; ++j) store<V>(dst + (i * Out + j) * b.point, out[j]);
      }
    }
}

// One image's tile at (h0, w0), size x size, where it lies or as a zero-padded copy.
struct Patch {
  const float* at;
  int64_t row, col;
};

static Patch tile_patch(const View& x, int64_t n, int64_t height, int64_t width, int64_t h0, int64_t w0, int64_t size,
                        const int64_t* channel, int64_t channels, bool in_place, float* staged) {
  const float* image = static_cast<const float*>(x.data) + n * x.n;
  if (in_place && h0 >= 0 && w0 >= 0 && h0 + size <= height && w0 + size <= width)
    return {image + h0 * x.h + w0 * x.w + channel[0], x.h, x.w};
  const int64_t ld = round_up(channels, kPanel);
  if (in_place) {
    float* dst = staged;
    for (int64_t i = h0; i < h0 + size; ++i)
      for (int64_t j = w0; j < w0 + size; ++j, dst += ld) {
        if (i < 0 || i >= height || j < 0 || j >= width)
          memset(dst, 0, size_t(ld) * 4);
        else
          memcpy(dst, image + i * x.h + j * x.w + channel[0], size_t(ld) * 4);
      }
  } else {
    stage_band(staged, image, x, height, width, Axis{h0, 1, size}, Axis{w0, 1, size}, channel, channels, ld);
  }
  return {staged, size * ld, ld};
}

constexpr int kGradRows = LP_REGISTERS == 32 ? 8 : 4;  // divides the 16 channels of a block

// sums[j][lane] (+)= sum over tiles of x[tile][j] * grad[panel][tile][lane]
template <int P, int... I>
static inline __attribute__((always_inline)) void winograd_grad_body(const float* x, const float* grad, int64_t grad_panel,
                                                                     int64_t tiles, float* sums, int64_t sums_panel, bool add,
                                                                     std::integer_sequence<int, I...>) {
  using V = Simd<float, LP_VECTOR_BYTES>::reg;
  constexpr int L = Simd<float, LP_VECTOR_BYTES>::lanes, per_panel = int(kPanel) / L, NV = per_panel * P;
  V acc[kGradRows * NV] = {};
  for (int64_t t = 0; t < tiles; ++t, x += kPanel, grad += kPanel) {
    V b[NV];
    for (int v = 0; v < NV; ++v) b[v] = load<V>(grad + v / per_panel * grad_panel + v % per_panel * L);
    ((acc[I] += x[I / NV] * b[I % NV]), ...);
  }
  const auto put = [&](int j, int v, V value) {
    float* at = sums + v / per_panel * sums_panel + j * kPanel + v % per_panel * L;
    store<V>(at, add ? load<V>(at) + value : value);
  };
  (put(I / NV, I % NV, acc[I]), ...);
}

template <int P>
static void winograd_grad_product(const float* x, const float* grad, int64_t grad_panel, int64_t tiles, float* sums,
                                  int64_t sums_panel, bool add) {
  constexpr int NV = int(kPanel) / Simd<float, LP_VECTOR_BYTES>::lanes * P;
  winograd_grad_body<P>(x, grad, grad_panel, tiles, sums, sums_panel, add, std::make_integer_sequence<int, kGradRows * NV>());
}

// One point: all rows of x by the panels [first, last) of grad.
static void winograd_grad_point(const float* x, int64_t x_block, int64_t rows, const float* grad, int64_t grad_block,
                                int64_t panels, int64_t tiles, float* sums, int64_t sums_panel, bool add) {
  constexpr int wide = LP_REGISTERS == 32 ? 2 : 1;
  for (int64_t panel = 0; panel < panels;) {
    const bool two = wide == 2 && panel + 2 <= panels;
    for (int64_t c = 0; c < rows; c += kGradRows) {
      const float* from = x + c / kPanel * x_block + c % kPanel;
      float* to = sums + panel * sums_panel + c * kPanel;
      two ? winograd_grad_product<wide>(from, grad + panel * grad_block, grad_block, tiles, to, sums_panel, add)
          : winograd_grad_product<1>(from, grad + panel * grad_block, grad_block, tiles, to, sums_panel, add);
    }
    panel += two ? 2 : 1;
  }
}

// Sums over all pixels of 16 outputs' gradients.
static void sum_panel(const View& grad, const TapConv& p, const int64_t* channel, int64_t count, float* sums) {
  double total[kPanel] = {};
  for (int64_t n = 0; n < p.n; ++n)
    for (int64_t r = 0; r < p.rows; ++r) {
      const float* row = static_cast<const float*>(grad.data) + n * grad.n + r * grad.h;
      for (int64_t i = 0; i < count; ++i)
        for (int64_t c = 0; c < p.cols; ++c) total[i] += row[channel[i] * grad.c + c * grad.w];
    }
  for (int64_t i = 0; i < kPanel; ++i) sums[i] = float(total[i]);
}

// Tiles per pass: the transformed tiles, and if possible the sums, stay in L2; where the sums do not, each is read and
// written once per pass, so that passes must be long.
static int64_t tiles_per_pass(int64_t points, int64_t channels, int64_t outputs, int64_t tiles, int threads) {
  const int64_t per_tile = points * 4 * (round_up(channels, kPanel) + round_up(outputs, kPanel));
  const int64_t sums = points * 4 * channels * outputs, budget = 640 * 1024;
  const int64_t fit = sums < budget / 2 ? (budget - sums) / per_tile : budget / per_tile;
  const int64_t least = sums > budget ? 64 : 32;
  const int64_t wanted = std::max(least, std::min<int64_t>(fit, 128)) * threads;
  const int64_t passes = (tiles + wanted - 1) / wanted;
  return (tiles + passes - 1) / passes;
}

// Sums of `panels` of 16 outputs at the points back to nine taps, in the layout of the direct kernel's partial sums.
template <int M>
static void points_to_taps(const float* sums, int64_t sums_point, int64_t sums_panel, int64_t panels, int64_t channels,
                           float* partial, const Env& env) {
  constexpr int N = M + 2;
  run_tasks(env, panels, [&](int, int64_t panel) {
    using V = Simd<float, LP_VECTOR_BYTES>::reg;
    constexpr int L = Simd<float, LP_VECTOR_BYTES>::lanes;
    float* const dst = partial + panel * kPanel * channels * 9;
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t v = 0; v < kPanel; v += L) {
        const float* from = sums + panel * sums_panel + c * kPanel + v;
        V t[3][N], in[N], out[3];
#pragma GCC unroll 6
        for (int j = 0; j < N; ++j) {
#pragma GCC unroll 6
          for (int i = 0; i < N; ++i) in[i] = load<V>(from + (i * N + j) * sums_point);
          WinogradAdjoint<M>::weight_grad(in, out);
          for (int i = 0; i < 3; ++i) t[i][j] = out[i];
        }
        for (int i = 0; i < 3; ++i) {
          WinogradAdjoint<M>::weight_grad(t[i], out);
          for (int j = 0; j < 3; ++j) store<V>(dst + ((i * 3 + j) * channels + c) * kPanel + v, out[j]);
        }
      }
  });
}

template <int M>
static void winograd_weight_grad_tiles(const TapWeightGrad& w, const Env& env) {
  constexpr int N = M + 2, points = N * N;
  const TapConv& p = w.conv;
  const int64_t channels = p.in_begin[1], outputs = p.out_begin[1], rows = round_up(channels, kGradRows);
  const int64_t tiles_h = (p.rows + M - 1) / M, tiles_w = (p.cols + M - 1) / M, tiles = p.n * tiles_h * tiles_w;
  const int64_t panels = (outputs + kPanel - 1) / kPanel;
  float* const partial = static_cast<float*>(w.partial);
  if (w.wants_sums)
    run_tasks(env, panels, [&](int, int64_t panel) {
      sum_panel(w.grad, p, p.out_channel + panel * kPanel, std::min(kPanel, outputs - panel * kPanel),
                partial + w.sum_begin[0] + panel * kPanel);
    });
  if (tiles == 0 || channels == 0) return;
#if defined(__AVX512F__)
  if (lanes_fit(p, w.grad)) {
    const int64_t panel = channels * kPanel, point = panels * panel;
    float* const sums = static_cast<float*>(env.alloc(env.owner, size_t(points * point) * 4));
    memset(sums, 0, size_t(points * point) * 4);  // of outputs that are not there too
    lane_grad_sums<M>(w, env, sums, point, panel);
    return points_to_taps<M>(sums, point, panel, panels, channels, partial, env);
  }
#endif

  // Outputs in portions, so that the sums of a portion do not outgrow the workspace.
  const int64_t limit = std::max<int64_t>(2, (int64_t(12) << 20) / (points * rows * kPanel * 4) / 2 * 2);
  const int64_t portions = (panels + limit - 1) / limit, portion = round_up((panels + portions - 1) / portions, 2);
  const int64_t pass = tiles_per_pass(points, channels, std::min(outputs, portion * kPanel), tiles, env.threads);
  TileBuffer x = tile_buffer(channels, pass), grad = tile_buffer(std::min(outputs, portion * kPanel), pass);
  const int64_t x_ld = round_up(channels, kPanel), staged = N * N * std::max(x_ld, grad.blocks * kPanel) + 2 * kPanel;
  const int64_t sums_panel = rows * kPanel, sums_point = std::min(panels, portion) * sums_panel;
  const int64_t slots = env.threads;
  const int64_t floats = points * (x.point + grad.point + sums_point) + slots * staged + 64;
  float* base = reinterpret_cast<float*>(aligned(static_cast<char*>(env.alloc(env.owner, size_t(floats) * 4 + 64))));
  x.data = base;
  grad.data = x.data + points * x.point;
  float* const sums = grad.data + points * grad.point;
  float* const stage = sums + points * sums_point;
  const bool x_in_place = p.x.c == 1 && channels % kPanel == 0 && is_run(p.in_channel, channels);

  for (int64_t first = 0; first < panels; first += portion) {
    const int64_t count = std::min(portion, panels - first), lanes = std::min(outputs - first * kPanel, count * kPanel);
    const int64_t* ids = p.out_channel + first * kPanel;
    grad.blocks = count;
    const bool grad_in_place = w.grad.c == 1 && lanes % kPanel == 0 && is_run(ids, lanes);
    for (int64_t begin = 0; begin < tiles; begin += pass) {
      const int64_t used = std::min(pass, tiles - begin);
      const bool keep_x = first > 0 && pass >= tiles;  // still there from the portion before
      constexpr int64_t chunk = 4;
      run_tasks(env, (used + chunk - 1) / chunk, [&](int slot, int64_t task) {
        float* buffer = stage + slot * staged;
        for (int64_t i = task * chunk; i < std::min(used, (task + 1) * chunk); ++i) {
          const int64_t tile = begin + i, n = tile / (tiles_h * tiles_w);
          const int64_t row0 = tile / tiles_w % tiles_h * M, col0 = tile % tiles_w * M;
          if (!keep_x) {
            const Patch a = tile_patch(p.x, n, p.height, p.width, row0 + p.tap_h[0], col0 + p.tap_w[0], N, p.in_channel,
                                       channels, x_in_place, buffer);
            transform_tile<N, N>(a.at, a.row, a.col, x, i, [](const auto* in, auto* out) { Winograd<M>::input(in, out); });
          }
          const Patch b = tile_patch(w.grad, n, p.rows, p.cols, row0, col0, M, ids, lanes, grad_in_place, buffer);
          transform_tile<M, N>(b.at, b.row, b.col, grad, i,
                               [](const auto* in, auto* out) { WinogradAdjoint<M>::grad(in, out); });
        }
      });
      run_tasks(env, points, [&](int, int64_t point) {
        winograd_grad_point(x.data + point * x.point, x.block, rows, grad.data + point * grad.point, grad.block, count, used,
                            sums + point * sums_point, sums_panel, begin > 0);
      });
    }
    points_to_taps<M>(sums, sums_point, sums_panel, count, channels, partial + first * kPanel * channels * 9, env);
  }
}

static void winograd_weight_grad(const TapWeightGrad& w, int tile, const Env& env) {
  tile == 2 ? winograd_weight_grad_tiles<2>(w, env) : winograd_weight_grad_tiles<4>(w, env);
}
