// Training convolutions of maps of up to four channels, such as images and what pruning leaves of a first stage: a vector is 16
// neighbouring pixels of one channel. Pixels of channels are parted into planes when a band of rows is staged, with stride 2
// into even and odd columns too, so that every tap of every pixel is a load at an offset; results are turned back into pixels.
// The weight gradient is the same sums with the output's gradient, also in planes, in the place of the weight. Transforms do
// not pay at so few channels. AVX-512 only. Included once per instruction set (see simd.h).

#if defined(__AVX512F__)

constexpr int64_t kPlaneBandFloats = 8 * 1024;  // of a band's input, so that it stays in the L1 cache
constexpr int kPlaneBlock = 4;                  // outputs, and vectors of pixels, that go through a product together

// How a band lies: row by row, channel by channel, and with stride 2 even columns before odd ones.
struct PlaneBands {
  int64_t phases, length, row, row_step, rows, bands, floats;
  explicit PlaneBands(const PlaneConv& p) {
    phases = std::min(p.stride_w, p.kw);
    const int64_t read = round_up(p.cols, 16) + (p.kw - 1) / p.stride_w;
    const int64_t written = (round_up(p.width, 16 * p.stride_w) + p.stride_w - 1 + p.pad_w) / p.stride_w;
    length = round_up(std::max(read, written), 8);
    row = p.inputs * phases * length;
    row_step = std::min(p.stride_h, p.kh);  // rows that no tap reads are left out
    rows = std::clamp<int64_t>((kPlaneBandFloats / row - p.kh) / row_step, 1, p.rows);
    bands = (p.rows + rows - 1) / rows;
    floats = round_up(((rows - 1) * row_step + p.kh) * row + 32, 16);
  }
  // Of a tap's channel, from the place of a pixel.
  int64_t at(const PlaneConv& p, int64_t h, int64_t w, int64_t c) const {
    return h * row + (c * phases + w % p.stride_w) * length + w / p.stride_w;
  }
};

// 16 pixels of up to four channels to one vector per channel; `floats` of them are there.
template <int Channels>
struct PartPixels {
  __m512i index[Channels];
  __mmask16 late[Channels];
  PartPixels() {
    alignas(64) int32_t at[16];
    for (int c = 0; c < Channels; ++c) {
      late[c] = 0;
      for (int i = 0; i < 16; ++i) {
        at[i] = (i * Channels + c) & 31;
        late[c] |= __mmask16((i * Channels + c >= 32) << i);
      }
      index[c] = _mm512_load_si512(at);
    }
  }
  inline __attribute__((always_inline)) void operator()(const float* from, int64_t floats, __m512* to) const {
    __m512 v[4];
    if (floats >= 16 * Channels) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) v[i] = i < Channels ? _mm512_loadu_ps(from + 16 * i) : _mm512_setzero_ps();
    } else {
      for (int i = 0; i < 4; ++i) {
        const int64_t left = std::clamp<int64_t>(std::min<int64_t>(floats, 16 * Channels) - 16 * i, 0, 16);
        v[i] = _mm512_maskz_loadu_ps(__mmask16((1u << left) - 1), from + 16 * i);
      }
    }
#pragma GCC unroll 4
    for (int c = 0; c < Channels; ++c) {
      to[c] = Channels == 1 ? v[0] : _mm512_permutex2var_ps(v[0], index[c], v[1]);
      if (Channels > 2) to[c] = _mm512_mask_blend_ps(late[c], to[c], _mm512_permutex2var_ps(v[2], index[c], v[3]));
    }
  }
};

