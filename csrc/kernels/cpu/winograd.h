// Winograd F(MxM, RxR), float32: per block of output tiles, transform the input, multiply point by point with one panel group
// of transformed weights after the other, and transform back at once, while the products are in L2. Stride 1 as F(2x2, 3x3),
// F(4x4, 3x3) and F(2x2, 5x5), a dilated convolution as one plain convolution per residue of the pixel's position; stride 2 as
// described at TileDomain. Included once per instruction set (see simd.h).

template <int Bytes, int W, int P, bool Tail, int MR, int... I>
static inline __attribute__((always_inline)) void product_body(const float* a, const ChannelBlocks& blocks, const float* weight,
                                                               int64_t panel_stride, int phases, int64_t ahead, float* out,
                                                               int64_t out_stride, std::integer_sequence<int, I...>) {
  using V = typename Simd<float, Bytes>::reg;
  constexpr int L = Simd<float, Bytes>::lanes, per_panel = W / L, NV = per_panel * P;
  V acc[MR * NV] = {};
  const float* panel[P];
  for (int i = 0; i < P; ++i) panel[i] = weight + i * panel_stride;
  for (; phases > 0; --phases, a += blocks.point) {
    const float* at = a;
    for (int64_t block = blocks.blocks; block > 0; --block, at += kTileGroup * kChannelBlock) {
      const float* x = at + (block == 1 ? blocks.last_begin : 0);
      const float* const end = at + (block == 1 ? blocks.last_end : kChannelBlock);
      for (; x < end; ++x) {
        V b[NV];
        for (int i = 0; i < P; ++i) __builtin_prefetch(panel[i] + ahead, 0, 2);
        for (int v = 0; v < NV; ++v) b[v] = load_panel<V, Tail>(panel[v / per_panel] + v % per_panel * L, v == NV - 1);
        ((acc[I] += x[I / NV * kChannelBlock] * b[I % NV]), ...);
        for (int i = 0; i < P; ++i) panel[i] += Tail && i == P - 1 ? 8 : W;
      }
    }
  }
  (store<V>(out + I / NV * out_stride + I % NV * L, acc[I]), ...);
}

using ProductFn = void (*)(const float* a, const ChannelBlocks& blocks, const float* weight, int64_t panel_stride, int phases,
                           int64_t ahead, float* out, int64_t out_stride);

