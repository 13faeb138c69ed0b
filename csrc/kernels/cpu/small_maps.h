// Convolutions of maps of a few pixels, where most of a kernel's taps hang over the edge: a matrix product for every pair of an
// input and an output pixel that a tap joins, and no others. Lanes are whatever lies side by side, or is cheapest to lay so:
// images (forward) or input channels (both gradients); the weight itself is only read once per step, and its gradient is
// written where it belongs. Included once per instruction set (see simd.h).

constexpr int kPairRows = LP_REGISTERS == 32 ? 6 : 2;
constexpr int64_t kPairLanes = LP_VECTOR_BYTES / 4;

// One product: depth steps of a vector of lanes and of kPairRows scalars.
struct PairRun {
  const float *scalar, *vector;
};

// out[row][lane] = sum over runs and steps k of scalar[row_at[row] + k * step] * vector[k][lane]
template <int NV, int... I>
static inline __attribute__((always_inline)) void pair_body(const PairRun* run, int runs, int64_t depth, const int64_t* row_at,
                                                            int64_t step, float* out, std::integer_sequence<int, I...>) {
  using V = Simd<float, LP_VECTOR_BYTES>::reg;
  V acc[kPairRows * NV] = {};
  for (int r = 0; r < runs; ++r) {
    const float *vector = run[r].vector, *scalar[kPairRows];
    for (int j = 0; j < kPairRows; ++j) scalar[j] = run[r].scalar + row_at[j];
    for (int64_t k = 0; k < depth; ++k, vector += NV * kPairLanes) {
      V b[NV];
      for (int v = 0; v < NV; ++v) b[v] = load<V>(vector + v * kPairLanes);
      ((acc[I] += scalar[I / NV][k * step] * b[I % NV]), ...);
    }
  }
  ((store<V>(out + I * kPairLanes, acc[I])), ...);
}

static void pair_products(int64_t width, const PairRun* run, int runs, int64_t depth, const int64_t* row_at, int64_t step,
                          float* out) {
  if (width == 4 * kPairLanes)
    pair_body<4>(run, runs, depth, row_at, step, out, std::make_integer_sequence<int, kPairRows * 4>());
  else if (width == 2 * kPairLanes)
    pair_body<2>(run, runs, depth, row_at, step, out, std::make_integer_sequence<int, kPairRows * 2>());
  else
    pair_body<1>(run, runs, depth, row_at, step, out, std::make_integer_sequence<int, kPairRows>());
}

// Lanes in blocks of four, two or one vector; what is laid out by blocks has a block's rows one behind the other.
struct LaneBlocks {
  int64_t count, lanes, padded;
  explicit LaneBlocks(int64_t all) : count(0), lanes(all), padded(round_up(all, kPairLanes)) {
    for (int64_t at = 0; at < padded; at += width(at)) ++count;
  }
  int64_t width(int64_t at) const {
    const int64_t vectors = (padded - at) / kPairLanes;
    return (vectors >= 4 ? 4 : vectors >= 2 ? 2 : 1) * kPairLanes;
  }
  int64_t start(int64_t block) const {
    int64_t at = 0;
    while (block-- > 0) at += width(at);
    return at;
  }
  int64_t used(int64_t at) const { return std::min(width(at), lanes - at); }
};

static void copy_lanes(const float* from, int64_t used, int64_t width, float* to) {
  using V = Simd<float, LP_VECTOR_BYTES>::reg;
  for (int64_t v = 0; v < width; v += kPairLanes)
    store<V>(to + v, load_part<V>(from + v, std::max<int64_t>(0, std::min(kPairLanes, used - v))));
}

static float* pair_scratch(const Env& env, int64_t floats) {
  return reinterpret_cast<float*>(aligned(static_cast<char*>(env.alloc(env.owner, size_t(floats) * 4 + 64))));
}

