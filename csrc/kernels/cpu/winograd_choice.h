// When a convolution of a training step is computed by Winograd's algorithm, and with which tiles.
#pragma once
#include "driver.h"

namespace lp {

constexpr int64_t kLeastWinogradChannels = 12;
// Fewest tiles that fill the vectors of `winograd_lanes.h`.
constexpr int64_t kLeastLaneTiles = 64;

// Side of the Winograd tile for a map of this size, 0 for the direct kernel. Transforms pay from a dozen channels and a few
// tiles up, with a tile in each lane from four; the 2x2 tile where the 4x4 one would compute as many products for pixels that
// do not exist. `dense`: the channels of a pixel lie one behind the other, in both maps.
inline int winograd_tile(Algorithm algorithm, DType dtype, const ConvShape& s, int64_t inputs, int64_t outputs, int64_t rows,
                         int64_t cols, bool dense) {
  const bool fits = dtype == DType::f32 && s.groups == 1 && s.kh == 3 && s.kw == 3 && s.stride_h == 1 && s.stride_w == 1 &&
                    s.dil_h == 1 && s.dil_w == 1 && inputs > 0 && outputs > 0 && s.n * rows * cols > 0;
  if (!fits || algorithm == Algorithm::direct) return 0;
  if (algorithm != Algorithm::automatic) return algorithm == Algorithm::winograd2 ? 2 : 4;
  const int64_t four = (rows + 3) / 4 * ((cols + 3) / 4), two = (rows + 1) / 2 * ((cols + 1) / 2);
  const int tile = 16 * two <= 36 * four ? 2 : 4;
  const int64_t fewest = std::min(inputs, outputs), most = std::max(inputs, outputs);
  const bool lanes = dense && fewest >= kLeastLaneChannels && most <= level().lane_channels &&
                     s.n * (tile == 2 ? two : four) >= kLeastLaneTiles;
  return lanes || (fewest >= kLeastWinogradChannels && s.n * two >= 16) ? tile : 0;
}

}  // namespace lp
