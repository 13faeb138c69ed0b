// Weight gradient: for every tap, an outer product of staged input channels and output-gradient channels summed over the
// pixels of a band. Threads own partial sums; tasks are dealt statically, so equal thread counts give equal bits.
// Included once per instruction set (see simd.h).

template <class T>
struct GradBand {
  const T* x;                        // staged inputs
  const T* grad;                     // [panel][pixel][16]
  int64_t rows, cols, x_row, x_col;  // steps of the staged input, in elements
};

template <class T>
using GradTileFn = void (*)(const GradBand<T>& band, int64_t x_at, int64_t panel_stride, T* sums, int64_t sums_panel,
                            int64_t used);

// MR consecutive (tap column, channel) positions by P panels of 16 outputs.
template <class T, int Bytes, int P, int MR, int... I>
static inline __attribute__((always_inline)) void grad_tile_body(const GradBand<T>& band, int64_t x_at, int64_t panel_stride,
                                                                 T* sums, int64_t sums_panel, int64_t used,
                                                                 std::integer_sequence<int, I...>) {
  using V = typename Simd<T, Bytes>::reg;
  using M = typename Simd<T, Bytes>::mem;
  constexpr int L = Simd<T, Bytes>::lanes, per_panel = int(kPanel) / L, NV = per_panel * P;
  V acc[MR * NV] = {};
  const T* q[P];
  for (int i = 0; i < P; ++i) q[i] = band.grad + i * panel_stride;
  for (int64_t r = 0; r < band.rows; ++r) {
    const T* x = band.x + x_at + r * band.x_row;
    for (int64_t c = 0; c < band.cols; ++c, x += band.x_col) {
      V b[NV];
      for (int v = 0; v < NV; ++v) b[v] = *reinterpret_cast<const M*>(q[v / per_panel] + v % per_panel * L);
      ((acc[I] += x[I / NV] * b[I % NV]), ...);
      for (int i = 0; i < P; ++i) q[i] += kPanel;
    }
  }
  const auto add = [&](int j, int v, V value) {
    if (j >= used) return;
    M* at = reinterpret_cast<M*>(sums + v / per_panel * sums_panel + j * kPanel + v % per_panel * L);
    *at = *at + value;
  };
  (add(I / NV, I % NV, acc[I]), ...);
}

template <class T, int Bytes, int P, int MR>
static void grad_tile(const GradBand<T>& band, int64_t x_at, int64_t panel_stride, T* sums, int64_t sums_panel, int64_t used) {
  constexpr int NV = int(kPanel) / Simd<T, Bytes>::lanes * P;
  grad_tile_body<T, Bytes, P, MR>(band, x_at, panel_stride, sums, sums_panel, used, std::make_integer_sequence<int, MR * NV>());
}

template <class T>
struct GradTileSet {
  int max;
  GradTileFn<T> fn[15];
};

template <class T, int P, int MR>
static void fill_grad_tiles(GradTileSet<T>& set) {
  constexpr int limit = max_rows(int(kPanel) / Simd<T, LP_VECTOR_BYTES>::lanes * P);
  if constexpr (MR <= limit) {
    if constexpr (MR == limit || MR % 2 == 0 || MR == 1) set.fn[MR] = grad_tile<T, LP_VECTOR_BYTES, P, MR>;
    set.max = MR;
    fill_grad_tiles<T, P, MR + 1>(set);
    if (!set.fn[MR]) set.fn[MR] = set.fn[MR + 1];
  }
}

template <class T, int P>
static const GradTileSet<T>& grad_tiles() {
  static const GradTileSet<T> set = [] {
    GradTileSet<T> s{};
    fill_grad_tiles<T, P, 1>(s);
    return s;
  }();
  return set;
}

// The band's output gradient as panels of 16 channels (zero lanes past the last one), and its sums over pixels.
template <class T>
static void stage_grad(T* dst, T* sums, const View& grad, const Task& t, int64_t cols, const int64_t* channel,
                       int64_t channels) {
  for (int64_t first = 0; first < channels; first += kPanel) {
    const int64_t count = std::min(kPanel, channels - first);
    T total[kPanel] = {};
    for (int64_t i = 0; i < t.images; ++i)
      for (int64_t r = 0; r < t.rows; ++r) {
        const T* row = static_cast<const T*>(grad.data) + (t.image0 + i) * grad.n + (t.row0 + r) * grad.h;
        const Axis no_rows{0, 1, 1}, all_cols{0, 1, cols};
        const View line{nullptr, 0, grad.c, 0, grad.w};
        stage_band(dst, row, line, 1, cols, no_rows, all_cols, channel + first, count, kPanel);
        for (int64_t c = 0; c < cols; ++c, dst += kPanel)
          for (int64_t o = 0; o < kPanel; ++o) total[o] += dst[o];
      }
    for (int64_t o = 0; o < kPanel; ++o) sums[first + o] += total[o];
  }
}

