// Plain parameter structs shared by the torch-free kernels and the thin bindings. Strides are in elements.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define LP_HD __host__ __device__ __forceinline__
#else
#define LP_HD inline
#endif

namespace lp {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };
enum class Act : int { none = 0, relu = 1, relu6 = 2, silu = 3, hardswish = 4, gelu = 5, sigmoid = 6 };

// How a trainable convolution is computed where more than one way fits; `automatic` decides by shape.
enum class Algorithm : int { automatic = 0, direct = 1, winograd2 = 2, winograd4 = 3 };

// Geometry of one convolution. `channels`/`outputs` are those of the full (unrestricted) weight.
struct ConvShape {
  int64_t n, channels, height, width;
  int64_t outputs, kh, kw, out_h, out_w;
  int64_t stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, groups;
};

// A four-dimensional view: data pointer and strides of (n, c, h, w).
struct View {
  void* data;
  int64_t n, c, h, w;
};

// A sorted or free list of channel indices; `index == nullptr` means 0, 1, ..., count-1.
struct IndexList {
  const int64_t* index;
  int64_t count;
  LP_HD int64_t operator[](int64_t i) const { return index ? index[i] : i; }
};

// Packed weights: per group, panels of 16 outputs; a last panel of 1..8 outputs is 8 wide. Inside a panel the order is
// (kh, kw, input channel of the group, lane); lanes past the last output are zero. Depthwise: (kh, kw, output).
constexpr int64_t kPanel = 16;

LP_HD int64_t packed_width(int64_t outputs) {
  const int64_t rest = outputs % kPanel;
  return outputs - rest + (rest == 0 ? 0 : rest <= 8 ? 8 : kPanel);
}

LP_HD int64_t packed_size(int64_t outputs, int64_t channels_per_group, int64_t taps, int64_t groups) {
  if (channels_per_group == 1 && groups > 1) return taps * outputs;
  return groups * packed_width(outputs / groups) * channels_per_group * taps;
}

// Position of weight[o, c, tap] in the packed tensor (o over all groups, c inside the group).
LP_HD int64_t packed_offset(int64_t o, int64_t c, int64_t tap, int64_t outputs, int64_t channels_per_group, int64_t taps,
                            int64_t groups) {
  if (channels_per_group == 1 && groups > 1) return tap * outputs + o;
  const int64_t per_group = outputs / groups, g = o / per_group, local = o % per_group;
  const int64_t depth = channels_per_group * taps, width = packed_width(per_group);
  const int64_t panel = local / kPanel, lanes = width - panel * kPanel < kPanel ? 8 : kPanel;
  return g * width * depth + panel * kPanel * depth + (tap * channels_per_group + c) * lanes + local % kPanel;
}

// Behind the direct layout a packed weight may carry a transform of itself, in the same panels. Winograd's has its points for
// taps. A tile's code says which: 0 is none, the side of its outputs with stride 1 (2: 3x3 and 5x5, 4: 3x3), and with stride 2
// that much more than kStridedTile (4 and 5: 3x3, 4: 5x5, 3: 7x7). 1x1 has Strassen's: its seven products are the taps, half
// the inputs the channels, and half of every unit of 64 outputs the outputs.
constexpr int kStridedTile = 16, kStrassenTile = 1;
constexpr int kTileCodes[] = {2, 4, kStridedTile + 3, kStridedTile + 4, kStridedTile + 5, kStrassenTile};
constexpr int64_t kStrassenHalf = 32;

// Units of the outputs; the last one may have up to 7 outputs too few. What is left over has no transform.
LP_HD int64_t strassen_units(int64_t outputs) { return (outputs + 7) / (2 * kStrassenHalf); }

LP_HD bool transform_takes(int64_t kernel, int tile) {
  if (kernel == 1) return tile == kStrassenTile;
  if (kernel == 3) return tile == 2 || tile == 4 || tile == kStridedTile + 4 || tile == kStridedTile + 5;
  return kernel == 5 ? tile == 2 || tile == kStridedTile + 4 : kernel == 7 && tile == kStridedTile + 3;
}

// Stride 2: the four phases of a few channels fill one block as they are, the others count as taps of their points.
LP_HD bool unites_phases(int64_t kernel, int64_t channels) { return kernel == 7 && channels <= 4; }

// Multiplications per tile, input channel and output.
LP_HD int64_t winograd_products(int64_t kernel, int64_t channels, int tile) {
  if (tile < kStridedTile) return (tile + kernel - 1) * (tile + kernel - 1);
  const int64_t points = tile - kStridedTile + (kernel - 1) / 2;
  return unites_phases(kernel, channels) ? 4 * points * points : (2 * points - 1) * (2 * points - 1);
}

