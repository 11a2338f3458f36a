/* The C API of the merge3 kernels. No torch, no C++ in this header.
 *
 * One operation merges many tensors of a model in one call. For tensor t with base theta,
 * experts e_1..e_K and per element i (all arithmetic in float32, rounded once to the output dtype):
 *
 *   tau_k = e_k[i] - theta[i]                     task vector, never stored
 *   c_k   = keep_k(i) * rescale_k * weight_k * tau_k
 *   m_k   = 1, or [sign(c_k) == elected sign]     see merge3_elect
 *   out   = theta[i] + lambda * (normalize ? sum(c_k m_k) / sum(weight_k m_k) : sum(c_k m_k))
 *
 * All arrays of structs are host memory. Tensor data lives where `device` says. Every function
 * returns a merge3_status; merge3_last_error() gives the message of this thread's last failure.
 */
#ifndef MERGE3_MERGE_H
#define MERGE3_MERGE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MERGE3_MAX_EXPERTS 8
/* Bins of |tau| per row: a `ranked` keep takes an element's rank to be the middle of its bin. */
#define MERGE3_RANK_BINS 32
/* Floats per row of a rank table: what |tau| has to reach for each bin, 0 for the first. */
#define MERGE3_RANK_STRIDE MERGE3_RANK_BINS
/* Elements that one thread or block works on; slices of a tensor start at multiples of it. */
#ifndef MERGE3_CHUNK
#define MERGE3_CHUNK 65536
#endif

typedef enum {
  MERGE3_OK = 0,
  MERGE3_INVALID_ARGUMENT = 1,
  MERGE3_UNSUPPORTED = 2,
  MERGE3_DEVICE_ERROR = 3,
} merge3_status;

typedef enum { MERGE3_CPU = 0, MERGE3_CUDA = 1 } merge3_device;
typedef enum { MERGE3_FLOAT32 = 0, MERGE3_FLOAT16 = 1, MERGE3_BFLOAT16 = 2 } merge3_dtype;

/* Which elements of a task vector survive (see keep_* in merge_math.h). */
typedef enum {
  MERGE3_KEEP_ALL = 0,
  MERGE3_KEEP_MAGNITUDE = 1, /* |tau| above `lo`                     TIES */
  MERGE3_KEEP_RANDOM = 2,    /* philox below `density`               DARE */
  MERGE3_KEEP_RANKED = 3,    /* philox below density +- epsilon      DELLA */
  MERGE3_KEEP_BAND = 4,      /* |tau| between `lo` and `hi`          Model Breadcrumbs */
  MERGE3_KEEP_MASK = 5,      /* the element's bit in masks[k]        EMR-Merging */
  /* No expert is read: tau is +1 or -1 by the element's bit, `rescale` is its scale.  BitDelta */
  MERGE3_SIGNS = 6,
} merge3_sparsify;

/* How the sign of the merged task vector is elected. */
typedef enum { MERGE3_ELECT_NONE = 0, MERGE3_ELECT_SUM = 1, MERGE3_ELECT_COUNT = 2 } merge3_elect;

typedef struct {
  void *out;
  const void *base; /* NULL: theta = 0, so that tau_k = e_k */
  const void *experts[MERGE3_MAX_EXPERTS];
  const float *rank_tables[MERGE3_MAX_EXPERTS]; /* ranked only: [rows, MERGE3_RANK_STRIDE] */
  /* mask and signs: one bit per element of the whole tensor, the lowest of a word first */
  const uint32_t *masks[MERGE3_MAX_EXPERTS];
  int64_t numel;
  int64_t columns; /* ranked and arcee_fusion: elements per row */
  /* merge: where this row starts in its whole tensor, a multiple of MERGE3_CHUNK. The slices of a
   * tensor give the bits of the whole; their rank tables are the whole tensor's. */
  int64_t offset;
  int32_t dtype;     /* of base and experts */
  int32_t out_dtype;
  uint32_t id; /* names the tensor's random stream; stable across calls */
  uint32_t reserved;
} merge3_tensor;

/* One per (tensor, expert), expert fastest. `lo_share` of the elements whose |tau| equals `lo` are
 * kept, chosen by a hash of their index; likewise `hi_share` for `hi`. */
