// Winograd F(MxM, RxR), stride 1, float32, as F(2x2, 3x3), F(4x4, 3x3) and F(2x2, 5x5): per block of output tiles, transform
// the input, multiply point by point with one panel group of transformed weights after the other, and transform back at once,
// while the products are in L2. A dilated convolution is one plain convolution per residue of the pixel's position. Included
// once per instruction set (see simd.h).

// One-dimensional transforms for M outputs over N = M + R - 1 inputs. N = 6 takes the points 0, +-sqrt(1/2), +-sqrt(2): their
// matrices are better conditioned than those of 0, +-1, +-2, and the error is about a quarter. The transform of the input
// depends on the points alone.
template <int M, int N = M + 2>
struct Winograd;

template <>
struct Winograd<2, 4> {
  template <class V>
  static inline __attribute__((always_inline)) void input(const V* d, V* o) {
    o[0] = d[0] - d[2];
    o[1] = d[1] + d[2];
    o[2] = d[2] - d[1];
    o[3] = d[3] - d[1];
  }
  template <class V>
  static inline __attribute__((always_inline)) void output(const V* m, V* y) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] + m[3];
  }
};

struct WinogradSix {
  template <class V>
  static inline __attribute__((always_inline)) void input(const V* d, V* o) {
    constexpr float a = 0.70710678118654752f, b = 1.41421356237309505f;
    const V e1 = d[4] - 2.0f * d[2], f1 = d[3] - 2.0f * d[1];
    const V e2 = d[4] - 0.5f * d[2], f2 = d[3] - 0.5f * d[1];
    o[0] = d[0] + (d[4] - 2.5f * d[2]);
    o[1] = e1 + a * f1;
    o[2] = e1 - a * f1;
    o[3] = e2 + b * f2;
    o[4] = e2 - b * f2;
    o[5] = d[1] + (d[5] - 2.5f * d[3]);
  }
};

template <>
struct Winograd<4, 6> : WinogradSix {
  template <class V>
  static inline __attribute__((always_inline)) void output(const V* m, V* y) {
    constexpr float a = 0.70710678118654752f, b = 1.41421356237309505f;
    constexpr float a3 = 0.35355339059327376f, b3 = 2.82842712474619010f;
    const V s1 = m[1] + m[2], d1 = m[1] - m[2], s2 = m[3] + m[4], d2 = m[3] - m[4];
    y[0] = m[0] + s1 + s2;
    y[1] = a * d1 + b * d2;
    y[2] = 0.5f * s1 + 2.0f * s2;
    y[3] = m[5] + a3 * d1 + b3 * d2;
  }
};

template <>
struct Winograd<2, 6> : WinogradSix {
  template <class V>
  static inline __attribute__((always_inline)) void output(const V* m, V* y) {
    constexpr float a = 0.70710678118654752f, b = 1.41421356237309505f;
    y[0] = m[0] + (m[1] + m[2]) + (m[3] + m[4]);
    y[1] = m[5] + a * (m[1] - m[2]) + b * (m[3] - m[4]);
  }
};

// Transformed inputs lie as [group of tiles][point][block of 16 channels][tile of the group][16], so that the product reads
// one stream. Strides are in floats.
constexpr int kChannelBlock = 16;
constexpr int kTileGroup = LP_REGISTERS == 32 ? 14 : LP_VECTOR_BYTES == 32 ? 12 : 6;

struct ChannelBlocks {
  int64_t blocks, last_begin, last_end;  // the last block holds the last 16 channels: it may overlap the one before
  int64_t point, group;                  // strides
};

static ChannelBlocks channel_blocks(int64_t channels, int64_t points) {
  ChannelBlocks b;
  b.blocks = (channels + kChannelBlock - 1) / kChannelBlock;
  b.last_end = b.blocks == 1 ? channels : kChannelBlock;
  b.last_begin = b.blocks == 1 ? 0 : b.blocks * kChannelBlock - channels;
  b.point = b.blocks * kTileGroup * kChannelBlock;
  if (b.point % 1024 == 0) b.point += kChannelBlock;  // strides of whole pages fall into one cache set
  b.group = b.point * points;
  return b;
}

