// 1x1 convolution by one level of Strassen's algorithm (1969) in Winograd's form: seven products of half the inputs, half the
// pixels and half the outputs in the place of eight. Pixels are paired within a register tile and outputs within a unit of 64,
// so that three products in turn go through the same accumulators (as Huang et al. 2016 fuse the sums into the product), and
// what two of them share never leaves L1. Sums of weights are packed; sums of inputs are made once per tile, beside the
// products of the tile before. Included once per instruction set (see simd.h).

// Columns of a tile, in each half of a unit.
constexpr int kStrassenPanels = LP_REGISTERS == 32 ? 2 : 1;

// The sums of inputs of a tile's pairs of rows: A21 + A22, A21 + A22 - A11, A11 - A21, A12 - A21 - A22 + A11, each `step`
// behind the one before.
struct StrassenSums {
  const float *upper, *lower;
  int64_t ldx, depth, second;
  float* out;
  int64_t ld, step;
  int64_t pairs, at;  // left to do, and of the first one done
  bool far;           // the rows come from beyond L2

  template <class V>
  inline __attribute__((always_inline)) void some(int64_t k, int64_t lanes) {
    V s = load_part<V>(lower + k, lanes) + load_part<V>(lower + second + k, lanes);
    store<V>(out + k, s);
    s -= load_part<V>(upper + k, lanes);
    store<V>(out + step + k, s);
    s = load_part<V>(upper + second + k, lanes) - s;
    store<V>(out + 3 * step + k, s);
    s = load_part<V>(upper + k, lanes) - load_part<V>(lower + k, lanes);
    store<V>(out + 2 * step + k, s);
  }
  // A vector of the next pair.
  template <class V>
  inline __attribute__((always_inline)) void one() {
    constexpr int64_t L = sizeof(V) / 4;
    const int64_t k = std::min(at, depth - L);
    if (far) {  // the hardware does not see that the next rows come next
      for (const float* line : {upper + k, lower + k}) {
        __builtin_prefetch(line + ldx);
        __builtin_prefetch(line + ldx + second);
      }
    }
    some<V>(k, L);
    at += L;
    if (at < depth) return;
    at = 0;
    upper += ldx;
    lower += ldx;
    out += ld;
    --pairs;
  }
  template <class V>
  inline void all() {
    constexpr int64_t L = sizeof(V) / 4;
    if (depth >= L)
      while (pairs > 0) one<V>();
    for (; pairs > 0; --pairs, upper += ldx, lower += ldx, out += ld) some<V>(0, depth);
  }
};

// Rows [0, rows) of x in pairs of row i and row rows - pairs + i: an odd one in the middle is its own partner, and is stored
// once. Likewise inputs k and second + k: the weights of the second half are zero where the halves overlap.
struct StrassenTile {
  const float* x;
  int64_t ldx;
  int64_t rows, depth, second;
  const float* sums;  // four times `sums_step` apart
  int64_t ld, sums_step;
  StrassenSums* next;     // of another tile, made beside the products: adders and memory wait for the multipliers
  const float* weight;    // of seven products in their order below, panel after panel
  const float* shift[2];  // of the left and the right columns
  const float* residual;
  int64_t ldr;
  float* y;
  int64_t ldy, count;  // of the right columns; all of the left ones are there
  Clamp bounds;
};

template <int Rows, int NV, class V, int... I>
static inline __attribute__((always_inline)) void strassen_product(V* acc, const float* a, int64_t ld, const float* weight,
                                                                   int64_t depth, StrassenSums& next,
                                                                   std::integer_sequence<int, I...>) {
  constexpr int bases = (Rows + 2) / 3, L = sizeof(V) / 4, per_panel = int(kPanel) / L;
  const float* base[bases];
  for (int i = 0; i < bases; ++i) base[i] = a + i * 3 * ld;
  const float* panel[kStrassenPanels];
  for (int i = 0; i < kStrassenPanels; ++i) panel[i] = weight + i * 7 * kPanel * depth;
  for (int64_t k = depth; k > 0;) {
    if (next.pairs > 0 && depth >= L) next.one<V>();
    const int64_t some = std::min<int64_t>(k, 8);
    k -= some;
    for (int64_t i = some; i > 0; --i) {
      V b[NV];
      for (int v = 0; v < NV; ++v) b[v] = load<V>(panel[v / per_panel] + v % per_panel * L);
      ((acc[I] += base[I / NV / 3][I / NV % 3 * ld] * b[I % NV]), ...);
      for (int i = 0; i < kStrassenPanels; ++i) panel[i] += kPanel;
      for (int i = 0; i < bases; ++i) ++base[i];
    }
  }
}