template <int Channels>
static void stage_plane_row(const PlaneConv& p, const PlaneBands& b, const PartPixels<Channels>& part, const float* from,
                            float* to) {
  if (p.stride_w == 1) {
    for (int64_t first = 0; first < p.width; first += 16) {
      __m512 v[Channels];
      part(from + first * Channels, (p.width - first) * Channels, v);
#pragma GCC unroll 4
      for (int c = 0; c < Channels; ++c) _mm512_storeu_ps(to + c * b.length + first + p.pad_w, v[c]);
    }
    return;
  }
  alignas(64) static const int32_t kEven[16] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  const __m512i even = _mm512_load_si512(kEven), odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  for (int64_t first = 0; first < p.width; first += 32) {
    __m512 v[2][Channels];
    for (int i = 0; i < 2; ++i)
      part(from + (first + 16 * i) * Channels, std::max<int64_t>(0, (p.width - first - 16 * i) * Channels), v[i]);
#pragma GCC unroll 4
    for (int c = 0; c < Channels; ++c)
      for (int64_t parity = 0; parity < 2; ++parity)
        if (const int64_t phase = (parity + p.pad_w) % 2; phase < b.phases)
          _mm512_storeu_ps(to + (c * b.phases + phase) * b.length + (first + parity + p.pad_w) / 2,
                           _mm512_permutex2var_ps(v[0][c], parity ? odd : even, v[1][c]));
  }
}

// The inputs of rows [first, last) of the output. What lies beside the map has been zero before and is so after.
template <int Channels>
static void stage_planes(const PlaneConv& p, const PlaneBands& b, const PartPixels<Channels>& part, int64_t image,
                         int64_t first, int64_t last, float* to) {
  const int64_t count = (last - first - 1) * b.row_step + p.kh;
  for (int64_t i = 0; i < count; ++i, to += b.row) {
    const int64_t h = p.kh >= p.stride_h ? first * p.stride_h + i : (first + i / p.kh) * p.stride_h + i % p.kh;
    const int64_t from = h - p.pad_h;
    if (from >= 0 && from < p.height)
      stage_plane_row(p, b, part, p.x + image * p.x_image + from * p.x_row, to);
    else
      memset(to, 0, size_t(b.row) * 4);
  }
}

// 16 pixels of up to four outputs from planes to y, `count` of them.
static inline __attribute__((always_inline)) void store_planes(__m512* r, int64_t outputs, int64_t count, float* y,
                                                               int64_t ldy) {
  turn_lanes(r);  // vector k: pixels k, k + 4, k + 8, k + 12
  if (ldy == 4 && outputs == 4 && count >= 16) {
    const auto pair = [](__m512 a, __m512 b, auto control) {
      return _mm512_maskz_shuffle_f32x4(0xffff, a, b, decltype(control)::value);
    };
    using Low = std::integral_constant<int, 0x44>;
    using High = std::integral_constant<int, 0xee>;
    using Even = std::integral_constant<int, 0x88>;
    using Odd = std::integral_constant<int, 0xdd>;
    const __m512 a = pair(r[0], r[1], Low{}), b = pair(r[2], r[3], Low{}), c = pair(r[0], r[1], High{}),
                 d = pair(r[2], r[3], High{});
    _mm512_storeu_ps(y, pair(a, b, Even{}));
    _mm512_storeu_ps(y + 16, pair(a, b, Odd{}));
    _mm512_storeu_ps(y + 32, pair(c, d, Even{}));
    _mm512_storeu_ps(y + 48, pair(c, d, Odd{}));
    return;
  }
  if (outputs == 4 && count >= 16) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      _mm_storeu_ps(y + k * ldy, _mm512_castps512_ps128(r[k]));
      _mm_storeu_ps(y + (k + 4) * ldy, _mm512_maskz_extractf32x4_ps(0xf, r[k], 1));
      _mm_storeu_ps(y + (k + 8) * ldy, _mm512_maskz_extractf32x4_ps(0xf, r[k], 2));
      _mm_storeu_ps(y + (k + 12) * ldy, _mm512_maskz_extractf32x4_ps(0xf, r[k], 3));
    }
    return;
  }
  const __mmask8 lanes = __mmask8((1u << outputs) - 1);
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const auto put = [&](int64_t pixel, __m128 v) {
      if (pixel < count) _mm_mask_storeu_ps(y + pixel * ldy, lanes, v);
    };
    put(k, _mm512_castps512_ps128(r[k]));
    put(k + 4, _mm512_maskz_extractf32x4_ps(0xf, r[k], 1));
    put(k + 8, _mm512_maskz_extractf32x4_ps(0xf, r[k], 2));
    put(k + 12, _mm512_maskz_extractf32x4_ps(0xf, r[k], 3));
  }
}

