// Tensor-core and depthwise convolution of bf16 tensors.
#include "tensor_launch.cuh"

namespace lp {
namespace cuda {

void tensor_forward_bf16(const CompactForward& f, const Env& env, cudaStream_t stream) { tensor_forward<Bf16>(f, env, stream); }

}  // namespace cuda
}  // namespace lp
