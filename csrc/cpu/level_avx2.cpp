#define MK_NAME "avx2"
#define MK_NAMESPACE avx2
#define MK_WIDTH 8
#define MK_MR 6
#define MK_PAIRS 0
#define MK_TILES 0
#define MK_SPLIT 0
#include <immintrin.h>
#include "kernels.h"
