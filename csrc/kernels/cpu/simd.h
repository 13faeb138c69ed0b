// Vector types and storage formats. Included once per instruction set inside namespace LP_ISA, so that no
// inline function compiled for a newer CPU can be merged by the linker into code that an older CPU runs.
// (standard headers: isa.h)

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class S>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};

template <class T, int Bytes>
struct Simd {
  typedef T reg __attribute__((vector_size(Bytes)));
  typedef T mem __attribute__((vector_size(Bytes), aligned(alignof(T)), may_alias));
  static constexpr int lanes = Bytes / int(sizeof(T));
};

template <class V>
using ScalarOf = std::remove_cv_t<std::remove_reference_t<decltype(std::declval<V>()[0])>>;

template <class V>
static inline V load(const ScalarOf<V>* p) {
  return *reinterpret_cast<const typename Simd<ScalarOf<V>, sizeof(V)>::mem*>(p);
}
template <class V>
static inline void store(ScalarOf<V>* p, V v) {
  *reinterpret_cast<typename Simd<ScalarOf<V>, sizeof(V)>::mem*>(p) = v;
}

// The first `count` lanes; nothing behind them is touched. Pieces of a power of two, because masked moves are slow on some
// AVX2 machines.
template <class V>
static inline V load_part(const ScalarOf<V>* p, int64_t count) {
  using T = ScalarOf<V>;
  constexpr int64_t lanes = sizeof(V) / sizeof(T);
  if (count >= lanes) return load<V>(p);
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64 && sizeof(T) == 4) return V(_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p));
  if constexpr (sizeof(V) == 32 && sizeof(T) == 4) return V(_mm256_maskz_loadu_ps(__mmask8((1u << count) - 1), p));
#endif
  alignas(64) T part[lanes] = {};
  int64_t at = 0;
  if (lanes > 8 && (count & 8)) memcpy(part, p, 8 * sizeof(T)), at = 8;
  if (lanes > 4 && (count & 4)) memcpy(part + at, p + at, 4 * sizeof(T)), at += 4;
  if (lanes > 2 && (count & 2)) memcpy(part + at, p + at, 2 * sizeof(T)), at += 2;
  if (count & 1) part[at] = p[at];
  return load<V>(part);
}
template <class V>
static inline void store_part(ScalarOf<V>* p, V v, int64_t count) {
  using T = ScalarOf<V>;
  constexpr int64_t lanes = sizeof(V) / sizeof(T);
  if (count >= lanes) return store<V>(p, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64 && sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), __m512(v));
    return;
  }
  if constexpr (sizeof(V) == 32 && sizeof(T) == 4) {
    _mm256_mask_storeu_ps(p, __mmask8((1u << count) - 1), __m256(v));
    return;
  }
#endif
  alignas(64) T part[lanes];
  store<V>(part, v);
  int64_t at = 0;
  if (lanes > 8 && (count & 8)) memcpy(p, part, 8 * sizeof(T)), at = 8;
  if (lanes > 4 && (count & 4)) memcpy(p + at, part + at, 4 * sizeof(T)), at += 4;
  if (lanes > 2 && (count & 2)) memcpy(p + at, part + at, 2 * sizeof(T)), at += 2;
  if (count & 1) p[at] = part[at];
}

// One load for all that use it: as operands of them GCC would read it again each time, mostly from two cache lines.
template <class V>
static inline __attribute__((always_inline)) V in_register(V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) >= 16) asm("" : "+v"(v));
#elif defined(__AVX2__)
  if constexpr (sizeof(V) >= 16) asm("" : "+x"(v));
#endif
  return v;
}

static inline float to_acc(float v) { return v; }
static inline double to_acc(double v) { return v; }
static inline float to_acc(bf16 v) {
  const uint32_t bits = uint32_t(v.bits) << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}
// Exact for normal, subnormal, infinite and NaN inputs: the exponent is rebased by a multiplication.
static inline float to_acc(f16 v) {
  const uint32_t sign = uint32_t(v.bits & 0x8000u) << 16, body = uint32_t(v.bits & 0x7fffu) << 13;
  float out;
  memcpy(&out, &body, 4);
  out *= 0x1p112f;
  uint32_t bits;
  memcpy(&bits, &out, 4);
  if ((v.bits & 0x7c00u) == 0x7c00u) bits |= 0x7f800000u;
  bits |= sign;
  memcpy(&out, &bits, 4);
  return out;
}

static inline void from_acc(float v, float& out) { out = v; }
static inline void from_acc(double v, double& out) { out = v; }
static inline void from_acc(float v, bf16& out) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = v != v ? uint16_t(0x7fc0u) : uint16_t(rounded);
}
static inline void from_acc(float v, f16& out) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  uint32_t a = bits & 0x7fffffffu;
  if (a > 0x7f800000u) {
    out.bits = uint16_t(sign | 0x7e00u);
  } else if (a >= 0x477ff000u) {  // rounds to infinity
    out.bits = uint16_t(sign | 0x7c00u);
  } else if (a < 0x38800000u) {  // subnormal half: let the FPU round by adding 0.5
    float f;
    memcpy(&f, &a, 4);
    f += 0.5f;
    memcpy(&a, &f, 4);
    out.bits = uint16_t(sign | (a - 0x3f000000u));
  } else {
    a += 0xc8000fffu + ((a >> 13) & 1u);
    out.bits = uint16_t(sign | (a >> 13));
  }
}