template <class T>
static void depthwise_weight_grad(const TapConv& p, const Bands& b, const Task& t, const T* staged, const T* grad, T* sums,
                                  int64_t channels, int64_t ld) {
  using V = typename Simd<T, LP_VECTOR_BYTES>::reg;
  using M = typename Simd<T, LP_VECTOR_BYTES>::mem;
  constexpr int L = Simd<T, LP_VECTOR_BYTES>::lanes;
  const int64_t staged_rows = (t.rows - 1) * b.pixel_step_h + b.extent_h, pixels = t.images * t.rows * p.cols;
  for (int64_t first = 0; first < channels; first += kPanel)
    for (int k = 0; k < p.taps; ++k)
      for (int64_t lane = 0; lane < kPanel; lane += L) {
        V acc = {};
        const T* q = grad + first * pixels + lane;
        for (int64_t i = 0; i < t.images; ++i)
          for (int64_t r = 0; r < t.rows; ++r) {
            const T* x =
                staged + first + lane +
                ((i * staged_rows + r * b.pixel_step_h + p.tap_h[k] - b.min_h) * b.staged_cols + p.tap_w[k] - b.min_w) * ld;
            for (int64_t c = 0; c < p.cols; ++c, x += b.pixel_step_w * ld, q += kPanel)
              acc += *reinterpret_cast<const M*>(x) * *reinterpret_cast<const M*>(q);
          }
        M* at = reinterpret_cast<M*>(sums + (first * p.taps) + k * kPanel + lane);
        *at = *at + acc;
      }
}

template <class T>
static void task_weight_grad(const TapConv& p, const Bands& b, const Task& t, const T* staged, const T* grad, T* sums,
                             int64_t inputs, int64_t outputs) {
  const int64_t depth = inputs * p.taps, pixels = t.images * t.rows * p.cols;
  const int64_t staged_rows = (t.rows - 1) * b.pixel_step_h + b.extent_h, panels = (outputs + kPanel - 1) / kPanel;
  for (int64_t panel = 0; panel < panels;) {
    const bool two = LP_REGISTERS == 32 && sizeof(T) == 4 && panels - panel >= 2;
    const GradTileSet<T>& set = two ? grad_tiles<T, LP_REGISTERS == 32 && sizeof(T) == 4 ? 2 : 1>() : grad_tiles<T, 1>();
    for (int k = 0; k < p.taps;) {
      // Neighbouring taps of one row are one run of positions, as in the forward kernel.
      int last = k + 1;
      while (last < p.taps && p.tap_h[last] == p.tap_h[k] && p.tap_w[last] == p.tap_w[k] + (last - k)) ++last;
      const int64_t run = (last - k) * inputs, blocks = (run + set.max - 1) / set.max;
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t at = run * block / blocks, used = run * (block + 1) / blocks - at;
        const int64_t x_at = ((p.tap_h[k] - b.min_h) * b.staged_cols + p.tap_w[k] - b.min_w) * inputs + at;
        T* out = sums + panel * kPanel * depth + (k * inputs + at) * kPanel;
        const bool joined = t.images == 1 || staged_rows == t.rows * b.pixel_step_h;
        for (int64_t i = 0; i < (joined ? 1 : t.images); ++i) {
          const GradBand<T> band{staged + i * staged_rows * b.staged_cols * inputs,
                                 grad + (panel * pixels + i * t.rows * p.cols) * kPanel,
                                 joined ? t.images * t.rows : t.rows,
                                 p.cols,
                                 b.pixel_step_h * b.staged_cols * inputs,
                                 b.pixel_step_w * inputs};
          set.fn[used](band, x_at, pixels * kPanel, out, kPanel * depth, used);
        }
      }
      k = last;
    }
    panel += two ? 2 : 1;
  }
}