template <int Bytes, int W, int P, bool Tail, int MR>
static void product(const float* a, const ChannelBlocks& blocks, const float* weight, int64_t panel_stride, int phases,
                    int64_t ahead, float* out, int64_t out_stride) {
  constexpr int NV = W / Simd<float, Bytes>::lanes * P;
  product_body<Bytes, W, P, Tail, MR>(a, blocks, weight, panel_stride, phases, ahead, out, out_stride,
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

// `taps`: points, counting each phase.
static TileBlocks tile_blocks(const TapConv& p, int M, int N, int64_t taps, int64_t channels, int64_t outputs, int threads) {
  TileBlocks b{};
  const int64_t points = N * N;
  b.step_h = b.step_w = 1;
  if (p.step_h == 1) {
    b.step_h = p.tap_h[N - M + 1] - p.tap_h[0];
    b.step_w = p.tap_w[1] - p.tap_w[0];
  }
  b.tiles_h = ((p.rows + b.step_h - 1) / b.step_h + M - 1) / M;
  b.tiles_w = ((p.cols + b.step_w - 1) / b.step_w + M - 1) / M;
  b.tiles = p.n * b.step_h * b.step_w * b.tiles_h * b.tiles_w;
  b.width = LP_REGISTERS == 32 ? 2 * kPanel : kPanel;
  const int64_t bytes = 4 * (taps * round_up(channels, kChannelBlock) + points * b.width);
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
  // As even as can be: a panel without a neighbour takes little more than half of the time of two.
  b.panels_per_task = (b.panels + wanted - 1) / wanted;
  b.splits = (b.panels + b.panels_per_task - 1) / b.panels_per_task;
  return b;
}

// The outputs of a tile: rows x cols pixels at the distance of the dilation, none for a residue that has fewer.
struct TilePlace {
  int64_t n, row0, col0;
  int rows, cols;
};
static void place_tiles(const TapConv& p, const TileBlocks& t, int M, int64_t first, int64_t count, TilePlace* place) {
  int64_t col = first % t.tiles_w, row = first / t.tiles_w % t.tiles_h;
  int64_t residue = first / (t.tiles_h * t.tiles_w) % (t.step_h * t.step_w);
  int64_t n = first / (t.tiles_h * t.tiles_w * t.step_h * t.step_w);
  const auto left = [M](int64_t size, int64_t at, int64_t step) {
    if (at + (M - 1) * step < size) return M;
    return at < size ? int((size - at + step - 1) / step) : 0;
  };
  for (int64_t i = 0; i < count; ++i, ++place) {
    place->n = n;
    place->row0 = row * M * t.step_h;
    place->col0 = col * M * t.step_w;
    if (residue > 0) {
      place->row0 += residue / t.step_w;
      place->col0 += residue % t.step_w;
    }
    place->rows = left(p.rows, place->row0, t.step_h);
    place->cols = left(p.cols, place->col0, t.step_w);
    if (++col < t.tiles_w) continue;
    col = 0;
    if (++row < t.tiles_h) continue;
    row = 0;
    if (++residue < t.step_h * t.step_w) continue;
    residue = 0;
    ++n;
  }
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
  TilePlace* places;
  // Where the outputs are not dense channels-last maps:
  PixelTable<float> table;
  int64_t* pixel_begin;  // per tile of the block, and the end
};

// The last vector of a pixel overlaps the one before; fewer channels than a block are followed by zeros.
static inline void stage_pixel(float* to, const float* from, int64_t channels) {
  using V = Simd<float, LP_VECTOR_BYTES>::reg;
  constexpr int64_t L = Simd<float, LP_VECTOR_BYTES>::lanes;
  if (channels < kChannelBlock)
    for (int64_t c = 0; c < kChannelBlock; c += L) store<V>(to + c, V{});
  if (channels < L) {
    LP_VECTOR_BYTES == 64 ? store<V>(to, load_part<V>(from, channels)) : void(memcpy(to, from, size_t(channels) * 4));
    return;
  }
  for (int64_t c = 0; c + L <= channels; c += L) store<V>(to + c, load<V>(from + c));
  if (channels % L > 0) store<V>(to + channels - L, load<V>(from + channels - L));
}

// A copy of the tile's input with its zero padding, whose pixels begin on cache lines.
static void stage_patch(const TapConv& p, const TileBlocks& t, int64_t n, int64_t h0, int64_t w0, int64_t size, int64_t channel,
                        int64_t channels, int64_t ld, float* patch) {
  for (int64_t i = 0; i < size; ++i)
    for (int64_t j = 0; j < size; ++j, patch += ld) {
      const int64_t h = h0 + i * t.step_h, w = w0 + j * t.step_w;
      if (h < 0 || h >= p.height || w < 0 || w >= p.width)
        memset(patch, 0, size_t(ld) * 4);
      else
        stage_pixel(patch, static_cast<const float*>(p.x.data) + n * p.x.n + h * p.x.h + w * p.x.w + channel, channels);
    }
}

// Fetches what a tile reads of channels-last maps that the one before it did not: between rows of tiles the hardware guesses
// nothing. Rows that it shares with the tiles above it are left out.
static void fetch_patch(const TapConv& p, const TileBlocks& t, const TilePlace& before, const TilePlace& at, int64_t window,
                        int64_t step, int64_t stride) {
  const int64_t h = at.row0 * stride + p.tap_h[0], w = at.col0 * stride + p.tap_w[0], shared = window - step;
  const int64_t known = at.n == before.n && at.row0 == before.row0 ? shared : 0;
  const int64_t first_row = std::max<int64_t>(0, h + shared * t.step_h), end_row = std::min(p.height, h + window * t.step_h);
  const int64_t first_col = std::max<int64_t>(0, w + known * t.step_w), end_col = std::min(p.width, w + window * t.step_w);
  const float* const from = static_cast<const float*>(p.x.data) + at.n * p.x.n + p.in_channel[0];
  for (int64_t i = first_row; i < end_row; i += t.step_h)
    for (int64_t j = first_col; j < end_col; j += t.step_w)
      for (int64_t c = 0; c < p.in_begin[1]; c += 16) __builtin_prefetch(from + i * p.x.h + j * p.x.w + c, 0, 2);
}

template <int M, int N, int S>
static void transform_block(const TapConv& p, const TileBlocks& t, const ChannelBlocks& cb, int64_t count,
                            const WinogradScratch& s) {
  constexpr int window = TileDomain<N, S>::window;
  const int64_t channels = p.in_begin[1];
  const bool run = p.x.c == 1 && is_run(p.in_channel, channels);
  const bool far = run && p.n * p.height * p.width * channels * 4 > kFarMap;
  const int64_t ld = run ? round_up(channels, kChannelBlock) : std::max<int64_t>(kChannelBlock, channels);
  // Pixels of fewer channels than a block are read with the beginning of the next one, up to the end of the tensor.
  const int64_t limit = (p.n - 1) * p.x.n + (p.height - 1) * p.x.h + (p.width - 1) * p.x.w + channels -
                        std::max<int64_t>(kChannelBlock, channels);
  const int64_t group_rows = tile_groups(count).rows, reach_h = (window - 1) * t.step_h;
  const int64_t reach_w = (window - 1) * t.step_w;
  const auto transform = [&](const float* src, int64_t row, int64_t col, float* dst) {
    if constexpr (S == 1)
      winograd_input<M, N>(src, row, col, channels, cb, dst);
    else
      winograd_strided_input<N>(src, row, col, channels, cb, dst);
  };
  for (int64_t i = 0; i < count; ++i) {
    const TilePlace& at = s.places[i];
    const int64_t n = at.n, h0 = at.row0 * S + p.tap_h[0], w0 = at.col0 * S + p.tap_w[0];
    float* dst = s.inputs + i / group_rows * cb.group + i % group_rows * kChannelBlock;
    if (far && i + 1 < count) fetch_patch(p, t, at, s.places[i + 1], window, M * S, S);
    const bool inside = h0 >= 0 && w0 >= 0 && h0 + reach_h < p.height && w0 + reach_w < p.width;
    if (run && inside && n * p.x.n + (h0 + reach_h) * p.x.h + (w0 + reach_w) * p.x.w <= limit) {
      const float* src = static_cast<const float*>(p.x.data) + n * p.x.n + h0 * p.x.h + w0 * p.x.w + p.in_channel[0];
      transform(src, p.x.h * t.step_h, p.x.w * t.step_w, dst);
    } else {
      if (run)
        stage_patch(p, t, n, h0, w0, window, p.in_channel[0], channels, ld, s.staged);
      else
        stage_band(s.staged, static_cast<const float*>(p.x.data) + n * p.x.n, p.x, p.height, p.width,
                   Axis{h0, t.step_h, window}, Axis{w0, t.step_w, window}, p.in_channel, channels, ld);
      transform(s.staged, window * ld, ld, dst);
    }
  }
}

// Whether a tile's outputs go from registers to the map.
static bool stores_maps(const TapConv& p) {
  return p.out.c == 1 && !p.scale && (!p.residual.data || p.residual.c == 1) && clamp_of(p.act).complete &&
         is_run(p.out_channel, p.out_begin[1]);
}

// Where the pixels of a block of tiles lie in the output.
static void place_pixels(const TapConv& p, const TileBlocks& t, int64_t count, const WinogradScratch& s) {
  int64_t pixels = 0;
  for (int64_t i = 0; i < count; ++i) {
    const TilePlace& at = s.places[i];
    s.pixel_begin[i] = pixels;
    for (int r = 0; r < at.rows; ++r)
      for (int c = 0; c < at.cols; ++c, ++pixels) {
        const int64_t row = at.row0 + r * t.step_h, col = at.col0 + c * t.step_w;
        s.table.out[pixels] = at.n * p.out.n + row * p.out.h + col * p.out.w;
        s.table.residual[pixels] = at.n * p.residual.n + row * p.residual.h + col * p.residual.w;
      }
  }
  s.pixel_begin[count] = pixels;
}

template <int M, int N, int S, int W, int P, bool Tail = false>
static void run_products(const TapConv& p, const TileBlocks& t, const ChannelBlocks& cb, int64_t channels, int64_t count,
                         int64_t panel, const WinogradScratch& s) {
  using D = TileDomain<N, S>;
  constexpr int points = N * N, width = W * P;
  const ProductSet& set = products<W, P, Tail>();
  const int64_t group_rows = tile_groups(count).rows;
  const int64_t depth = D::taps * channels, first_output = panel * kPanel;
  for (int point = 0; point < points; ++point) {
    const int phases = D::phases(point / N, point % N), offset = D::offset(point / N, point % N);
    const float* weight = static_cast<const float*>(p.weight) + first_output * depth + offset * channels * W;
    const int64_t to_next = kPanel * depth - (Tail ? offset * channels * 8 : 0);  // a tail is half as long per point
    for (int64_t begin = 0; begin < count; begin += group_rows) {
      const int64_t used = std::min<int64_t>(group_rows, count - begin), calls = (used + set.max - 1) / set.max;
      const float* a = s.inputs + begin / group_rows * cb.group + offset * cb.point;
      for (int64_t c = 0; c < calls; ++c) {
        const int64_t row = used * c / calls, size = used * (c + 1) / calls - row;
        // The last pass over these weights fetches those of the next point.
        const int64_t ahead = c + 1 == calls && begin + used == count ? phases * channels * W : 0;
        set.fn[size](a + row * kChannelBlock, cb, weight, to_next, phases, ahead,
                     s.products + ((begin + row) * points + point) * width, points * width);
      }
    }
  }
  const int64_t outputs = std::min<int64_t>(width, p.out_begin[1] - first_output);
  if (stores_maps(p)) {
    TileTarget to{nullptr,
                  nullptr,
                  t.step_h * p.out.h,
                  t.step_w * p.out.w,
                  t.step_h * p.residual.h,
                  t.step_w * p.residual.w,
                  p.shift ? static_cast<const float*>(p.shift) + first_output : nullptr,
                  outputs,
                  clamp_of(p.act)};
    const int64_t channel = p.out_channel[first_output];
    float* const y = static_cast<float*>(p.out.data) + channel;
    const float* const residual = p.residual.data ? static_cast<const float*>(p.residual.data) + channel : nullptr;
    for (int64_t i = 0; i < count; ++i) {
      const TilePlace& at = s.places[i];
      if (i + 1 < count) {  // the next tile's output lines, while this one is computed
        const TilePlace& next = s.places[i + 1];
        const float* line = y + next.n * p.out.n + next.row0 * p.out.h + next.col0 * p.out.w;
        for (int r = 0; r < next.rows; ++r)
          for (int c = 0; c < next.cols; ++c) {
            __builtin_prefetch(line + r * to.y_row + c * to.y_col, 1);
            if constexpr (width > 16) __builtin_prefetch(line + r * to.y_row + c * to.y_col + 16, 1);
          }
      }
      to.y = y + at.n * p.out.n + at.row0 * p.out.h + at.col0 * p.out.w;
      if (residual) to.residual = residual + at.n * p.residual.n + at.row0 * p.residual.h + at.col0 * p.residual.w;
      winograd_output_maps<M, N>(s.products + i * points * width, width, at.rows, at.cols, to);
    }
    return;
  }
  const bool consecutive = is_run(p.out_channel + first_output, outputs);
  alignas(64) float y[M * M * width + 8];  // the epilogue reads whole vectors, which eight outputs may not fill
  for (int64_t i = 0; i < count; ++i) {
    const TilePlace& at = s.places[i];
    winograd_output_buffer<M, N>(s.products + i * points * width, width, at.rows, at.cols, y);
    epilogue<float, float>(p, y, width, s.table, s.pixel_begin[i], at.rows * at.cols, first_output, outputs, consecutive);
  }
}

// `channels` of the transformed inputs, which transform(tiles, blocks, first tile, count, scratch) writes; `staged`: floats
// that it needs besides.
template <int M, int N, int S, class F>
static void winograd_tiles(const TapConv& p, int64_t channels, int64_t staged, const Env& env, const F& transform) {
  using D = TileDomain<N, S>;
  const int64_t outputs = p.out_begin[1];
  if (p.n == 0 || p.rows == 0 || p.cols == 0 || outputs == 0) return;
  const TileBlocks t = tile_blocks(p, M, N, D::taps, channels, outputs, env.threads);
  const ChannelBlocks cb = channel_blocks(channels, D::taps);
  const int64_t groups = (t.block + kTileGroup - 1) / kTileGroup;
  const int64_t input_bytes = round_up((groups * cb.group + kChannelBlock) * 4, 64);
  const int64_t product_bytes = round_up(groups * kTileGroup * N * N * t.width * 4, 64);
  const int64_t staged_bytes = round_up(staged * 4, 64);
  const int64_t pixels = t.block * M * M;
  const int64_t slot_bytes = input_bytes + product_bytes + staged_bytes + round_up((2 * pixels + t.block + 1) * 8, 64) + 64 +
                             round_up(t.block * int64_t(sizeof(TilePlace)), 64);
  const int64_t tasks = t.blocks * t.splits;
  const int64_t slots = task_slots(env, tasks);
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
    s.places = reinterpret_cast<TilePlace*>(s.pixel_begin + t.block + 1);
    const int64_t first = t.begin(index / t.splits), count = t.begin(index / t.splits + 1) - first;
    place_tiles(p, t, M, first, count, s.places);
    transform(t, cb, first, count, s);
    if (!stores_maps(p)) place_pixels(p, t, count, s);
    const int64_t begin = index % t.splits * t.panels_per_task, end = std::min(t.panels, begin + t.panels_per_task);
    const int64_t rest = outputs % kPanel, full = outputs / kPanel + (rest > 8);
    int64_t panel = begin;
    if constexpr (LP_REGISTERS == 32)
      for (; panel + 2 <= std::min(end, full); panel += 2) run_products<M, N, S, 16, 2>(p, t, cb, channels, count, panel, s);
    if (kTailBeside && panel + 2 == end && end > full) {
      run_products<M, N, S, 16, kTailBeside ? 2 : 1, kTailBeside>(p, t, cb, channels, count, panel, s);
      panel = end;
    }
    for (; panel < std::min(end, full); ++panel) run_products<M, N, S, 16, 1>(p, t, cb, channels, count, panel, s);
    if (panel < end) run_products<M, N, S, 8, 1>(p, t, cb, channels, count, panel, s);
  });
}

