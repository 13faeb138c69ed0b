// The CPU kernels compiled for the avx2 level; setup.py passes the matching -m flags to this file alone.
#define LP_ISA avx2
#define LP_VECTOR_BYTES 32
#define LP_REGISTERS 16
#include "isa.h"
