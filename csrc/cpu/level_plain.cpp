#define MK_NAME "plain"
#define MK_NAMESPACE plain
#define MK_WIDTH 4
#define MK_MR 4
#define MK_PAIRS 0
#define MK_TILES 0
#define MK_SPLIT 0

#include "kernels.h"
