// 1x1 convolution by one level of Strassen's algorithm (1969) in Winograd's form: seven products of half the inputs, half the
// pixels and half the outputs in the place of eight. Pixels are paired within a register tile and outputs within a unit of 64,
// so that three products in turn go through the same accumulators (as Huang et al. 2016 fuse the sums into the product), and
// what two of them share never leaves L1. Sums of weights are packed; sums of inputs are made once per block of pixels.
// Included once per instruction set (see simd.h).

// Columns of a tile, in each half of a unit.
constexpr int kStrassenPanels = LP_REGISTERS == 32 ? 2 : 1;

// Rows [0, rows) of x in pairs of row i and row rows - pairs + i: an odd one in the middle is its own partner, and is stored
// once. Likewise inputs k and second + k: the weights of the second half are zero where the halves overlap.
struct StrassenTile {
  const float* x;
  int64_t ldx;
  int64_t rows, depth, second;
  const float* sums;  // four times `sums_step` apart: A21 + A22, A21 + A22 - A11, A11 - A21, A12 - A21 - A22 + A11
  int64_t ld, sums_step;
  const float* weight;    // of seven products in their order below, panel after panel
  const float* shift[2];  // of the left and the right columns
  const float* residual;
  int64_t ldr;
  float* y;
  int64_t ldy, count[2];
  Clamp bounds;
};

template <int Rows, int NV, class V, int... I>
static inline __attribute__((always_inline)) void strassen_product(V* acc, const float* a, int64_t ld, const float* weight,
                                                                   int64_t depth, std::integer_sequence<int, I...>) {
  constexpr int bases = (Rows + 2) / 3, L = sizeof(V) / 4, per_panel = int(kPanel) / L;
  const float* base[bases];
  for (int i = 0; i < bases; ++i) base[i] = a + i * 3 * ld;
  const float* panel[kStrassenPanels];
  for (int i = 0; i < kStrassenPanels; ++i) panel[i] = weight + i * 7 * kPanel * depth;
  for (int64_t k = depth; k > 0; --k) {
    V b[NV];
    for (int v = 0; v < NV; ++v) b[v] = load<V>(panel[v / per_panel] + v % per_panel * L);
    ((acc[I] += base[I / NV / 3][I / NV % 3 * ld] * b[I % NV]), ...);
    for (int i = 0; i < kStrassenPanels; ++i) panel[i] += kPanel;
    for (int i = 0; i < bases; ++i) ++base[i];
  }
}

template <int Bytes, int Rows, int... I>
static inline __attribute__((always_inline)) void strassen_body(const StrassenTile& given,
                                                                std::integer_sequence<int, I...> all) {
  using V = typename Simd<float, Bytes>::reg;
  constexpr int L = Simd<float, Bytes>::lanes, NV = int(kPanel) * kStrassenPanels / L;
  const StrassenTile t = given;  // stores may alias anything behind a reference
  alignas(64) float first[Rows * NV * L], second[Rows * NV * L];
  V acc[Rows * NV] = {};
  const int64_t low_at = t.rows - Rows;
  const float *upper = t.x, *lower = t.x + low_at * t.ldx, *weight = t.weight;
  const V low = V{} + t.bounds.low, high = V{} + t.bounds.high;
  const auto product = [&](const float* a, int64_t ld) __attribute__((always_inline)) {
    strassen_product<Rows, NV>(acc, a, ld, weight, t.depth, all);
    weight += t.depth * kPanel;
  };
  const auto keep = [&](float* to) __attribute__((always_inline)) { ((store<V>(to + I * L, acc[I])), ...); };
  // Output lines arrive while the product before them is computed.
  const auto ahead = [&](int64_t row, int half) __attribute__((always_inline)) {
    for (int j = 0; j < Rows; ++j)
      for (int v = 0; v < NV * L; v += 16) __builtin_prefetch(t.y + (row + j) * t.ldy + half * kStrassenHalf + v, 1);
  };
  const auto finish = [&](int64_t row, int half, int skip, const auto& value) __attribute__((always_inline)) {
    V shift[NV] = {};
    const int64_t count = t.count[half];
    if (t.shift[half])
      for (int v = 0; v < NV; ++v)
        if (count > v * L) shift[v] = load_part<V>(t.shift[half] + v * L, count - v * L);
    float* y = t.y + row * t.ldy + half * kStrassenHalf;
    const float* residual = t.residual ? t.residual + row * t.ldr + half * kStrassenHalf : nullptr;
    const auto one = [&](int j, int v, V sum, auto whole, auto more) __attribute__((always_inline)) {
      const int64_t lanes = decltype(whole)::value ? L : count - v * L;
      if (j < skip || lanes <= 0) return;
      sum += shift[v];
      if constexpr (decltype(more)::value) sum += load_part<V>(residual + j * t.ldr + v * L, lanes);
      store_part<V>(y + j * t.ldy + v * L, clamp(sum, low, high), lanes);
    };
    using Yes = std::true_type;
    using No = std::false_type;
    if (count == NV * L)
      residual ? (one(I / NV, I % NV, value(I), Yes(), Yes()), ...) : (one(I / NV, I % NV, value(I), Yes(), No()), ...);
    else
      residual ? (one(I / NV, I % NV, value(I), No(), Yes()), ...) : (one(I / NV, I % NV, value(I), No(), No()), ...);
  };
  const auto sum = [&](int i) __attribute__((always_inline)) { return acc[i]; };
  const int skip = 2 * Rows > t.rows ? 1 : 0;

  product(upper, t.ldx);  // A11 B11
  keep(first);
  ahead(0, 0);
  product(upper + t.second, t.ldx);  // A12 B21
  finish(0, 0, 0, sum);
  ((acc[I] = load<V>(first + I * L)), ...);
  product(t.sums + t.sums_step, t.ld);  // (A21 + A22 - A11) (B22 - B12 + B11)
  keep(first);
  product(t.sums + 2 * t.sums_step, t.ld);  // (A11 - A21) (B22 - B12)
  keep(second);
  ahead(low_at, 0);
  product(lower + t.second, t.ldx);  // A22 (B21 - B22 + B12 - B11)
  finish(low_at, 0, skip, sum);
  ((acc[I] = V{}), ...);
  ahead(low_at, 1);
  product(t.sums, t.ld);  // (A21 + A22) (B12 - B11)
  finish(low_at, 1, skip, [&](int i) __attribute__((always_inline)) { return acc[i] + load<V>(second + i * L); });
  ((acc[I] += load<V>(first + I * L)), ...);
  ahead(0, 1);
  product(t.sums + 3 * t.sums_step, t.ld);  // (A12 - A21 - A22 + A11) B22
  finish(0, 1, 0, sum);
}

