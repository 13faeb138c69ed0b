// Entry points of the kernels, CPU and CUDA. Without CUDA the launchers are never reached: the ops are not registered.
#pragma once
#include "../kernels/cpu/tap_conv.h"
#include "binding.h"

namespace lp {

#if defined(USE_CUDA)
void masked_forward_cuda(const MaskedForward&, const Env&, void* stream);
void masked_backward_cuda(const MaskedBackward&, const Env&, void* stream);
void compact_forward_cuda(const CompactForward&, const Env&, void* stream);
void batch_norm_forward_cuda(const BatchNorm&, const Env&, void* stream);
void batch_norm_backward_cuda(const BatchNorm&, const Env&, void* stream);
void pack_cuda(const View& weight, DType dtype, int64_t outputs, int64_t channels_per_group, int64_t kh, int64_t kw,
               int64_t groups, void* packed, void* stream);
void pack_tensor_cuda(const View& weight, int64_t outputs, int64_t channels_per_group, int64_t kh, int64_t kw, int lanes,
                      bool depthwise, float* packed, int64_t gap, int64_t size, void* stream);
#else
template <class... Args>
void masked_forward_cuda(const Args&...) {}
template <class... Args>
void masked_backward_cuda(const Args&...) {}
template <class... Args>
void compact_forward_cuda(const Args&...) {}
template <class... Args>
void batch_norm_forward_cuda(const Args&...) {}
template <class... Args>
void batch_norm_backward_cuda(const Args&...) {}
template <class... Args>
void pack_cuda(const Args&...) {}
template <class... Args>
void pack_tensor_cuda(const Args&...) {}
#endif

}  // namespace lp
