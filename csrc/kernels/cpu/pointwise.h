// 1x1 convolution of dense channels-last tensors: a matrix product with the epilogue in registers, nothing staged.
// Included once per instruction set (see simd.h).

// relu and relu6 as bounds; the other activations run over the stored values.
struct Clamp {
  float low, high;
  bool complete;  // nothing left to do after clamping
};
static Clamp clamp_of(Act act) {
  const float inf = __builtin_inff();
  const bool none = act == Act::none, relu = act == Act::relu, relu6 = act == Act::relu6;
  return Clamp{relu || relu6 ? 0.0f : -inf, relu6 ? 6.0f : inf, none || relu || relu6};
}

template <class V>
static inline __attribute__((always_inline)) V clamp(V v, V low, V high) {
  v = v < low ? low : v;  // NaN passes through
  return v > high ? high : v;
}
template <class V>
static inline V clamp(V v, float low, float high) {
  return clamp(v, V{} + low, V{} + high);
}

// Tiles one behind the other. Their sums run over contiguous stretches of x: one for a 1x1 convolution, one per row of taps for
// a staged band.
struct PointwiseTile {
  const float* x;
  int64_t ldx;
  int runs;
  const int64_t *run_at, *run_length;
  const float* weight;
  int64_t panel_stride;
  const float* shift;
  const float* residual;
  int64_t ldr;
  float* y;
  int64_t ldy, count;
  Clamp bounds;
  bool near;    // y is in the cache
  bool beyond;  // y is larger than all caches: whole lines are written past them
  int64_t tiles, depth;
  NextPanels<float> ahead;
};

#if defined(__AVX512F__)
// The last panel holds up to 8 outputs: two inputs at a time fill a whole vector, lane by lane in turns, and the two halves are
// added at the end. `Full`: with a panel of 16 before it.
template <int Full, int MR, int... J>
static inline __attribute__((always_inline)) void pointwise_pairs(const PointwiseTile& t, std::integer_sequence<int, J...>) {
  using V = typename Simd<float, 64>::reg;
  using Half = typename Simd<float, 32>::reg;
  using Yes = std::true_type;
  using No = std::false_type;
  constexpr int bases = (MR + 2) / 3;
  const PointwiseTile q = t;  // stores may alias anything behind a reference
  const int64_t ld = q.ldx, rest = q.count - 16 * Full;
  const __mmask16 lanes = __mmask16((1u << rest) - 1);
  const V low = V{} + q.bounds.low, high = V{} + q.bounds.high;
  typedef int Lanes __attribute__((vector_size(64)));
  constexpr Lanes turns = {0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15};
  constexpr Lanes twice = {0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7};
  constexpr Lanes even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  // Even lanes begin with the shift.
  const V shift = q.shift && Full > 0 ? load<V>(q.shift) : V{};
  const V last = q.shift ? __builtin_shuffle(V(_mm512_maskz_loadu_ps(lanes, q.shift + 16 * Full)), turns) : V{};
  const auto two = [](const float* p) __attribute__((always_inline)) {
    double pair;
    memcpy(&pair, p, 8);
    return V(_mm512_castpd_ps(_mm512_set1_pd(pair)));
  };
  const float *x = q.x, *residual = q.residual;
  float* y = q.y;
  for (int64_t tile = 0; tile < q.tiles; ++tile) {
    V acc[MR] = {((void)J, shift)...}, tail[MR] = {((void)J, last)...};
    const float *panel = q.weight, *narrow = q.weight + Full * q.panel_stride;
    const float* base[bases];
    if (!q.near)
      for (int j = 0; j < MR; ++j) __builtin_prefetch(y + j * q.ldy, 1);
    for (int r = 0; r < q.runs; ++r) {
      for (int i = 0; i < bases; ++i) base[i] = x + q.run_at[r] + i * 3 * ld;
      int64_t k = q.run_length[r];
      for (; k >= 2; k -= 2) {
        if constexpr (Full > 0) {
          const V first = load<V>(panel), second = load<V>(panel + 16);
          ((acc[J] += base[J / 3][J % 3 * ld] * first), ...);
          ((acc[J] += base[J / 3][J % 3 * ld + 1] * second), ...);
          panel += 32;
        }
        const V both = in_register(__builtin_shuffle(load<V>(narrow), turns));
        ((tail[J] += two(base[J / 3] + J % 3 * ld) * both), ...);
        narrow += 16;
        for (int i = 0; i < bases; ++i) base[i] += 2;
      }
      if (k == 0) continue;
      if constexpr (Full > 0) {
        const V first = load<V>(panel);
        ((acc[J] += base[J / 3][J % 3 * ld] * first), ...);
        panel += 16;
      }
      // A last input goes to both halves with half of its weight: what is infinite must not meet weights of zero.
      const V both = in_register(__builtin_shuffle(load_panel<V, true>(narrow, true), twice) * 0.5f);
      ((tail[J] += base[J / 3][J % 3 * ld] * both), ...);
      narrow += 8;
    }
    if constexpr (Full > 0) {
      const auto finish = [&](int j, V value) __attribute__((always_inline)) {
        if (residual) value += load<V>(residual + j * q.ldr);
        store<V>(y + j * q.ldy, clamp(value, low, high));
      };
      (finish(J, acc[J]), ...);
    }
    // The halves of two pixels are added at once. Stores of half a vector lie in one cache line more often.
    const auto finish_two = [&](int j, auto whole, auto add) __attribute__((always_inline)) {
      constexpr bool Whole = decltype(whole)::value, Residual = decltype(add)::value;
      const int k = j + 1 < MR ? j + 1 : j;
      V value = __builtin_shuffle(tail[j], tail[k], even) + __builtin_shuffle(tail[j], tail[k], even + 1);
      if constexpr (Residual) {
        const auto part = [&](int i) __attribute__((always_inline)) {
          return _mm256_maskz_loadu_ps(__mmask8(lanes), residual + i * q.ldr + 16 * Full);
        };
        value += V(_mm512_insertf32x8(_mm512_castps256_ps512(part(j)), part(k), 1));
      }
      value = clamp(value, low, high);
      const auto put = [&](int i, __m256 v) __attribute__((always_inline)) {
        float* to = y + i * q.ldy + 16 * Full;
        if constexpr (Whole)
          store<Half>(to, Half(v));
        else
          _mm256_mask_storeu_ps(to, __mmask8(lanes), v);
      };
      put(j, _mm512_castps512_ps256(__m512(value)));
      if (k != j) put(k, _mm512_extractf32x8_ps(__m512(value), 1));
    };
    if (residual)
      ((J % 2 == 0 ? finish_two(J, No(), Yes()) : void()), ...);
    else if (rest == 8)
      ((J % 2 == 0 ? finish_two(J, Yes(), No()) : void()), ...);
    else
      ((J % 2 == 0 ? finish_two(J, No(), No()) : void()), ...);
    x += MR * ld;
    y += MR * q.ldy;
    if (residual) residual += MR * q.ldr;
  }
}
#endif