template <int Bytes, int Rows, int... I>
static inline __attribute__((always_inline)) void strassen_body(const StrassenTile& given,
                                                                std::integer_sequence<int, I...> all) {
  using V = typename Simd<float, Bytes>::reg;
  constexpr int L = Simd<float, Bytes>::lanes, NV = int(kPanel) * kStrassenPanels / L;
  const StrassenTile t = given;  // stores may alias anything behind a reference
  alignas(64) float first[Rows * NV * L], second[Rows * NV * L];
  StrassenSums next = *t.next;
  V acc[Rows * NV] = {};
  const int64_t low_at = t.rows - Rows;
  const float *upper = t.x, *lower = t.x + low_at * t.ldx, *weight = t.weight;
  const V low = V{} + t.bounds.low, high = V{} + t.bounds.high;
  const auto product = [&](const float* a, int64_t ld) __attribute__((always_inline)) {
    strassen_product<Rows, NV>(acc, a, ld, weight, t.depth, next, all);
    weight += t.depth * kPanel;
  };
  // Loads and stores between products take as many cycles as the little code that they are leaves them: addresses are computed
  // anew each time, not kept on the stack.
  const auto keep = [&](float* to) __attribute__((always_inline)) { ((store<V>(to + I * L, acc[I])), ...); };
  // Output lines arrive while the product before them is computed.
  const auto ahead = [&](int64_t row, int half) __attribute__((always_inline)) {
    const float* line = t.y + row * t.ldy + half * kStrassenHalf;
#pragma GCC unroll 1
    for (int j = 0; j < Rows; ++j, line += t.ldy)
      for (int v = 0; v < NV * L; v += 16) __builtin_prefetch(line + v, 1);
  };
  using Yes = std::true_type;
  using No = std::false_type;
  const auto finish = [&](int64_t row, auto right, bool skip, const auto& value) __attribute__((always_inline)) {
    constexpr int half = decltype(right)::value;
    const int64_t count = half ? t.count : NV * L, last = count - (NV - 1) * L;
    const float* shift = t.shift[half];
    float* y = t.y + row * t.ldy + half * kStrassenHalf;
    const float* residual = t.residual ? t.residual + row * t.ldr + half * kStrassenHalf : nullptr;
    if (last <= 0) {  // short vectors alone come here
      ((store<V>(second + I * L, value(I))), ...);
      for (int j = skip; j < Rows; ++j)
        for (int v = 0; v * L < count; ++v) {
          const int64_t lanes = std::min<int64_t>(L, count - v * L);
          V all = load<V>(second + (j * NV + v) * L);
          if (shift) all += load_part<V>(shift + v * L, lanes);
          if (residual) all += load_part<V>(residual + j * t.ldr + v * L, lanes);
          store_part<V>(y + j * t.ldy + v * L, clamp(all, low, high), lanes);
        }
      return;
    }
    float* to[(Rows + 2) / 3];
    const float* from[(Rows + 2) / 3];
    for (int i = 0; i < (Rows + 2) / 3; ++i) {
      to[i] = y + i * 3 * t.ldy;
      asm("" : "+r"(to[i]));
    }
    for (int i = 0; i < (Rows + 2) / 3 && residual; ++i) from[i] = residual + i * 3 * t.ldr;
    V added[NV] = {};
    for (int v = 0; v < NV && shift; ++v) added[v] = load_part<V>(shift + v * L, v < NV - 1 ? L : last);
    const auto one = [&](int j, int v, V all, auto whole, auto more) __attribute__((always_inline)) {
      if (j == 0 && skip) return;
      const int64_t lanes = decltype(whole)::value || v < NV - 1 ? L : last;
      all += added[v];
      if constexpr (decltype(more)::value) all += load_part<V>(from[j / 3] + j % 3 * t.ldr + v * L, lanes);
      store_part<V>(to[j / 3] + j % 3 * t.ldy + v * L, clamp(all, low, high), lanes);
    };
    if (!half || last == L)
      residual ? (one(I / NV, I % NV, value(I), Yes(), Yes()), ...) : (one(I / NV, I % NV, value(I), Yes(), No()), ...);
    else
      residual ? (one(I / NV, I % NV, value(I), No(), Yes()), ...) : (one(I / NV, I % NV, value(I), No(), No()), ...);
  };
  const auto sum = [&](int i) __attribute__((always_inline)) { return acc[i]; };
  const bool skip = 2 * Rows > t.rows;  // the first row below is the last one above

  product(upper, t.ldx);  // A11 B11
  keep(first);
  ahead(0, 0);
  product(upper + t.second, t.ldx);  // A12 B21
  finish(0, No(), false, sum);
  ((acc[I] = load<V>(first + I * L)), ...);
  product(t.sums + t.sums_step, t.ld);  // (A21 + A22 - A11) (B22 - B12 + B11)
  keep(first);
  product(t.sums + 2 * t.sums_step, t.ld);  // (A11 - A21) (B22 - B12)
  keep(second);
  ahead(low_at, 0);
  product(lower + t.second, t.ldx);  // A22 (B21 - B22 + B12 - B11)
  finish(low_at, No(), skip, sum);
  ((acc[I] = V{}), ...);
  ahead(low_at, 1);
  product(t.sums, t.ld);  // (A21 + A22) (B12 - B11)
  finish(low_at, Yes(), skip, [&](int i) __attribute__((always_inline)) { return acc[i] + load<V>(second + i * L); });
  ((acc[I] += load<V>(first + I * L)), ...);
  ahead(0, 1);
  product(t.sums + 3 * t.sums_step, t.ld);  // (A12 - A21 - A22 + A11) B22
  finish(0, Yes(), false, sum);
  *t.next = next;
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

static bool strassen(const TapConv& p, const Env& env) {
  if (!is_pointwise(p)) return false;
  const int64_t pixels = p.n * p.rows * p.cols, inputs = p.in_begin[1], outputs = p.out_begin[1];
  const int64_t units = strassen_units(outputs), depth = (inputs + 1) / 2;
  const bool far = pixels * inputs * 4 > kFarMap;
  const StrassenSet& set = strassen_set();
  const int64_t most = 2 * set.max, half = (pixels + 1) / 2;
  // An even number: as many for each of two threads. The same for any number of them, as the pairs decide how sums are rounded.
  const int64_t tiles = pixels <= most ? 1 : round_up((pixels + most - 1) / most, 2);
  // Tiles that pass over the weights together. Those stay in the L2 cache: one, and the sums of the next one are made beside
  // it. Else some, and their sums are made before.
  const int64_t block = 7 * depth * units * kStrassenHalf * 4 <= 512 * 1024 ? 1 : 4, ring = block == 1 ? 2 : block;
  const int64_t shares = env.threads > 1 ? 2 * env.threads : 1, cuts = std::min(tiles, shares);
  // Few tiles: threads share the outputs as well, and each makes the sums again.
  const int64_t parts = std::min(units, (shares + cuts - 1) / cuts);
  const int64_t slots = task_slots(env, cuts * parts), pairs = ring * set.max;
  // An odd number of lines from row to row: they spread over all sets of the cache.
  const int64_t ld = (round_up(depth, 16) / 16 | 1) * 16;
  float* scratch =
      reinterpret_cast<float*>(aligned(static_cast<char*>(env.alloc(env.owner, size_t(slots * 4 * pairs * ld) * 4 + 64))));
  const float *weight = static_cast<const float*>(p.weight), *weight_sums = weight + packed_size(outputs, inputs, 1, 1);
  const float* shift = static_cast<const float*>(p.shift);
  const int64_t summed = std::min(outputs, units * 2 * kStrassenHalf), zero = 0;  // outputs; the others follow directly
  run_tasks(env, cuts * parts, [&](int slot, int64_t index) {
    using V = Simd<float, vector_bytes<float, int(kPanel)>()>::reg;
    const int64_t cut = index / parts, part = index % parts;
    const int64_t first = tiles * cut / cuts, end = tiles * (cut + 1) / cuts;
    const int64_t begin = units * part / parts, stop = units * (part + 1) / parts;
    const auto row_of = [&](int64_t tile) { return std::min(pixels, 2 * (half * tile / tiles)); };
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
    // Sums of this block and of the next one.
    const auto place = [&](int64_t tile) { return sums + (tile - first) % ring * set.max * ld; };
    const auto sums_of = [&](int64_t tile) {
      const int64_t rows = row_of(tile + 1) - row_of(tile), half = (rows + 1) / 2;
      const float* upper = x + row_of(tile) * t.ldx;
      return StrassenSums{upper, upper + (rows - half) * t.ldx, t.ldx, depth, t.second, place(tile), ld, t.sums_step, half, 0,
                          far};
    };
    PointwiseTile rest{};
    rest.ldx = t.ldx;
    rest.ldy = t.ldy;
    rest.ldr = t.ldr;
    rest.runs = 1;
    rest.run_at = &zero;
    rest.run_length = &inputs;
    rest.bounds = t.bounds;
    if (block == 1) sums_of(first).all<V>();
    for (int64_t from = first; from < end; from += block) {
      const int64_t to = std::min(end, from + block);
      for (int64_t i = from; i < to && block > 1; ++i) sums_of(i).all<V>();
      for (int64_t unit = begin; unit < stop; ++unit)
        for (int64_t panel = 0; panel < kStrassenHalf; panel += kStrassenPanels * kPanel) {
          const int64_t left = unit * 2 * kStrassenHalf + panel, right = left + kStrassenHalf;
          t.weight = weight_sums + (unit * kStrassenHalf + panel) * 7 * depth;
          t.count = std::min<int64_t>(kStrassenPanels * kPanel, outputs - right);
          t.shift[0] = shift ? shift + left : nullptr;
          t.shift[1] = shift ? shift + right : nullptr;
          for (int64_t i = from; i < to; ++i) {
            const int64_t row = row_of(i);
            const bool last = unit + 1 == stop && panel + kStrassenPanels * kPanel >= kStrassenHalf;
            StrassenSums next = last && block == 1 && i + 1 < end ? sums_of(i + 1) : StrassenSums{};
            t.next = &next;
            t.rows = row_of(i + 1) - row;
            t.x = x + row * t.ldx;
            t.sums = place(i);
            t.y = y + row * t.ldy + left;
            t.residual = residual ? residual + row * t.ldr + left : nullptr;
            set.fn[(t.rows + 1) / 2](t);
            next.all<V>();
          }
        }
      const int64_t row = row_of(from), rows = row_of(to) - row;
      if (part + 1 == parts && summed < outputs)
        pointwise_panels(rest, weight + summed * inputs, shift ? shift + summed : nullptr, inputs, outputs - summed, 1, rows,
                         [&](int64_t, PointwiseTile& tile) {
                           tile.x = x + row * t.ldx;
                           tile.y = y + row * t.ldy + summed;
                           tile.residual = residual ? residual + row * t.ldr + summed : nullptr;
                         });
      const int64_t left = begin * 2 * kStrassenHalf, right = part + 1 == parts ? outputs : stop * 2 * kStrassenHalf;
      if (!t.bounds.complete) activate_rows(p.act, y + row * t.ldy + left, t.ldy, rows, right - left);
    }
  });
  return true;
}
