// Batch normalisation of f32 maps.
#include "batch_norm_launch.cuh"

namespace lp {
namespace cuda {

void norm_f32(const BatchNorm& p, const Env& env, cudaStream_t stream, bool is_forward) {
  norm_run<F32>(p, env, stream, is_forward);
}

}  // namespace cuda
}  // namespace lp
