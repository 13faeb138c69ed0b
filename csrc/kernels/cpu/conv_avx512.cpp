// The CPU kernels compiled for the avx512 level; setup.py passes the matching -m flags to this file alone.
#define LP_ISA avx512
#define LP_VECTOR_BYTES 64
#define LP_REGISTERS 32
#include "isa.h"