LP_HD int64_t transformed_size(int64_t outputs, int64_t channels, int64_t kernel, int tile) {
  if (tile == kStrassenTile) return packed_size(kStrassenHalf * strassen_units(outputs), (channels + 1) / 2, 7, 1);
  return tile == 0 ? 0 : packed_size(outputs, channels, winograd_products(kernel, channels, tile), 1);
}

// The tile whose transform a packed weight of this size carries; -1 for a size that is none of these.
LP_HD int packed_tile(int64_t size, int64_t outputs, int64_t channels_per_group, int64_t kh, int64_t kw, int64_t groups) {
  const int64_t direct = packed_size(outputs, channels_per_group, kh * kw, groups);
  if (size == direct) return 0;
  for (int tile : kTileCodes)
    if (kh == kw && groups == 1 && transform_takes(kh, tile) &&
        size == direct + transformed_size(outputs, channels_per_group, kh, tile))
      return tile;
  return -1;
}

// What a CPU kernel needs from its caller: threads and scratch memory. `parallel` splits [0, n) over the caller's pool;
// `alloc` is only called from the calling thread and its memory lives until the caller frees the whole call's scratch.
struct Env {
  int threads;
  void (*parallel)(int64_t n, void (*body)(int64_t begin, int64_t end, void* ctx), void* ctx);
  void* (*alloc)(void* owner, size_t bytes);
  void* owner;
  void* member = nullptr;  // Team::Member of the calling thread: the other members make the same call beside it
};

struct MaskedForward {
  ConvShape shape;
  DType dtype;
  View x, y;
  View weight;  // (o, c, kh, kw)
  const void* bias;
  const void* gate;
  const void* in_gate;  // multiplies the inputs, or nullptr
  IndexList live_in, live_out;
  bool compact_maps;  // x and y hold live channels only
  Act act;
  Algorithm algorithm;
};

// `saved` is the forward output (none, relu, relu6, sigmoid) or the value before the activation (the others).
struct MaskedBackward {
  ConvShape shape;
  DType dtype;
  View grad_y, saved, x, weight;
  const void* bias;
  const void* gate;
  const void* in_gate;
  IndexList live_in, live_out;
  bool compact_maps;  // so do grad_y, saved, x and grad_x
  Act act;
  View grad_x;  // data == nullptr: not wanted; all gradients arrive zero-filled, unless every element is live
  void* grad_weight;
  int64_t grad_weight_strides[4];  // of (o, c, kh, kw); contiguous on CUDA
  void* grad_in_gate;
  void* grad_bias;
  void* grad_gate;
  Algorithm algorithm;
};

// y = act(gate * (weight * (x - mean) / sqrt(var + eps) + bias) + residual) and its gradients. Maps are contiguous or
// channels-last, all alike. Dead channels: zero before residual and activation, moments and gradients zero.
struct BatchNorm {
  int64_t n, channels, pixels;
  bool channels_last;
  DType dtype;
  const void *x, *residual, *weight, *bias, *gate;  // residual, weight, bias, gate: or nullptr
  IndexList live;                                   // of the maps
  const int64_t* place;                             // of each channel of the maps in the vectors, or nullptr: they are alike
  int64_t vector_channels;                          // length of the vectors
  bool training;                                    // forward: writes mean and var (biased) from x; backward: they depend on x
  double eps;
  Act act;
  void *mean, *var;
  void* y;
  const void* grad_y;
  void *grad_x, *grad_residual, *grad_weight, *grad_bias, *grad_gate;  // nullptr: not wanted
};

// act(scatter(conv + bias) + residual). `dtype` is that of x, residual, y; packed and bias are float32 (float64 for f64), but
// for `packed_is_half`.
struct CompactForward {
  ConvShape shape;  // channels = conv inputs (length of in_index), outputs = conv outputs
  DType dtype;
  View x, residual, y;  // residual.data == nullptr: none
  const void* packed;
  bool packed_is_half;  // CPU: in the half type `dtype`, else float32
  int tile;             // code of the transformed weights in `packed`; 0: none
  const void* bias;
  IndexList in_index, out_index;
  int64_t x_channels, y_channels;
  Act act;
  // CUDA, tensor cores: weights in x's dtype (8 lanes) or float32 for tf32 (4 lanes) behind the direct layout; 0: none.
  int lanes;
  const void* tensor_weight;
  bool bias_is_float;  // else x's dtype
  // The map's channels are followed by lanes of its own, up to a multiple of 8, on the CPU up to the next pixel: they hold
  // anything and may be overwritten.
  bool y_has_room;
  bool x_has_room, residual_has_room;  // CPU
};

}  // namespace lp
