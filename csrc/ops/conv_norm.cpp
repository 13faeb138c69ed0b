// Binding of masked_conv_norm_act and its backward: a convolution and the batch norm that alone reads it, as one operator.
// Calling two of them takes as long as computing a map of few channels.
#include "training_ops.h"

namespace lp {
namespace {

// Stride, padding, dilation (two numbers each) and groups.
struct Geometry {
  Sizes stride, padding, dilation;
  int64_t groups;
};

Geometry parse(const char* op, const Sizes& g) {
  if (g.size() != 7)
    fail(op, ": geometry must have 7 numbers, two each of stride, padding and dilation, and groups; got ", g.size());
  return {{g[0], g[1]}, {g[2], g[3]}, {g[4], g[5]}, g[6]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_norm_act(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& in_gate,
    const std::optional<Tensor>& live_in, const std::optional<Tensor>& live_out, bool compact_maps, const Sizes& geometry,
    const std::optional<Tensor>& residual, const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias,
    const std::optional<Tensor>& live, int64_t compact_of, double eps, const std::string& activation,
    const std::optional<Tensor>& running_mean, const std::optional<Tensor>& running_var, const std::optional<Tensor>& tracked,
    double momentum) {
  const char* op = "masked_conv_norm_act";
  const Geometry g = parse(op, geometry);
  if (running_mean.has_value() != running_var.has_value()) fail(op, ": give both running_mean and running_var, or neither");
  const Tensor middle = masked_conv2d(x, weight, bias, std::nullopt, live_in, live_out, g.stride, g.padding, g.dilation,
                                      g.groups, "none", "auto", in_gate, compact_maps);
  auto [y, mean, var] = batch_norm_act(middle, residual, norm_weight, norm_bias, std::nullopt, std::nullopt, std::nullopt, live,
                                       eps, activation, compact_of);
  const int64_t count = middle.size(0) * middle.size(2) * middle.size(3);
  if (running_mean) record_moments(*running_mean, *running_var, tracked, mean, var, count, momentum);
  return {y, middle, mean, var};
}

// Bits of `needs`: gradients of x, weight, bias, in_gate, norm_weight, norm_bias, residual.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_norm_act_backward(
    const Tensor& grad_y, const Tensor& middle, const Tensor& mean, const Tensor& var, const Tensor& x, const Tensor& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& in_gate, const std::optional<Tensor>& live_in,
    const std::optional<Tensor>& live_out, bool compact_maps, const Sizes& geometry, const std::optional<Tensor>& residual,
    const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, const std::optional<Tensor>& live,
    int64_t compact_of, double eps, const std::string& activation, int64_t needs) {
  const Geometry g = parse("masked_conv_norm_act_backward", geometry);
  const auto needed = [&](int bit) { return (needs >> bit & 1) != 0; };
  const bool of_conv = needed(0) || needed(1) || needed(2) || needed(3);
  auto [grad_middle, grad_residual, grad_norm_weight, grad_norm_bias, unused_gate] =
      batch_norm_act_backward(grad_y, middle, residual, norm_weight, norm_bias, std::nullopt, mean, var, live, true, eps,
                              activation, of_conv, needed(6), needed(4), needed(5), false, compact_of);
  if (!of_conv) {
    const Sizes map{0, 0, 0, 0};
    return {new_output(x, map), new_output(weight, map), zeros_on(x, {0}), zeros_on(x, {0}),
            grad_norm_weight,   grad_norm_bias,          grad_residual};
  }
  auto [grad_x, grad_weight, grad_bias, unused, grad_in_gate] = masked_conv2d_backward(
      grad_middle, std::nullopt, x, weight, bias, std::nullopt, live_in, live_out, g.stride, g.padding, g.dilation, g.groups,
      "none", needed(0), needed(1), needed(2), false, "auto", in_gate, needed(3), compact_maps);
  return {grad_x, grad_weight, grad_bias, grad_in_gate, grad_norm_weight, grad_norm_bias, grad_residual};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lightning_prune, m) {
  m.def(
      "masked_conv_norm_act(Tensor x, Tensor weight, Tensor? bias, Tensor? in_gate, Tensor? live_in, Tensor? live_out, "
      "bool compact_maps, int[] geometry, Tensor? residual, Tensor? norm_weight, Tensor? norm_bias, Tensor? live, "
      "int compact_of, float eps, str activation, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? tracked, "
      "float momentum) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "masked_conv_norm_act_backward(Tensor grad_y, Tensor middle, Tensor mean, Tensor var, Tensor x, Tensor weight, "
      "Tensor? bias, Tensor? in_gate, Tensor? live_in, Tensor? live_out, bool compact_maps, int[] geometry, Tensor? residual, "
      "Tensor? norm_weight, Tensor? norm_bias, Tensor? live, int compact_of, float eps, str activation, int needs) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(lightning_prune, CPU, m) {
  m.impl("masked_conv_norm_act", TORCH_BOX(&conv_norm_act));
  m.impl("masked_conv_norm_act_backward", TORCH_BOX(&conv_norm_act_backward));
}

}  // namespace lp
