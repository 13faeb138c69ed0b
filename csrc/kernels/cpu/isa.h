// Everything that is compiled per instruction set, in a namespace of its own and with internal linkage.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "tap_conv.h"
#include "team.h"

#define LP_JOIN2(a, b) a##b
#define LP_JOIN(a, b) LP_JOIN2(a, b)
#define LP_STRING2(a) #a
#define LP_STRING(a) LP_STRING2(a)

namespace lp {
namespace {
namespace LP_ISA {
#include "simd.h"
#include "activations.h"
// clang-format off: each header builds on the one before
#include "stage.h"
#include "epilogue.h"
#include "tiles.h"
#include "pointwise.h"
#include "strassen.h"
#include "depthwise_flat.h"
#include "depthwise.h"
#include "depthwise_taps.h"
#include "depth_first.h"
#include "pool.h"
#include "half_maps.h"
#include "planes.h"
#include "conv.h"
#include "winograd_transforms.h"
#include "winograd_lanes.h"
#include "winograd_lanes_grad.h"
#include "plane_training.h"
#include "winograd.h"
#include "weight_grad.h"
#include "winograd_training.h"
#include "batch_norm.h"
#include "live_rows.h"
#include "small_maps.h"
// clang-format on
}  // namespace LP_ISA
}  // namespace

const CpuKernels& LP_JOIN(cpu_kernels_, LP_ISA)() {
  static const CpuKernels table = {LP_STRING(LP_ISA),
                                   LP_VECTOR_BYTES / 4,
                                   {LP_ISA::conv<float>, LP_ISA::conv<double>},
                                   LP_ISA::kMostLaneChannels,
                                   LP_ISA::winograd,
                                   LP_ISA::strassen,
                                   LP_ISA::depthwise_in_place,
                                   LP_ISA::residual_rows,
                                   LP_ISA::inverted_residual,
                                   {LP_ISA::weight_grad<float>, LP_ISA::weight_grad<double>},
                                   {LP_ISA::act_grad<float>, LP_ISA::act_grad<double>},
                                   {LP_ISA::batch_norm_forward<float>, LP_ISA::batch_norm_forward<double>},
                                   {LP_ISA::batch_norm_backward<float>, LP_ISA::batch_norm_backward<double>},
                                   LP_ISA::winograd_weight,
                                   LP_ISA::winograd_weight_grad,
                                   {LP_ISA::small_map_forward, LP_ISA::small_map_input_grad, LP_ISA::small_map_weight_grad},
                                   {LP_ISA::plane_forward, LP_ISA::plane_weight_grad},
                                   LP_ISA::plane_input_grad,
                                   LP_ISA::live_rows,
                                   LP_ISA::max_pool,
                                   LP_ISA::mean_pool,
                                   LP_ISA::widen_map,
                                   LP_ISA::narrow_map};
  return table;
}

}  // namespace lp