template <int... I>
static inline __attribute__((always_inline)) void plane_products(const float* const* x, const int64_t* at, int64_t depth,
                                                                 const float* weight, __m512 (*to)[kPlaneBlock],
                                                                 const float* shift, std::integer_sequence<int, I...>) {
  using V = Simd<float, 64>::reg;
  V acc[sizeof...(I)] = {(V{} + shift[I / kPlaneBlock])...};
  for (int64_t k = 0; k < depth; ++k, weight += kPlaneBlock) {
    V in[kPlaneBlock], w[kPlaneBlock];
    for (int v = 0; v < kPlaneBlock; ++v) in[v] = load<V>(x[v] + at[k]);
    for (int o = 0; o < kPlaneBlock; ++o) w[o] = in_register(V{} + weight[o]);
    ((acc[I] += in[I % kPlaneBlock] * w[I / kPlaneBlock]), ...);
  }
  ((to[I % kPlaneBlock][I / kPlaneBlock] = __m512(acc[I])), ...);
}

template <int Channels>
static void plane_forward_of(const PlaneConv& p, const Env& env) {
  const PlaneBands b(p);
  const PartPixels<Channels> part;
  const int64_t tasks = p.n * b.bands, slots = task_slots(env, tasks), taps = p.kh * p.kw * p.inputs;
  const int64_t blocks = (p.outputs + kPlaneBlock - 1) / kPlaneBlock, vectors = (p.cols + 15) / 16;
  float* const staged = static_cast<float*>(env.alloc(env.owner, size_t(slots * b.floats + 16) * 4));
  memset(staged, 0, size_t(slots * b.floats) * 4);
  int64_t at[4 * 9];
  for (int64_t k = 0; k < taps; ++k) at[k] = b.at(p, k / p.inputs / p.kw, k / p.inputs % p.kw, k % p.inputs);
  run_tasks(env, tasks, [&](int slot, int64_t task) {
    float* const x = staged + slot * b.floats;
    const int64_t image = task / b.bands, first = task % b.bands * b.rows, last = std::min(p.rows, first + b.rows);
    stage_planes(p, b, part, image, first, last, x);
    const int64_t count = (last - first) * vectors;
    for (int64_t i = 0; i < count; i += kPlaneBlock) {
      const float* from[kPlaneBlock];
      for (int64_t v = 0; v < kPlaneBlock; ++v) {
        const int64_t own = std::min(i + v, count - 1);
        from[v] = x + own / vectors * b.row_step * b.row + own % vectors * 16;
      }
      for (int64_t block = 0; block < blocks; ++block) {
        __m512 sums[kPlaneBlock][kPlaneBlock];
        plane_products(from, at, taps, p.weight + block * taps * kPlaneBlock, sums, p.shift + block * kPlaneBlock,
                       std::make_integer_sequence<int, kPlaneBlock * kPlaneBlock>());
        for (int64_t v = 0; v < kPlaneBlock && i + v < count; ++v) {
          const int64_t row = first + (i + v) / vectors, col = (i + v) % vectors * 16;
          store_planes(sums[v], std::min<int64_t>(kPlaneBlock, p.outputs - block * kPlaneBlock), p.cols - col,
                       p.y + image * p.y_image + row * p.y_row + col * p.y_pixel + block * kPlaneBlock, p.y_pixel);
        }
      }
    }
  });
}