template <int M, int N = M + 2>
static void winograd_input(const float* src, int64_t row, int64_t col, int64_t channels, const ChannelBlocks& b, float* dst) {
  using V = Simd<float, LP_VECTOR_BYTES>::reg;
  constexpr int L = Simd<float, LP_VECTOR_BYTES>::lanes;
  for (int64_t block = 0; block < b.blocks; ++block, dst += kTileGroup * kChannelBlock) {
    const float* from = src + std::min(block * kChannelBlock, std::max<int64_t>(0, channels - kChannelBlock));
    for (int v = 0; v < kChannelBlock; v += L) {
      V t[N][N], in[N], out[N];
#pragma GCC unroll 6
      for (int j = 0; j < N; ++j) {
#pragma GCC unroll 6
        for (int i = 0; i < N; ++i) in[i] = load<V>(from + i * row + j * col + v);
        Winograd<M, N>::input(in, out);
#pragma GCC unroll 6
        for (int i = 0; i < N; ++i) t[i][j] = out[i];
      }
#pragma GCC unroll 6
      for (int i = 0; i < N; ++i) {
        Winograd<M, N>::input(t[i], out);
#pragma GCC unroll 6
        for (int j = 0; j < N; ++j) store<V>(dst + (i * N + j) * b.point + v, out[j]);
      }
    }
  }
}

// products: [point][width] of one tile; y: [row * used_cols + col][width].
template <int M, int N = M + 2>
static void winograd_output(const float* products, int64_t width, int rows, int cols, float* y) {
  const auto run = [&](auto zero, int64_t v) __attribute__((always_inline)) {
    using V = decltype(zero);
    V t[M][N], in[N], out[M];
#pragma GCC unroll 6
    for (int j = 0; j < N; ++j) {
#pragma GCC unroll 6
      for (int i = 0; i < N; ++i) in[i] = load<V>(products + (i * N + j) * width + v);
      Winograd<M, N>::output(in, out);
#pragma GCC unroll 4
      for (int i = 0; i < M; ++i) t[i][j] = out[i];
    }
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
      Winograd<M, N>::output(t[i], out);
      if (i >= rows) return;
#pragma GCC unroll 4
      for (int j = 0; j < M; ++j)
        if (j < cols) store<V>(y + (i * cols + j) * width + v, out[j]);
    }
  };
  constexpr int L = Simd<float, LP_VECTOR_BYTES>::lanes;
  int64_t v = 0;
  for (; v + L <= width; v += L) run(Simd<float, LP_VECTOR_BYTES>::reg{}, v);
  if constexpr (L > 8)
    for (; v < width; v += 8) run(Simd<float, 32>::reg{}, v);
}

template <int Bytes, int W, int P, bool Tail, int MR, int... I>
static inline __attribute__((always_inline)) void product_body(const float* a, const ChannelBlocks& blocks, const float* weight,
                                                               int64_t panel_stride, float* out, int64_t out_stride,
                                                               std::integer_sequence<int, I...>) {
  using V = typename Simd<float, Bytes>::reg;
  constexpr int L = Simd<float, Bytes>::lanes, per_panel = W / L, NV = per_panel * P;
  V acc[MR * NV] = {};
  const float* panel[P];
  for (int i = 0; i < P; ++i) panel[i] = weight + i * panel_stride;
  for (int64_t block = blocks.blocks; block > 0; --block, a += kTileGroup * kChannelBlock) {
    const float* x = a + (block == 1 ? blocks.last_begin : 0);
    const float* const end = a + (block == 1 ? blocks.last_end : kChannelBlock);
    for (; x < end; ++x) {
      V b[NV];
      for (int v = 0; v < NV; ++v) b[v] = load_panel<V, Tail>(panel[v / per_panel] + v % per_panel * L, v == NV - 1);
      ((acc[I] += x[I / NV * kChannelBlock] * b[I % NV]), ...);
      for (int i = 0; i < P; ++i) panel[i] += Tail && i == P - 1 ? 8 : W;
    }
  }
  (store<V>(out + I / NV * out_stride + I % NV * L, acc[I]), ...);
}

