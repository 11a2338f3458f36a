/* Merging experts that are held as what they differ from the base by: the C API. CPU only.
 *
 * Either of two ways, per tensor and expert:
 *   kept    a bit per element, and the expert's own values where it is set; elsewhere it is the base
 *   int8    a byte per element and a scale per row: base + scale[row] * byte, in float32, rounded to the dtype
 */
#ifndef MERGE3_COMPACT_H
#define MERGE3_COMPACT_H

#include "merge.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Of one tensor of one expert. All zero: the table's expert is the expert itself. Else the table's `experts[k]` is the
 * base's tensor, from which it differs. */
typedef struct {
  const void *values;    /* kept: of the tensor's dtype, in order; int8: int8_t [numel] */
  const uint32_t *mask;  /* kept: [ceil(numel / 32)], the lowest bit of a word first, none set beyond numel */
  const int64_t *starts; /* kept: the first value of each MERGE3_CHUNK elements, and behind them how many there are */
  const float *scales;   /* int8: one per row of `columns` elements */
  int64_t columns;
} merge3_compact;

/* As merge3_merge of the expanded experts, bit for bit; they are expanded a few thousand elements at a time, in cache.
 * compact: [tensors, K]. The rows are whole tensors (offset 0). Masks must name as many values as there are. */
merge3_status merge3_merge_compact(const merge3_context *context, const merge3_modes *modes, int64_t tensors,
                                   const merge3_tensor *table, const merge3_compact *compact,
                                   const merge3_coefficient *coefficients, const float *lambda);

#ifdef __cplusplus
}
#endif

#endif
