#include "binding.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "../include/pages.h"
#include "../kernels/cpu/tap_conv.h"

namespace lp {

const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

Act parse_activation(const char* op, const std::string& name) {
  static const char* const names[kActivations] = {"none", "relu", "relu6", "silu", "hardswish", "gelu", "sigmoid"};
  for (int i = 0; i < kActivations; ++i)
    if (name == names[i]) return Act(i);
  fail(op, ": activation must be one of none, relu, relu6, silu, hardswish, gelu, sigmoid; got '", name, "'");
}

int64_t product(std::initializer_list<int64_t> factors) {
  int64_t value = 1;
  for (const int64_t factor : factors)
    if (__builtin_mul_overflow(value, factor, &value)) return std::numeric_limits<int64_t>::max();
  return value;
}

bool is_channels_last(const Tensor& x) {
  if (x.dim() != 4 || x.is_contiguous()) return false;
  const auto sizes = x.sizes();
  const auto strides = x.strides();
  int64_t expected = 1;
  for (int d : {1, 3, 2, 0}) {
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

// Uninitialised, on the device of `like`. On the CPU past the dispatcher: a training step makes hundreds of small tensors.
static Tensor fresh(const Tensor& like, const Sizes& shape, ScalarType type, bool channels_last) {
  if (like.is_cuda() || like.device().type() != torch::headeronly::DeviceType::CPU)
    return torch::stable::empty(shape, type, std::nullopt, like.device(), std::nullopt,
                                channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  int64_t strides[8], step = 1;
  const int dims = int(shape.size());
  if (dims > 8) fail("tensors of more than 8 dimensions are not made here; got ", dims);
  for (int i = dims - 1; i >= 0; --i) {
    const int d = !channels_last ? i : i == 0 ? 0 : i == 1 ? 2 : i == 2 ? 3 : 1;  // N, H, W, C
    strides[d] = step;
    step *= std::max<int64_t>(1, shape[size_t(d)]);
  }
  AtenTensorHandle made = nullptr;
  if (aoti_torch_empty_strided(dims, shape.data(), strides, int32_t(type), aoti_torch_device_type_cpu(), 0, &made) != 0)
    fail("no memory for a tensor of shape ", show(shape));
  return Tensor(made);
}

Tensor new_output(const Tensor& like, const Sizes& shape) {
  return fresh(like, shape, like.scalar_type(), is_channels_last(like));
}

Tensor zeros_on(const Tensor& like, const Sizes& shape, std::optional<ScalarType> type) {
  Tensor out = fresh(like, shape, type.value_or(like.scalar_type()), false);
  if (like.device().type() != torch::headeronly::DeviceType::CPU) return torch::stable::zero_(out);
  if (const int64_t count = out.numel(); count > 0) std::memset(out.data_ptr(), 0, size_t(count) * size_t(out.element_size()));
  return out;
}

bool same_shape(const Tensor& t, const Tensor& other) {
  const auto a = t.sizes(), b = other.sizes();
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin());
}

View view_of(const Tensor& t) {
  const auto s = t.strides();
  return View{t.data_ptr(), s[0], s[1], s[2], s[3]};
}

static void check_device(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  if (t.is_cuda() != like.is_cuda() || t.get_device_index() != like.get_device_index())
    fail(op, ": ", name, " must be on the same device as x; move it with ", name, ".to(x.device)");
}

Tensor vector_argument(const char* op, const char* name, const Tensor& t, int64_t length, const Tensor& like,
                       std::optional<ScalarType> type) {
  check_device(op, name, t, like);
  if (t.dim() != 1 || t.size(0) != length)
    fail(op, ": ", name, " must have shape (", length, "), one value per output channel; got ", show_shape(t));
  const ScalarType expected = type.value_or(like.scalar_type());
  if (t.scalar_type() != expected)
    fail(op, ": ", name, " must be ", dtype_name(expected), "; got ", dtype_name(t.scalar_type()));
  return dense(t);
}

Tensor index_argument(const char* op, const char* name, const Tensor& t, int64_t limit, Order order, const Tensor& like) {
  check_device(op, name, t, like);
  if (t.dim() != 1 || t.scalar_type() != ScalarType::Long)
    fail(op, ": ", name, " must be a 1-D int64 tensor of channel indices; got shape ", show_shape(t), " and ",
         dtype_name(t.scalar_type()));
  if (order != Order::any && t.size(0) > limit)
    fail(op, ": ", name, " has ", t.size(0), " indices for ", limit, " channels; indices must be unique");
  Tensor index = dense(t);
  if (t.is_cuda()) return index;
  const auto* values = static_cast<const int64_t*>(index.data_ptr());
  std::vector<bool> seen(order == Order::unique ? size_t(limit) : 0);
  for (int64_t i = 0; i < index.size(0); ++i) {
    if (values[i] < 0 || values[i] >= limit)
      fail(op, ": ", name, "[", i, "] = ", values[i], " is not a channel; expected 0 <= index < ", limit);
    if (order == Order::sorted && i > 0 && values[i] <= values[i - 1])
      fail(op, ": ", name, " must be sorted and unique; got ", values[i - 1], " before ", values[i],
           " (use torch.unique(index))");
    if (order == Order::unique) {
      if (seen[size_t(values[i])]) fail(op, ": ", name, " must be unique; channel ", values[i], " appears twice");
      seen[size_t(values[i])] = true;
    }
  }
  return index;
}

// Of the numbers of a convolution: neither sums nor the product of any two of them wrap around.
static constexpr int64_t kMost = int64_t(1) << 31;

ConvShape conv_shape(const char* op, const Tensor& x, const Sizes& weight, const Sizes& stride, const Sizes& padding,
                     const Sizes& dilation, int64_t groups, int64_t channels) {
  if (x.dim() != 4) fail(op, ": x must be 4-D (N, C, H, W); got shape ", show_shape(x));
  if (weight.size() != 4) fail(op, ": weight must be 4-D (O, C / groups, kh, kw); got shape ", show(weight));
  const std::pair<const char*, const Sizes*> pairs[] = {{"stride", &stride}, {"padding", &padding}, {"dilation", &dilation}};
  for (const auto& [name, value] : pairs) {
    const int64_t least = value == &padding ? 0 : 1;
    if (value->size() != 2 || (*value)[0] < least || (*value)[1] < least)
      fail(op, ": ", name, " must be two integers >= ", least, "; got ", show(*value));
    if (std::max((*value)[0], (*value)[1]) >= kMost) fail(op, ": ", name, " must be less than ", kMost, "; got ", show(*value));
  }
  if (groups < 1 || channels % groups || weight[0] % groups)
    fail(op, ": groups must divide both channel counts; got groups=", groups, " for ", channels, " inputs and ", weight[0],
         " outputs");
  if (weight[1] * groups != channels)
    fail(op, ": weight must have shape (O, ", channels / groups, ", kh, kw) for ", channels,
         " input channels and groups=", groups, "; got ", show(weight));
  if (weight[2] < 1 || weight[3] < 1) fail(op, ": the kernel must be at least 1x1; got weight ", show(weight));
  if (*std::max_element(weight.begin(), weight.end()) >= kMost)
    fail(op, ": the sizes of weight must be less than ", kMost, "; got ", show(weight));
  ConvShape s{x.size(0), channels,  x.size(2), x.size(3),  weight[0],  weight[2],   weight[3],   0,
              0,         stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1], groups};
  const int64_t span_h = s.height + 2 * s.pad_h - s.dil_h * (s.kh - 1) - 1;
  const int64_t span_w = s.width + 2 * s.pad_w - s.dil_w * (s.kw - 1) - 1;
  if (span_h < 0 || span_w < 0)
    fail(op, ": the dilated kernel is larger than the padded input; x is ", show_shape(x), ", weight ", show(weight),
         ", padding ", show(padding), ", dilation ", show(dilation));
  s.out_h = span_h / s.stride_h + 1;
  s.out_w = span_w / s.stride_w + 1;
  return s;
}

namespace {
constexpr size_t kWorkspaceLimit = size_t(64) << 20, kWorkspacePlace = 4096 + 64;
struct Workspace {
  Pages memory;
  size_t wanted = 0;
  bool taken = false;
};
thread_local Workspace workspace;
}  // namespace

Scratch::Scratch(const Tensor& like) : like_(like), owns_workspace_(!like.is_cuda() && !workspace.taken) {
  if (!owns_workspace_) return;
  workspace.taken = true;
  if (workspace.wanted > workspace.memory.size()) {
    workspace.memory = Pages();
    workspace.memory = Pages(workspace.wanted, kWorkspacePlace);
  }
}

Scratch::~Scratch() {
  if (!owns_workspace_) return;
  workspace.wanted = std::min(std::max(workspace.wanted, wanted_), kWorkspaceLimit);
  workspace.taken = false;
}

void* Scratch::allocate(size_t bytes) {
  if (owns_workspace_) {
    const size_t size = round_to(bytes, 64);
    wanted_ += size;
    if (used_ + size <= workspace.memory.size()) {
      used_ += size;
      return workspace.memory.data() + used_ - size;
    }
  }
  const Sizes shape{int64_t(bytes)};
  blocks_.push_back(torch::stable::empty(shape, ScalarType::Byte, std::nullopt, like_.device()));
  return blocks_.back().data_ptr();
}

Env Scratch::env() {
  if (!like_.is_cuda()) cpu_level_name();  // a misspelt level is refused here, not in a thread of a pool, which cannot throw
  return Env{int(torch::stable::get_num_threads()),
             [](int64_t n, void (*body)(int64_t, int64_t, void*), void* ctx) {
               // A plain lambda and not the template: the callback already has the C signature.
               torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { body(begin, end, ctx); });
             },
             [](void* owner, size_t bytes) { return static_cast<Scratch*>(owner)->allocate(bytes); }, this};
}

void* current_stream([[maybe_unused]] const Tensor& t) {
#if defined(USE_CUDA)
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream) != 0) fail("no current CUDA stream");
  return stream;
#else
  fail("built without CUDA; rebuild where torch has CUDA and nvcc is on PATH");
#endif
}

}  // namespace lp
