#define MK_NAME "avx512"
#define MK_NAMESPACE avx512
#define MK_WIDTH 16
#define MK_MR 14
#define MK_PAIRS 0
#define MK_TILES 0
#define MK_SPLIT 0
#include <immintrin.h>
#include "kernels.h"