template <int Bytes, int W, int P, bool Tail, bool Far, int MR, int... I>
static inline __attribute__((always_inline)) void pointwise_body(const PointwiseTile& t, std::integer_sequence<int, I...>) {
  using V = typename Simd<float, Bytes>::reg;
  using Yes = std::true_type;
  using No = std::false_type;
  constexpr int L = Simd<float, Bytes>::lanes, per_panel = W / L, NV = per_panel * P;
  // One pointer for three rows: more would not fit the integer registers.
  constexpr int bases = (MR + 2) / 3;
  const PointwiseTile q = t;  // stores may alias anything behind a reference
  const int64_t ld = q.ldx;
  const V low = V{} + q.bounds.low, high = V{} + q.bounds.high;
  V shift[NV] = {};
  if (q.shift)
    for (int v = 0; v < NV; ++v)
      if (q.count > v * L) shift[v] = load_part<V>(q.shift + v * L, q.count - v * L);
  const float *x = q.x, *residual = q.residual;
  float* y = q.y;
  NextPanels<float> ahead = q.ahead;
  for (int64_t tile = 0; tile < q.tiles; ++tile) {
    V acc[MR * NV] = {shift[I % NV]...};
    const float* panel[P];
    for (int i = 0; i < P; ++i) panel[i] = q.weight + i * q.panel_stride;
    const float* base[bases];
    // The output lines arrive while the sums are computed.
    for (int j = 0; j < MR && !q.near; ++j) {
      __builtin_prefetch(y + j * q.ldy, 1);
      if constexpr (W * P > 16) __builtin_prefetch(y + j * q.ldy + 16, 1);
    }
    for (int r = 0; r < q.runs; ++r) {
      for (int i = 0; i < bases; ++i) base[i] = x + q.run_at[r] + i * 3 * ld;
      for (int64_t k = q.run_length[r]; k > 0; --k) {
        V b[NV];
        if constexpr (Far) {
          __builtin_prefetch(ahead.at, 0, 2);
          ahead.at += ahead.step;
        }
        for (int v = 0; v < NV; ++v) b[v] = load_panel<V, Tail>(panel[v / per_panel] + v % per_panel * L, v == NV - 1);
        ((acc[I] += base[I / NV / 3][I / NV % 3 * ld] * b[I % NV]), ...);
        for (int i = 0; i < P; ++i) panel[i] += Tail && i == P - 1 ? 8 : W;
        for (int i = 0; i < bases; ++i) ++base[i];
      }
    }
    const auto finish = [&](int j, int v, V value, auto whole, auto add) __attribute__((always_inline)) {
      const int64_t lanes = decltype(whole)::value ? L : q.count - v * L;
      if (lanes <= 0) return;
      if constexpr (decltype(add)::value) value += load_part<V>(residual + j * q.ldr + v * L, lanes);
      value = clamp(value, low, high);
#if defined(__AVX512F__)
      if constexpr (decltype(whole)::value && sizeof(V) == 64)
        if (q.beyond) return _mm512_stream_ps(y + j * q.ldy + v * L, __m512(value));
#endif
      store_part<V>(y + j * q.ldy + v * L, value, lanes);
    };
    if (q.count == W * P)
      residual ? (finish(I / NV, I % NV, acc[I], Yes(), Yes()), ...) : (finish(I / NV, I % NV, acc[I], Yes(), No()), ...);
    else
      residual ? (finish(I / NV, I % NV, acc[I], No(), Yes()), ...) : (finish(I / NV, I % NV, acc[I], No(), No()), ...);
    x += MR * ld;
    y += MR * q.ldy;
    if (residual) residual += MR * q.ldr;
  }
}

