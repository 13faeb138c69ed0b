// Binding of pack_conv2d_weight and compact_conv2d.
#include "binding.h"
#include "../kernels/cuda/tensor_plan.h"
#include "launch.h"

namespace lp {
namespace {

// Half types are packed, and accumulated, in float32.
ScalarType compute_type(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return ScalarType::Float;
    case ScalarType::Double:
      return ScalarType::Double;
    default:
      fail(op, ": ", name, " must be float32, float64, bfloat16 or float16; got ", dtype_name(t.scalar_type()));
  }
}

DType storage_type(ScalarType t) {
  return t == ScalarType::Double     ? DType::f64
         : t == ScalarType::BFloat16 ? DType::bf16
         : t == ScalarType::Half     ? DType::f16
                                     : DType::f32;
}

bool is_half(ScalarType t) { return t == ScalarType::BFloat16 || t == ScalarType::Half; }

// "auto": the transform from as many channels as the direct kernels were slower; winograd.py and strassen.py have the same
// rules.
int parse_algorithm(const char* op, const std::string& name, const Tensor& weight, int64_t groups) {
  static const char* const names[] = {"winograd2",         "winograd4",         "winograd3_stride2",
                                      "winograd4_stride2", "winograd5_stride2", "strassen"};
  const int64_t kernel = weight.size(2);
  const bool fits = weight.size(3) == kernel && groups == 1 && !weight.is_cuda() && weight.scalar_type() != ScalarType::Double;
  const bool half = is_half(weight.scalar_type());
  // Half storage rounds the transformed weight too, which only the small tile forgives.
  if (name == "auto" && kernel == 1)
    return fits && weight.scalar_type() == ScalarType::Float && strassen_units(weight.size(0)) > 0 && weight.size(1) >= 48
               ? kStrassenTile
               : 0;
  if (name == "auto")
    return !fits || (kernel != 3 && kernel != 5) || weight.size(0) < 9 || weight.size(1) < 9 ? 0
           : kernel == 5                                                                     ? (half ? 0 : 2)
           : half                                                                            ? 2
                                                                                             : 4;
  if (name == "direct" || name == "tensor_core") return 0;
  if (name == "strassen" && !(fits && kernel == 1 && weight.scalar_type() == ScalarType::Float))
    fail(op, ": algorithm 'strassen' takes float32 weights on the CPU with groups=1 and of shape (O, C, 1, 1); got ",
         dtype_name(weight.scalar_type()), " of shape ", show_shape(weight), weight.is_cuda() ? " on CUDA" : "",
         " with groups=", groups);
  static_assert(std::size(names) == std::size(kTileCodes), "a name for every code");
  for (size_t i = 0; i < std::size(names); ++i) {
    if (name != names[i]) continue;
    if (fits && transform_takes(kernel, kTileCodes[i])) return kTileCodes[i];
    fail(op, ": algorithm '", name,
         "' takes float32 or half weights on the CPU with groups=1 and of shape (O, C, k, k), k = 3 or 5 for winograd2 and "
         "winograd4_stride2, 3 for winograd4 and winograd5_stride2, 7 for winograd3_stride2; got ",
         dtype_name(weight.scalar_type()), " of shape ", show_shape(weight), weight.is_cuda() ? " on CUDA" : "",
         " with groups=", groups);
  }
  fail(op,
       ": algorithm must be one of auto, direct, winograd2, winograd4, winograd3_stride2, winograd4_stride2, "
       "winograd5_stride2, strassen, tensor_core; got '",
       name, "'");
}

// Lanes of the weights behind the direct layout, or 0; tensor_cores.py has the same rule.
int parse_lanes(const char* op, const std::string& name, const Tensor& weight, int64_t groups) {
  const ScalarType type = weight.scalar_type();
  const bool half = is_half(type);
  const bool depthwise = cuda::is_depthwise(weight.size(0), weight.size(1), groups);
  const bool fits = weight.is_cuda() && (groups == 1 || depthwise) && (half || type == ScalarType::Float);
  if (name == "tensor_core" && !fits)
    fail(op, ": algorithm 'tensor_core' takes float32, bfloat16 or float16 weights on CUDA, dense or depthwise; got ",
         dtype_name(type), " of shape ", show_shape(weight), weight.is_cuda() ? " on CUDA" : " on the CPU",
         " with groups=", groups);
  if (name == "tensor_core" || (name == "auto" && fits && (half || depthwise))) return half ? 8 : 4;
  return 0;
}

// Channels of each pixel together, pixels at one distance: channels_last, with or without room behind the channels. Not for
// what is also contiguous. tensor_cores.py has the same rule.
bool rows_of_channels(const Tensor& x) {
  const auto size = x.sizes(), stride = x.strides();
  if (x.is_contiguous() || (size[1] > 1 && stride[1] != 1)) return false;
  const int64_t pitch = size[3] > 1 ? stride[3] : size[2] > 1 ? stride[2] : stride[0];
  return pitch >= size[1] && (size[2] == 1 || stride[2] == size[3] * pitch) &&
         (size[0] == 1 || stride[0] == size[2] * size[3] * pitch);
}

Tensor with_room(const Tensor& like, const Sizes& shape) {
  const Sizes room{shape[0], cuda::round_up(shape[1], 8), shape[2], shape[3]};
  return torch::stable::empty(room, like.scalar_type(), std::nullopt, like.device(), std::nullopt, MemoryFormat::ChannelsLast);
}

Tensor pack_conv2d_weight(const Tensor& weight, int64_t groups, const std::string& algorithm) {
  const char* op = "pack_conv2d_weight";
  if (weight.dim() != 4) fail(op, ": weight must be 4-D (O, C / groups, kh, kw); got shape ", show_shape(weight));
  if (groups < 1 || weight.size(0) % groups)
    fail(op, ": groups must divide the ", weight.size(0), " output channels; got groups=", groups);
  const ScalarType type = compute_type(op, "weight", weight);
  const Tensor w = weight.scalar_type() == type ? weight : torch::stable::to(weight, type);
  const int tile = parse_algorithm(op, algorithm, weight, groups);
  const int64_t direct = packed_size(w.size(0), w.size(1), w.size(2) * w.size(3), groups);
  const int lanes = parse_lanes(op, algorithm, weight, groups);
  const bool depthwise = cuda::is_depthwise(w.size(0), w.size(1), groups);
  const int64_t taps = w.size(2) * w.size(3);
  const int64_t gap = lanes == 0 ? 0 : cuda::tensor_weight_begin(w.size(0), w.size(1), taps, groups) - direct;
  const int64_t transformed = tile != 0 ? transformed_size(w.size(0), w.size(1), w.size(2), tile)
                              : lanes != 0
                                  ? gap + cuda::tensor_weight_size(w.size(0), w.size(1), taps, depthwise) + (lanes == 8 ? 1 : 2)
                                  : 0;
  Tensor packed = torch::stable::empty(Sizes{direct + transformed}, type, std::nullopt, w.device());
  const DType dtype = storage_type(type);
  Scratch scratch(w);
  if (w.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(w.get_device_index());
    pack_cuda(view_of(w), dtype, w.size(0), w.size(1), w.size(2), w.size(3), groups, packed.data_ptr(), current_stream(w));
    if (lanes != 0)
      pack_tensor_cuda(view_of(w), w.size(0), w.size(1), w.size(2), w.size(3), lanes, depthwise,
                       static_cast<float*>(packed.data_ptr()) + direct, gap, transformed, current_stream(w));
  } else {
    pack_cpu(view_of(w), dtype, w.size(0), w.size(1), w.size(2), w.size(3), groups, packed.data_ptr(), scratch.env());
    if (tile == kStrassenTile)
      pack_strassen_cpu(view_of(w), w.size(0), w.size(1), static_cast<float*>(packed.data_ptr()) + direct, scratch.env());
    else if (tile != 0)
      pack_winograd_cpu(view_of(w), w.size(0), w.size(1), int(w.size(2)), tile, static_cast<float*>(packed.data_ptr()) + direct,
                        scratch.env());
  }
  return packed;
}

Tensor convolve(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                const std::optional<Tensor>& in_index, const std::optional<Tensor>& out_index, const Sizes& weight_shape,
                const Sizes& stride, const Sizes& padding, const Sizes& dilation, int64_t groups, Act activation) {
  const char* op = "compact_conv2d";
  const ScalarType type = compute_type(op, "x", x);
  if (x.dim() != 4) fail(op, ": x must be 4-D (N, C, H, W); got shape ", show_shape(x));
  const int64_t x_channels = x.size(1);
  std::optional<Tensor> in, out;
  if (in_index) in = index_argument(op, "in_index", *in_index, x_channels, Order::any, x);
  const ConvShape s = conv_shape(op, x, weight_shape, stride, padding, dilation, groups, in ? in->size(0) : x_channels);
  const int64_t carried = packed.dim() == 1 ? packed.size(0) : -1, per_group = s.channels / s.groups;
  // At least one for each weight, else the sizes below might wrap around.
  const int64_t elements = product({s.outputs, per_group, s.kh, s.kw});
  const bool enough = elements <= std::max<int64_t>(0, carried);
  const int tile = enough ? packed_tile(carried, s.outputs, per_group, s.kh, s.kw, s.groups) : -1;
  const int lanes = tile >= 0 || !enough ? 0 : cuda::tensor_lanes(carried, s.outputs, per_group, s.kh * s.kw, s.groups);
  if ((tile < 0 && lanes == 0) || packed.is_cuda() != x.is_cuda())
    fail(op, ": packed must have shape (",
         elements < int64_t(1) << 40 ? packed_size(s.outputs, per_group, s.kh * s.kw, s.groups) : elements,
         ") and be on x's device for weight_shape ", show(weight_shape), "; got ", show_shape(packed),
         " (make it with pack_conv2d_weight(weight, groups))");
  if (compute_type(op, "packed", packed) != type)
    fail(op, ": packed must be ", dtype_name(type), " (or x's dtype) for x of ", dtype_name(x.scalar_type()), "; got ",
         dtype_name(packed.scalar_type()));
  const auto in_compute_type = [&](const Tensor& t) { return t.scalar_type() == type ? dense(t) : torch::stable::to(t, type); };
  // The lanes must be those of x's dtype; otherwise the direct layout in front of them serves.
  const bool in_rows = x.is_cuda() && type == ScalarType::Float && lanes == (x.scalar_type() == ScalarType::Float ? 4 : 8);
  std::optional<Tensor> shift;
  if (bias) {
    if (compute_type(op, "bias", *bias) != type)
      fail(op, ": bias must be ", dtype_name(type), " or x's dtype; got ", dtype_name(bias->scalar_type()));
    const Tensor b = in_rows && bias->scalar_type() == x.scalar_type() ? dense(*bias) : in_compute_type(*bias);
    shift = vector_argument(op, "bias", b, s.outputs, b);
    if (b.is_cuda() != x.is_cuda()) fail(op, ": bias must be on the same device as x");
  }
  int64_t y_channels = s.outputs;
  if (out_index) {
    if (!residual) fail(op, ": out_index adds the outputs to channels of residual, so residual must not be None");
    y_channels = residual->dim() == 4 ? residual->size(1) : 0;
    out = index_argument(op, "out_index", *out_index, y_channels, Order::unique, x);
    if (out->size(0) != s.outputs)
      fail(op, ": out_index must have one entry per conv output, ", s.outputs, "; got ", out->size(0));
  }
  const Sizes y_shape{s.n, y_channels, s.out_h, s.out_w};
  if (residual &&
      (!has_shape(*residual, y_shape) || residual->scalar_type() != x.scalar_type() || residual->is_cuda() != x.is_cuda()))
    fail(op, ": residual must be ", dtype_name(x.scalar_type()), " of shape ", show(y_shape), " on x's device; got ",
         dtype_name(residual->scalar_type()), " of shape ", show_shape(*residual));
  const bool padded = in_rows && rows_of_channels(x);
  Tensor room = padded ? with_room(x, y_shape) : new_output(x, y_shape);
  const Tensor y = room.size(1) == y_channels ? room : torch::stable::narrow(room, 1, 0, y_channels);
  CompactForward f{};
  f.shape = s;
  f.dtype = storage_type(x.scalar_type());
  f.x = view_of(x);
  if (residual) f.residual = view_of(*residual);
  f.y = view_of(y);
  // Strassen's sums of weights that were rounded to a half type have lost too much.
  f.tile = tile < 0 || (tile == kStrassenTile && is_half(packed.scalar_type())) ? 0 : tile;
  f.bias = data_of(shift);
  f.in_index = IndexList{in ? static_cast<const int64_t*>(in->data_ptr()) : nullptr, s.channels};
  f.out_index = IndexList{out ? static_cast<const int64_t*>(out->data_ptr()) : nullptr, s.outputs};
  f.x_channels = x_channels;
  f.y_channels = y_channels;
  f.act = activation;
  f.lanes = in_rows ? lanes : 0;
  f.y_has_room = padded;
  std::optional<Tensor> weights;
  if (in_rows) {
    weights = packed.scalar_type() == x.scalar_type() ? dense(packed) : torch::stable::to(packed, x.scalar_type());
    const int64_t element = x.scalar_type() == ScalarType::Float ? 4 : 2;
    f.tensor_weight = static_cast<const char*>(weights->data_ptr()) +
                      element * cuda::tensor_weight_begin(s.outputs, per_group, s.kh * s.kw, s.groups);
    f.bias_is_float = shift && shift->scalar_type() == ScalarType::Float;
  }
  // What lies behind the channels is read by others, with weights of zero: the tensor-core kernels write it.
  if (room.size(1) > y_channels && (out || !cuda::tensor_cores_take(f))) torch::stable::zero_(room);
  if (!in_rows || !cuda::tensor_cores_take(f)) {
    f.lanes = 0;
    // The CPU's kernels convert half weights themselves: the part they use.
    f.packed_is_half = !x.is_cuda() && is_half(packed.scalar_type()) && packed.scalar_type() == x.scalar_type();
    weights = f.packed_is_half ? dense(packed) : in_compute_type(packed);
    if (shift && shift->scalar_type() != type) shift = in_compute_type(*shift), f.bias = data_of(shift);
  }
  f.packed = weights->data_ptr();
  Scratch scratch(x);
  if (x.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    compact_forward_cuda(f, scratch.env(), current_stream(x));
  } else {
    compact_forward_cpu(f, scratch.env());
  }
  return y;
}

Tensor compact_conv2d(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
                      const std::optional<Tensor>& residual, const std::optional<Tensor>& in_index,
                      const std::optional<Tensor>& out_index, const Sizes& weight_shape, const Sizes& stride,
                      const Sizes& padding, const Sizes& dilation, int64_t groups, const std::string& activation) {
  return convolve(x, packed, bias, residual, in_index, out_index, weight_shape, stride, padding, dilation, groups,
                  parse_activation("compact_conv2d", activation));
}

// The same for a tenth of a small layer's time less: every list and string that comes from Python is converted twice.
Tensor compact_conv2d_prepared(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
                               const std::optional<Tensor>& residual, const std::optional<Tensor>& in_index,
                               const std::optional<Tensor>& out_index, const Sizes& settings) {
  if (settings.size() != 12 || settings[11] < 0 || settings[11] >= kActivations)
    fail(
        "compact_conv2d_prepared: settings must be weight_shape, stride, padding, dilation, groups and the place of the "
        "activation in ACTIVATIONS, 12 integers; got ",
        show(settings));
  const auto from = [&](int first, int count) { return Sizes(settings.begin() + first, settings.begin() + first + count); };
  return convolve(x, packed, bias, residual, in_index, out_index, from(0, 4), from(4, 2), from(6, 2), from(8, 2), settings[10],
                  Act(settings[11]));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lightning_prune, m) {
  m.def("pack_conv2d_weight(Tensor weight, int groups, str algorithm=\"direct\") -> Tensor");
  m.def(
      "compact_conv2d(Tensor x, Tensor packed, Tensor? bias, Tensor? residual, Tensor? in_index, Tensor? out_index, "
      "int[4] weight_shape, int[2] stride, int[2] padding, int[2] dilation, int groups, str activation) -> Tensor");
  m.def(
      "compact_conv2d_prepared(Tensor x, Tensor packed, Tensor? bias, Tensor? residual, Tensor? in_index, Tensor? out_index, "
      "int[] settings) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lightning_prune, CPU, m) {
  m.impl("pack_conv2d_weight", TORCH_BOX(&pack_conv2d_weight));
  m.impl("compact_conv2d", TORCH_BOX(&compact_conv2d));
  m.impl("compact_conv2d_prepared", TORCH_BOX(&compact_conv2d_prepared));
}

#if defined(USE_CUDA)
STABLE_TORCH_LIBRARY_IMPL(lightning_prune, CUDA, m) {
  m.impl("pack_conv2d_weight", TORCH_BOX(&pack_conv2d_weight));
  m.impl("compact_conv2d", TORCH_BOX(&compact_conv2d));
  m.impl("compact_conv2d_prepared", TORCH_BOX(&compact_conv2d_prepared));
}
#endif

}  // namespace lp
