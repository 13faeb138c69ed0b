// Maps of half types as float32 channels-last copies, and back: storage is half, arithmetic is not. Included once per
// instruction set (see simd.h).

static inline Simd<float, LP_VECTOR_BYTES>::reg widen(const bf16* from) {
  using Half = Simd<uint16_t, LP_VECTOR_BYTES / 2>;
  using Word = Simd<uint32_t, LP_VECTOR_BYTES>::reg;
  const Half::reg bits = *reinterpret_cast<const Half::mem*>(from);
  return Simd<float, LP_VECTOR_BYTES>::reg(__builtin_convertvector(bits, Word) << 16);
}

// To the nearest, ties to even; NaN stays NaN.
static inline void narrow(Simd<float, LP_VECTOR_BYTES>::reg v, bf16* to) {
  using Half = Simd<uint16_t, LP_VECTOR_BYTES / 2>;
  using Word = Simd<uint32_t, LP_VECTOR_BYTES>::reg;
  const Word bits = Word(v);
  const Word rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Word result = v != v ? Word{} + 0x7fc0u : rounded;
  *reinterpret_cast<Half::mem*>(to) = __builtin_convertvector(result, Half::reg);
}

#if defined(__AVX512F__)
static inline Simd<float, 64>::reg widen(const f16* from) {
  return Simd<float, 64>::reg(_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}
static inline void narrow(Simd<float, 64>::reg v, f16* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtps_ph(0xffff, __m512(v), _MM_FROUND_TO_NEAREST_INT));
}
constexpr bool kVectorF16 = true;
#elif defined(__F16C__)
static inline Simd<float, 32>::reg widen(const f16* from) {
  return Simd<float, 32>::reg(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
static inline void narrow(Simd<float, 32>::reg v, f16* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(__m256(v), _MM_FROUND_TO_NEAREST_INT));
}
constexpr bool kVectorF16 = true;
#else
constexpr bool kVectorF16 = false;
#endif

template <class S>
constexpr bool kVectorHalf = std::is_same_v<S, bf16> || kVectorF16;

template <class S>
static void widen_run(const S* from, float* to, int64_t count) {
  int64_t i = 0;
  if constexpr (kVectorHalf<S>) {
    constexpr int64_t L = Simd<float, LP_VECTOR_BYTES>::lanes;
    for (; i + L <= count; i += L) store(to + i, widen(from + i));
  }
  for (; i < count; ++i) to[i] = to_acc(from[i]);
}

template <class S>
static void narrow_run(const float* from, S* to, int64_t count) {
  int64_t i = 0;
  if constexpr (kVectorHalf<S>) {
    constexpr int64_t L = Simd<float, LP_VECTOR_BYTES>::lanes;
    for (; i + L <= count; i += L) narrow(load<Simd<float, LP_VECTOR_BYTES>::reg>(from + i), to + i);
  }
  for (; i < count; ++i) from_acc(from[i], to[i]);
}

// One row of a map per task.
template <class S, bool Narrow>
static void convert_map(const HalfMap& m, const Env& env) {
  const int64_t row_size = m.width * m.channels;
  run_tasks(env, m.n * m.height, [&](int, int64_t index) {
    S* half = static_cast<S*>(m.half.data) + index / m.height * m.half.n + index % m.height * m.half.h;
    float* dense = m.dense + index * row_size;
    const auto run = [](S* h, float* d, int64_t count) {
      if constexpr (Narrow)
        narrow_run(d, h, count);
      else
        widen_run(h, d, count);
    };
    if (m.half.c == 1 && m.half.w == m.channels) return run(half, dense, row_size);
    for (int64_t w = 0; w < m.width; ++w, half += m.half.w, dense += m.channels) {
      if (m.half.c == 1) {
        run(half, dense, m.channels);
        continue;
      }
      for (int64_t c = 0; c < m.channels; ++c) {
        if constexpr (Narrow)
          from_acc(dense[c], half[c * m.half.c]);
        else
          dense[c] = to_acc(half[c * m.half.c]);
      }
    }
  });
}

static void widen_map(const HalfMap& m, const Env& env) {
  m.dtype == DType::bf16 ? convert_map<bf16, false>(m, env) : convert_map<f16, false>(m, env);
}
static void narrow_map(const HalfMap& m, const Env& env) {
  m.dtype == DType::bf16 ? convert_map<bf16, true>(m, env) : convert_map<f16, true>(m, env);
}
