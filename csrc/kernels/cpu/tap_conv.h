// The one description all CPU kernels work from: a convolution as a list of taps. Forward, the phases of a strided input
// gradient, the weight gradient and depthwise are all "for every pixel, sum over taps and channels".
#pragma once
#include "../../include/lp_params.h"

namespace lp {

struct TapConv {
  View x;  // input
  int64_t n, height, width;
  int groups;
  // Channel ids per group: in_channel[in_begin[g] .. in_begin[g + 1]). Always present.
  const int64_t* in_channel;
  const int64_t* in_begin;
  const int64_t* out_channel;
  const int64_t* out_begin;
  int taps;
  const int64_t *tap_h, *tap_w;  // offset of each tap from the pixel's origin, row-major and ascending
  int64_t rows, cols;            // pixels of this (phase of the) output
  int64_t step_h, step_w;        // origin of pixel (r, c) is (r * step_h, c * step_w)
  View out;                      // base already at the phase's first pixel, strides already times the phase step
  View residual;
  const void* weight;           // packed, accumulator type
  const int64_t* weight_begin;  // per group
  const void* scale;            // per compact output or nullptr
  const void* shift;
  Act act;
  // Spare lanes behind the channels of x; of out and residual: up to the next pixel, at least to a multiple of 8, they may be
  // read and overwritten.
  bool x_room, out_room;
  bool depthwise;  // in_channel[i] feeds out_channel[i]; weight is (tap, channel padded to 16)
};

struct TapWeightGrad {
  TapConv conv;          // x, taps, pixels, channel lists
  View grad;             // gradient at the convolution's output; channels through conv.out_channel
  void* partial;         // [parts][partial_size]
  int64_t partial_size;  // group by group: panels x (taps x inputs) x 16; then, per group, panels x 16 sums of grad
  const int64_t* partial_begin;
  const int64_t* sum_begin;
  int parts;
  bool wants_sums;  // of grad; the direct kernel always writes them
};

// Where the elements of a packed weight come from and go: a[lane, reduced channel, tap] =
// weight[lane_at + red_at + tap_at] * red_scale * lane_scale, in panels of lanes as packed_offset lays them out. For Winograd
// the taps are the nine of 3x3, row-major in the order of their offsets, and become (tile + 2)^2 points.
template <class T>
struct PanelSource {
  const T* weight;
  const int64_t* lane_at;  // element offset of each lane
  int64_t lanes;
  const int64_t* red_at;  // element offset of each reduced channel
  int64_t reds;
  const T* red_scale;   // or nullptr
  const T* lane_scale;  // or nullptr
  const int64_t* tap_at;
  T* out;
};

// grad_v[pixel][i] = grad_y * act'(saved) for the listed channels, channels-last and compact.
struct ActGrad {
  View grad_y, saved;
  int64_t n, rows, cols;
  const int64_t* channel;
  int64_t channels;
  void* out;
  Act act;
};

// Dense channels-last float32 maps; every window reaches into the map.
struct MaxPool {
  const float* x;
  float* y;
  int64_t n, channels, height, width, kh, kw, stride_h, stride_w, pad_h, pad_w, out_h, out_w;
};

// The mean over all pixels of float32 maps of consecutive channels; y has one pixel per image.
struct MeanPool {
  View x, y;
  int64_t n, channels, height, width;
};

// 1x1 (weight nullptr: none), depthwise 3x3 of padding 1, 1x1 on float32 maps of consecutive channels, whose rows of pixels
// lie one behind the other. inputs == inner where the first is missing; x_room, out_room: as of TapConv.
struct InvertedResidual {
  struct Layer {
    const float *weight, *shift;
    Act act;
  };
  View x, out, residual;
  int64_t n, inputs, inner, outputs, height, width, rows, cols, stride;
  Layer expand, depthwise, project;
  bool x_room, out_room;
};

// A map of a half type and its dense channels-last float32 copy.
struct HalfMap {
  View half;
  DType dtype;
  int64_t n, channels, height, width;
  float* dense;
};

// Live columns of the live rows of a dense channels-last float32 weight, and where they lie side by side.
struct LiveRows {
  bool gather;  // whole to block; else block to whole rows, zero where nothing lives
  float *whole, *block;
  int64_t taps, channels, block_row, block_tap;  // steps in floats
  IndexList rows, columns;
};

// A convolution of dense channels-last maps of a few pixels. `places` are the pixels of x, `sites` those of y.
struct SmallMap {
  static constexpr int64_t limit = 16;  // places, sites, and taps that join any one of them to others
  int64_t n, inputs, outputs, places, sites, taps;
  float *x, *y;                                        // or their gradients
  int64_t x_image, y_image, x_at[limit], y_at[limit];  // steps and offsets in floats
  const float* weight;
  int64_t weight_row, tap_at[limit];
  int8_t joins[limit][limit];  // the tap from a place to a site, -1: none
  const float *in_scale, *shift;
  float* grad_weight;  // or nullptr, like in_sums, which get what they lack to the gradient of in_scale
  int64_t grad_row, grad_tap_at[limit];
  float* in_sums;
  int tap(int64_t place, int64_t site) const { return joins[place][site]; }
};

// A convolution of up to four dense channels-last inputs, kernels up to 3x3, stride 1 or 2 (plane_training.h).
struct PlaneConv {
  int64_t n, inputs, outputs, height, width, rows, cols;
  int64_t kh, kw, stride_h, stride_w, pad_h, pad_w;
  const float* x;
  int64_t x_image, x_row;  // steps in floats
  float* y;                // or the gradient of it
  int64_t y_image, y_row, y_pixel;
  const float *weight, *shift;      // [output / 4][tap][input][output % 4], padded with zeros
  float *grad_weight, *grad_shift;  // sums of products, [output][tap][input], and of the gradient of y
};

// The input gradient of such a convolution with stride 2 and up to 32 outputs: `conv` with the gradient of y, and that of x in
// the place of x. Even and odd rows and columns of it are a convolution each, at stride 1.
struct PlaneGrad {
  static constexpr int64_t limit = 32;
  struct Phase {
    int64_t taps, h[4], w[4];  // offsets of y's pixels
    const float* weight;       // [input / 4][tap][output][input % 4], padded with zeros
  };
  PlaneConv conv;
  float* grad_x;
  Phase phase[2][2];
};

// Fewest channels of a convolution with Winograd tiles in lanes: it loads four at a time.
constexpr int64_t kLeastLaneChannels = 4;

struct CpuKernels {
  const char* name;
  int64_t lanes;                                           // floats of a vector
  void (*conv[2])(const TapConv&, const Env&);             // float32, float64
  int64_t lane_channels;                                   // most channels of a convolution with Winograd tiles in lanes
  void (*winograd)(const TapConv&, int tile, const Env&);  // float32, one group; see kTileCodes
  // float32, 1x1, one group, weight direct and transformed; false: not a case for it
  bool (*strassen)(const TapConv&, const Env&);
  bool (*depthwise)(const TapConv&, const Env&);  // float32, one group, weight (tap, channel); false: not a case for it
  bool (*residual_rows)(const TapConv&, int64_t channels, const Env&);  // float32: out = act(residual), if it can
  void (*inverted_residual)(const InvertedResidual&, const Env&);
  void (*weight_grad[2])(const TapWeightGrad&, const Env&);
  void (*act_grad[2])(const ActGrad&, const Env&);
  void (*batch_norm_forward[2])(const BatchNorm&, const Env&);
  void (*batch_norm_backward[2])(const BatchNorm&, const Env&);
  void (*winograd_weight)(const PanelSource<float>&, int tile, const Env&);
  void (*winograd_weight_grad)(const TapWeightGrad&, int tile, const Env&);  // float32, one group, 3x3, stride 1, one part
  void (*small_map[3])(const SmallMap&, const Env&);                         // output, gradients of x and of the weight
  void (*plane[2])(const PlaneConv&, const Env&);                            // output, gradient of the weight, or nullptr
  void (*plane_grad)(const PlaneGrad&, const Env&);                          // or nullptr
  bool (*live_rows)(const LiveRows&, const Env&);                            // false: not on this level
  void (*max_pool)(const MaxPool&, const Env&);
  void (*mean_pool)(const MeanPool&, const Env&);
  void (*widen)(const HalfMap&, const Env&);   // half to dense
  void (*narrow)(const HalfMap&, const Env&);  // dense to half, rounded to the nearest
};

const CpuKernels& cpu_kernels_portable();
const CpuKernels& cpu_kernels_avx2();
const CpuKernels& cpu_kernels_avx512();

// Of the L1 data cache, with 64 sets of 64-byte lines as every x86 has; other geometries count as so many of those.
int l1_ways();
bool cpu_has_avx2();
bool cpu_has_avx512();
// Whether vectors of 64 bytes take twice as long as those of 32.
bool cpu_halves_vectors();
// The best level this CPU has, capped by LIGHTNING_PRUNE_CPU_LEVEL (read on every call: it is one getenv). Throws where that is
// misspelt.
const char* cpu_level_name();
const CpuKernels& cpu_kernels();

// Drivers: torch-free entry points for the bindings.
void masked_forward_cpu(const MaskedForward&, const Env&);
void masked_backward_cpu(const MaskedBackward&, const Env&);
// The rows `outs` and columns `ins` of a weight (its shape in outputs, channels, kh, kw of `s`) side by side, and back, with
// zeros beside them: in the rows `outs` or, with `clear`, everywhere.
void live_block_cpu(DType, const ConvShape& s, const View& weight, const View& block, const IndexList& ins,
                    const IndexList& outs, const Env&);
void spread_block_cpu(DType, const ConvShape& s, const View& block, void* out, const int64_t* step, const IndexList& ins,
                      const IndexList& outs, bool clear, const Env&);
void compact_forward_cpu(const CompactForward&, const Env&);
void pack_cpu(const View& weight, DType dtype, int64_t outputs, int64_t channels_per_group, int64_t kh, int64_t kw,
              int64_t groups, void* packed, const Env&);
// The transformed weights of the Winograd tile of this code, transformed_size() of them.
void pack_winograd_cpu(const View& weight, int64_t outputs, int64_t channels, int kernel, int tile, float* packed, const Env&);
// Strassen's sums of a 1x1 weight.
void pack_strassen_cpu(const View& weight, int64_t outputs, int64_t channels, float* packed, const Env&);

}  // namespace lp
