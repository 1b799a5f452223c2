#define MK_NAME "amx_split"
#define MK_NAMESPACE amx_split
#define MK_WIDTH 16
#define MK_MR 14
#define MK_PAIRS 1
#define MK_TILES 1
#define MK_SPLIT 1
#include <immintrin.h>
#include "kernels.h"
