"""The typed face of the kernels (torch.ops.merge3.*). Knows tensors, not models.

All operations take flat lists: T tensors of out and base, T*K of experts, expert fastest. Inputs may
be float32, float16 or bfloat16 (one dtype per tensor and its experts); arithmetic is float32 with one
final rounding. Formulas: csrc/merge_math.h; oracle: merge3/reference.py.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from merge3.errors import BadInput, ResourceError, Unavailable

try:
    from merge3 import _C  # after torch: it links against libtorch
except ImportError as error:  # pragma: no cover - depends on the build
    raise Unavailable(
        "merge3._C", f"the kernels are not built ({error})", hint="run `make install`, or `pip install .`"
    ) from error

SPARSIFY = ("all", "magnitude", "random", "ranked", "band")
PACKED = ("mask", "signs")  # which read one bit per element; see packed.py
ELECT = ("none", "sum", "count")
RULES = ("nearswap", "arcee_fusion", "ram", "sce", "unify")
STATISTICS = ("magnitude", "variance")
MAX_EXPERTS = 8
RANK_BINS = 32
RANK_STRIDE = RANK_BINS
CHUNK = _C.chunk  # elements, 65536; slices of a tensor start at its multiples
# Columns of a coefficient row, as in merge3_coefficient.
WEIGHT, RESCALE, LO, LO_SHARE, HI, HI_SHARE, DENSITY, EPSILON = range(8)
FIELDS = 8
NONE = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Modes:
    """What one fused merge does to every tensor; names as in SPARSIFY, PACKED and ELECT."""

    sparsify: str = "all"
    elect: str = "none"
    normalize: bool = False
    seed: int = 0


@dataclass(frozen=True)
class OrderStatistics:
    """Per (tensor, expert, rank): the value at that rank from the largest, the elements above it and
    their sum, the elements equal to it; per (tensor, expert): the sum of all and the non-zero count."""

    value: torch.Tensor  # float32 [T, K, R]
    greater: torch.Tensor  # int64 [T, K, R]
    equal: torch.Tensor  # int64 [T, K, R]
    l1_greater: torch.Tensor  # float64 [T, K, R]
    total: torch.Tensor  # float64 [T, K]
    nonzero: torch.Tensor  # int64 [T, K]


def build_info() -> dict:
    """What was built and what can run: devices, the CPU's instruction set, torch's version, whether CUDA is there."""
    return {
        "devices": _C.build.split(),
        "cpu": _C.cpu,
        "torch": torch.__version__,
        "cuda_available": torch.cuda.is_available(),
    }


def tensor_id(name: str) -> int:
    """The random stream of a tensor: a hash of its name, so the order of tensors never matters."""
    return zlib.crc32(name.encode())


def coefficients(tensors: int, experts: int) -> torch.Tensor:
    """Neutral coefficients, float32 [T, K, FIELDS]: weight 1, no rescale, everything kept."""
    c = torch.zeros(tensors, experts, FIELDS)
    c[..., WEIGHT] = 1.0
    c[..., RESCALE] = 1.0
    c[..., LO_SHARE] = 1.0
    c[..., HI] = float("inf")
    c[..., HI_SHARE] = 1.0
    c[..., DENSITY] = 1.0
    return c


def merge_(
    out: Sequence[torch.Tensor],
    base: Sequence[torch.Tensor],
    experts: Sequence[torch.Tensor],
    coefficients: torch.Tensor,
    lambda_: torch.Tensor,
    modes: Modes = Modes(),
    ids: torch.Tensor | None = None,
    rank_tables: Sequence[torch.Tensor] = (),
    offsets: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
) -> None:
    """Write base + λ · elect(sparsify(experts − base)) into `out`, in place, one pass.

    out, base: T tensors; base may be empty (then θ = 0 and the result is a sum of experts).
    experts: T·K, expert fastest. coefficients: float32 CPU [T, K, FIELDS]; lambda_: float32 CPU [T].
    ids: int64 CPU [T], the tensors' random streams (default 0..T−1). rank_tables: T·K, for `ranked`; for `mask`
    and `signs` the T·K bit masks (see pack). `signs` reads no experts: give none.
    offsets, columns: int64 CPU [T], where the given tensors are slices: each one's first element within
    its whole tensor (a multiple of CHUNK) and that tensor's last dimension. Slices give the bits of the whole.
    Moves (K + 2) · Σ numel · itemsize bytes. Deterministic for any thread count, and the same bits on CPU and
    GPU, but for the payload of a NaN. `out` may be `base`.
    Raises BadInput naming the list and index on a dtype, device, size or contiguity mismatch, or an overlap; and
    while a CUDA graph is captured, which would not keep the coefficients: capture Prepared.launch.
    TIES: Yadav et al. 2023, Algorithm 1; DARE: Yu et al. 2024; DELLA: Deep et al. 2024.
    """
    if ids is None:
        ids = torch.arange(len(out))
    sparsify, elect, seed = numbers(modes)
    tensors = list(out), list(base), list(experts)
    slices = NONE if offsets is None else offsets, NONE if columns is None else columns
    how = list(rank_tables), sparsify, elect, modes.normalize, seed
    call(torch.ops.merge3.merge_, *tensors, coefficients, lambda_, ids, *slices, *how)


class Prepared:
    """A merge whose tensors stay where they are. Their table is checked once and lies beside them, so that a
    run uploads coefficients and launches a kernel, or one for each dtype: no check, no synchronisation.

    `launch` alone can be captured in a CUDA graph; `upload` before a replay changes what it merges. Arguments
    as for merge_; the tensors are kept alive.

        prepared = Prepared(out, base, experts)
        prepared.upload(coefficients(len(out), len(experts) // len(out)), torch.ones(len(out)))
        prepared.launch()
    """

    def __init__(self, out, base, experts, ids=None, rank_tables=(), sparsify: str = "all"):
        self._tensors = [*out, *base, *experts, *rank_tables]
        count = len(rank_tables) if sparsify in PACKED else len(experts)
        self._count, self._experts = len(out), count // max(1, len(out))
        self._sparsify = sparsify
        blocks = sum(-(-o.numel() // CHUNK) for o in out)
        table = torch.empty(blocks * _C.block_bytes + self._count * _C.tensor_bytes, dtype=torch.uint8)
        self._plan = torch.zeros(_C.merge_kernels, dtype=torch.int64)
        ids = torch.arange(self._count) if ids is None else ids
        tensors = list(out), list(base), list(experts)
        mode = _mode(sparsify, SPARSIFY + PACKED, "sparsify")
        call(torch.ops.merge3.prepare_, table, self._plan, *tensors, ids, list(rank_tables), mode)
        device = out[0].device
        self._table = table.to(device)
        self._coefficients = torch.empty(self._count, self._experts, FIELDS, device=device)
        self._lambda = torch.empty(self._count, device=device)

    def upload(self, coefficients: torch.Tensor, lambda_: torch.Tensor) -> None:
        """float32 [T, K, FIELDS] and [T]. Ordered on the current stream."""
        if coefficients.shape != self._coefficients.shape or lambda_.shape != self._lambda.shape:
            raise BadInput(
                "coefficients, lambda_",
                f"shapes {list(coefficients.shape)} and {list(lambda_.shape)}",
                f"{list(self._coefficients.shape)} and {list(self._lambda.shape)}",
            )
        self._coefficients.copy_(coefficients, non_blocking=True)
        self._lambda.copy_(lambda_, non_blocking=True)

    def launch(self, modes: Modes = Modes()) -> None:
        """Merge with what was uploaded. `modes.sparsify` must be the one that was prepared."""
        launch_together([self], [modes])


def launch_together(merges: Sequence[Prepared], modes: Sequence[Modes]) -> None:
    """Launch merges of tensors that have the same sizes in the same order: other coefficients and modes over the same
    inputs, into other outputs. On the CPU what they have in common is read from memory once, a chunk at a time.
    Raises BadInput where one was prepared for another way to sparsify, or sizes differ.
    """
    for prepared, how in zip(merges, modes, strict=True):
        if how.sparsify != prepared._sparsify:
            raise BadInput("sparsify", f"found {how.sparsify!r}", f"{prepared._sparsify!r}, as prepared")
        if (prepared._count, prepared._experts) != (merges[0]._count, merges[0]._experts):
            expected = f"{merges[0]._count} of {merges[0]._experts}, as in the first"
            raise BadInput("merges", f"{prepared._count} tensors of {prepared._experts} experts", expected)
    sparsify, elect, seeds = zip(*map(numbers, modes))
    lists = zip(*((one._table, one._plan, one._coefficients, one._lambda) for one in merges))
    how = list(sparsify), list(elect), [int(one.normalize) for one in modes], list(seeds)
    call(torch.ops.merge3.merge_prepared_, *map(list, lists), merges[0]._count, merges[0]._experts, *how)


def elementwise_(
    out: Sequence[torch.Tensor],
    base: Sequence[torch.Tensor],
    experts: Sequence[torch.Tensor],
    rule: str,
    scalars: torch.Tensor,
    per_expert: torch.Tensor | None = None,
    rows: Sequence[torch.Tensor] = (),
) -> None:
    """Apply a method's own per-element rule (RULES), in place, one pass.

    scalars: float32 CPU [T] (t, importance threshold, epsilon, variance threshold by rule);
    per_expert: float32 CPU [T, K]; rows: T float32 tensors [rows], arcee_fusion's row divergences.
    """
    if per_expert is None:
        per_expert = torch.ones(len(out), len(experts) // max(1, len(out)))
    tensors = list(out), list(base), list(experts)
    call(torch.ops.merge3.elementwise_, *tensors, scalars, per_expert, list(rows), _mode(rule, RULES, "rule"))


def gram(base: Sequence[torch.Tensor], experts: Sequence[torch.Tensor], tensors: int) -> torch.Tensor:
    """Inner products of [θ, τ_1, .., τ_K] per tensor: float64 [T, K+1, K+1]; θ = 0 where base is empty.

    Not finite exactly where some input of that row or column is not. Last bits may differ between CPU and GPU.
    """
    k = len(experts) // max(1, tensors)
    result = torch.empty(tensors, k + 1, k + 1, dtype=torch.float64)
    call(torch.ops.merge3.gram_, result, list(base), list(experts))
    return result


def order_statistics(
    base: Sequence[torch.Tensor],
    experts: Sequence[torch.Tensor],
    ranks: torch.Tensor,
    statistic: str = "magnitude",
) -> OrderStatistics:
    """Exact order statistics of |τ_k|, or of the variance across experts (then K = 1 in the result).

    ranks: int64 CPU [T, R], 1-based from the largest; 0 gives (inf, 0, 0), above n gives the smallest.
    """
    t, r = ranks.shape
    k = 1 if statistic == "variance" else len(experts) // max(1, t)
    result = OrderStatistics(
        torch.empty(t, k, r),
        *(torch.empty(t, k, r, dtype=d) for d in (torch.int64, torch.int64, torch.float64)),
        torch.empty(t, k, dtype=torch.float64),
        torch.empty(t, k, dtype=torch.int64),
    )
    written = result.value, result.greater, result.equal, result.l1_greater, result.total, result.nonzero
    asked = ranks.contiguous(), _mode(statistic, STATISTICS, "statistic")
    call(torch.ops.merge3.order_statistics_, *written, list(base), list(experts), *asked)
    return result


def pack(
    base: Sequence[torch.Tensor], experts: Sequence[torch.Tensor], tensors: int, unified: Sequence[torch.Tensor] = ()
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """One bit per element and expert: T·K masks, int32 [ceil(numel / 32)], the lowest bit of a word first.

    A bit is [τ_k ≥ 0]; with `unified` (T tensors, a model): [τ_k and its task vector have one sign, neither 0].
    Also float64 [T, K, 2]: Σ|τ_k|, and the number of set bits; with `unified` Σ|τ_unified| over them.
    """
    masks = [torch.empty((expert.numel() + 31) // 32, dtype=torch.int32, device=expert.device) for expert in experts]
    sums = torch.empty(tensors, len(experts) // max(1, tensors), 2, dtype=torch.float64)
    call(torch.ops.merge3.pack_, masks, sums, list(base), list(experts), list(unified))
    return masks, sums


def rank_tables(
    base: Sequence[torch.Tensor], experts: Sequence[torch.Tensor], tensors: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Per (tensor, expert): float32 [rows, RANK_STRIDE], what |τ| has to reach for each bin of rank (0 for the first),
    and the sum of |τ| per bin over all rows, float64 [T, K, RANK_BINS]. A 1-D tensor is one row.

    A rank counts as the middle of its bin, so it is at most 1 / (2 RANK_BINS) off; equal elements share the bin of
    their middle position."""
    tables = []
    for expert in experts:
        columns = expert.shape[-1] if expert.dim() >= 2 else expert.numel()
        rows = expert.numel() // columns if columns else 0
        tables.append(torch.empty(rows, RANK_STRIDE, device=expert.device))
    bin_l1 = torch.empty(tensors, len(experts) // max(1, tensors), RANK_BINS, dtype=torch.float64)
    call(torch.ops.merge3.rank_tables_, tables, bin_l1, list(base), list(experts))
    return tables, bin_l1


def numbers(modes: Modes) -> tuple[int, int, int]:
    """Modes as the operators take them: sparsify, elect, seed."""
    # Seeds are 64-bit patterns; the operator schema only has signed integers.
    seed = (modes.seed + 2**63) % 2**64 - 2**63
    return _mode(modes.sparsify, SPARSIFY + PACKED, "sparsify"), _mode(modes.elect, ELECT, "elect"), seed


def _mode(name: str, names: tuple[str, ...], what: str) -> int:
    if name not in names:
        raise BadInput(what, f"unknown {name!r}", ", ".join(names))
    return names.index(name)


def call(op, *arguments):
    """Call an operator; what it refuses is a BadInput, without torch's trimmings."""
    try:
        return op(*arguments)
    except NotImplementedError as error:  # torch has no kernel of ours for the tensors' device
        raise Unavailable(
            "kernels",
            str(error).split("\n")[0][:160],
            f"tensors on one of: {_C.build}",
            "build with MERGE3_CUDA=1 where nvcc is installed",
        ) from None
    except RuntimeError as error:
        message = str(error).split("\n")[0]
        if "merge3: " not in message:
            raise
        message = message[message.index("merge3: ") + len("merge3: ") :]
        if message.startswith("CUDA error"):
            raise (ResourceError if message.startswith("CUDA error 2:") else Unavailable)("the GPU", message) from None
        raise BadInput(message) from None


for _name in (
    "merge_",
    "prepare_",
    "merge_prepared_",
    "merge_backward_",
    "elementwise_",
    "gram_",
    "order_statistics_",
    "pack_",
    "rank_tables_",
):
    # Every op writes into tensors the caller made, so there is no shape to infer.
    torch.library.register_fake(f"merge3::{_name}", lambda *arguments: None)