static void small_map_forward(const SmallMap& p, const Env& env) {
  const LaneBlocks images(p.n);
  float* const x = pair_scratch(env, images.padded * p.places * p.inputs);
  run_tasks(env, images.count * p.places, [&](int, int64_t task) {
    const int64_t at = images.start(task / p.places), place = task % p.places, width = images.width(at);
    float* const to = x + at * p.places * p.inputs + place * p.inputs * width;
    for (int64_t i = 0; i < width; ++i) {
      const float* from = p.x + (at + i) * p.x_image + p.x_at[place];
      for (int64_t c = 0; c < p.inputs; ++c)
        to[c * width + i] = at + i < p.n ? from[c] * (p.in_scale ? p.in_scale[c] : 1.0f) : 0.0f;
    }
  });
  run_tasks(env, (p.outputs + kPairRows - 1) / kPairRows, [&](int, int64_t task) {
    const int64_t first = task * kPairRows, rows = std::min<int64_t>(kPairRows, p.outputs - first);
    int64_t row_at[kPairRows];
    for (int64_t j = 0; j < kPairRows; ++j) row_at[j] = (first + std::min(j, rows - 1)) * p.weight_row;
    alignas(64) float sums[kPairRows * 4 * kPairLanes];
    PairRun run[SmallMap::limit];
    for (int64_t at = 0; at < images.padded; at += images.width(at))
      for (int64_t site = 0; site < p.sites; ++site) {
        const int64_t width = images.width(at);
        int runs = 0;
        for (int64_t place = 0; place < p.places; ++place)
          if (const int tap = p.tap(place, site); tap >= 0)
            run[runs++] = {p.weight + p.tap_at[tap], x + at * p.places * p.inputs + place * p.inputs * width};
        pair_products(width, run, runs, p.inputs, row_at, 1, sums);
        float* const y = p.y + at * p.y_image + p.y_at[site] + first;
        for (int64_t i = 0; i < images.used(at); ++i)
          for (int64_t j = 0; j < rows; ++j) y[i * p.y_image + j] = sums[j * width + i] + (p.shift ? p.shift[first + j] : 0.0f);
      }
  });
}

static void small_map_input_grad(const SmallMap& p, const Env& env) {
  using V = Simd<float, LP_VECTOR_BYTES>::reg;
  const LaneBlocks channels(p.inputs);
  float* const weight = pair_scratch(env, channels.padded * p.taps * p.outputs);
  run_tasks(env, channels.count * p.taps, [&](int, int64_t task) {
    const int64_t at = channels.start(task / p.taps), tap = task % p.taps, width = channels.width(at);
    float* to = weight + at * p.taps * p.outputs + tap * p.outputs * width;
    for (int64_t o = 0; o < p.outputs; ++o, to += width)
      copy_lanes(p.weight + o * p.weight_row + p.tap_at[tap] + at, channels.used(at), width, to);
  });
  const int64_t portions = (p.n + kPairRows - 1) / kPairRows;
  run_tasks(env, channels.count * p.places * portions, [&](int, int64_t task) {
    const int64_t at = channels.start(task / (p.places * portions)), place = task / portions % p.places;
    const int64_t first = task % portions * kPairRows, rows = std::min<int64_t>(kPairRows, p.n - first);
    const int64_t width = channels.width(at);
    int64_t row_at[kPairRows];
    for (int64_t j = 0; j < kPairRows; ++j) row_at[j] = (first + std::min(j, rows - 1)) * p.y_image;
    alignas(64) float sums[kPairRows * 4 * kPairLanes];
    PairRun run[SmallMap::limit];
    int runs = 0;
    for (int64_t site = 0; site < p.sites; ++site)
      if (const int tap = p.tap(place, site); tap >= 0)
        run[runs++] = {p.y + p.y_at[site], weight + at * p.taps * p.outputs + tap * p.outputs * width};
    pair_products(width, run, runs, p.outputs, row_at, 1, sums);
    for (int64_t j = 0; j < rows; ++j)
      for (int64_t v = 0; v < channels.used(at); v += kPairLanes) {
        const int64_t used = std::min(kPairLanes, channels.used(at) - v);
        const V scale = p.in_scale ? load_part<V>(p.in_scale + at + v, used) : V{} + 1.0f;
        store_part<V>(p.x + (first + j) * p.x_image + p.x_at[place] + at + v, load<V>(sums + j * width + v) * scale, used);
      }
  });
}

