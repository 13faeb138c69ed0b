// Batch normalisation of f64 maps.
#include "batch_norm_launch.cuh"

namespace lp {
namespace cuda {

void norm_f64(const BatchNorm& p, const Env& env, cudaStream_t stream, bool is_forward) {
  norm_run<F64>(p, env, stream, is_forward);
}

}  // namespace cuda
}  // namespace lp