using ProductFn = void (*)(const float* a, const ChannelBlocks& blocks, const float* weight, int64_t panel_stride, float* out,
                           int64_t out_stride);

template <int Bytes, int W, int P, bool Tail, int MR>
static void product(const float* a, const ChannelBlocks& blocks, const float* weight, int64_t panel_stride, float* out,
                    int64_t out_stride) {
  constexpr int NV = W / Simd<float, Bytes>::lanes * P;
  product_body<Bytes, W, P, Tail, MR>(a, blocks, weight, panel_stride, out, out_stride,
                                      std::make_integer_sequence<int, MR * NV>());
}

struct ProductSet {
  int max;
  ProductFn fn[16];
};

template <int W, int P, bool Tail, int MR>
static void fill_products(ProductSet& set) {
  constexpr int bytes = vector_bytes<float, W>(), vectors = W / Simd<float, bytes>::lanes * P;
  constexpr int limit = std::min(kTileGroup, max_rows(vectors));
  if constexpr (MR <= limit) {
    if constexpr (MR == limit || MR % 2 == 0 || MR == 1) set.fn[MR] = product<bytes, W, P, Tail, MR>;
    set.max = MR;
    fill_products<W, P, Tail, MR + 1>(set);
    if (!set.fn[MR]) set.fn[MR] = set.fn[MR + 1];
  }
}

template <int W, int P, bool Tail>
static const ProductSet& products() {
  static const ProductSet set = [] {
    ProductSet s{};
    fill_products<W, P, Tail, 1>(s);
    return s;
  }();
  return set;
}

// Which output tiles a task computes, and its cut through the panels of outputs.
struct TileBlocks {
  int64_t step_h, step_w;           // dilation
  int64_t tiles_h, tiles_w, tiles;  // per residue of an image; over all residues and images
  int64_t block, blocks, unit;      // most tiles per task; they are cut at multiples of `unit`
  int64_t panels, panels_per_task, splits;
  int64_t width;  // of the widest panel group

  int64_t begin(int64_t index) const { return std::min(tiles, (tiles + unit - 1) / unit * index / blocks * unit); }
};

static TileBlocks tile_blocks(const TapConv& p, int M, int N, int64_t channels, int64_t outputs, int threads) {
  TileBlocks b{};
  const int64_t points = N * N;
  b.step_h = p.tap_h[N - M + 1] - p.tap_h[0];
  b.step_w = p.tap_w[1] - p.tap_w[0];
  b.tiles_h = ((p.rows + b.step_h - 1) / b.step_h + M - 1) / M;
  b.tiles_w = ((p.cols + b.step_w - 1) / b.step_w + M - 1) / M;
  b.tiles = p.n * b.step_h * b.step_w * b.tiles_h * b.tiles_w;
  b.width = LP_REGISTERS == 32 ? 2 * kPanel : kPanel;
  const int64_t bytes = points * 4 * (round_up(channels, kChannelBlock) + b.width);
  // Inputs and products of a block stay in L2; deep layers rather share each weight among more tiles.
  const int64_t budget = LP_REGISTERS == 32 ? 384 * 1024 : 256 * 1024, least = channels > 320 ? 3 : LP_REGISTERS == 32 ? 2 : 1;
  const int64_t groups = std::max(least, budget / (bytes * kTileGroup));
  b.block = std::min<int64_t>(std::min<int64_t>(groups, 6) * kTileGroup, std::max<int64_t>(1, b.tiles));
  b.blocks = (b.tiles + b.block - 1) / b.block;
  b.unit = 1;
  const int64_t all = (b.tiles + kTileGroup - 1) / kTileGroup;
  if (threads > 1 && all >= 2 * threads) {
    // Whole groups, as many for each thread.
    b.unit = kTileGroup;
    b.blocks = std::min(all, round_up(b.blocks, threads));
  }
  const int64_t units = (b.tiles + b.unit - 1) / b.unit;
  b.block = (units + b.blocks - 1) / b.blocks * b.unit;
  b.panels = packed_width(outputs) / 8 / 2 + (packed_width(outputs) / 8) % 2;
  // Few tiles: threads share them and split the outputs; each transforms the tiles again.
  const int64_t wanted = threads > 1 && b.blocks < threads ? (threads + b.blocks - 1) / b.blocks : 1;
  const int64_t unit = b.width / kPanel;
  b.panels_per_task = round_up((b.panels + wanted - 1) / wanted, unit);
  b.splits = (b.panels + b.panels_per_task - 1) / b.panels_per_task;
  return b;
}