using PointwiseFn = void (*)(const PointwiseTile&);

template <int Bytes, int W, int P, bool Tail, bool Far, int MR>
static void pointwise_tile(const PointwiseTile& t) {
  constexpr int NV = W / Simd<float, Bytes>::lanes * P;
  pointwise_body<Bytes, W, P, Tail, Far, MR>(t, std::make_integer_sequence<int, MR * NV>());
}

#if defined(__AVX512F__)
template <int Full, int MR>
static void pointwise_pair_tile(const PointwiseTile& t) {
  pointwise_pairs<Full, MR>(t, std::make_integer_sequence<int, MR>());
}
#endif

struct PointwiseSet {
  int max;
  PointwiseFn fn[15], pairs[15];  // pairs: or nullptr
  PointwiseFn far[15];            // fetch ahead, or nullptr
};

template <int W, int P, bool Tail, int MR>
static void fill_pointwise(PointwiseSet& set) {
  constexpr int bytes = vector_bytes<float, W>(), limit = max_rows(W / Simd<float, bytes>::lanes * P);
  if constexpr (MR <= limit) {
    set.fn[MR] = pointwise_tile<bytes, W, P, Tail, false, MR>;
    if constexpr (P > 1 && !Tail) set.far[MR] = pointwise_tile<bytes, W, P, Tail, true, MR>;
#if defined(__AVX512F__)
    if constexpr (Tail || W == 8) set.pairs[MR] = pointwise_pair_tile<Tail, MR>;
#endif
    set.max = MR;
    fill_pointwise<W, P, Tail, MR + 1>(set);
  }
}

template <int W, int P, bool Tail>
static const PointwiseSet& pointwise_set() {
  static const PointwiseSet set = [] {
    PointwiseSet s{};
    fill_pointwise<W, P, Tail, 1>(s);
    return s;
  }();
  return set;
}

// Outputs that are stored, and their shift: with room behind the channels those of the last panel's spare lanes as well, which
// then need no masks.
struct PanelOutputs {
  int64_t count;
  const float* shift;
};
static PanelOutputs panel_outputs(const Env& env, const float* shift, int64_t exact, bool room) {
  const int64_t count = room ? round_up(exact, 8) : exact;
  if (count == exact || !shift) return {count, shift};
  float* copy = static_cast<float*>(env.alloc(env.owner, size_t(count) * 4));
  memset(copy, 0, size_t(count) * 4);
  memcpy(copy, shift, size_t(exact) * 4);
  return {count, copy};
}