template <class T>
static void weight_grad(const TapWeightGrad& w, const Env& env) {
  const TapConv& p = w.conv;
  if (p.n == 0 || p.rows == 0 || p.cols == 0 || w.partial_size == 0) return;
  const Bands b = make_bands(p, sizeof(T), env.threads);
  int64_t most_outputs = 0;
  for (int g = 0; g < p.groups; ++g) most_outputs = std::max(most_outputs, p.out_begin[g + 1] - p.out_begin[g]);
  const int64_t staged = round_up(staged_elements(b) + 64, 16);
  const int64_t slot_elements = staged + b.pixels * round_up(most_outputs, kPanel) + 64;
  T* scratch =
      reinterpret_cast<T*>(aligned(static_cast<char*>(env.alloc(env.owner, size_t(w.parts * slot_elements) * sizeof(T) + 64))));
  struct Context {
    const TapWeightGrad& w;
    const Bands& b;
    T* scratch;
    int64_t staged, slot_elements;
  } context{w, b, scratch, staged, slot_elements};
  env.parallel(
      w.parts,
      [](int64_t begin, int64_t end, void* ctx) {
        const Context& c = *static_cast<Context*>(ctx);
        const TapConv& p = c.w.conv;
        for (int64_t part = begin; part < end; ++part) {
          T* partial = static_cast<T*>(c.w.partial) + part * c.w.partial_size;
          memset(partial, 0, size_t(c.w.partial_size) * sizeof(T));
          T* x = c.scratch + part * c.slot_elements;
          T* grad = x + c.staged;
          for (int64_t i = c.b.tasks * part / c.w.parts; i < c.b.tasks * (part + 1) / c.w.parts; ++i) {
            const Task t = task_at(p, c.b, i);
            const int64_t first = p.out_begin[t.group], outputs = p.out_begin[t.group + 1] - first;
            const int64_t inputs = p.in_begin[t.group + 1] - p.in_begin[t.group];
            if (outputs == 0) continue;
            stage_grad(grad, partial + c.w.sum_begin[t.group], c.w.grad, t, p.cols, p.out_channel + first, outputs);
            if (inputs == 0) continue;
            const int64_t ld = p.depthwise ? round_up(inputs, kPanel) : inputs;
            stage_task<T, T>(x, p, c.b, t, ld);
            T* sums = partial + c.w.partial_begin[t.group];
            if (p.depthwise)
              depthwise_weight_grad(p, c.b, t, x, grad, sums, outputs, ld);
            else
              task_weight_grad(p, c.b, t, x, grad, sums, inputs, outputs);
          }
        }
      },
      &context);
}

template <class T>
static void act_grad(const ActGrad& p, const Env& env) {
  const int64_t lines = p.n * p.rows;
  if (lines == 0 || p.cols == 0 || p.channels == 0) return;
  const int64_t row = p.cols * p.channels, chunk = std::max<int64_t>(1, 4096 / row);
  // Both rows are staged in the slot's own scratch: staging may reach a vector beyond its row, which elsewhere is another
  // thread's.
  const int64_t slots = std::min<int64_t>(env.threads, (lines + chunk - 1) / chunk), room = round_up(row, 16) + 16;
  T* scratch = reinterpret_cast<T*>(env.alloc(env.owner, size_t(slots * 2 * room) * sizeof(T)));
  run_tasks(env, (lines + chunk - 1) / chunk, [&](int slot, int64_t task) {
    for (int64_t line = task * chunk; line < std::min(lines, (task + 1) * chunk); ++line) {
      const int64_t n = line / p.rows, r = line % p.rows;
      T* out = static_cast<T*>(p.out) + line * row;
      T *grad_y = scratch + slot * 2 * room, *saved = grad_y + room;
      const Axis one{0, 1, 1}, all{0, 1, p.cols};
      const View gy{nullptr, 0, p.grad_y.c, 0, p.grad_y.w}, sv{nullptr, 0, p.saved.c, 0, p.saved.w};
      stage_band(grad_y, static_cast<const T*>(p.grad_y.data) + n * p.grad_y.n + r * p.grad_y.h, gy, 1, p.cols, one, all,
                 p.channel, p.channels, p.channels);
      stage_band(saved, static_cast<const T*>(p.saved.data) + n * p.saved.n + r * p.saved.h, sv, 1, p.cols, one, all, p.channel,
                 p.channels, p.channels);
      with_act(p.act, [&](auto act) {
        using V = typename Simd<T, LP_VECTOR_BYTES>::reg;
        constexpr int64_t L = Simd<T, LP_VECTOR_BYTES>::lanes;
        for (int64_t i = 0; i < row; i += L) {
          const int64_t lanes = std::min(L, row - i);
          const V grad = load_part<V>(grad_y + i, lanes) * activate_grad<decltype(act)::value>(load_part<V>(saved + i, lanes));
          store_part<V>(out + i, grad, lanes);
        }
      });
    }
  });
}