// The outputs of a tile: rows x cols pixels at the distance of the dilation, none for a residue that has fewer.
struct TilePlace {
  int64_t n, row0, col0;
  int rows, cols;
};
static TilePlace tile_place(const TapConv& p, const TileBlocks& t, int M, int64_t tile) {
  const int64_t row = tile / t.tiles_w % t.tiles_h * M, col = tile % t.tiles_w * M;
  const int64_t residue = tile / (t.tiles_h * t.tiles_w) % (t.step_h * t.step_w);
  TilePlace place{};
  place.n = tile / (t.tiles_h * t.tiles_w * t.step_h * t.step_w);
  place.row0 = residue / t.step_w + row * t.step_h;
  place.col0 = residue % t.step_w + col * t.step_w;
  const auto left = [M](int64_t size, int64_t at, int64_t step) {
    return int(std::max<int64_t>(0, std::min<int64_t>(M, (size - at + step - 1) / step)));
  };
  place.rows = left(p.rows, place.row0, t.step_h);
  place.cols = left(p.cols, place.col0, t.step_w);
  return place;
}

// Even groups instead of full ones and a stump.
struct TileGroups {
  int64_t rows, groups;
};
static TileGroups tile_groups(int64_t tiles) {
  TileGroups g;
  g.groups = (tiles + kTileGroup - 1) / kTileGroup;
  g.rows = (tiles + g.groups - 1) / g.groups;
  return g;
}

struct WinogradScratch {
  float *inputs, *products, *staged;
  PixelTable<float> table;
  int64_t* pixel_begin;  // per tile of the block, and the end
};

// A copy of the tile's input with its zero padding, dense channels.
static void stage_patch(const TapConv& p, const TileBlocks& t, int64_t n, int64_t h0, int64_t w0, int64_t size, int64_t channel,
                        int64_t channels, int64_t ld, float* patch) {
  if (ld > channels) memset(patch, 0, size_t(size * size * ld) * 4);
  for (int64_t i = 0; i < size; ++i)
    for (int64_t j = 0; j < size; ++j, patch += ld) {
      const int64_t h = h0 + i * t.step_h, w = w0 + j * t.step_w;
      if (h < 0 || h >= p.height || w < 0 || w >= p.width)
        memset(patch, 0, size_t(channels) * 4);
      else
        memcpy(patch, static_cast<const float*>(p.x.data) + n * p.x.n + h * p.x.h + w * p.x.w + channel, size_t(channels) * 4);
    }
}

