// The operators of a training step as functions, for operators that are made of several. Arguments as the schemas have them.
#pragma once
#include <tuple>

#include "binding.h"

namespace lp {

Tensor masked_conv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& gate, const std::optional<Tensor>& live_in,
                     const std::optional<Tensor>& live_out, const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                     int64_t groups, const std::string& activation, const std::string& algorithm,
                     const std::optional<Tensor>& in_gate, bool compact_maps);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> masked_conv2d_backward(
    const Tensor& grad_y, const std::optional<Tensor>& saved, const Tensor& x, const Tensor& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& gate, const std::optional<Tensor>& live_in,
    const std::optional<Tensor>& live_out, const Sizes& stride, const Sizes& padding, const Sizes& dilation, int64_t groups,
    const std::string& activation, bool need_x, bool need_weight, bool need_bias, bool need_gate, const std::string& algorithm,
    const std::optional<Tensor>& in_gate, bool need_in_gate, bool compact_maps);

std::tuple<Tensor, Tensor, Tensor> batch_norm_act(const Tensor& x, const std::optional<Tensor>& residual,
                                                  const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                                  const std::optional<Tensor>& gate, const std::optional<Tensor>& mean,
                                                  const std::optional<Tensor>& var, const std::optional<Tensor>& live,
                                                  double eps, const std::string& activation, int64_t compact_of);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm_act_backward(
    const Tensor& grad_y, const Tensor& x, const std::optional<Tensor>& residual, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& gate, const Tensor& mean, const Tensor& var,
    const std::optional<Tensor>& live, bool training, double eps, const std::string& activation, bool need_x,
    bool need_residual, bool need_weight, bool need_bias, bool need_gate, int64_t compact_of);

void record_moments(const Tensor& running_mean, const Tensor& running_var, const std::optional<Tensor>& tracked,
                    const Tensor& mean, const Tensor& var, int64_t count, double momentum);

}  // namespace lp