template <int M, int N, int S = 1>
static void winograd_by_tiles(const TapConv& p, const Env& env) {
  constexpr int window = TileDomain<N, S>::window;
  const int64_t channels = p.in_begin[1];
  const int64_t staged = window * window * round_up(channels, kChannelBlock) + kChannelBlock;
  winograd_tiles<M, N, S>(p, channels, staged, env,
                          [&](const TileBlocks& t, const ChannelBlocks& cb, int64_t, int64_t count, const WinogradScratch& s) {
                            transform_block<M, N, S>(p, t, cb, count, s);
                          });
}

// The 7x7 stem, stride 2, on so few channels that the four phases of a pixel fill one block: stride-1 F(3x3, 4x4) on blocks of
// 2x2 pixels, `cells`, whose channels are (row phase, column phase, channel); a phase without a tap has zero weights. The
// columns of a row of tiles are transformed once, for all tiles that share them.
static void transform_stem(const TapConv& p, const TileBlocks& t, const ChannelBlocks& cb, int64_t first, int64_t count,
                           const WinogradScratch& s) {
  constexpr int M = 3, N = 6, rows = 2 * N - 1;
  using Half = Simd < float, LP_VECTOR_BYTES<32 ? 16 : 32>::reg;
  constexpr int half = int(sizeof(Half)) / 4, side = 8;  // a row of a cell: two pixels of up to four channels
  using V = Simd<float, LP_VECTOR_BYTES>::reg;
  constexpr int L = Simd<float, LP_VECTOR_BYTES>::lanes;
  const int64_t channels = p.in_begin[1], pair = 2 * channels, group_rows = tile_groups(count).rows;
  // An odd column has no tap at infinity: whatever lies there, also NaN, must not come through as a product with zero.
  alignas(64) int32_t even[kChannelBlock];
  for (int i = 0; i < kChannelBlock; ++i) even[i] = i % pair < channels ? -1 : 0;
  float* const cells = s.staged;  // [point row][cell][16]
  for (int64_t begin = 0; begin < count;) {
    const TilePlace& at = s.places[begin];
    const int64_t to_edge = t.tiles_w - (first + begin) % t.tiles_w;
    const int64_t tiles = std::min(std::min<int64_t>(kTileGroup, to_edge), count - begin), width = M * tiles + M;
    float* const band = cells + N * width * kChannelBlock;
    stage_band(band, static_cast<const float*>(p.x.data) + at.n * p.x.n, p.x, p.height, p.width,
               Axis{2 * at.row0 + p.tap_h[0], 1, rows}, Axis{2 * at.col0 + p.tap_w[0], 1, 2 * width}, p.in_channel, channels,
               channels);
    for (int64_t c = 0; c < width; ++c) {
      Half in[N], out[N];
      for (int part = 0; part < 2 * side; part += half) {
        const int phase = part / side, lane = part % side;
        const float* src = band + phase * width * pair + c * pair + lane;
#pragma GCC unroll 6
        for (int i = 0; i < N; ++i) in[i] = i < N - phase ? load<Half>(src + 2 * i * width * pair) : Half{};
        WinogradSix::finite(in, out);
        out[N - 1] = phase == 0 ? WinogradSix::infinity(in) : Half{};
#pragma GCC unroll 6
        for (int i = 0; i < N; ++i) store<Half>(cells + (i * width + c) * kChannelBlock + phase * pair + lane, out[i]);
      }
    }
    for (int64_t k = 0; k < tiles; ++k) {
      const int64_t tile = begin + k;
      float* dst = s.inputs + tile / group_rows * cb.group + tile % group_rows * kChannelBlock;
      for (int i = 0; i < N; ++i)
        for (int v = 0; v < kChannelBlock; v += L) {
          V in[N], out[N];
          const float* src = cells + (i * width + M * k) * kChannelBlock + v;
#pragma GCC unroll 6
          for (int j = 0; j < N; ++j) in[j] = load<V>(src + j * kChannelBlock);
          WinogradSix::input(in, out);
          using Bits = typename Simd<int32_t, LP_VECTOR_BYTES>::reg;
          out[N - 1] = V(Bits(out[N - 1]) & load<Bits>(even + v));
#pragma GCC unroll 6
          for (int j = 0; j < N; ++j) store<V>(dst + (i * N + j) * cb.point + v, out[j]);
        }
    }
    begin += tiles;
  }
}

