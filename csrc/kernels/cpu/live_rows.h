// Live columns of the live rows of a weight: copied side by side and back, a vector of channels at a time. Included once per
// instruction set (see simd.h).

static bool live_rows(const LiveRows& p, const Env& env) {
#if defined(__AVX512F__)
  constexpr int64_t L = 16;
  struct Piece {
    __mmask16 there, live;
    int64_t at, count;  // of its live channels, among all of them
  };
  const int64_t pieces = (p.channels + L - 1) / L, live = p.columns.count;
  Piece* piece = static_cast<Piece*>(env.alloc(env.owner, size_t(pieces) * sizeof(Piece)));
  int64_t next = 0;
  for (int64_t b = 0; b < pieces; ++b) {
    const int64_t end = std::min(p.channels, (b + 1) * L), first = next;
    uint32_t bits = 0;
    for (; next < live && p.columns[next] < end; ++next) bits |= 1u << (p.columns[next] - b * L);
    piece[b] = {__mmask16((1u << (end - b * L)) - 1), __mmask16(bits), first, next - first};
  }
  run_tasks(env, p.rows.count, [&](int, int64_t row) {
    float* const whole = p.whole + p.rows[row] * p.taps * p.channels;
    float* const block = p.block + row * p.block_row;
    // Rows that live lie apart: the next one is fetched while this one is copied.
    const int64_t ahead = row + 1 < p.rows.count ? (p.rows[row + 1] - p.rows[row]) * p.taps * p.channels : 0;
    for (int64_t t = 0; t < p.taps; ++t) {
      float *large = whole + t * p.channels, *small = block + t * p.block_tap;
      for (int64_t b = 0; b < pieces; ++b, large += L) {
        const Piece& k = piece[b];
        // Masked moves only at the ends, because they are slow.
        const bool full = k.there == 0xffff, whole_vector = k.at + L <= live;
        const __mmask16 used = __mmask16((1u << k.count) - 1);
        float* const at = small + k.at;
        __builtin_prefetch(large + ahead, 0, 2);
        if (p.gather) {
          const __m512 values =
              _mm512_maskz_compress_ps(k.live, full ? _mm512_loadu_ps(large) : _mm512_maskz_loadu_ps(k.there, large));
          whole_vector ? _mm512_storeu_ps(at, values) : _mm512_mask_storeu_ps(at, used, values);
        } else {
          const __m512 values =
              _mm512_maskz_expand_ps(k.live, whole_vector ? _mm512_loadu_ps(at) : _mm512_maskz_loadu_ps(used, at));
          full ? _mm512_storeu_ps(large, values) : _mm512_mask_storeu_ps(large, k.there, values);
        }
      }
    }
  });
  return true;
#else
  return false;
#endif
}