template <int M, int N>
static void transform_block(const TapConv& p, const TileBlocks& t, const ChannelBlocks& cb, int64_t first, int64_t count,
                            const WinogradScratch& s) {
  const int64_t channels = p.in_begin[1];
  const int64_t ld = std::max<int64_t>(kChannelBlock, channels);
  const bool run = p.x.c == 1 && is_run(p.in_channel, channels);
  // Pixels of fewer channels than a block are read with the beginning of the next one, up to the end of the tensor.
  const int64_t limit = (p.n - 1) * p.x.n + (p.height - 1) * p.x.h + (p.width - 1) * p.x.w + channels - ld;
  const int64_t group_rows = tile_groups(count).rows, reach_h = (N - 1) * t.step_h, reach_w = (N - 1) * t.step_w;
  int64_t pixels = 0;
  for (int64_t i = 0; i < count; ++i) {
    const TilePlace at = tile_place(p, t, M, first + i);
    const int64_t n = at.n, h0 = at.row0 + p.tap_h[0], w0 = at.col0 + p.tap_w[0];
    float* dst = s.inputs + i / group_rows * cb.group + i % group_rows * kChannelBlock;
    const bool inside = h0 >= 0 && w0 >= 0 && h0 + reach_h < p.height && w0 + reach_w < p.width;
    if (run && inside && n * p.x.n + (h0 + reach_h) * p.x.h + (w0 + reach_w) * p.x.w <= limit) {
      const float* src = static_cast<const float*>(p.x.data) + n * p.x.n + h0 * p.x.h + w0 * p.x.w + p.in_channel[0];
      winograd_input<M, N>(src, p.x.h * t.step_h, p.x.w * t.step_w, channels, cb, dst);
    } else {
      if (run)
        stage_patch(p, t, n, h0, w0, N, p.in_channel[0], channels, ld, s.staged);
      else
        stage_band(s.staged, static_cast<const float*>(p.x.data) + n * p.x.n, p.x, p.height, p.width, Axis{h0, t.step_h, N},
                   Axis{w0, t.step_w, N}, p.in_channel, channels, ld);
      winograd_input<M, N>(s.staged, N * ld, ld, channels, cb, dst);
    }
    s.pixel_begin[i] = pixels;
    for (int r = 0; r < at.rows; ++r)
      for (int c = 0; c < at.cols; ++c, ++pixels) {
        const int64_t row = at.row0 + r * t.step_h, col = at.col0 + c * t.step_w;
        s.table.out[pixels] = n * p.out.n + row * p.out.h + col * p.out.w;
        s.table.residual[pixels] = n * p.residual.n + row * p.residual.h + col * p.residual.w;
      }
  }
  s.pixel_begin[count] = pixels;
}

template <int M, int N, int W, int P, bool Tail = false>
static void run_products(const TapConv& p, const TileBlocks& t, const ChannelBlocks& cb, int64_t first, int64_t count,
                         int64_t panel, const WinogradScratch& s) {
  constexpr int points = N * N, width = W * P;
  const ProductSet& set = products<W, P, Tail>();
  const int64_t group_rows = tile_groups(count).rows;
  const int64_t channels = p.in_begin[1], depth = points * channels, first_output = panel * kPanel;
  const float* weight = static_cast<const float*>(p.weight) + first_output * depth;
  for (int point = 0; point < points; ++point, weight += channels * W) {
    const int64_t to_next = kPanel * depth - (Tail ? point * channels * 8 : 0);  // a tail is half as long per point
    for (int64_t begin = 0; begin < count; begin += group_rows) {
      const int64_t used = std::min<int64_t>(group_rows, count - begin), calls = (used + set.max - 1) / set.max;
      const float* a = s.inputs + begin / group_rows * cb.group + point * cb.point;
      for (int64_t c = 0; c < calls; ++c) {
        const int64_t row = used * c / calls, size = used * (c + 1) / calls - row;
        set.fn[size](a + row * kChannelBlock, cb, weight, to_next, s.products + ((begin + row) * points + point) * width,
                     points * width);
      }
    }
  }
  const int64_t outputs = std::min<int64_t>(width, p.out_begin[1] - first_output);
  const bool consecutive = is_run(p.out_channel + first_output, outputs);
  const bool dense = consecutive && p.out.c == 1;
  const float* near_row = dense ? static_cast<const float*>(p.out.data) + p.out_channel[first_output] : nullptr;
  alignas(64) float y[M * M * width];
  for (int64_t i = 0; i < count; ++i) {
    const TilePlace at = tile_place(p, t, M, first + i);
    if (near_row && i + 1 < count)  // the next tile's output lines, while this one is computed
      for (int64_t j = s.pixel_begin[i + 1]; j < s.pixel_begin[i + 2]; ++j) {
        __builtin_prefetch(near_row + s.table.out[j], 1);
        if constexpr (width > 16) __builtin_prefetch(near_row + s.table.out[j] + 16, 1);
      }
    winograd_output<M, N>(s.products + i * points * width, width, at.rows, at.cols, y);
    epilogue<float, float>(p, y, width, s.table, s.pixel_begin[i], at.rows * at.cols, first_output, outputs, consecutive);
  }
}