// Rows [begin, end) of the product with P panels of weights; Tail: the last of them is 8 wide.
template <int W, int P, bool Tail = false>
static void pointwise_rows(PointwiseTile t, int64_t rows) {
  const PointwiseSet& set = pointwise_set<W, P, Tail>();
  const int64_t tiles = (rows + set.max - 1) / set.max;
  if (tiles == 0) return;
  // Half vectors alone are as good as pairs where a whole one takes twice as long, and need no shuffles.
  const bool pairs = set.pairs[1] && !(W == 8 && cpu_halves_vectors());
  const PointwiseFn* const fn = pairs ? set.pairs : set.far[1] && t.ahead.step > 0 ? set.far : set.fn;
  // As even as possible: some tiles of one pixel more, then the others.
  for (const int64_t more : {1, 0}) {
    const int64_t size = rows / tiles + more;
    t.tiles = more ? rows % tiles : tiles - rows % tiles;
    if (t.tiles == 0) continue;
    fn[size](t);
    t.x += t.tiles * size * t.ldx;
    t.y += t.tiles * size * t.ldy;
    if (t.residual) t.residual += t.tiles * size * t.ldr;
    t.ahead.at += t.tiles * t.depth * t.ahead.step;
  }
}

// One step from pixel to pixel, over rows and images too.
static bool is_matrix(const View& v, int64_t n, int64_t rows, int64_t cols) {
  return v.c == 1 && (rows == 1 || v.h == cols * v.w) && (n == 1 || v.n == rows * cols * v.w);
}

static bool is_pointwise(const TapConv& p) {
  if (p.depthwise || p.groups != 1 || p.taps != 1 || p.step_h != 1 || p.step_w != 1 || p.scale) return false;
  if (p.tap_h[0] != 0 || p.tap_w[0] != 0 || p.rows != p.height || p.cols != p.width) return false;
  if (!is_matrix(p.x, p.n, p.rows, p.cols) || !is_matrix(p.out, p.n, p.rows, p.cols)) return false;
  if (p.residual.data && !is_matrix(p.residual, p.n, p.rows, p.cols)) return false;
  return is_run(p.in_channel, p.in_begin[1]) && is_run(p.out_channel, p.out_begin[1]);
}

// All panels of `outputs` outputs, over `lines` rows of `pixels` pixels each; at(line, tile) sets x, y and residual.
template <class F>
static void pointwise_panels(PointwiseTile t, const float* weight, const float* shift, int64_t depth, int64_t outputs,
                             int64_t lines, int64_t pixels, const F& at) {
  const int64_t rest = outputs % kPanel, full = outputs / kPanel + (rest > 8);
  t.panel_stride = kPanel * depth;
  t.depth = depth;
  const int64_t tiles = (pixels + max_rows(2) - 1) / max_rows(2);
  for (int64_t panel = 0; panel * kPanel < outputs;) {
    const bool tail = kTailBeside && panel + 1 == full && rest > 0 && rest <= 8;
    const int64_t o = panel * kPanel, take = tail || (LP_REGISTERS == 32 && panel + 2 <= full) ? 2 : 1;
    t.weight = weight + o * depth;
    t.shift = shift ? shift + o : nullptr;
    t.count = std::min(outputs - o, take * kPanel);
    t.ahead = next_panels(t.weight, depth, take * kPanel, outputs, lines * tiles);
    for (int64_t line = 0; line < lines; ++line) {
      at(line, t);
      t.y += o;
      if (t.residual) t.residual += o;
      if (tail)
        pointwise_rows<16, kTailBeside ? 2 : 1, kTailBeside>(t, pixels);
      else if (panel >= full)
        pointwise_rows<8, 1>(t, pixels);
      else if (take == 2)
        pointwise_rows<16, LP_REGISTERS == 32 ? 2 : 1>(t, pixels);
      else
        pointwise_rows<16, 1>(t, pixels);
      t.ahead.at += tiles * depth * t.ahead.step;
    }
    panel += take;
  }
}

// What another layer has just used and is no larger is still in L2: fetching it ahead only takes time.
constexpr int64_t kNearBytes = int64_t(128) << 10;
// More bytes of outputs are in no cache when they are read: their old lines need not be fetched to be overwritten.
constexpr int64_t kBeyondBytes = int64_t(16) << 20;

