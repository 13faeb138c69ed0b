// Index arithmetic of the tensor-core convolution, shared by kernels, packing and the host emulation.
#pragma once
#include "storage.h"

// A loop that nvcc is not to unroll; host compilers do not know the pragma.
#if defined(__CUDACC__)
#define LP_ROLLED _Pragma("unroll 1")
#else
#define LP_ROLLED
#endif

namespace lp {
namespace cuda {

// The product: rows are output pixels, columns outputs, depth the list of (tap, chunk), a chunk being the channels in 16
// bytes. There is no padding per tap beyond the last chunk. Weights are packed as [tap][chunk][output][lane].
LP_HD int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Elements of the packed weight; `lanes` is 8 for 16-bit types and 4 for float32. Depthwise: [tap][output].
LP_HD int64_t tensor_weight_size(int64_t outputs, int64_t channels, int64_t taps, bool depthwise) {
  return taps * round_up(outputs, 8) * (depthwise ? 1 : round_up(channels, 8));
}
LP_HD int64_t tensor_weight_offset(int64_t o, int64_t c, int64_t tap, int64_t outputs, int64_t channels, int lanes,
                                   bool depthwise) {
  if (depthwise) return tap * round_up(outputs, 8) + o;
  const int64_t chunks = round_up(channels, 8) / lanes;
  return ((tap * chunks + c / lanes) * round_up(outputs, 8) + o) * lanes + c % lanes;
}

LP_HD bool is_depthwise(int64_t outputs, int64_t channels_per_group, int64_t groups) {
  return groups > 1 && groups == outputs && channels_per_group == 1;
}

// Where they begin in the packed tensor: at 16 bytes, whatever the length of the direct layout (depthwise: any).
LP_HD int64_t tensor_weight_begin(int64_t outputs, int64_t channels_per_group, int64_t taps, int64_t groups) {
  return round_up(packed_size(outputs, channels_per_group, taps, groups), 8);
}

// What a packed tensor carries behind the direct layout: 8 or 4 lanes, or 0 for nothing. One or two more elements (zeros)
// tell it from a Winograd weight, whose size is a multiple of 8.
LP_HD int tensor_lanes(int64_t size, int64_t outputs, int64_t channels_per_group, int64_t taps, int64_t groups) {
  const bool depthwise = is_depthwise(outputs, channels_per_group, groups);
  if (groups != 1 && !depthwise) return 0;
  const int64_t rest = size - tensor_weight_begin(outputs, channels_per_group, taps, groups) -
                       tensor_weight_size(outputs, channels_per_group, taps, depthwise);
  return rest == 1 ? 8 : rest == 2 ? 4 : 0;
}

// Rows and columns of a kernel: their bits share a word (Window).
constexpr int kMostTaps = 16;

struct TensorConv {
  const void* x;         // rows of channels: 16-byte aligned, strides multiples of 16 bytes
  const void* weight;    // tensor_weight_offset
  const void* bias;      // float, or x's type
  const void* residual;  // or null
  void* y;
  float* partial;  // [split][pixel][columns]; null: no split
  const int64_t* out_index;
  int64_t x_n, y_n, y_c, r_n, r_c;  // strides in elements
  int x_h, x_w, y_h, y_w, r_h, r_w;
  int height, width, out_h, out_w, pixels;
  int channels, chunks, taps, kh, kw;
  struct {
    int row, column, chunk;
  } step;  // of the depth, see DepthCursor
  int stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
  int outputs, columns;  // columns: outputs rounded up to 8
  int y_channels;
  int splits, steps_per_split;
  int blocks_n;  // tiles side by side: neighbouring blocks read the same pixels
  Act act;
  bool bias_is_float;
  bool bias_vector;   // bias begins at 16 bytes
  bool y_vector;      // y has 16-byte rows of channels with room for `columns`
  bool r_vector;      // so has residual
  bool x_linear;      // 1x1, and output pixel m reads x at m * x_w
  bool y_linear;      // pixel m of y lies at m * y_w, likewise of residual
  bool pixels_first;  // neighbouring pixels are closer in y than neighbouring channels
};

// Whether eight outputs of a pixel are 16-byte pieces of y.
LP_HD bool writes_rows(const TensorConv& p) { return p.y_vector && !p.out_index; }

// A position in the depth list, advanced by the chunks of a step.
struct DepthCursor {
  int row, column, chunk;  // the tap's place in the kernel; a chunk of it
  LP_HD static DepthCursor at(const TensorConv& p, int q) {
    const int tap = q / p.chunks;
    return DepthCursor{tap / p.kw, tap % p.kw, q % p.chunks};
  }
  LP_HD void advance(const TensorConv& p) {
    chunk += p.step.chunk, column += p.step.column, row += p.step.row;
    if (chunk >= p.chunks) chunk -= p.chunks, ++column;
    if (column >= p.kw) column -= p.kw, ++row;
  }
};

// The window of an output pixel: where the first channel under tap (0, 0) lies, which need not exist, and what of the kernel
// lies outside the map: bit r for row r of taps, bit kMostTaps + c for column c.
struct Window {
  uintptr_t corner;
  uint32_t outside;
};

template <class S>
LP_HD Window window_of(const TensorConv& p, int m) {
  if (m >= p.pixels) return Window{0, ~0u};
  const uintptr_t x = reinterpret_cast<uintptr_t>(p.x), bytes = sizeof(typename S::Element);
  if (p.x_linear) return Window{x + uintptr_t(int64_t(m) * p.x_w) * bytes, 0};
  const int per_image = p.out_h * p.out_w;
  const int n = m / per_image, rest = m - n * per_image, oh = rest / p.out_w, ow = rest - oh * p.out_w;
  const int h = oh * p.stride_h - p.pad_h, w = ow * p.stride_w - p.pad_w;
  Window r{x + uintptr_t(n * p.x_n + int64_t(h) * p.x_h + int64_t(w) * p.x_w) * bytes, 0};
  LP_ROLLED
  for (int k = 0; k < p.kh; ++k) r.outside |= uint32_t(unsigned(h + k * p.dil_h) >= unsigned(p.height)) << k;
  LP_ROLLED
  for (int k = 0; k < p.kw; ++k) r.outside |= uint32_t(unsigned(w + k * p.dil_w) >= unsigned(p.width)) << (kMostTaps + k);
  return r;
}

// What a position in the depth list means for every window: the way in bytes from the corner to its piece, how many of the 16
// bytes exist (the others read as zero), and the bits that must not be outside.
struct Reach {
  uintptr_t way;
  int bytes;
  uint32_t bits;
};

template <class S>
LP_HD Reach reach_of(const TensorConv& p, const DepthCursor& d) {
  constexpr int kBytes = int(sizeof(typename S::Element));
  const int left = d.row < p.kh ? p.channels - d.chunk * S::kLanes : 0;
  const int count = left < 0 ? 0 : left < S::kLanes ? left : S::kLanes;
  const int64_t way = int64_t(d.row * p.dil_h) * p.x_h + int64_t(d.column * p.dil_w) * p.x_w + d.chunk * S::kLanes;
  return Reach{uintptr_t(way * kBytes), count * kBytes, 1u << (d.row % kMostTaps) | 1u << (kMostTaps + d.column)};
}

// One kernel: a tile of BM pixels x BN outputs, CH chunks of depth per step, WARPS_M x WARPS_N warps; with GROUP four warps
// multiply 64 pixels together (warpgroup.h), otherwise each for itself.
template <class S_, int BM_, int BN_, int CH_, int WARPS_M, int WARPS_N, int STAGES_, bool GROUP>
struct Tile {
  using S = S_;
  static constexpr bool kGroup = GROUP;
  // Steps that are copied ahead. A group may still read the slot of the step before.
  static constexpr int kAhead = STAGES_ - (GROUP ? 2 : 1);
  static constexpr int BM = BM_, BN = BN_, CH = CH_, STAGES = STAGES_;
  static constexpr int kWarpsM = WARPS_M, kWarpsN = WARPS_N, kThreads = 32 * WARPS_M * WARPS_N;
  static constexpr int WM = BM / WARPS_M, WN = BN / WARPS_N, MI = WM / 16, NI = WN / 8;
  // 16-byte pieces of x and of the weight that a thread copies per step.
  static constexpr int kRows = BM * CH / kThreads, kWeights = (BN * CH + kThreads - 1) / kThreads;
  // A chunk is a plane of BM rows of 16 bytes. The gap between planes spreads the copies of one row over all banks.
  static constexpr int kPlaneA = BM * 16 + (CH == 4 ? 32 : 16), kPlaneB = BN * 16;
  static constexpr int kStageBytes = CH * (kPlaneA + kPlaneB);
  // Sums of a warp, rows padded so that writing fragments does not collide.
  static constexpr int kSumStride = WN % 32 == 8 || WN % 32 == 24 ? WN : WN + 8;
  static constexpr int kSumBytes = WARPS_M * WARPS_N * WM * kSumStride * 4;
  static constexpr int kShared = STAGES * kStageBytes > kSumBytes ? STAGES * kStageBytes : kSumBytes;
  // What a launch needs of it: a short depth, as of most 1x1 convolutions, leaves slots unused, and room for more blocks.
  static constexpr int shared_bytes(int steps) {
    return steps >= STAGES ? kShared : steps * kStageBytes > kSumBytes ? steps * kStageBytes : kSumBytes;
  }
  static_assert(CH == 4 || CH == 8, "the plane gap is for 4 or 8 chunks");
  static_assert(WM % 16 == 0 && WN % 8 == 0 && BM * CH % kThreads == 0 && kThreads % CH == 0, "tile does not divide");
  static_assert(kSumStride % 32 == 8 || kSumStride % 32 == 24, "bank conflicts while storing");
  static_assert(!GROUP || (S::kLanes == 8 && WARPS_N == 1 && WM == 16 && WARPS_M % 4 == 0), "not a tile of warp groups");
  static_assert(kAhead >= 1, "too few stages");
  static_assert(kPlaneA % 16 == 0 && kShared <= 227 * 1024, "shared memory");
};

}  // namespace cuda
}  // namespace lp
