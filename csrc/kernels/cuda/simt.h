// The few instructions that the tensor-core kernels need beyond C++. With LP_SIMT_EMULATION a test supplies them on the host,
// so that the very same kernel source runs there.
#pragma once
#if defined(LP_SIMT_EMULATION)
#include LP_SIMT_EMULATION
#define LP_DEVICE inline
#define LP_DEVICE_CALL inline
#include "warpgroup.h"
#else
#include <cuda_runtime.h>

#include "storage.h"
#define LP_DEVICE __device__ __forceinline__
#define LP_DEVICE_CALL __device__ __noinline__

namespace lp {
namespace cuda {
namespace simt {

LP_DEVICE int thread() { return int(threadIdx.x); }
LP_DEVICE int block_x() { return int(blockIdx.x); }
LP_DEVICE int block_y() { return int(blockIdx.y); }
LP_DEVICE void sync_block() { __syncthreads(); }
LP_DEVICE void sync_warp() { __syncwarp(); }
LP_DEVICE char* shared() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}
LP_DEVICE unsigned address(const void* p) { return unsigned(__cvta_generic_to_shared(p)); }

// Global memory in one access. The compiler merges words by itself where it pleases, and takes apart stores of vector types.
LP_DEVICE Piece16 load16(const void* p) {
  const uint4 v = *static_cast<const uint4*>(p);
  return Piece16{{v.x, v.y, v.z, v.w}};
}
LP_DEVICE void store16(void* p, const Piece16& v) {
  asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(__cvta_generic_to_global(p)), "r"(v.words[0]), "r"(v.words[1]),
               "r"(v.words[2]), "r"(v.words[3])
               : "memory");
}

// Copies `bytes` (0 to 16) and fills the rest of the 16 with zeros.
LP_DEVICE void copy16(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address(shared)), "l"(global), "r"(bytes) : "memory");
}
// Nothing unless `active`.
LP_DEVICE void copy16_if(bool active, void* shared, const void* global, int bytes) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %3, 0; @p cp.async.cg.shared.global [%0], [%1], 16, %2;}" ::"r"(address(shared)),
               "l"(global), "r"(bytes), "r"(int(active))
               : "memory");
}
// Zeros alone if `refused` is not zero, from an address that may be any. A size that is the same for many copies costs each of
// them less than one that is chosen by `refused` would: what is not 16 goes into the address.
LP_DEVICE void copy16_unless(uint32_t refused, void* shared, const void* global, int bytes) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %3, 0; @!p cp.async.cg.shared.global [%0], [%1], 16, %2;"
      " @p cp.async.cg.shared.global [%0], [%1], 16, 0;}" ::"r"(address(shared)),
      "l"(global), "r"(bytes), "r"(refused)
      : "memory");
}
LP_DEVICE void copies_end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int GROUPS>
LP_DEVICE void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

// 8x8 matrices of 16-bit values, one 16-byte row per lane: lanes 0-7 the rows of r[0], 8-15 of r[1] and so on.
LP_DEVICE void load4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address(row))
               : "memory");
}
LP_DEVICE void load2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address(row))
               : "memory");
}

// c += a * b for a 16x8 tile; the depth is 16 (16-bit types) or 8 (tf32): two 16-byte chunks either way.
template <class S>
LP_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
#define LP_MULTIPLY(TYPE, NAME)                                                                    \
  template <>                                                                                      \
  LP_DEVICE void multiply<TYPE>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {   \
    asm volatile("mma.sync.aligned." NAME " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));              \
  }
LP_MULTIPLY(Bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
LP_MULTIPLY(F16, "m16n8k16.row.col.f32.f16.f16.f32")
LP_MULTIPLY(Tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef LP_MULTIPLY

// Rounds to nearest what the product would cut off.
LP_DEVICE uint32_t rounded_tf32(uint32_t bits) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(__uint_as_float(bits)));
  return r;
}

}  // namespace simt
}  // namespace cuda
}  // namespace lp
#include "warpgroup.h"
#endif
