"""Steps run into the weights of a live model: in place where kernels can, else beside them, batch by batch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence

import torch

from merge3.checkpoint.layout import Ref
from merge3.live.held import execute_held, readable
from merge3.live.streaming import execute_streamed, stream_together
from merge3.methods import Step, execute
from merge3.methods.execute import Output, execute_together, together
from merge3.pool import Pool

# Elements merged beside the model at once, where they cannot be merged in place: parts of fused parameters that are no
# block of memory, as the kernels want theirs, and weights of another dtype than the merge's.
BATCH = 24_000_000


class Writer:
    """Remembers what was prepared for the pool's tensors, as long as they lie where they are."""

    def __init__(self, pool: Pool):
        self.pool = pool
        self._prepared: OrderedDict = OrderedDict()
        self._memory = pool.memory  # the plan under which the above was prepared

    def run(self, outputs: list[Output], seed: int, rounded: Mapping[str, torch.dtype]) -> None:
        """rounded: weights that are wider than what they are exported in -> that dtype."""
        self._follow()
        there, beside = [], []
        for output in outputs:
            (there if in_place(output[2], output[0], rounded) else beside).append(output)
        with torch.no_grad():
            self._write(there, seed, self._prepared)
            for batch in _batches(beside):
                blocks = []
                for name, step, out in batch:
                    blocks.append((name, step, out.new_empty(out.shape, dtype=rounded.get(name, out.dtype))))
                self._write(blocks, seed, None)
                for (_, _, out), (_, _, block) in zip(batch, blocks):
                    out.copy_(block)

    def run_together(self, candidates: Sequence[list[Output]], seed: int, rounded: Mapping[str, torch.dtype]) -> None:
        """As `run` of each, the same outputs in the same order: what all read, is read once where it can be."""
        self._follow()
        alone: list[list[Output]] = [[] for _ in candidates]
        here: list[tuple[Output, ...]] = []
        streamed: list[tuple[Output, ...]] = []
        for outputs in zip(*candidates, strict=True):
            steps = [step for _, step, _ in outputs]
            alike = all(step.refs == steps[0].refs for step in steps) and len({name for name, _, _ in outputs}) == 1
            alike = alike and all(in_place(out, name, rounded) for name, _, out in outputs)
            if alike and self.pool.resident(steps[0].refs) and all(map(together, steps)):
                here.append(outputs)
            elif alike and all(step.sliceable for step in steps) and not self._at_hand(steps[0]):
                streamed.append(outputs)
            else:
                for own, output in zip(alone, outputs):
                    own.append(output)
        with torch.no_grad():
            execute_together(here, self.pool.get, seed, self._prepared)
            stream_together(streamed, self.pool, seed)
        for own in alone:
            self.run(own, seed, rounded)

    def _follow(self) -> None:
        """Keep to the pool's plan of memory."""
        if self.pool.memory is not self._memory:  # tensors may have left that prepared tables still hold
            self._prepared.clear()
            self._memory = self.pool.memory

    def _at_hand(self, step: Step) -> bool:
        return self.pool.resident(step.refs) or readable(step, self.pool)

    def _write(self, outputs: list[Output], seed: int, prepared: OrderedDict | None) -> None:
        here, held, away = [], [], []
        for output in outputs:
            if self.pool.resident(output[1].refs):
                here.append(output)
            else:
                (held if readable(output[1], self.pool) else away).append(output)
        execute(here, self.pool.get, seed, prepared)
        execute_held(held, self.pool, seed)
        execute_streamed(away, self.pool, seed)


def kept_wide(weights: Mapping[str, torch.Tensor], pool: Pool, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """Weights that transformers keeps in float32 in a narrower model -> what they are exported in, and so rounded to: a
    merge must not be better here than on disk. dtype: of the live model, where it is not the endpoints'."""
    rounded = {}
    for name, weight in weights.items():
        own = dtype or pool.common_dtype(Ref(pool.base, name))
        if weight.dtype == torch.float32 and own.is_floating_point and own != torch.float32:
            rounded[name] = own
    return rounded


def in_place(out: torch.Tensor, name: str, rounded: Mapping[str, torch.dtype]) -> bool:
    """Whether a merge can be written there as it comes."""
    return out.is_contiguous() and name not in rounded


def _batches(outputs: list[Output]) -> Iterator[list[Output]]:
    """In order, about BATCH elements at a time."""
    batch: list[Output] = []
    size = 0
    for output in outputs:
        batch.append(output)
        size += output[2].numel()
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