static void winograd_stem(const TapConv& p, const Env& env) {
  const int64_t channels = p.in_begin[1], width = 3 * kTileGroup + 3;
  const int64_t staged = width * (6 * kChannelBlock + 11 * 2 * channels) + 2 * kChannelBlock;
  winograd_tiles<3, 6, 1>(p, 4 * channels, staged, env,
                          [&](const TileBlocks& t, const ChannelBlocks& cb, int64_t first, int64_t count,
                              const WinogradScratch& s) { transform_stem(p, t, cb, first, count, s); });
}

static void winograd(const TapConv& p, int tile, const Env& env) {
#if defined(__AVX512F__)
  if (lanes_fit(p, p.out)) return tile == 2 ? winograd_lanes<2>(p, env) : winograd_lanes<4>(p, env);
#endif
  if (p.step_h == 2) {
    if (p.taps == 49) return unites_phases(7, p.in_begin[1]) ? winograd_stem(p, env) : winograd_by_tiles<3, 6, 2>(p, env);
    if (p.taps == 25) return winograd_by_tiles<4, 6, 2>(p, env);
    return tile == kStridedTile + 4 ? winograd_by_tiles<4, 5, 2>(p, env) : winograd_by_tiles<5, 6, 2>(p, env);
  }
  if (p.taps == 25) return winograd_by_tiles<2, 6>(p, env);
  tile == 2 ? winograd_by_tiles<2, 4>(p, env) : winograd_by_tiles<4, 6>(p, env);
}