typedef struct {
  float weight, rescale;
  float lo, lo_share;
  float hi, hi_share;
  float density, epsilon;
} merge3_coefficient;

typedef struct {
  int32_t experts; /* K, 1..MERGE3_MAX_EXPERTS */
  int32_t sparsify;
  int32_t elect;
  int32_t normalize;
  uint64_t seed;
} merge3_modes;

/* How CPU work is spread over threads: call body(arg, begin, end) over all of [0, count), on as many threads as
 * there should be. Each call works on whatever is left, so a thread that is held up delays no other.
 * NULL: the library starts threads for the call, as many as OMP_NUM_THREADS says, or else one per core that the
 * process may use (its affinity and its cgroups' CPU quota). */
typedef struct {
  void (*parallel_for)(void *self, int64_t count,
                       void (*body)(void *arg, int64_t begin, int64_t end), void *arg);
  void *self;
} merge3_executor;

/* On a GPU, calls do not depend on the calling thread's current device, and leave it as it was. Those that
 * take or give host memory (all but merge3_merge_resident) are refused, with
 * MERGE3_UNSUPPORTED, while the stream is captured for a CUDA graph. */
typedef struct {
  int32_t device; /* merge3_device */
  void *stream;   /* cudaStream_t of that GPU; ignored on the CPU */
  const merge3_executor *executor;
  int32_t device_index; /* which GPU, from 0 on: where the tensors and the stream are; ignored on the CPU */
} merge3_context;

/* Fused merge. coefficients: [tensors, K]; lambda: [tensors]. Moves (K + 1) reads + 1 write. */
merge3_status merge3_merge(const merge3_context *context, const merge3_modes *modes,
                           int64_t tensors, const merge3_tensor *table,
                           const merge3_coefficient *coefficients, const float *lambda);

/* What one thread of a CPU, or one block of threads of a GPU, works on: elements MERGE3_CHUNK * chunk and following of
 * a tensor. */
typedef struct merge3_block { /* with a tag: nvcc 13.0 fails on a std::vector of a struct without */
  int32_t tensor, chunk;
} merge3_block;

/* How many blocks each kernel of a merge has on a GPU, in the order in which they stand: [0] the one that serves
 * anything; [1 + dtype] the one that reads and writes 16 bytes at a time, where base, experts and out are of that dtype
 * and begin at multiples of 16 bytes, and (ranked) rows are a multiple of eight elements. */
#define MERGE3_MERGE_KERNELS 4
typedef struct {
  int64_t blocks[MERGE3_MERGE_KERNELS];
} merge3_plan;

/* The same for a table that stays: prepare it once, put it where the tensors lie, then merge as often
 * as coefficients change. merge3_prepare checks the table for these modes (K and sparsify count) and
 * fills the plan and, if it is not NULL, blocks: as many as the plan's numbers add up to.
 * Every array but the plan given to merge3_merge_resident is memory of the device: on a GPU it is a launch
 * for each kernel that has blocks, one for a model of one dtype, with no copy and no synchronisation, so that
 * a CUDA graph can capture it. Blocks are not read on the CPU. */
merge3_status merge3_prepare(const merge3_context *context, const merge3_modes *modes,
                             int64_t tensors, const merge3_tensor *table, merge3_plan *plan,
                             merge3_block *blocks);
merge3_status merge3_merge_resident(const merge3_context *context, const merge3_modes *modes,
                                    int64_t tensors, const merge3_plan *plan, const merge3_tensor *table,
                                    const merge3_block *blocks, const merge3_coefficient *coefficients,
                                    const float *lambda);

/* Several of these at once, whose tensors have the same sizes in the same order: other coefficients and modes over the
 * same inputs, into other outputs. On the CPU each chunk is merged for all of them in turn, so that what they have in
 * common comes from memory once; on a GPU one merge follows the other. */
typedef struct {
  const merge3_modes *modes;
  const merge3_plan *plan;
  const merge3_tensor *table;
  const merge3_block *blocks;
  const merge3_coefficient *coefficients;
  const float *lambda;
} merge3_prepared;
merge3_status merge3_merge_together(const merge3_context *context, int32_t count, int64_t tensors,
                                    const merge3_prepared *merges);

