// Binding of masked_batch_norm_act and its backward: validation, allocation, one call into the kernels.
#include <algorithm>

#include "binding.h"
#include "launch.h"
#include "map_memory.h"
#include "training_ops.h"

namespace lp {
namespace {

// Arguments in x's own memory order; kept alive while the kernels read them.
struct NormArguments {
  Tensor x;
  int64_t channels;  // of the vectors
  std::optional<Tensor> residual, weight, bias, gate, live;
  BatchNorm p;
};

bool pixels_by_channels(const Tensor& x) { return is_channels_last(x) || x.size(2) * x.size(3) == 1; }

// The same values laid out as `like`, which is contiguous or channels_last.
Tensor laid_out(const Tensor& t, const Tensor& like) {
  const auto a = t.strides(), b = like.strides();
  bool same = true;
  for (int d = 0; d < 4; ++d) same = same && (t.size(d) == 1 || a[d] == b[d]);
  if (same) return t;
  Tensor copy = new_output(like, Sizes(like.sizes().data(), like.sizes().data() + 4));
  return torch::stable::copy_(copy, t);
}

bool is_half(const Tensor& x) { return x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half; }

// Statistics and parameters of half maps are float32.
ScalarType vector_type(const Tensor& x) { return is_half(x) ? ScalarType::Float : x.scalar_type(); }

DType map_type(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      return DType::f32;
  }
}

void check_map(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  if (!same_shape(t, x) || t.scalar_type() != x.scalar_type())
    fail(op, ": ", name, " must be ", dtype_name(x.scalar_type()), " of shape ", show_shape(x), " like x; got ",
         dtype_name(t.scalar_type()), " of shape ", show_shape(t));
}

NormArguments check(const char* op, const Tensor& x, const std::optional<Tensor>& residual, const std::optional<Tensor>& weight,
                    const std::optional<Tensor>& bias, const std::optional<Tensor>& gate, const std::optional<Tensor>& live,
                    bool training, double eps, const std::string& activation, int64_t compact_of) {
  if (x.dim() != 4) fail(op, ": x must be 4-D (N, C, H, W); got shape ", show_shape(x));
  if (x.scalar_type() != ScalarType::Float && x.scalar_type() != ScalarType::Double && !(x.is_cuda() && is_half(x)))
    fail(op, ": x must be float32 or float64, on CUDA also float16 or bfloat16; got ", dtype_name(x.scalar_type()),
         " (cast with x.float())");
  if (eps < 0) fail(op, ": eps must not be negative; got ", eps);
  const int64_t channels = compact_of > 0 ? compact_of : x.size(1);
  NormArguments a{is_channels_last(x) ? x : dense(x), channels, {}, {}, {}, {}, {}, {}};
  if (residual) {
    check_map(op, "residual", *residual, x);
    a.residual = laid_out(*residual, a.x);
  }
  if (weight) a.weight = vector_argument(op, "weight", *weight, channels, x, vector_type(x));
  if (bias) a.bias = vector_argument(op, "bias", *bias, channels, x, vector_type(x));
  if (gate) a.gate = vector_argument(op, "gate", *gate, channels, x, vector_type(x));
  if (live) a.live = index_argument(op, "live", *live, channels, Order::sorted, x);
  BatchNorm& p = a.p;
  p.n = x.size(0);
  p.channels = x.size(1);
  p.pixels = x.size(2) * x.size(3);
  p.channels_last = pixels_by_channels(a.x);
  p.dtype = map_type(x);
  p.vector_channels = channels;
  p.x = a.x.data_ptr();
  p.residual = data_of(a.residual);
  p.weight = data_of(a.weight);
  p.bias = data_of(a.bias);
  p.gate = data_of(a.gate);
  p.live = IndexList{nullptr, x.size(1)};
  if (compact_of > 0 && (!a.live || a.live->size(0) != x.size(1)))
    fail(op, ": with compact_of x must have one channel for each of live; got x of shape ", show_shape(x), " and ",
         a.live ? show_shape(*a.live) : "None", " for live");
  if (compact_of > 0)
    p.place = static_cast<const int64_t*>(a.live->data_ptr());
  else if (a.live)
    p.live = IndexList{static_cast<const int64_t*>(a.live->data_ptr()), a.live->size(0)};
  p.training = training;
  p.eps = eps;
  p.act = parse_activation(op, activation);
  return a;
}

// A vector of which the kernels write the live channels: zeros, unless that is all of them.
Tensor new_vector(const NormArguments& a, int64_t length) {
  const bool all_written = !a.live && a.p.n * a.p.pixels > 0;
  if (!all_written || length == 0) return zeros_on(a.x, {length}, vector_type(a.x));
  return torch::stable::empty({length}, vector_type(a.x), std::nullopt, a.x.device());
}

Tensor copy_of(const Tensor& t) {
  Tensor copy = torch::stable::empty({t.size(0)}, t.scalar_type(), std::nullopt, t.device());
  return torch::stable::copy_(copy, t);
}

template <class T>
void move_statistics(const Tensor& running, const Tensor& of_batch, double scale, double momentum) {
  T* const to = static_cast<T*>(running.data_ptr());
  const T* const from = static_cast<const T*>(of_batch.data_ptr());
  const T share = T(momentum), factor = T(scale);
  for (int64_t i = 0; i < running.size(0); ++i) {
    const T value = from[i] * factor;  // as torch.lerp has it
    to[i] = share < T(0.5) ? to[i] + share * (value - to[i]) : value - (value - to[i]) * (T(1) - share);
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> batch_norm_act(const Tensor& x, const std::optional<Tensor>& residual,
                                                  const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                                  const std::optional<Tensor>& gate, const std::optional<Tensor>& mean,
                                                  const std::optional<Tensor>& var, const std::optional<Tensor>& live,
                                                  double eps, const std::string& activation, int64_t compact_of) {
  const char* op = "masked_batch_norm_act";
  if (mean.has_value() != var.has_value()) fail(op, ": give both mean and var, or neither to take them from x");
  NormArguments a = check(op, x, residual, weight, bias, gate, live, !mean, eps, activation, compact_of);
  Tensor y = new_map(a.x, {x.size(0), x.size(1), x.size(2), x.size(3)});
  const auto moments = [&](const char* name, const std::optional<Tensor>& given) {
    const ScalarType type = vector_type(x);
    return given ? copy_of(vector_argument(op, name, *given, a.channels, x, type)) : new_vector(a, a.channels);
  };
  Tensor used_mean = moments("mean", mean), used_var = moments("var", var);
  a.p.y = y.data_ptr();
  a.p.mean = used_mean.data_ptr();
  a.p.var = used_var.data_ptr();
  Scratch scratch(x);
  if (x.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    batch_norm_forward_cuda(a.p, scratch.env(), current_stream(x));
  } else {
    cpu_kernels().batch_norm_forward[a.p.dtype == DType::f64](a.p, scratch.env());
  }
  return {y, used_mean, used_var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm_act_backward(
    const Tensor& grad_y, const Tensor& x, const std::optional<Tensor>& residual, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& gate, const Tensor& mean, const Tensor& var,
    const std::optional<Tensor>& live, bool training, double eps, const std::string& activation, bool need_x,
    bool need_residual, bool need_weight, bool need_bias, bool need_gate, int64_t compact_of) {
  const char* op = "masked_batch_norm_act_backward";
  NormArguments a = check(op, x, residual, weight, bias, gate, live, training, eps, activation, compact_of);
  check_map(op, "grad_y", grad_y, x);
  if (need_residual && !residual) fail(op, ": need_residual is set but residual is None");
  if (need_weight && !weight) fail(op, ": need_weight is set but weight is None");
  if (need_bias && !bias) fail(op, ": need_bias is set but bias is None");
  if (need_gate && !gate) fail(op, ": need_gate is set but gate is None");
  const Tensor grad = laid_out(grad_y, a.x);
  const Tensor means = vector_argument(op, "mean", mean, a.channels, x, vector_type(x));
  const Tensor vars = vector_argument(op, "var", var, a.channels, x, vector_type(x));
  const Sizes map{x.size(0), x.size(1), x.size(2), x.size(3)}, none{0, 0, 0, 0};
  Tensor grad_x = new_map(a.x, need_x ? map : none), grad_residual = new_map(a.x, need_residual ? map : none);
  Tensor vectors[3];
  const bool needs[3] = {need_weight, need_bias, need_gate};
  for (int i = 0; i < 3; ++i) vectors[i] = new_vector(a, needs[i] ? a.channels : 0);
  BatchNorm& p = a.p;
  p.grad_y = grad.data_ptr();
  p.mean = means.data_ptr();
  p.var = vars.data_ptr();
  if (need_x) p.grad_x = grad_x.data_ptr();
  if (need_residual) p.grad_residual = grad_residual.data_ptr();
  if (need_weight) p.grad_weight = vectors[0].data_ptr();
  if (need_bias) p.grad_bias = vectors[1].data_ptr();
  if (need_gate) p.grad_gate = vectors[2].data_ptr();
  Scratch scratch(x);
  if (x.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    batch_norm_backward_cuda(p, scratch.env(), current_stream(x));
  } else {
    cpu_kernels().batch_norm_backward[p.dtype == DType::f64](p, scratch.env());
  }
  return {grad_x, grad_residual, vectors[0], vectors[1], vectors[2]};
}

void record_moments(const Tensor& running_mean, const Tensor& running_var, const std::optional<Tensor>& tracked,
                    const Tensor& mean, const Tensor& var, int64_t count, double momentum) {
  const char* op = "record_moments";
  const int64_t channels = running_mean.dim() == 1 ? running_mean.size(0) : 0;
  const std::pair<const char*, const Tensor*> all[] = {
      {"running_mean", &running_mean}, {"running_var", &running_var}, {"mean", &mean}, {"var", &var}};
  for (const auto& [name, t] : all)
    if (t->is_cuda() || t->dim() != 1 || t->size(0) != channels || t->scalar_type() != running_mean.scalar_type() ||
        !t->is_contiguous())
      fail(op, ": ", name, " must be contiguous on the CPU, ", dtype_name(running_mean.scalar_type()), " of shape (", channels,
           "); got ", dtype_name(t->scalar_type()), " of shape ", show_shape(*t));
  if (tracked && (tracked->is_cuda() || tracked->scalar_type() != ScalarType::Long || tracked->numel() != 1))
    fail(op, ": tracked must be one int64 on the CPU; got ", dtype_name(tracked->scalar_type()), " of shape ",
         show_shape(*tracked));
  const double unbiased = double(count) / double(std::max<int64_t>(count - 1, 1));
  switch (running_mean.scalar_type()) {
    case ScalarType::Float:
      move_statistics<float>(running_mean, mean, 1, momentum);
      move_statistics<float>(running_var, var, unbiased, momentum);
      break;
    case ScalarType::Double:
      move_statistics<double>(running_mean, mean, 1, momentum);
      move_statistics<double>(running_var, var, unbiased, momentum);
      break;
    default:
      fail(op, ": statistics must be float32 or float64; got ", dtype_name(running_mean.scalar_type()));
  }
  if (tracked) ++*static_cast<int64_t*>(tracked->data_ptr());
}

STABLE_TORCH_LIBRARY_FRAGMENT(lightning_prune, m) {
  m.def(
      "record_moments(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? tracked, Tensor mean, Tensor var, "
      "int count, float momentum) -> ()");
  m.def(
      "masked_batch_norm_act(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? gate, Tensor? mean, "
      "Tensor? var, Tensor? live, float eps, str activation, int compact_of=0) -> (Tensor, Tensor, Tensor)");
  m.def(
      "masked_batch_norm_act_backward(Tensor grad_y, Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? gate, "
      "Tensor mean, Tensor var, Tensor? live, bool training, float eps, str activation, bool need_x, bool need_residual, "
      "bool need_weight, bool need_bias, bool need_gate, int compact_of=0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(lightning_prune, CPU, m) {
  m.impl("record_moments", TORCH_BOX(&record_moments));
  m.impl("masked_batch_norm_act", TORCH_BOX(&batch_norm_act));
  m.impl("masked_batch_norm_act_backward", TORCH_BOX(&batch_norm_act_backward));
}

#if defined(USE_CUDA)
STABLE_TORCH_LIBRARY_IMPL(lightning_prune, CUDA, m) {
  m.impl("masked_batch_norm_act", TORCH_BOX(&batch_norm_act));
  m.impl("masked_batch_norm_act_backward", TORCH_BOX(&batch_norm_act_backward));
}
#endif

}  // namespace lp
