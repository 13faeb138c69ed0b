// Binding of compact_segment: checks a program once per call, so that no number in it can reach outside of a tensor.
#include "../kernels/cpu/segment.h"

#include <cstring>

#include "binding.h"
#include "launch.h"

namespace lp {
namespace {

constexpr const char* kOp = "compact_segment";

void check(bool ok, int64_t step, const char* what) {
  if (!ok) fail(kOp, ": step ", step, " of the program is damaged: ", what, " (make programs with inference/segment.py)");
}

// Above every number of a program that can be right, and far from what would wrap.
constexpr int64_t kMuch = int64_t(1) << 40;

int64_t extent(int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  const int64_t span = size + 2 * pad - product({dilation, kernel - 1}) - 1;
  return span < 0 ? -1 : span / stride + 1;
}

void check_place(const SegmentHeader& h, int64_t i, int64_t place, int64_t step, int64_t c, int64_t height, int64_t width) {
  if (place == kInside) return check(step == 0, i, "a step inside");
  check(place >= 0 ? step >= c : step == c, i, "the step from pixel to pixel");
  if (place == kFromInput)
    check(c == h.x_c && height == h.x_h && width == h.x_w, i, "the input's shape");
  else if (place == kToOutput)
    check(c == h.y_c && height == h.y_h && width == h.y_w, i, "the output's shape");
  else
    check(place >= 0 && c > 0 && height > 0 && width > 0 && product({step, height, width}) <= h.arena - place, i,
          "a place in the arena");
}

// Where a weight or bias lies among all of them.
struct Place {
  int64_t begin, size;
};

void check_step(const SegmentHeader& h, SegmentStep& t, int64_t i, const std::vector<Place>& tensors) {
  t.tile = 0;
  int64_t numbers[sizeof(t) / sizeof(int64_t)];
  std::memcpy(numbers, &t, sizeof(t));
  for (const int64_t number : numbers) check(number >= kInside && number < kMuch, i, "the size of its numbers");
  check(t.kind == kConv || t.kind == kMaxPool || t.kind == kMean, i, "its kind");
  check(t.in != kToOutput && t.out != kFromInput && t.residual != kToOutput && t.residual != kInside &&
            (t.out != t.in || t.in == kInside),
        i, "its places");
  check_place(h, i, t.in, t.in_step, t.channels, t.height, t.width);
  check_place(h, i, t.out, t.out_step, t.outputs, t.out_h, t.out_w);
  check(t.residual != kNone || t.residual_step == 0, i, "the step of its residual");
  if (t.residual != kNone) check_place(h, i, t.residual, t.residual_step, t.outputs, t.out_h, t.out_w);
  check(t.kh > 0 && t.kw > 0 && t.stride_h > 0 && t.stride_w > 0 && t.dil_h > 0 && t.dil_w > 0 && t.pad_h >= 0 && t.pad_w >= 0,
        i, "its window");
  check(t.out_h == extent(t.height, t.kh, t.stride_h, t.pad_h, t.dil_h) &&
            t.out_w == extent(t.width, t.kw, t.stride_w, t.pad_w, t.dil_w),
        i, "its output's size");
  if (t.kind == kMaxPool) {
    check(t.channels == t.outputs && 2 * t.pad_h <= t.kh && 2 * t.pad_w <= t.kw && t.dil_h == 1 && t.dil_w == 1 &&
              t.in != kFromInput && t.residual == kNone && t.in_step == t.channels && t.out_step == t.outputs,
          i, "its pooling window");
    return;
  }
  if (t.kind == kMean) {
    check(t.channels == t.outputs && t.kh == t.height && t.kw == t.width && t.out_h == 1 && t.out_w == 1 && t.in >= 0 &&
              t.out != kInside && t.residual == kNone,
          i, "the map of its mean");
    return;
  }
  const int64_t count = int64_t(tensors.size());
  check(t.weight >= 0 && t.weight < count && t.bias >= kNone && t.bias < count, i, "its tensors");
  check(t.groups > 0 && t.channels % t.groups == 0 && t.outputs % t.groups == 0 && t.act >= 0 && t.act <= 6, i, "its groups");
  const int64_t size = tensors[size_t(t.weight)].size, per_group = t.channels / t.groups;
  t.tile =
      product({t.outputs, per_group, t.kh, t.kw}) > size ? -1 : packed_tile(size, t.outputs, per_group, t.kh, t.kw, t.groups);
  check(t.tile >= 0, i, "the size of its weight");
  check(t.bias == kNone || tensors[size_t(t.bias)].size == t.outputs, i, "the size of its bias");
}

bool is_1x1(const SegmentStep& t) {
  return t.kind == kConv && t.kh == 1 && t.kw == 1 && t.stride_h == 1 && t.stride_w == 1 && t.pad_h == 0 && t.pad_w == 0 &&
         t.groups == 1;
}
bool is_depthwise_3x3(const SegmentStep& t) {
  return t.kind == kConv && t.kh == 3 && t.kw == 3 && t.stride_h == t.stride_w && t.stride_h <= 2 && t.pad_h == 1 &&
         t.pad_w == 1 && t.dil_h == 1 && t.dil_w == 1 && t.groups > 1 && t.groups == t.channels && t.channels == t.outputs;
}

// Maps inside join a depthwise convolution with the 1x1 ones around it, and nothing else.
void check_inside(const std::vector<SegmentStep>& steps) {
  for (size_t i = 0; i < steps.size(); ++i) {
    const SegmentStep& t = steps[i];
    const SegmentStep* before = i > 0 ? &steps[i - 1] : nullptr;
    check((t.in == kInside) == (before && before->out == kInside), int64_t(i), "a map inside has two ends");
    if (t.in == kInside) {
      check(t.channels == before->outputs && t.height == before->out_h && t.width == before->out_w, int64_t(i), "a map inside");
      check(is_depthwise_3x3(*before) ? is_1x1(t) && t.out != kInside : is_depthwise_3x3(t) && t.out == kInside, int64_t(i),
            "the layers that run depth first");
    }
    if (t.out == kInside)
      check((is_1x1(t) || is_depthwise_3x3(t)) && t.residual == kNone && t.in != kFromInput, int64_t(i),
            "a layer that runs depth first");
  }
}

Tensor compact_segment(const Tensor& x, const Tensor& weights, const Tensor& places, const Tensor& program) {
  if (program.dim() != 1 || program.scalar_type() != ScalarType::Long || program.is_cuda() || !program.is_contiguous())
    fail(kOp, ": program must be a contiguous 1-D int64 tensor on the CPU; got ", dtype_name(program.scalar_type()),
         " of shape ", show_shape(program));
  constexpr int64_t head = sizeof(SegmentHeader) / 8, each = sizeof(SegmentStep) / 8;
  const auto* numbers = static_cast<const int64_t*>(program.data_ptr());
  SegmentHeader h{};
  if (program.size(0) >= head) std::memcpy(&h, numbers, sizeof(h));
  if (h.version != 2 || h.steps < 1 || h.steps > program.size(0) || program.size(0) != head + h.steps * each || h.arena < 0 ||
      h.arena >= kMuch || h.slice < 1)
    fail(kOp, ": program is damaged or from another version");
  if (x.dim() != 4 || x.is_cuda() || x.scalar_type() != ScalarType::Float || x.size(1) != h.x_c || x.size(2) != h.x_h ||
      x.size(3) != h.x_w)
    fail(kOp, ": x must be float32 of shape (N, ", h.x_c, ", ", h.x_h, ", ", h.x_w, ") on the CPU; got ",
         dtype_name(x.scalar_type()), " of shape ", show_shape(x));
  if (weights.scalar_type() != ScalarType::Float || weights.is_cuda() || weights.dim() != 1 || !weights.is_contiguous())
    fail(kOp, ": weights must be a contiguous 1-D float32 tensor on the CPU; got ", dtype_name(weights.scalar_type()),
         " of shape ", show_shape(weights));
  if (places.scalar_type() != ScalarType::Long || places.is_cuda() || places.dim() != 2 || places.size(1) != 2 ||
      !places.is_contiguous())
    fail(kOp, ": places must be a contiguous int64 tensor of shape (tensors, 2) on the CPU; got ",
         dtype_name(places.scalar_type()), " of shape ", show_shape(places));
  std::vector<Place> tensors(size_t(places.size(0)), Place{});
  std::memcpy(tensors.data(), places.data_ptr(), tensors.size() * sizeof(Place));
  std::vector<const float*> data;
  data.reserve(tensors.size());
  const int64_t floats = weights.numel();
  for (const Place& t : tensors) {
    if (t.begin < 0 || t.size < 0 || t.begin > floats || t.size > floats - t.begin)
      fail(kOp, ": a weight or bias must lie in the ", floats, " weights; got ", t.size, " from ", t.begin, " on");
    data.push_back(static_cast<const float*>(weights.data_ptr()) + t.begin);
  }
  std::vector<SegmentStep> steps(size_t(h.steps), SegmentStep{});
  std::memcpy(steps.data(), numbers + head, steps.size() * sizeof(SegmentStep));
  for (int64_t i = 0; i < h.steps; ++i) check_step(h, steps[size_t(i)], i, tensors);
  check_inside(steps);
  if (steps.back().out != kToOutput) fail(kOp, ": the last step of the program must write the output");
  const int64_t n = x.size(0);
  h.slice = std::min(h.slice, std::max<int64_t>(1, n));
  const Sizes shape{n, h.y_c, h.y_h, h.y_w};
  Tensor y = torch::stable::empty(shape, x.scalar_type(), std::nullopt, x.device(), std::nullopt, MemoryFormat::ChannelsLast);
  Scratch scratch(x);
  run_segment_cpu(Segment{&h, steps.data(), data.data(), view_of(x), static_cast<float*>(y.data_ptr()), n}, scratch.env());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lightning_prune, m) {
  m.def("compact_segment(Tensor x, Tensor weights, Tensor places, Tensor program) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lightning_prune, CPU, m) { m.impl("compact_segment", TORCH_BOX(&compact_segment)); }

}  // namespace lp
