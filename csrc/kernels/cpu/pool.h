// Maximum over windows of dense channels-last maps, along columns, then along rows; mean over whole maps. Included once per
// instruction set (see simd.h).

template <class V>
static inline V larger(V a, V b) {  // NaN wins
#if defined(__AVX512F__)
  // The instruction returns its second operand where either is NaN; bits set in either keep that one.
  if constexpr (sizeof(V) == 64) {
    constexpr __mmask16 all = 0xffff;  // the unmasked form makes GCC 12 warn
    const __m512i one = _mm512_castps_si512(_mm512_maskz_max_ps(all, a, b));
    return V(_mm512_castsi512_ps(_mm512_or_si512(one, _mm512_castps_si512(_mm512_maskz_max_ps(all, b, a)))));
  }
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) return V(_mm256_or_ps(_mm256_max_ps(a, b), _mm256_max_ps(b, a)));
#endif
  return (b > a) | (b != b) ? b : a;
}

template <class F>
static inline __attribute__((always_inline)) void by_vectors(int64_t count, const F& body) {
  using Wide = Simd<float, LP_VECTOR_BYTES>::reg;
  const auto run = [&](auto zero) __attribute__((always_inline)) {
    constexpr int64_t L = sizeof(zero) / 4;
    for (int64_t i = 0; i < count; i += L) body(zero, std::min(i, count - L));  // the last vector overlaps the one before
  };
  if (count * 4 >= LP_VECTOR_BYTES)
    run(Wide{});
  else if (count >= 8)
    run(Simd<float, 32>::reg{});
  else if (count >= 4)
    run(Simd<float, 16>::reg{});
  else
    run(Simd<float, 4>::reg{});
}

static void max_pool(const MaxPool& p, const Env& env) {
  const int64_t C = p.channels, line = p.width * C, padded = round_up(line, 16);
  const int64_t tasks = p.n * p.out_h, slots = task_slots(env, tasks);
  if (tasks == 0) return;
  float* const lines = static_cast<float*>(env.alloc(env.owner, size_t(slots * padded) * sizeof(float)));
  run_tasks(env, tasks, [&](int slot, int64_t index) {
    const int64_t n = index / p.out_h, row = index % p.out_h, h0 = row * p.stride_h - p.pad_h;
    const int64_t top = std::max<int64_t>(0, h0), bottom = std::min(p.height, h0 + p.kh);
    const float* const first = p.x + (n * p.height + top) * line;
    float* const tallest = lines + slot * padded;
    by_vectors(line, [&](auto zero, int64_t i) __attribute__((always_inline)) {
      using V = decltype(zero);
      V best = load<V>(first + i);
      for (int64_t h = 1; h < bottom - top; ++h) best = larger(best, load<V>(first + h * line + i));
      store<V>(tallest + i, best);
    });
    float* y = p.y + index * p.out_w * C;
    for (int64_t col = 0; col < p.out_w; ++col, y += C) {
      const int64_t w0 = col * p.stride_w - p.pad_w;
      const int64_t left = std::max<int64_t>(0, w0), right = std::min(p.width, w0 + p.kw);
      const float* const from = tallest + left * C;
      by_vectors(C, [&](auto zero, int64_t c) __attribute__((always_inline)) {
        using V = decltype(zero);
        V best = load<V>(from + c);
        for (int64_t w = 1; w < right - left; ++w) best = larger(best, load<V>(from + w * C + c));
        store<V>(y + c, best);
      });
    }
  });
}

static void mean_pool(const MeanPool& p, const Env& env) {
  constexpr int64_t part = 64;  // channels of a task
  const int64_t parts = (p.channels + part - 1) / part;
  run_tasks(env, p.n * parts, [&](int, int64_t index) {
    const int64_t n = index / parts, first = index % parts * part;
    const float* const x = static_cast<const float*>(p.x.data) + n * p.x.n + first;
    float* const y = static_cast<float*>(p.y.data) + n * p.y.n + first;
    const int64_t count = std::min(part, p.channels - first);
    // Whole vectors may also sum what lies between the channels of a pixel and those of the next one.
    const int64_t readable = std::max(p.channels, p.x.w) - first, wide = round_up(count, count <= 8 ? 4 : LP_VECTOR_BYTES / 4);
    by_vectors(std::min(readable, wide), [&](auto zero, int64_t c) __attribute__((always_inline)) {
      using V = decltype(zero);
      // Sums of rows: fewer roundings than one sum over all pixels. Two, that do not wait for each other.
      V total = zero;
      for (int64_t h = 0; h < p.height; ++h) {
        const float* at = x + h * p.x.h + c;
        V even = zero, odd = zero;
        int64_t w = 0;
        for (; w + 2 <= p.width; w += 2, at += 2 * p.x.w) {
          even += load<V>(at);
          odd += load<V>(at + p.x.w);
        }
        if (w < p.width) even += load<V>(at);
        total += even + odd;
      }
      store_part<V>(y + c, total / float(p.height * p.width), count - c);
    });
  });
}
