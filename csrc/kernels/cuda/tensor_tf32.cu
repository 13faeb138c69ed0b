// Tensor-core and depthwise convolution of tf32 tensors.
#include "tensor_launch.cuh"

namespace lp {
namespace cuda {

void tensor_forward_tf32(const CompactForward& f, const Env& env, cudaStream_t stream) { tensor_forward<Tf32>(f, env, stream); }

}  // namespace cuda
}  // namespace lp