struct StrassenSet {
  int max;
  void (*fn[15])(const StrassenTile&);
};

template <int Bytes, int Rows>
static void strassen_tile(const StrassenTile& t) {
  constexpr int NV = int(kPanel) * kStrassenPanels / Simd<float, Bytes>::lanes;
  strassen_body<Bytes, Rows>(t, std::make_integer_sequence<int, Rows * NV>());
}

template <int Rows>
static void fill_strassen(StrassenSet& set) {
  constexpr int bytes = vector_bytes<float, int(kPanel)>();
  if constexpr (Rows <= max_rows(int(kPanel) * kStrassenPanels / Simd<float, bytes>::lanes)) {
    set.fn[Rows] = strassen_tile<bytes, Rows>;
    set.max = Rows;
    fill_strassen<Rows + 1>(set);
  }
}

static const StrassenSet& strassen_set() {
  static const StrassenSet set = [] {
    StrassenSet s{};
    fill_strassen<1>(s);
    return s;
  }();
  return set;
}

// The four sums of every pair of rows.
static void strassen_sums(const StrassenTile& t, int64_t pairs, float* sums) {
  using V = Simd<float, LP_VECTOR_BYTES>::reg;
  constexpr int64_t L = Simd<float, LP_VECTOR_BYTES>::lanes;
  for (int64_t j = 0; j < pairs; ++j) {
    const float *upper = t.x + j * t.ldx, *lower = upper + (t.rows - pairs) * t.ldx;
    float* out = sums + j * t.ld;
    const auto some = [&](int64_t k, int64_t lanes) __attribute__((always_inline)) {
      const auto at = [&](const float* row) __attribute__((always_inline)) { return load_part<V>(row + k, lanes); };
      const V a11 = at(upper), a12 = at(upper + t.second), a21 = at(lower), a22 = at(lower + t.second);
      const V s1 = a21 + a22, s2 = s1 - a11;
      store<V>(out + k, s1);
      store<V>(out + t.sums_step + k, s2);
      store<V>(out + 2 * t.sums_step + k, a11 - a21);
      store<V>(out + 3 * t.sums_step + k, a12 - s2);
    };
    int64_t k = 0;
    for (; k + L <= t.depth; k += L) some(k, L);
    if (k < t.depth) some(k, t.depth - k);
  }
}

