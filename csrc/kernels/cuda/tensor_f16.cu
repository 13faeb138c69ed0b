// Tensor-core and depthwise convolution of f16 tensors.
#include "tensor_launch.cuh"

namespace lp {
namespace cuda {

void tensor_forward_f16(const CompactForward& f, const Env& env, cudaStream_t stream) { tensor_forward<F16>(f, env, stream); }

}  // namespace cuda
}  // namespace lp