/* Gradient of the merge, one pass: table[t].out holds dL/dout (read). weight_gradient and
 * rescale_gradient [tensors, K], lambda_gradient [tensors]: host memory. What is kept and the elected
 * signs count as constants. Deterministic. */
merge3_status merge3_merge_backward(const merge3_context *context, const merge3_modes *modes,
                                    int64_t tensors, const merge3_tensor *table,
                                    const merge3_coefficient *coefficients, const float *lambda,
                                    double *weight_gradient, double *rescale_gradient,
                                    double *lambda_gradient);

/* Methods whose per-element rule is not a sparsified, elected, scaled sum. */
typedef enum {
  MERGE3_NEARSWAP = 0,     /* scalar: t */
  MERGE3_ARCEE_FUSION = 1, /* scalar: importance threshold; rank_tables[0]: row divergence [rows] */
  MERGE3_RAM = 2,          /* scalar: epsilon; per expert: factor of unshared elements */
  MERGE3_SCE = 3,          /* scalar: variance threshold; per expert: weight */
  MERGE3_UNIFY = 4,        /* the largest change towards the elected sign  EMR-Merging */
} merge3_rule;

/* scalars: [tensors]; per_expert: [tensors, K]. */
merge3_status merge3_elementwise(const merge3_context *context, int32_t rule, int32_t experts,
                                 int64_t tensors, const merge3_tensor *table,
                                 const float *scalars, const float *per_expert);

/* Inner products of [theta, tau_1, .., tau_K] (theta = 0 rows where base is NULL).
 * gram: [tensors, K + 1, K + 1] float64, host memory. Not finite where an input is not. */
merge3_status merge3_gram(const merge3_context *context, int32_t experts, int64_t tensors,
                          const merge3_tensor *table, double *gram);

typedef enum { MERGE3_MAGNITUDE = 0, MERGE3_VARIANCE = 1 } merge3_statistic;

/* Exact order statistics of |tau_k| (or of the variance across experts, then K counts as 1).
 * ranks: [tensors, R], 1-based from the largest. All results in host memory:
 * value, greater (elements strictly above value), equal, l1_greater: [tensors, K, R];
 * total (sum over all elements), nonzero: [tensors, K]. */
merge3_status merge3_order_statistics(const merge3_context *context, int32_t statistic,
                                      int32_t experts, int64_t tensors, const merge3_tensor *table,
                                      int64_t rank_count, const int64_t *ranks, float *value,
                                      int64_t *greater, int64_t *equal, double *l1_greater,
                                      double *total, int64_t *nonzero);

/* Fills table[t].rank_tables (device memory, written here) and bin_l1 [tensors, K, bins] (host): the sum of |tau| in
 * each bin, over all rows. Elements that tie share the bin of their middle position, so that a share of ties counts for
 * as much as a share of other elements. */
merge3_status merge3_rank_tables(const merge3_context *context, int32_t experts, int64_t tensors,
                                 const merge3_tensor *table, double *bin_l1);

typedef enum {
  MERGE3_PACK_SIGNS = 0,     /* tau_k >= 0 */
  MERGE3_PACK_AGREEMENT = 1, /* tau_k and the unified task vector have one sign, and neither is 0 */
} merge3_packing;

/* Fills table[t].masks (device memory, written here; offset 0). AGREEMENT: table[t].out is the unified
 * model, which is read. sums: [tensors, K, 2], host memory: of |tau_k|, and of |tau_unified| where the
 * bit is set (SIGNS: how many bits are). */
merge3_status merge3_pack(const merge3_context *context, int32_t packing, int32_t experts,
                          int64_t tensors, const merge3_tensor *table, double *sums);

const char *merge3_last_error(void);
/* "cpu", or "cpu cuda" when the library was built with CUDA. */
const char *merge3_build(void);
/* The instruction set of the CPU loops: "generic", "avx2" or "avx512". The environment variable
 * MERGE3_CPU chooses another one; "" (and an error) where that does not exist here. */
const char *merge3_cpu(void);

#ifdef __cplusplus
}
#endif
#endif
