// Runs the tensor-core convolution's kernel source on the host, block by block (simt_emulation.h).
#define LP_SIMT_EMULATION "simt_emulation.h"
#include "kernels/cuda/depthwise.cuh"
#include "kernels/cuda/tensor_conv.cuh"
#include "kernels/cuda/tensor_plan.h"

namespace {
using namespace lp;
using namespace lp::cuda;

lp::View view(void* data, const int64_t* strides) { return {data, strides[0], strides[1], strides[2], strides[3]}; }

template <class T>
void run_blocks(const TensorConv& p, const Launch& launch, bool reverse) {
  auto& m = simt::machine;
  for (m.by = 0; m.by < launch.splits; ++m.by)
    for (m.bx = 0; m.bx < launch.blocks_m * launch.blocks_n; ++m.bx)
      simt::run_block(T::kThreads, T::shared_bytes(p.steps_per_split), reverse,
                      [&] { TensorConvKernel<T>(p, simt::shared()).run(); });
}

template <class S, int I = 0>
void run_tile(const TensorConv& p, const Launch& launch, bool reverse) {
  if constexpr (I < kTileCount) {
    if constexpr (has_tile<S>(I))
      if (launch.tile == I) return run_blocks<TileAt<S, I>>(p, launch, reverse);
    run_tile<S, I + 1>(p, launch, reverse);
  }
}

template <class S>
struct Units {
  const TensorConv& p;
  bool reverse;
  template <int KW, int STRIDE>
  void operator()() const {
    const int64_t count = depthwise_units(p) + 3;  // as on the device, a few threads too many
    for (int64_t i = 0; i < count; ++i) depthwise_unit_of<S, KW, STRIDE>(p, reverse ? count - 1 - i : i);
  }
};

template <class S>
void run(const CompactForward& f, int tile, int splits, bool reverse) {
  const ConvShape& s = f.shape;
  if (s.groups > 1) {
    const TensorConv p = tensor_params(f, f.x, Launch{0, 1, 0, 0}, nullptr);
    with_depthwise_variant(p, Units<S>{p, reverse});
    return;
  }
  const int64_t pixels = s.n * s.out_h * s.out_w, columns = round_up(s.outputs, 8);
  const int64_t depth = s.kh * s.kw * round_up(s.channels, 8) / f.lanes;
  const Launch launch = choose_launch(pixels, columns, depth, 132, false, tile, splits);
  // As on the device, whatever the parts do not write would be seen.
  std::vector<float> partial(launch.splits > 1 ? size_t(launch.splits * pixels * columns) + 4 : 0, std::nanf(""));
  float* parts = partial.data();
  while (reinterpret_cast<uintptr_t>(parts) % 16) ++parts;
  const TensorConv p = tensor_params(f, f.x, launch, launch.splits > 1 ? parts : nullptr);
  run_tile<S>(p, launch, reverse);
  if (launch.splits > 1)
    for (int64_t unit = 0; unit < pixels * columns / 8 + 3; ++unit) add_parts<S>(p, unit);
}
}  // namespace

extern "C" int tile_count() { return kTileCount; }

extern "C" int tile_of_groups(int tile) { return kTiles[tile].group; }

extern "C" void choose(int64_t pixels, int64_t columns, int64_t depth, int processors, int groups, int* out) {
  const Launch launch = choose_launch(pixels, columns, depth, processors, groups != 0);
  out[0] = launch.tile, out[1] = launch.splits, out[2] = launch.blocks_m, out[3] = launch.blocks_n;
  out[4] = kTiles[launch.tile].bm, out[5] = kTiles[launch.tile].bn;
}

// How many positions of a depth list a cursor gets wrong that goes through it in the steps of a tile.
extern "C" int wrong_positions(int tile, int kh, int kw, int chunks) {
  CompactForward f{};
  f.shape = ConvShape{1, chunks * 8, kh, kw, 8, kh, kw, 1, 1, 1, 1, 0, 0, 1, 1, 1};
  f.lanes = 8;
  const TensorConv p = tensor_params(f, f.x, Launch{tile, 1, 1, 1}, nullptr);
  const int step = kTiles[tile].ch;
  int wrong = 0;
  for (int first = 0; first < step; ++first) {
    DepthCursor d = DepthCursor::at(p, first);
    for (int q = first; q < kh * kw * chunks + 8 * step; q += step, d.advance(p))
      wrong += d.chunk != q % chunks || d.column != q / chunks % kw || d.row != q / chunks / kw;
  }
  return wrong;
}

extern "C" int carried_lanes(int64_t size, int64_t outputs, int64_t channels, int64_t taps, int64_t groups) {
  return tensor_lanes(size, outputs, channels, taps, groups);
}

extern "C" int64_t weight_begin(int64_t outputs, int64_t channels, int64_t taps, int64_t groups) {
  return tensor_weight_begin(outputs, channels, taps, groups);
}

extern "C" void convert(int dtype, const float* values, int64_t count, uint16_t* bits, float* back) {
  for (int64_t i = 0; i < count; ++i) {
    bits[i] = dtype == 2 ? Bf16::save(values[i]) : F16::save(values[i]);
    back[i] = dtype == 2 ? Bf16::load(bits[i]) : F16::load(bits[i]);
  }
}

// Returns -1 when the kernel does not take these tensors. counters: read and write bank conflicts, misaligned accesses and
// operands, copies from outside the tensors, reads of shared memory that a copy is changing.
extern "C" int emulate_tensor_conv(const int64_t* shape, int dtype, void* x, const int64_t* xs, int64_t x_bytes, void* weight,
                                   int64_t weight_bytes, const void* bias, int bias_is_float, void* residual, const int64_t* rs,
                                   void* y, const int64_t* ys, int y_has_room, const int64_t* out_index, int64_t y_channels,
                                   int act, int tile, int splits, int reverse, int64_t* counters) {
  CompactForward f{};
  f.shape = *reinterpret_cast<const ConvShape*>(shape);
  f.dtype = DType(dtype);
  f.x = view(x, xs);
  f.y = view(y, ys);
  if (residual) f.residual = view(residual, rs);
  f.bias = bias;
  f.in_index = {nullptr, f.shape.channels};
  f.out_index = {out_index, f.shape.outputs};
  f.x_channels = f.shape.channels;
  f.y_channels = y_channels;
  f.act = Act(act);
  f.lanes = f.dtype == DType::f32 ? 4 : 8;
  f.tensor_weight = weight;
  f.bias_is_float = bias_is_float;
  f.y_has_room = y_has_room;
  if (!tensor_cores_take(f) || !reads_in_place(f)) return -1;
  auto& m = simt::machine;
  m.x_begin = static_cast<char*>(x), m.x_end = m.x_begin + x_bytes;
  m.w_begin = static_cast<char*>(weight), m.w_end = m.w_begin + weight_bytes;
  m.read_conflicts = m.write_conflicts = m.misaligned = m.outside = m.races = 0;
  if (f.dtype == DType::f32)
    run<Tf32>(f, tile, splits, reverse);
  else if (f.dtype == DType::bf16)
    run<Bf16>(f, tile, splits, reverse);
  else
    run<F16>(f, tile, splits, reverse);
  counters[0] = m.read_conflicts, counters[1] = m.write_conflicts, counters[2] = m.misaligned, counters[3] = m.outside;
  counters[4] = m.races;
  return 0;
}
