#define MK_NAME "amx"
#define MK_NAMESPACE amx
#define MK_WIDTH 16
#define MK_MR 14
#define MK_PAIRS 1
#define MK_TILES 1
#define MK_SPLIT 0
#include <immintrin.h>
#include "kernels.h"