static void plane_forward(const PlaneConv& p, const Env& env) {
  constexpr decltype(&plane_forward_of<1>) of[] = {plane_forward_of<1>, plane_forward_of<2>, plane_forward_of<3>,
                                                   plane_forward_of<4>};
  of[p.inputs - 1](p, env);
}

// Four outputs of 16 pixels of the gradient, `count` of which are there.
static inline __attribute__((always_inline)) void part_quads(const float* y, int64_t ldy, int64_t outputs, int64_t count,
                                                             __m512* r) {
  const __mmask8 lanes = __mmask8((1u << outputs) - 1);
  if (outputs == 4 && count >= 16) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) r[k] = four_blocks(y + k * ldy, y + (k + 4) * ldy, y + (k + 8) * ldy, y + (k + 12) * ldy);
    return turn_lanes(r);
  }
  const auto get = [&](int64_t pixel) { return _mm_maskz_loadu_ps(pixel < count ? lanes : 0, y + pixel * ldy); };
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    r[k] = _mm512_castps128_ps512(get(k));
    r[k] = _mm512_insertf32x4(r[k], get(k + 4), 1);
    r[k] = _mm512_insertf32x4(r[k], get(k + 8), 2);
    r[k] = _mm512_insertf32x4(r[k], get(k + 12), 3);
  }
  turn_lanes(r);
}

// Rows [first, last) of the output's gradient, plane by plane, with a row and a column of what lies beside it on every side.
static void stage_grad_planes(const PlaneConv& p, int64_t length, int64_t plane, int64_t image, int64_t first, int64_t last,
                              float* to) {
  for (int64_t block = 0; block < p.outputs; block += kPlaneBlock)
    for (int64_t row = first - 1; row <= last; ++row) {
      float* const line = to + block * plane + (row - first + 1) * length;
      for (int64_t col = 0; col < p.cols; col += 16) {
        __m512 r[kPlaneBlock];
        const int64_t there = row >= 0 && row < p.rows ? p.cols - col : 0;
        const float* from = p.y + image * p.y_image + row * p.y_row + col * p.y_pixel + block;
        part_quads(from, p.y_pixel, std::min<int64_t>(kPlaneBlock, p.outputs - block), there, r);
        for (int o = 0; o < kPlaneBlock; ++o) _mm512_storeu_ps(line + o * plane + 1 + col, r[o]);
      }
    }
}

static void plane_input_grad(const PlaneGrad& f, const Env& env) {
  const PlaneConv& p = f.conv;
  const int64_t length = round_up(round_up(std::max(p.cols, (p.width + 1) / 2), 16) + 2, 8);
  const int64_t planes = round_up(p.outputs, kPlaneBlock), half = (p.height + 1) / 2;
  const int64_t rows = std::clamp<int64_t>(2 * kPlaneBandFloats / (planes * length) - 2, 1, half);
  const int64_t plane = (rows + 2) * length, bands = (half + rows - 1) / rows, tasks = p.n * bands;
  const int64_t slots = task_slots(env, tasks), floats = round_up(planes * plane + 32, 16);
  float* const staged = static_cast<float*>(env.alloc(env.owner, size_t(slots * floats) * 4));
  memset(staged, 0, size_t(slots * floats) * 4);
  const float none[kPlaneBlock] = {};
  run_tasks(env, tasks, [&](int slot, int64_t task) {
    float* const grad = staged + slot * floats;
    const int64_t image = task / bands, first = task % bands * rows, last = std::min(half, first + rows);
    stage_grad_planes(p, length, plane, image, first, last, grad);
    for (int64_t a = 0; a < 2; ++a)
      for (int64_t b = 0; b < 2; ++b) {
        const PlaneGrad::Phase& phase = f.phase[a][b];
        int64_t at[4 * PlaneGrad::limit], depth = 0;
        for (int64_t t = 0; t < phase.taps; ++t)
          for (int64_t o = 0; o < p.outputs; ++o) at[depth++] = o * plane + (phase.h[t] + 1) * length + phase.w[t] + 1;
        const int64_t cols = (p.width - b + 1) / 2, vectors = (cols + 15) / 16;
        const int64_t count = (std::min(last, (p.height - a + 1) / 2) - first) * vectors;
        for (int64_t i = 0; i < count; i += kPlaneBlock) {
          const float* from[kPlaneBlock];
          for (int64_t v = 0; v < kPlaneBlock; ++v) {
            const int64_t own = std::min(i + v, count - 1);
            from[v] = grad + own / vectors * length + own % vectors * 16;
          }
          for (int64_t c = 0; c < p.inputs; c += kPlaneBlock) {
            __m512 sums[kPlaneBlock][kPlaneBlock];
            plane_products(from, at, depth, phase.weight + c * depth, sums, none,
                           std::make_integer_sequence<int, kPlaneBlock * kPlaneBlock>());
            for (int64_t v = 0; v < kPlaneBlock && i + v < count; ++v) {
              const int64_t row = 2 * (first + (i + v) / vectors) + a, col = (i + v) % vectors * 16;
              store_planes(sums[v], std::min<int64_t>(kPlaneBlock, p.inputs - c), cols - col,
                           f.grad_x + image * p.x_image + row * p.x_row + (2 * col + b) * p.inputs + c, 2 * p.inputs);
            }
          }
        }
      }
  });
}

