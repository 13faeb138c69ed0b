// Storage types of the tensor-core kernels and their conversions, the same on the device and on the host.
#pragma once
#include <cstring>

#include "../../include/lp_params.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace lp {
namespace cuda {

LP_HD float float_of_bits(uint32_t bits) {
  float v;
  memcpy(&v, &bits, 4);
  return v;
}
LP_HD uint32_t bits_of_float(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  return bits;
}

// 16 bytes of storage: simt::load16 and store16 move them at once.
struct alignas(16) Piece16 {
  uint32_t words[4];
};

// kLanes: elements in 16 bytes, the unit of every copy.
struct Bf16 {
  using Element = uint16_t;
  static constexpr int kLanes = 8;
  static LP_HD float load(Element e) { return float_of_bits(uint32_t(e) << 16); }
  static LP_HD Element save(float v) {
#if defined(__CUDA_ARCH__)
    return __bfloat16_as_ushort(__float2bfloat16_rn(v));
#else
    const uint32_t bits = bits_of_float(v);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return Element((bits >> 16) | 0x40);
    return Element((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
#endif
  }
};

struct F16 {
  using Element = uint16_t;
  static constexpr int kLanes = 8;
  static LP_HD float load(Element e) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(e));
#else
    const uint32_t sign = uint32_t(e & 0x8000) << 16, exponent = (e >> 10) & 31, mantissa = e & 1023;
    if (exponent == 0) return float_of_bits(sign | bits_of_float(float(mantissa) * 5.9604644775390625e-8f));
    return float_of_bits(sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (mantissa << 13));
#endif
  }
  static LP_HD Element save(float v) {
#if defined(__CUDA_ARCH__)
    return __half_as_ushort(__float2half_rn(v));
#else
    const uint32_t bits = bits_of_float(v), sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return Element(sign | 0x7e00);
    if (rest >= 0x477ff000u) return Element(sign | 0x7c00);
    // Below 2^-14 a sum with 0.5 leaves the rounded subnormal in the low bits.
    if (rest < 0x38800000u) return Element(sign | (bits_of_float(float_of_bits(rest) + 0.5f) - 0x3f000000u));
    return Element(sign | ((rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1)) >> 13));
#endif
  }
};

// float32 in memory, 10 bits of mantissa in the products.
struct Tf32 {
  using Element = float;
  static constexpr int kLanes = 4;
  static LP_HD float load(Element e) { return e; }
  static LP_HD Element save(float v) { return v; }
};

struct F32 {
  using Element = float;
  static constexpr int kLanes = 4;
  static LP_HD float load(Element e) { return e; }
  static LP_HD Element save(float v) { return v; }
};

struct F64 {
  using Element = double;
  static constexpr int kLanes = 2;
  static LP_HD double load(Element e) { return e; }
  static LP_HD Element save(double v) { return v; }
};

}  // namespace cuda
}  // namespace lp