static void pointwise(const TapConv& p, const Env& env) {
  const PanelOutputs to = panel_outputs(env, static_cast<const float*>(p.shift), p.out_begin[1], p.out_room);
  const int64_t pixels = p.n * p.rows * p.cols, inputs = p.in_begin[1], outputs = to.count;
  const Clamp bounds = clamp_of(p.act);
  // Few weights: they stay in L2, and a block of rows in L1 while all panels pass over it. Many: the rows stay in L2.
  const int64_t tile = LP_REGISTERS == 32 ? 28 : 24;
  int64_t block = std::max<int64_t>(2 * tile, 128 * 1024 / 4 / (inputs + outputs) / tile * tile);
  if (inputs * outputs <= 48 * 1024) block = std::max(tile, 16 * 1024 / 4 / std::max<int64_t>(1, inputs) / tile * tile);
  if (env.threads > 1) block = std::max<int64_t>(tile, std::min(block, (pixels + 3 * env.threads - 1) / (3 * env.threads)));
  const int64_t blocks = std::min(pixels, round_up((pixels + block - 1) / block, env.threads));  // as many for each thread
  // Threads share the outputs where each then reads fewer weights than pixels that another one wrote.
  constexpr int64_t unit = 2 * kPanel;
  const int64_t units = (outputs + unit - 1) / unit;
  const int64_t parts =
      env.threads > 1 && pixels < outputs && 2 * pixels < inputs && units >= 2 * env.threads ? 2 * env.threads : 1;
  const int64_t cuts = parts > 1 ? 1 : blocks;
  const bool lines = p.out.w % 16 == 0 && (reinterpret_cast<uintptr_t>(p.out.data) + uintptr_t(p.out_channel[0]) * 4) % 64 == 0;
  const bool beyond = LP_VECTOR_BYTES == 64 && lines && bounds.complete && pixels * outputs * 4 > kBeyondBytes;
  run_tasks(env, cuts * parts, [&](int, int64_t index) {
    const int64_t cut = index / parts, part = index % parts;
    const int64_t first = pixels * cut / cuts, rows = pixels * (cut + 1) / cuts - first;
    const int64_t at = units * part / parts * unit, some = std::min(outputs, units * (part + 1) / parts * unit) - at;
    const int64_t begin = 0;
    PointwiseTile t{};
    t.ldx = p.x.w;
    t.ldy = p.out.w;
    t.ldr = p.residual.w;
    t.runs = 1;
    t.run_at = &begin;
    t.run_length = &inputs;
    t.bounds = bounds;
    t.beyond = beyond;
    t.near = beyond || (p.out_room && pixels * t.ldy * 4 <= kNearBytes);
    const float* x = static_cast<const float*>(p.x.data) + p.in_channel[0] + first * t.ldx;
    float* y = static_cast<float*>(p.out.data) + p.out_channel[0] + at + first * t.ldy;
    const float* residual = static_cast<const float*>(p.residual.data);
    if (residual) residual += p.out_channel[0] + at + first * t.ldr;
    pointwise_panels(t, static_cast<const float*>(p.weight) + at * inputs, to.shift ? to.shift + at : nullptr, inputs, some, 1,
                     rows, [&](int64_t, PointwiseTile& tile) {
                       tile.x = x;
                       tile.y = y;
                       tile.residual = residual;
                     });
    if (!bounds.complete) activate_rows(p.act, y, t.ldy, rows, some);
#if defined(__AVX512F__)
    if (beyond) _mm_sfence();  // whoever is told that this is done sees it
#endif
  });
}

// out = act(residual) over all `channels`, before some of them are computed; false: not a case for it.
static bool residual_rows(const TapConv& p, int64_t channels, const Env& env) {
  if (!is_matrix(p.out, p.n, p.rows, p.cols) || !is_matrix(p.residual, p.n, p.rows, p.cols)) return false;
  if (p.out.w != channels || p.residual.w != channels) return false;
  const int64_t pixels = p.n * p.rows * p.cols, tasks = std::min<int64_t>(pixels, 4 * env.threads);
  const Clamp bounds = clamp_of(p.act);
  run_tasks(env, tasks, [&](int, int64_t index) {
    using V = Simd<float, LP_VECTOR_BYTES>::reg;
    constexpr int64_t L = Simd<float, LP_VECTOR_BYTES>::lanes;
    const int64_t begin = pixels * index / tasks * channels, count = pixels * (index + 1) / tasks * channels - begin;
    const float* from = static_cast<const float*>(p.residual.data) + begin;
    float* to = static_cast<float*>(p.out.data) + begin;
    for (int64_t i = 0; i < count; i += L)
      store_part<V>(to + i, clamp(load_part<V>(from + i, count - i), bounds.low, bounds.high), count - i);
    if (!bounds.complete) activate_rows(p.act, to, count, 1, count);
  });
  return true;
}
