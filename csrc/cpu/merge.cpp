// The fused merge for any processor.
#define MERGE3_MERGE_ENTRY merge_generic
#define MERGE3_LANES f32x8
#define MERGE3_DIRECT 0  // one kernel per mode: what runs here is not today's hardware
#include "merge_loop.h"
