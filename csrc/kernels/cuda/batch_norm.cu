// Batch normalisation on CUDA: one translation unit per storage type.
#include <cuda_runtime.h>

#include "../../include/lp_params.h"

namespace lp {
namespace cuda {

void norm_bf16(const BatchNorm&, const Env&, cudaStream_t, bool is_forward);
void norm_f16(const BatchNorm&, const Env&, cudaStream_t, bool is_forward);
void norm_f32(const BatchNorm&, const Env&, cudaStream_t, bool is_forward);
void norm_f64(const BatchNorm&, const Env&, cudaStream_t, bool is_forward);

namespace {
void run(const BatchNorm& p, const Env& env, void* stream, bool is_forward) {
  using Run = void (*)(const BatchNorm&, const Env&, cudaStream_t, bool);
  constexpr Run of_type[] = {norm_f32, norm_f64, norm_bf16, norm_f16};  // in the order of DType
  of_type[int(p.dtype)](p, env, static_cast<cudaStream_t>(stream), is_forward);
}
}  // namespace
}  // namespace cuda

void batch_norm_forward_cuda(const BatchNorm& p, const Env& env, void* stream) { cuda::run(p, env, stream, true); }
void batch_norm_backward_cuda(const BatchNorm& p, const Env& env, void* stream) { cuda::run(p, env, stream, false); }

}  // namespace lp