static void small_map_weight_grad(const SmallMap& p, const Env& env) {
  using V = Simd<float, LP_VECTOR_BYTES>::reg;
  const LaneBlocks channels(p.inputs);
  const int64_t portions = (p.outputs + kPairRows - 1) / kPairRows;
  float* const x = pair_scratch(env, channels.padded * p.places * p.n);
  float* const grad = pair_scratch(env, portions * kPairRows * p.sites * p.n);
  float* const products = p.in_sums ? pair_scratch(env, portions * channels.padded) : nullptr;
  run_tasks(env, channels.count * p.places, [&](int, int64_t task) {
    const int64_t at = channels.start(task / p.places), place = task % p.places, width = channels.width(at);
    float* to = x + at * p.places * p.n + place * p.n * width;
    for (int64_t i = 0; i < p.n; ++i, to += width)
      copy_lanes(p.x + i * p.x_image + p.x_at[place] + at, channels.used(at), width, to);
  });
  run_tasks(env, portions, [&](int, int64_t task) {
    const int64_t first = task * kPairRows, rows = std::min<int64_t>(kPairRows, p.outputs - first);
    float* to = grad + first * p.sites * p.n;
    for (int64_t site = 0; site < p.sites; ++site)
      for (int64_t i = 0; i < p.n; ++i, to += kPairRows)
        for (int64_t j = 0; j < kPairRows; ++j) to[j] = j < rows ? p.y[i * p.y_image + p.y_at[site] + first + j] : 0.0f;
  });
  run_tasks(env, channels.count * portions, [&](int, int64_t task) {
    const int64_t at = channels.start(task / portions), portion = task % portions, width = channels.width(at);
    const int64_t first = portion * kPairRows, rows = std::min<int64_t>(kPairRows, p.outputs - first);
    int64_t row_at[kPairRows];
    for (int64_t j = 0; j < kPairRows; ++j) row_at[j] = j;
    alignas(64) float sums[kPairRows * 4 * kPairLanes];
    V total[4] = {};
    for (int64_t tap = 0; tap < p.taps; ++tap) {
      PairRun run[SmallMap::limit];
      int runs = 0;
      for (int64_t place = 0; place < p.places; ++place)
        for (int64_t site = 0; site < p.sites; ++site)
          if (p.tap(place, site) == tap)
            run[runs++] = {grad + (first * p.sites + site * kPairRows) * p.n, x + at * p.places * p.n + place * p.n * width};
      pair_products(width, run, runs, p.n, row_at, kPairRows, sums);
      for (int64_t j = 0; j < rows; ++j)
        for (int64_t v = 0; v < channels.used(at); v += kPairLanes) {
          const int64_t used = std::min(kPairLanes, channels.used(at) - v);
          const V raw = load<V>(sums + j * width + v);
          const V scale = p.in_scale ? load_part<V>(p.in_scale + at + v, used) : V{} + 1.0f;
          if (p.grad_weight)
            store_part<V>(p.grad_weight + (first + j) * p.grad_row + p.grad_tap_at[tap] + at + v, raw * scale, used);
          if (products)
            total[v / kPairLanes] += raw * load_part<V>(p.weight + (first + j) * p.weight_row + p.tap_at[tap] + at + v, used);
        }
    }
    for (int64_t v = 0; products && v < width; v += kPairLanes)
      store<V>(products + portion * channels.padded + at + v, total[v / kPairLanes]);
  });
  for (int64_t c = 0; products && c < p.inputs; ++c)
    for (int64_t portion = 0; portion < portions; ++portion) p.in_sums[c] += products[portion * channels.padded + c];
}
