// Batch normalisation of bf16 maps.
#include "batch_norm_launch.cuh"

namespace lp {
namespace cuda {

void norm_bf16(const BatchNorm& p, const Env& env, cudaStream_t stream, bool is_forward) {
  norm_run<Bf16>(p, env, stream, is_forward);
}

}  // namespace cuda
}  // namespace lp