// Sums over a band: to[c][o] += x[c] * grad[o], lane by lane.
template <int Inputs, int... I>
static inline __attribute__((always_inline)) void plane_grad_sums(const float* x, int64_t row, int64_t plane, const float* grad,
                                                                  int64_t grad_plane, int64_t length, int64_t rows,
                                                                  int64_t vectors, float* to,
                                                                  std::integer_sequence<int, I...>) {
  using V = Simd<float, 64>::reg;
  V acc[sizeof...(I)] = {load<V>(to + I * 16)...};
  for (int64_t r = 0; r < rows; ++r, x += row, grad += length)
    for (int64_t v = 0; v < vectors * 16; v += 16) {
      V in[Inputs], g[kPlaneBlock];
      for (int c = 0; c < Inputs; ++c) in[c] = load<V>(x + c * plane + v);
      for (int o = 0; o < kPlaneBlock; ++o) g[o] = load<V>(grad + o * grad_plane + v);
      ((acc[I] += in[I / kPlaneBlock] * g[I % kPlaneBlock]), ...);
    }
  ((store<V>(to + I * 16, acc[I])), ...);
}
template <int Inputs>
static void plane_grad_tap(const float* x, int64_t row, int64_t plane, const float* grad, int64_t grad_plane, int64_t length,
                           int64_t rows, int64_t vectors, float* to) {
  plane_grad_sums<Inputs>(x, row, plane, grad, grad_plane, length, rows, vectors, to,
                          std::make_integer_sequence<int, Inputs * kPlaneBlock>());
}

