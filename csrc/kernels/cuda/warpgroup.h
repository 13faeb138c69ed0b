// Products of four warps at once (wgmma, sm_90a): both factors are read from shared memory while the threads go on.
#pragma once
#include "storage.h"

namespace lp {
namespace cuda {

// Where a product finds a factor, as the instruction wants it: rows of 16 bytes, eight of them side by side, `rows` bytes from
// one eight to the next, `chunks` bytes from one 16 bytes of depth to the next (PTX ISA, matrix descriptor, K-major without
// swizzle: stride and leading dimension offset). Addresses and offsets are multiples of 16 below 2^18.
LP_HD uint64_t factor_of(unsigned address, int chunks, int rows) {
  const auto field = [](unsigned bytes) { return uint64_t((bytes & 0x3ffff) >> 4); };
  return field(address) | field(unsigned(chunks)) << 16 | field(unsigned(rows)) << 32;
}

#if !defined(LP_SIMT_EMULATION)
namespace simt {

// Makes what this thread's copies have brought visible to products; before the barrier that tells the other threads.
LP_DEVICE void show_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Before the first product that uses sums written by other instructions.
LP_DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
LP_DEVICE void products_end_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int GROUPS, int NI>
LP_DEVICE void products_wait(float (&sums)[NI][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
  if constexpr (GROUPS == 0) {  // nothing may read the sums earlier
#pragma unroll
    for (int j = 0; j < NI; ++j)
#pragma unroll
      for (int k = 0; k < 4; ++k) asm volatile("" : "+f"(sums[j][k])::"memory");
  }
}

// sums += a * b: 64 rows, 8 * NI columns, depth 16 (two chunks). Warp w holds rows 16 w to 16 w + 15 as multiply() does.
template <class S, int NI>
LP_DEVICE void multiply_group(float (&sums)[NI][4], uint64_t a, uint64_t b);

#define LP_T1 "%0,%1,%2,%3"
#define LP_T2 LP_T1 ",%4,%5,%6,%7"
#define LP_T3 LP_T2 ",%8,%9,%10,%11"
#define LP_T4 LP_T3 ",%12,%13,%14,%15"
#define LP_T5 LP_T4 ",%16,%17,%18,%19"
#define LP_T6 LP_T5 ",%20,%21,%22,%23"
#define LP_T7 LP_T6 ",%24,%25,%26,%27"
#define LP_T8 LP_T7 ",%28,%29,%30,%31"
#define LP_T9 LP_T8 ",%32,%33,%34,%35"
#define LP_T10 LP_T9 ",%36,%37,%38,%39"
#define LP_T11 LP_T10 ",%40,%41,%42,%43"
#define LP_T12 LP_T11 ",%44,%45,%46,%47"
#define LP_T13 LP_T12 ",%48,%49,%50,%51"
#define LP_T14 LP_T13 ",%52,%53,%54,%55"
#define LP_T15 LP_T14 ",%56,%57,%58,%59"
#define LP_T16 LP_T15 ",%60,%61,%62,%63"
#define LP_T20 LP_T16 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define LP_T24 LP_T20 ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define LP_T28 LP_T24 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define LP_T32 LP_T28 ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

#define LP_O(j) "+f"(sums[j][0]), "+f"(sums[j][1]), "+f"(sums[j][2]), "+f"(sums[j][3])
#define LP_O4 LP_O(0), LP_O(1), LP_O(2), LP_O(3)
#define LP_O5 LP_O4, LP_O(4)
#define LP_O6 LP_O5, LP_O(5)
#define LP_O7 LP_O6, LP_O(6)
#define LP_O8 LP_O7, LP_O(7)
#define LP_O10 LP_O8, LP_O(8), LP_O(9)
#define LP_O12 LP_O10, LP_O(10), LP_O(11)
#define LP_O13 LP_O12, LP_O(12)
#define LP_O16 LP_O13, LP_O(13), LP_O(14), LP_O(15)
#define LP_O24 LP_O16, LP_O(16), LP_O(17), LP_O(18), LP_O(19), LP_O(20), LP_O(21), LP_O(22), LP_O(23)
#define LP_O32 LP_O24, LP_O(24), LP_O(25), LP_O(26), LP_O(27), LP_O(28), LP_O(29), LP_O(30), LP_O(31)

// A and B: numbers of the last two operands.
#define LP_MULTIPLY_GROUP(TYPE, NAME, NI, COLUMNS, A, B)                                                                   \
  template <>                                                                                                              \
  LP_DEVICE void multiply_group<TYPE, NI>(float (&sums)[NI][4], uint64_t a, uint64_t b) {                                  \
    asm volatile("{.reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." NAME "." NAME \
                 " {" LP_T##NI "}, %" #A ", %" #B ", p, 1, 1, 0, 0;}"                                                      \
                 : LP_O##NI                                                                                                \
                 : "l"(a), "l"(b)                                                                                          \
                 : "memory");                                                                                              \
  }
#define LP_MULTIPLY_GROUPS(NI, COLUMNS, A, B)        \
  LP_MULTIPLY_GROUP(Bf16, "bf16", NI, COLUMNS, A, B) \
  LP_MULTIPLY_GROUP(F16, "f16", NI, COLUMNS, A, B)
LP_MULTIPLY_GROUPS(4, 32, 16, 17)
LP_MULTIPLY_GROUPS(5, 40, 20, 21)
LP_MULTIPLY_GROUPS(6, 48, 24, 25)
LP_MULTIPLY_GROUPS(7, 56, 28, 29)
LP_MULTIPLY_GROUPS(8, 64, 32, 33)
LP_MULTIPLY_GROUPS(10, 80, 40, 41)
LP_MULTIPLY_GROUPS(12, 96, 48, 49)
LP_MULTIPLY_GROUPS(13, 104, 52, 53)
LP_MULTIPLY_GROUPS(16, 128, 64, 65)
LP_MULTIPLY_GROUPS(24, 192, 96, 97)
LP_MULTIPLY_GROUPS(32, 256, 128, 129)

}  // namespace simt
#endif

}  // namespace cuda
}  // namespace lp
