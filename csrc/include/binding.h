// What every op binding needs: stable-ABI tensors to plain views, error messages, scratch memory from torch.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "lp_params.h"

namespace lp {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

template <class... Args>
[[noreturn]] void fail(const Args&... args) {
  std::ostringstream message;
  message << "lightning_prune: ";
  (message << ... << args);
  throw std::runtime_error(message.str());
}

inline std::string show(const int64_t* values, size_t count) {
  std::ostringstream out;
  out << "(";
  for (size_t i = 0; i < count; ++i) out << (i ? ", " : "") << values[i];
  out << ")";
  return out.str();
}
inline std::string show(const Sizes& sizes) { return show(sizes.data(), sizes.size()); }
inline std::string show_shape(const Tensor& t) { return show(t.sizes().data(), size_t(t.dim())); }

// Most tensors are contiguous: asking first saves a call of the dispatcher.
inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
inline bool has_shape(const Tensor& t, const Sizes& shape) {
  const auto sizes = t.sizes();
  return std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
}
bool same_shape(const Tensor& t, const Tensor& other);
const char* dtype_name(ScalarType type);
constexpr int kActivations = 7;
Act parse_activation(const char* op, const std::string& name);

// Or the largest number, where it does not fit: so that what a caller gives cannot wrap around to something that does.
int64_t product(std::initializer_list<int64_t> factors);

// Same rule as the fake kernels in lightning_prune/ops/_fake.py.
bool is_channels_last(const Tensor& x);
Tensor new_output(const Tensor& like, const Sizes& shape);
Tensor zeros_on(const Tensor& like, const Sizes& shape, std::optional<ScalarType> type = std::nullopt);

View view_of(const Tensor& t);
inline const void* data_of(const std::optional<Tensor>& t) { return t ? t->data_ptr() : nullptr; }

// Checks shape, dtype (that of `like`, unless another is given) and device and returns a contiguous tensor.
Tensor vector_argument(const char* op, const char* name, const Tensor& t, int64_t length, const Tensor& like,
                       std::optional<ScalarType> type = std::nullopt);
// Index tensors: 1-D int64 on x's device. Values are checked on the CPU only; on CUDA that would stall the stream.
enum class Order { sorted, unique, any };
Tensor index_argument(const char* op, const char* name, const Tensor& t, int64_t limit, Order order, const Tensor& like);

// Fills n, channels, height, width, out_h, out_w; reports every mismatch with expected and actual values.
ConvShape conv_shape(const char* op, const Tensor& x, const Sizes& weight, const Sizes& stride, const Sizes& padding,
                     const Sizes& dilation, int64_t groups, int64_t channels);

// Scratch memory for the length of one call. On the CPU it comes from a workspace that the calling thread keeps: fresh
// memory costs a page fault every 4 KB. What does not fit comes from torch's allocator, and the workspace grows before the
// next call, up to a limit.
class Scratch {
 public:
  explicit Scratch(const Tensor& like);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  Env env();
  void* allocate(size_t bytes);

 private:
  Tensor like_;
  std::vector<Tensor> blocks_;
  bool owns_workspace_;
  size_t used_ = 0, wanted_ = 0;
};

void* current_stream(const Tensor& t);

}  // namespace lp
