// The CPU kernels compiled for the portable level; setup.py passes the matching -m flags to this file alone.
#define LP_ISA portable
#define LP_VECTOR_BYTES 16
#define LP_REGISTERS 16
#include "isa.h"