static bool strassen(const TapConv& p, const Env& env) {
  if (!is_pointwise(p)) return false;
  const int64_t pixels = p.n * p.rows * p.cols, inputs = p.in_begin[1], outputs = p.out_begin[1];
  const int64_t units = strassen_units(outputs), depth = (inputs + 1) / 2;
  const StrassenSet& set = strassen_set();
  const int64_t most = 2 * set.max;
  // An even number: as many for each of two threads. The same for any number of them, as the pairs decide how sums are rounded.
  const int64_t tiles = pixels <= most ? 1 : round_up((pixels + most - 1) / most, 2);
  // Sums that stay in L1, or near it: the sums of weights are in L2, if they fit. Else few passes over them.
  int64_t block = 7 * depth * units * kStrassenHalf * 4 <= 512 * 1024 ? 1 : 4;  // tiles
  if (env.threads > 1) block = std::max<int64_t>(1, std::min(block, tiles / (3 * env.threads)));
  const int64_t blocks = std::min(tiles, round_up((tiles + block - 1) / block, env.threads));
  // Few blocks: threads share the outputs as well, and each makes the sums again.
  const int64_t parts = std::min(units, env.threads > 1 ? (3 * env.threads + blocks - 1) / blocks : 1);
  const int64_t slots = task_slots(env, blocks * parts), pairs = block * set.max;
  // An odd number of lines from row to row: they spread over all sets of the cache.
  const int64_t ld = (round_up(depth, 16) / 16 | 1) * 16;
  float* scratch =
      reinterpret_cast<float*>(aligned(static_cast<char*>(env.alloc(env.owner, size_t(slots * 4 * pairs * ld) * 4 + 64))));
  const float *weight = static_cast<const float*>(p.weight), *weight_sums = weight + packed_size(outputs, inputs, 1, 1);
  const float* shift = static_cast<const float*>(p.shift);
  run_tasks(env, blocks * parts, [&](int slot, int64_t index) {
    const int64_t cut = index / parts, part = index % parts;
    const int64_t first = tiles * cut / blocks, end = tiles * (cut + 1) / blocks;
    const auto row_of = [&](int64_t tile) { return pixels * tile / tiles; };
    float* sums = scratch + slot * 4 * pairs * ld;
    StrassenTile t{};
    t.ldx = p.x.w;
    t.ldy = p.out.w;
    t.ldr = p.residual.w;
    t.depth = depth;
    t.second = inputs - depth;
    t.ld = ld;
    t.sums_step = pairs * ld;
    t.bounds = clamp_of(p.act);
    const float* x = static_cast<const float*>(p.x.data) + p.in_channel[0];
    float* y = static_cast<float*>(p.out.data) + p.out_channel[0];
    const float* residual = static_cast<const float*>(p.residual.data);
    if (residual) residual += p.out_channel[0];
    const auto each = [&](const auto& body) {
      for (int64_t i = first; i < end; ++i) {
        t.rows = row_of(i + 1) - row_of(i);
        t.x = x + row_of(i) * t.ldx;
        t.sums = sums + (i - first) * set.max * ld;
        body(row_of(i));
      }
    };
    each([&](int64_t) { strassen_sums(t, (t.rows + 1) / 2, sums + (t.sums - sums)); });
    for (int64_t unit = units * part / parts; unit < units * (part + 1) / parts; ++unit)
      for (int64_t panel = 0; panel < kStrassenHalf; panel += kStrassenPanels * kPanel) {
        const int64_t left = unit * 2 * kStrassenHalf + panel, right = left + kStrassenHalf;
        t.weight = weight_sums + (unit * kStrassenHalf + panel) * 7 * depth;
        t.count[0] = kStrassenPanels * kPanel;
        t.count[1] = std::min<int64_t>(kStrassenPanels * kPanel, outputs - right);
        t.shift[0] = shift ? shift + left : nullptr;
        t.shift[1] = shift ? shift + right : nullptr;
        each([&](int64_t row) {
          t.y = y + row * t.ldy + left;
          t.residual = residual ? residual + row * t.ldr + left : nullptr;
          set.fn[(t.rows + 1) / 2](t);
        });
      }
    const int64_t row = row_of(first), rows = row_of(end) - row;
    const int64_t done = std::min(outputs, units * 2 * kStrassenHalf), zero = 0;
    if (part + 1 == parts && done < outputs) {
      PointwiseTile rest{};
      rest.ldx = t.ldx;
      rest.ldy = t.ldy;
      rest.ldr = t.ldr;
      rest.runs = 1;
      rest.run_at = &zero;
      rest.run_length = &inputs;
      rest.bounds = t.bounds;
      pointwise_panels(rest, weight + done * inputs, shift ? shift + done : nullptr, inputs, outputs - done, 1, rows,
                       [&](int64_t, PointwiseTile& tile) {
                         tile.x = x + row * t.ldx;
                         tile.y = y + row * t.ldy + done;
                         tile.residual = residual ? residual + row * t.ldr + done : nullptr;
                       });
    }
    if (t.bounds.complete) return;
    const int64_t begin = units * part / parts * 2 * kStrassenHalf;
    const int64_t stop = part + 1 == parts ? outputs : units * (part + 1) / parts * 2 * kStrassenHalf;
    activate_rows(p.act, y + row * t.ldy + begin, t.ldy, rows, stop - begin);
  });
  return true;
}