template <int M, int N>
static void winograd_tiles(const TapConv& p, const Env& env) {
  const int64_t channels = p.in_begin[1], outputs = p.out_begin[1];
  if (p.n == 0 || p.rows == 0 || p.cols == 0 || outputs == 0) return;
  const TileBlocks t = tile_blocks(p, M, N, channels, outputs, env.threads);
  const ChannelBlocks cb = channel_blocks(channels, N * N);
  const int64_t groups = (t.block + kTileGroup - 1) / kTileGroup;
  const int64_t input_bytes = round_up((groups * cb.group + kChannelBlock) * 4, 64);
  const int64_t product_bytes = round_up(groups * kTileGroup * N * N * t.width * 4, 64);
  const int64_t staged_bytes = round_up((N * N * std::max<int64_t>(kChannelBlock, channels) + kChannelBlock) * 4, 64);
  const int64_t pixels = t.block * M * M;
  const int64_t slot_bytes = input_bytes + product_bytes + staged_bytes + round_up((2 * pixels + t.block + 1) * 8, 64) + 64;
  const int64_t tasks = t.blocks * t.splits;
  const int64_t slots = std::min<int64_t>(env.threads, tasks);
  char* scratch = aligned(static_cast<char*>(env.alloc(env.owner, size_t(slots * slot_bytes + 64))));
  run_tasks(env, tasks, [&](int slot, int64_t index) {
    char* base = scratch + slot * slot_bytes;
    WinogradScratch s;
    s.inputs = reinterpret_cast<float*>(base);
    s.products = reinterpret_cast<float*>(base + input_bytes);
    s.staged = reinterpret_cast<float*>(base + input_bytes + product_bytes);
    s.table.in = nullptr;
    s.table.out = reinterpret_cast<int64_t*>(base + input_bytes + product_bytes + staged_bytes);
    s.table.residual = s.table.out + pixels;
    s.pixel_begin = s.table.residual + pixels;
    const int64_t first = t.begin(index / t.splits), count = t.begin(index / t.splits + 1) - first;
    transform_block<M, N>(p, t, cb, first, count, s);
    const int64_t begin = index % t.splits * t.panels_per_task, end = std::min(t.panels, begin + t.panels_per_task);
    const int64_t rest = outputs % kPanel, full = outputs / kPanel + (rest > 8);
    int64_t panel = begin;
    if constexpr (LP_REGISTERS == 32)
      for (; panel + 2 <= std::min(end, full); panel += 2) run_products<M, N, 16, 2>(p, t, cb, first, count, panel, s);
    if (kTailBeside && panel + 2 == end && end > full) {
      run_products<M, N, 16, kTailBeside ? 2 : 1, kTailBeside>(p, t, cb, first, count, panel, s);
      panel = end;
    }
    for (; panel < std::min(end, full); ++panel) run_products<M, N, 16, 1>(p, t, cb, first, count, panel, s);
    if (panel < end) run_products<M, N, 8, 1>(p, t, cb, first, count, panel, s);
  });
}

static void winograd(const TapConv& p, int tile, const Env& env) {
  if (p.taps == 25) return winograd_tiles<2, 6>(p, env);
  tile == 2 ? winograd_tiles<2, 4>(p, env) : winograd_tiles<4, 6>(p, env);
}
