// The program of a run of layers; lightning_prune/inference/segment.py writes it. All numbers are int64.
#pragma once
#include "../../include/lp_params.h"

namespace lp {

// Places of a map: an offset into the arena in floats per image, or one of these.
constexpr int64_t kNone = -1, kFromInput = -2, kToOutput = -3;
// A map that is never whole: the steps that it joins run depth first. They are a depthwise 3x3 convolution (padding 1, stride 1
// or 2) and a 1x1 behind it, and may be a 1x1 before it.
constexpr int64_t kInside = -4;
constexpr int64_t kConv = 0, kMaxPool = 1, kMean = 2;  // kMean: over all pixels

struct SegmentHeader {
  int64_t version;  // 2
  int64_t steps;
  int64_t x_c, x_h, x_w, y_c, y_h, y_w;
  int64_t arena;  // floats per image
  int64_t slice;  // images per pass through the program
};

struct SegmentStep {
  int64_t kind, in, out, residual;
  int64_t weight, bias, act;  // index into the tensors; Act
  int64_t channels, height, width, outputs, out_h, out_w;
  int64_t kh, kw, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, groups;
  int64_t in_step, out_step, residual_step;  // floats from pixel to pixel
  int64_t tile;                              // filled in by the binding: Winograd weights in the packed tensor
};

struct Segment {
  const SegmentHeader* header;
  const SegmentStep* step;
  const float* const* tensor;
  View x;
  float* y;  // channels-last
  int64_t n;
};

void run_segment_cpu(const Segment&, const Env&);

}  // namespace lp
