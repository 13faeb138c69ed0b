// Binding of masked_conv2d and masked_conv2d_backward: validation, allocation, one call into the kernels.
#include <algorithm>

#include "binding.h"
#include "launch.h"
#include "map_memory.h"
#include "training_ops.h"

namespace lp {
namespace {

// Contiguous, checked arguments; kept alive while the kernels read them.
struct Arguments {
  ConvShape shape;
  int64_t x_channels, y_channels;  // of the maps
  std::optional<Tensor> bias, gate, in_gate, live_in, live_out;
  DType dtype;
  Act act;
  Algorithm algorithm;
};

Algorithm parse_algorithm(const char* op, const std::string& name) {
  static const char* const names[] = {"auto", "direct", "winograd2", "winograd4"};
  for (int i = 0; i < 4; ++i)
    if (name == names[i]) return Algorithm(i);
  fail(op, ": algorithm must be one of auto, direct, winograd2, winograd4; got '", name, "'");
}

Arguments check(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                const std::optional<Tensor>& gate, const std::optional<Tensor>& live_in, const std::optional<Tensor>& live_out,
                const Sizes& stride, const Sizes& padding, const Sizes& dilation, int64_t groups, const std::string& activation,
                const std::string& algorithm, const std::optional<Tensor>& in_gate, bool compact_maps) {
  if (x.scalar_type() != ScalarType::Float && x.scalar_type() != ScalarType::Double)
    fail(op, ": x must be float32 or float64; got ", dtype_name(x.scalar_type()), " (cast with x.float())");
  if (weight.scalar_type() != x.scalar_type())
    fail(op, ": weight must be ", dtype_name(x.scalar_type()), " like x; got ", dtype_name(weight.scalar_type()));
  if (weight.is_cuda() != x.is_cuda()) fail(op, ": weight must be on the same device as x");
  Arguments a;
  const auto sizes = weight.sizes();
  const bool other_inputs = compact_maps && live_in && weight.dim() == 4;
  a.shape = conv_shape(op, x, Sizes(sizes.data(), sizes.data() + sizes.size()), stride, padding, dilation, groups,
                       other_inputs   ? weight.size(1) * groups
                       : x.dim() == 4 ? x.size(1)
                                      : 0);
  if (bias) a.bias = vector_argument(op, "bias", *bias, a.shape.outputs, x);
  if (gate) a.gate = vector_argument(op, "gate", *gate, a.shape.outputs, x);
  if (in_gate) {
    if (in_gate->is_cuda() != x.is_cuda())
      fail(op, ": in_gate must be on the same device as x; move it with in_gate.to(x.device)");
    if (in_gate->dim() != 1 || in_gate->size(0) != a.shape.channels || in_gate->scalar_type() != x.scalar_type())
      fail(op, ": in_gate must be ", dtype_name(x.scalar_type()), " of shape (", a.shape.channels,
           "), one value per input channel; got ", dtype_name(in_gate->scalar_type()), " of shape ", show_shape(*in_gate));
    a.in_gate = dense(*in_gate);
  }
  if (live_in) a.live_in = index_argument(op, "live_in", *live_in, a.shape.channels, Order::sorted, x);
  if (live_out) a.live_out = index_argument(op, "live_out", *live_out, a.shape.outputs, Order::sorted, x);
  a.x_channels = other_inputs ? a.live_in->size(0) : a.shape.channels;
  a.y_channels = compact_maps && live_out ? a.live_out->size(0) : a.shape.outputs;
  if (x.size(1) != a.x_channels)
    fail(op, ": with compact_maps x must have one channel for each of live_in, ", a.x_channels, "; got shape ", show_shape(x));
  a.dtype = x.scalar_type() == ScalarType::Double ? DType::f64 : DType::f32;
  a.act = parse_activation(op, activation);
  a.algorithm = parse_algorithm(op, algorithm);
  return a;
}

IndexList list_of(const std::optional<Tensor>& index, int64_t channels) {
  if (!index) return IndexList{nullptr, channels};
  return IndexList{static_cast<const int64_t*>(index->data_ptr()), index->size(0)};
}

}  // namespace

Tensor masked_conv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& gate, const std::optional<Tensor>& live_in,
                     const std::optional<Tensor>& live_out, const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                     int64_t groups, const std::string& activation, const std::string& algorithm,
                     const std::optional<Tensor>& in_gate, bool compact_maps) {
  const Arguments a = check("masked_conv2d", x, weight, bias, gate, live_in, live_out, stride, padding, dilation, groups,
                            activation, algorithm, in_gate, compact_maps);
  const ConvShape& s = a.shape;
  Tensor y = new_map(x, {s.n, a.y_channels, s.out_h, s.out_w});
  const IndexList out = list_of(a.live_out, s.outputs);
  if (out.count < a.y_channels) torch::stable::zero_(y);
  MaskedForward f{};
  f.shape = s;
  f.dtype = a.dtype;
  f.x = view_of(x);
  f.y = view_of(y);
  f.weight = view_of(weight);
  f.bias = data_of(a.bias);
  f.gate = data_of(a.gate);
  f.in_gate = data_of(a.in_gate);
  f.live_in = list_of(a.live_in, s.channels);
  f.live_out = out;
  f.compact_maps = compact_maps;
  f.act = a.act;
  f.algorithm = a.algorithm;
  Scratch scratch(x);
  if (x.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    masked_forward_cuda(f, scratch.env(), current_stream(x));
  } else {
    masked_forward_cpu(f, scratch.env());
  }
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> masked_conv2d_backward(
    const Tensor& grad_y, const std::optional<Tensor>& saved, const Tensor& x, const Tensor& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& gate, const std::optional<Tensor>& live_in,
    const std::optional<Tensor>& live_out, const Sizes& stride, const Sizes& padding, const Sizes& dilation, int64_t groups,
    const std::string& activation, bool need_x, bool need_weight, bool need_bias, bool need_gate, const std::string& algorithm,
    const std::optional<Tensor>& in_gate, bool need_in_gate, bool compact_maps) {
  const char* op = "masked_conv2d_backward";
  const Arguments a = check(op, x, weight, bias, gate, live_in, live_out, stride, padding, dilation, groups, activation,
                            algorithm, in_gate, compact_maps);
  const ConvShape& s = a.shape;
  const Sizes out_shape{s.n, a.y_channels, s.out_h, s.out_w};
  const auto check_output = [&](const char* name, const Tensor& t) {
    const auto sizes = t.sizes();
    if (sizes.size() != 4 || !std::equal(sizes.begin(), sizes.end(), out_shape.begin()) || t.scalar_type() != x.scalar_type())
      fail(op, ": ", name, " must be ", dtype_name(x.scalar_type()), " of shape ", show(out_shape), "; got ",
           dtype_name(t.scalar_type()), " of shape ", show_shape(t));
  };
  check_output("grad_y", grad_y);
  if (a.act != Act::none && !saved)
    fail(op, ": activation '", activation, "' needs `saved`: the output for relu, relu6 and sigmoid, else the value before it");
  if (saved) check_output("saved", *saved);
  if (need_bias && !bias) fail(op, ": need_bias is set but bias is None");
  if (need_gate && !gate) fail(op, ": need_gate is set but gate is None");
  if (need_in_gate && !in_gate) fail(op, ": need_in_gate is set but in_gate is None");
  Tensor grad_x = new_map(x, need_x ? Sizes{s.n, a.x_channels, s.height, s.width} : Sizes{0, 0, 0, 0});
  // Every pixel is reached by a tap, and every channel of the map is computed.
  const bool reached = s.stride_h <= s.kh && s.stride_w <= s.kw && s.dil_h == 1 && s.dil_w == 1 && s.groups == 1;
  const bool every_channel = !a.live_in || compact_maps;
  const bool all_written = reached && every_channel && list_of(a.live_out, s.outputs).count > 0;
  if (need_x && !all_written) torch::stable::zero_(grad_x);
  const auto wsizes = weight.sizes();
  const Sizes weight_shape = need_weight ? Sizes(wsizes.data(), wsizes.data() + 4) : Sizes{0, 0, 0, 0};
  // In the weight's own format, so that accumulating it needs no copy.
  Tensor grad_weight = x.is_cuda() ? zeros_on(x, weight_shape) : new_output(weight, weight_shape);
  const bool all_live = !a.live_in && !a.live_out && s.outputs > 0 && s.channels > 0;
  const bool spread = compact_maps && s.groups == 1;  // the kernel writes the zeros of dead channels too
  if (need_weight && !x.is_cuda() && !all_live && !spread) torch::stable::zero_(grad_weight);
  Tensor grad_bias = zeros_on(x, {need_bias ? s.outputs : 0});
  Tensor grad_gate = zeros_on(x, {need_gate ? s.outputs : 0});
  Tensor grad_in_gate = zeros_on(x, {need_in_gate ? s.channels : 0});
  MaskedBackward f{};
  f.shape = s;
  f.dtype = a.dtype;
  f.grad_y = view_of(grad_y);
  if (saved) f.saved = view_of(*saved);
  f.x = view_of(x);
  f.weight = view_of(weight);
  f.bias = data_of(a.bias);
  f.gate = data_of(a.gate);
  f.live_in = list_of(a.live_in, s.channels);
  f.live_out = list_of(a.live_out, s.outputs);
  f.compact_maps = compact_maps;
  f.act = a.act;
  f.algorithm = a.algorithm;
  if (need_x) f.grad_x = view_of(grad_x);
  f.in_gate = data_of(a.in_gate);
  if (need_weight) {
    f.grad_weight = grad_weight.data_ptr();
    for (int d = 0; d < 4; ++d) f.grad_weight_strides[d] = grad_weight.strides()[d];
  }
  if (need_in_gate) f.grad_in_gate = grad_in_gate.data_ptr();
  if (need_bias) f.grad_bias = grad_bias.data_ptr();
  if (need_gate) f.grad_gate = grad_gate.data_ptr();
  Scratch scratch(x);
  if (x.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    masked_backward_cuda(f, scratch.env(), current_stream(x));
  } else {
    masked_backward_cpu(f, scratch.env());
  }
  return {grad_x, grad_weight, grad_bias, grad_gate, grad_in_gate};
}

STABLE_TORCH_LIBRARY_FRAGMENT(lightning_prune, m) {
  m.def(
      "masked_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? gate, Tensor? live_in, Tensor? live_out, "
      "int[2] stride, int[2] padding, int[2] dilation, int groups, str activation, str algorithm=\"auto\", "
      "Tensor? in_gate=None, bool compact_maps=False) -> Tensor");
  m.def(
      "masked_conv2d_backward(Tensor grad_y, Tensor? saved, Tensor x, Tensor weight, Tensor? bias, Tensor? gate, "
      "Tensor? live_in, Tensor? live_out, int[2] stride, int[2] padding, int[2] dilation, int groups, str activation, "
      "bool need_x, bool need_weight, bool need_bias, bool need_gate, str algorithm=\"auto\", "
      "Tensor? in_gate=None, bool need_in_gate=False, bool compact_maps=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(lightning_prune, CPU, m) {
  m.impl("masked_conv2d", TORCH_BOX(&masked_conv2d));
  m.impl("masked_conv2d_backward", TORCH_BOX(&masked_conv2d_backward));
}

#if defined(USE_CUDA)
STABLE_TORCH_LIBRARY_IMPL(lightning_prune, CUDA, m) {
  m.impl("masked_conv2d", TORCH_BOX(&masked_conv2d));
  m.impl("masked_conv2d_backward", TORCH_BOX(&masked_conv2d_backward));
}
#endif

}  // namespace lp
