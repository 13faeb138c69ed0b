// Affine, residual, activation and store of finished register tiles. Included once per instruction set (see simd.h).

// Where a task's pixels read and write.
template <class T>
struct PixelTable {
  const T** in;
  int64_t* out;
  int64_t* residual;
};

// One pixel: act(row + shift + residual) to `count` consecutive channels.
template <Act A, class T>
static inline void finish_row(const T* row, const T* shift, const T* residual, T* out, int64_t count) {
  using V = typename Simd<T, LP_VECTOR_BYTES>::reg;
  constexpr int L = Simd<T, LP_VECTOR_BYTES>::lanes;
  for (int64_t o = 0; o < count; o += L) {
    const int64_t lanes = std::min<int64_t>(L, count - o);
    V v = load<V>(row + o);
    if (shift) v += load_part<V>(shift + o, lanes);
    if (residual) v += load_part<V>(residual + o, lanes);
    store_part<V>(out + o, activate<A>(v), lanes);
  }
}

// Affine, residual, activation on a tile in L1, then the store in the output's own layout and type. `consecutive`: the
// tile's output channels are a run.
template <class S, class T>
static void epilogue(const TapConv& p, T* tile_out, int64_t ld, const PixelTable<T>& table, int64_t pixel0, int64_t pixels,
                     int64_t first, int64_t count, bool consecutive) {
  const T* scale = p.scale ? static_cast<const T*>(p.scale) + first : nullptr;
  const T* shift = p.shift ? static_cast<const T*>(p.shift) + first : nullptr;
  const int64_t* channel = p.out_channel + first;
  if constexpr (std::is_same_v<S, T>) {
    if (p.out.c == 1 && consecutive && !scale && (!p.residual.data || p.residual.c == 1)) {
      const T* residual = static_cast<const T*>(p.residual.data);
      const T* const no_residual = nullptr;
      T* out = static_cast<T*>(p.out.data) + channel[0];
      if (residual) residual += channel[0];
      with_act(p.act, [&](auto act) {
        for (int64_t j = 0; j < pixels; ++j)
          finish_row<decltype(act)::value>(tile_out + j * ld, shift,
                                           residual ? residual + table.residual[pixel0 + j] : no_residual,
                                           out + table.out[pixel0 + j], count);
      });
      return;
    }
  }
  for (int64_t j = 0; j < pixels; ++j) {
    T* row = tile_out + j * ld;
    if (scale)
      for (int64_t o = 0; o < count; ++o) row[o] *= scale[o];
    if (shift)
      for (int64_t o = 0; o < count; ++o) row[o] += shift[o];
    if (p.residual.data) {
      const S* residual = static_cast<const S*>(p.residual.data) + table.residual[pixel0 + j];
      for (int64_t o = 0; o < count; ++o) row[o] += to_acc(residual[channel[o] * p.residual.c]);
    }
  }
  activate_rows(p.act, tile_out, ld, pixels, count);
  S* out = static_cast<S*>(p.out.data);
  if (p.out.c == 1) {
    for (int64_t j = 0; j < pixels; ++j) {
      const T* row = tile_out + j * ld;
      S* dst = out + table.out[pixel0 + j];
      if (consecutive) {
        dst += channel[0];
        for (int64_t o = 0; o < count; ++o) from_acc(row[o], dst[o]);
      } else {
        for (int64_t o = 0; o < count; ++o) from_acc(row[o], dst[channel[o]]);
      }
    }
    return;
  }
  for (int64_t o = 0; o < count; ++o) {
    S* plane = out + channel[o] * p.out.c;
    for (int64_t j = 0; j < pixels; ++j) from_acc(tile_out[j * ld + o], plane[table.out[pixel0 + j]]);
  }
}