template <int Channels>
static void plane_weight_grad_of(const PlaneConv& p, const Env& env) {
  const PlaneBands b(p);
  const PartPixels<Channels> part;
  const PartPixels<kPlaneBlock> part_grad;
  const bool dense_grad = p.outputs == kPlaneBlock && p.y_pixel == kPlaneBlock;
  const int64_t blocks = (p.outputs + kPlaneBlock - 1) / kPlaneBlock, vectors = (p.cols + 15) / 16, taps = p.kh * p.kw;
  const int64_t length = vectors * 16, plane = b.rows * length;
  // Parts do not depend on the number of threads, and are added in order.
  const int64_t parts = std::min<int64_t>(p.n, 8), slots = task_slots(env, parts);
  const int64_t part_floats = (taps * p.inputs + 1) * blocks * kPlaneBlock * 16;
  const int64_t slot_floats = b.floats + blocks * kPlaneBlock * plane;
  float* const staged = reinterpret_cast<float*>(
      aligned(static_cast<char*>(env.alloc(env.owner, size_t(slots * slot_floats + parts * part_floats) * 4 + 64))));
  float* const sums = staged + slots * slot_floats;
  memset(staged, 0, size_t(slots * slot_floats + parts * part_floats) * 4);
  run_tasks(env, parts, [&](int slot, int64_t task) {
    float *const x = staged + slot * slot_floats, *const grad = x + b.floats, *const own = sums + task * part_floats;
    for (int64_t image = p.n * task / parts; image < p.n * (task + 1) / parts; ++image)
      for (int64_t first = 0; first < p.rows; first += b.rows) {
        const int64_t last = std::min(p.rows, first + b.rows);
        stage_planes(p, b, part, image, first, last, x);
        for (int64_t block = 0; block < blocks; ++block) {
          const int64_t outputs = std::min<int64_t>(kPlaneBlock, p.outputs - block * kPlaneBlock);
          __m512 total[kPlaneBlock];
          for (int o = 0; o < kPlaneBlock; ++o) total[o] = _mm512_setzero_ps();
          for (int64_t row = first; row < last; ++row)
            for (int64_t col = 0; col < p.cols; col += 16) {
              __m512 r[kPlaneBlock];
              const float* from = p.y + image * p.y_image + row * p.y_row + col * p.y_pixel + block * kPlaneBlock;
              if (dense_grad)
                part_grad(from, (p.cols - col) * kPlaneBlock, r);
              else
                part_quads(from, p.y_pixel, outputs, p.cols - col, r);
              for (int o = 0; o < kPlaneBlock; ++o) {
                _mm512_storeu_ps(grad + (block * kPlaneBlock + o) * plane + (row - first) * length + col, r[o]);
                total[o] = _mm512_add_ps(total[o], r[o]);
              }
            }
          for (int o = 0; o < kPlaneBlock; ++o) {
            float* const to = own + (taps * p.inputs * blocks + block) * kPlaneBlock * 16 + o * 16;
            _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), total[o]));
          }
        }
        for (int64_t block = 0; block < blocks; ++block)
          for (int64_t t = 0; t < taps; ++t)
            plane_grad_tap<Channels>(x + b.at(p, t / p.kw, t % p.kw, 0), b.row_step * b.row, b.phases * b.length,
                                     grad + block * kPlaneBlock * plane, plane, length, last - first, vectors,
                                     own + (block * taps + t) * p.inputs * kPlaneBlock * 16);
      }
  });
  const auto total = [&](int64_t at) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < parts; ++i) sum = _mm512_add_ps(sum, _mm512_loadu_ps(sums + i * part_floats + at));
    return _mm512_reduce_add_ps(sum);
  };
  for (int64_t o = 0; o < p.outputs; ++o) {
    const int64_t block = o / kPlaneBlock, lane = o % kPlaneBlock;
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t c = 0; c < p.inputs; ++c)
        p.grad_weight[(o * taps + t) * p.inputs + c] = total((((block * taps + t) * p.inputs + c) * kPlaneBlock + lane) * 16);
    p.grad_shift[o] = total((taps * p.inputs * blocks + block) * kPlaneBlock * 16 + lane * 16);
  }
}

static void plane_weight_grad(const PlaneConv& p, const Env& env) {
  constexpr decltype(&plane_weight_grad_of<1>) of[] = {plane_weight_grad_of<1>, plane_weight_grad_of<2>,
                                                       plane_weight_grad_of<3>, plane_weight_grad_of<4>};
  of[p.inputs - 1](p, env);
}

#else
constexpr void (*plane_forward)(const PlaneConv&, const Env&) = nullptr;
constexpr void (*plane_weight_grad)(const PlaneConv&, const Env&) = nullptr;
constexpr void (*plane_input_grad)(const PlaneGrad&, const Env&) = nullptr;
#endif
