"""The pool: a base and its experts, aligned tensor by tensor, resident, compacted or streamed within a memory budget.

On the CPU the memory-mapped files are the pool, so no expert is ever copied; on another device, or where an endpoint's
dtype differs, each tensor is copied there once, or whenever it is used if the budget has no room for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import torch

from merge3.alignment import align, check_task_vectors
from merge3.checkpoint import Checkpoint, TensorInfo
from merge3.checkpoint.beside import Words
from merge3.checkpoint.layout import Layout, Ref, layout
from merge3.checkpoint.read import combine_hashes
from merge3.checkpoint.remapping import remapped
from merge3.checkpoint.towers import Tower
from merge3.checkpoint.vocabulary import Vocabulary, open_vocabulary
from merge3.derived import Compute, Derived, Job, Survey
from merge3.endpoints import Ties, open_endpoints
from merge3.errors import BadInput, CheckpointError
from merge3.experts import FULL, Compacted, Experts
from merge3.lineage import doubts
from merge3.memory import MemoryPlan, parse_size, usable
from merge3.planning import common_dtype, hash_endpoints, limits, plan_pool
from merge3.recipe import ModelRef, Tokenizer
from merge3.residence import Residence
from merge3.statistics import Statistics


@dataclass
class Pool:
    """Endpoints by name (str(ModelRef)), the first being the base, whose tensor names all of them go by.

    kept: tensors that cannot be merged and stay the base's, with the reason; fixed: those that no recipe merges.
    heads: endpoint -> tensors outside the backbone, which stay with their endpoint.
    left_out: tensors of other endpoints that no merge can take, with the reason.
    warnings: what makes endpoints seem not to belong together, one line each.
    towers: endpoint -> its place in the base's language tower; tower: the prefixes that were given; notes: of both.
    vocabulary: the tokens that all embeddings and heads have rows for; None: every endpoint's rows are its own.
    memory: which tensors are resident. derived: models that methods derive of the endpoints, under names of their own.
    joined: endpoints that are merges of others -> what tells each from others of its name. compacted: experts that are
    not held as they are.

        pool = Pool.open("base", ["math", "italian"])
        pool.get(Ref("math", "lm_head.weight"))
    """

    endpoints: dict[str, Checkpoint]
    device: torch.device
    dtype: torch.dtype | None = None
    derived_folder: str | Path | None = None
    vocabulary: Vocabulary | None = None
    kept: dict[str, str] = field(default_factory=dict)
    fixed: dict[str, str] = field(default_factory=dict)
    heads: dict[str, list[str]] = field(default_factory=dict)
    left_out: dict[Ref, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    towers: dict[str, Tower] = field(default_factory=dict)
    tower: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    joined: dict[str, str] = field(default_factory=dict)
    compacted: Compacted = field(init=False, repr=False)
    statistics: Statistics = field(init=False)
    derived: Derived = field(init=False)
    _ties: Ties = field(init=False, repr=False)
    _residence: Residence = field(init=False, repr=False)
    _limits: tuple[int | None, int] = field(default=(None, 0), repr=False)  # the budget; bytes of host memory to pin
    _reserved: int = field(default=0, repr=False)
    _streams: bool = field(default=False, repr=False)
    _hashes: dict[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        self._ties, self._residence = Ties(self.endpoints), Residence(self)
        self.statistics = Statistics(self.get, self._residence.in_groups)
        self.derived = Derived(self, self.derived_folder)
        self.compacted = Compacted(self, FULL, self._ties.stored)

    @staticmethod
    def open(
        base: str | ModelRef,
        experts: Iterable[str | ModelRef],
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        memory_budget: int | str | None = None,
        locate: Callable[[str], str] = str,
        drop: Iterable[str] = (),
        derived_folder: str | Path | None = None,
        tower: Mapping[str, str] | None = None,
        tokenizer: Tokenizer | None = None,
        experts_as: str | Experts = "full",
    ) -> Pool:
        """Open checkpoints and check that they fit together.

        dtype: convert every endpoint to it (default: as stored, promoted where endpoints differ).
        memory_budget: bytes, or a size such as "20GiB", that the live model and the weights may take on the
        device (on the CPU: of resident memory); what does not fit is streamed. Default: all; see planning.limits.
        locate: from a path as named to where it lies; endpoints keep the names they were given.
        drop: patterns of tensors that experts have and the base lacks, and that may be lost.
        derived_folder: where derived models are kept, and found by the next run (default: they go with the pool).
        tower: prefixes of a language model's names -> of the base's, where they cannot be found; see docs/towers.md.
        tokenizer: of every recipe to come (`recipe.tokenizer`): embeddings and heads get its rows, once.
        experts_as: how experts are held: `full`, `residual:0.1` or `int8`; see experts.py and docs/machines.md.
        Raises CheckpointError naming endpoint and tensor where shapes differ in a layer, or an expert lacks a tensor.
        """
        budget, held = None if memory_budget is None else parse_size(memory_budget), Experts.parse(experts_as)
        if held and derived_folder is not None:  # what is derived of compacted experts is something else
            derived_folder = Path(derived_folder) / str(held).replace(":", "-")
        (endpoints, towers), vocabulary = open_endpoints((base, *experts), locate, tower), None
        if tokenizer is not None:
            vocabulary = open_vocabulary(endpoints, tokenizer)
            endpoints = remapped(endpoints, vocabulary, Ties(endpoints).stored, dtype)
        pool = Pool(endpoints, usable(device), dtype, derived_folder, vocabulary, towers=towers)
        pool.tower, found = dict(tower or {}), align(pool.endpoints, pool.has, pool.shape, drop, towers)
        pool.fixed, pool.kept, pool.heads, pool.left_out = found.fixed, found.kept, found.heads, found.left_out
        pool.notes += [place.describe(model, pool.base) for model, place in towers.items()] + found.notes
        pool.warnings += [*found.warnings, *(vocabulary.notes if vocabulary is not None else ())]
        pool.warnings += doubts(pool.endpoints, vocabulary is None, towers)
        pool.compacted = Compacted(pool, held, pool._ties.stored)
        pool._limits = limits(pool, budget)
        pool._plan()
        pool.notes += pool.compacted.pack()
        return pool

    @property
    def base(self) -> str:
        """The name of the first endpoint."""
        return next(iter(self.endpoints))

    @property
    def base_checkpoint(self) -> Checkpoint:
        """The first endpoint's checkpoint."""
        return self.endpoints[self.base]

    @cached_property
    def whole(self) -> Pool:
        """The same endpoints with every expert as its file has it, streamed: what an export reads. Itself where nothing
        is compacted."""
        if not self.compacted.experts:
            return self
        folder = self.derived_folder and Path(self.derived_folder).parent
        endpoints = {model: found for model, found in self.endpoints.items() if model not in self.joined}
        pool = replace(self, endpoints=endpoints, derived_folder=folder, joined={}, _limits=(None, 0), _streams=True)
        pool._plan()
        return pool

    @cached_property
    def words(self) -> Words:
        """The tokenizer that its models are asked with: the vocabulary's, else the base's own."""
        return self.vocabulary.words if self.vocabulary else Words(self.base_checkpoint.path)

    @property
    def memory(self) -> MemoryPlan:
        """What lies where. Another object whenever that changes."""
        return self._residence.plan

    @cached_property
    def layouts(self) -> dict[str, Layout]:
        """Of what can be merged: tensors that are left out have no place."""
        return {model: layout(self._stored_names(model)) for model in self.endpoints}

    @cached_property
    def searched(self) -> Layout:
        """The base's layout without what stands beside the language tower, where a merge cannot change that."""
        whole, places = self.layouts[self.base], list(self.towers.values())
        inside = lambda names: tuple(n for n in names if all(place.holds(n) for place in places))
        return replace(whole, pre=inside(whole.pre), post=inside(whole.post))

    @cached_property
    def outputs(self) -> list[str]:
        """Outputs that a configuration could tie and that some endpoint has as tensors of their own: what a live model
        must hold apart to be any merge of these endpoints."""
        return self._ties.outputs(set().union(*map(self._stored_names, self.endpoints)))

    def has(self, ref: Ref) -> bool:
        """Whether there is such a tensor, stored, tied or derived."""
        if ref.model in self.derived:
            return self.derived.has(ref)
        return self._ties.stored(ref) is not None

    def shape(self, ref: Ref) -> tuple[int, ...]:
        """Of a tensor, stored, tied or derived; read from headers, not from weights."""
        shape = self.derived.job(ref).shape if ref.model in self.derived else self._info(ref).shape
        return shape if ref.rows is None else (ref.rows[1] - ref.rows[0], *shape[1:])

    def shared_with(self, ref: Ref) -> str | None:
        """The tensor that an output shares because its model ties it; None for a tensor of its own, or none."""
        return self._ties.shared_with(ref)

    def stored_dtype(self, ref: Ref) -> torch.dtype:
        """The dtype in the file; `get` may give the common dtype of all endpoints instead."""
        return torch.float32 if ref.model in self.derived else self._info(ref).dtype

    def common_dtype(self, ref: Ref) -> torch.dtype:
        """What a tensor is computed from; see planning.py."""
        return common_dtype(self, ref)

    def get(self, ref: Ref) -> torch.Tensor:
        """A tensor on the pool's device, in the common dtype of its name (integers as they are)."""
        return self.staged(ref).to(self.device)

    def staged(self, ref: Ref) -> torch.Tensor:
        """The same where it lies: a streamed tensor in host memory, pinned or a view of the mapped file."""
        return self._residence.staged(ref)

    def part(self, ref: Ref, begin: int, end: int) -> torch.Tensor:
        """Elements [begin, end) of a tensor, flat, where it lies."""
        return self._residence.part(ref, begin, end)

    def stored(self, ref: Ref) -> torch.Tensor:
        """A tensor as it is stored, a view of the mapped file; of a compacted one what stands for it."""
        if ref in self.compacted:
            return self.compacted.get(ref)
        if ref.model in self.derived:
            tensor = self.derived.get(ref)
        else:
            tensor = self.endpoints[ref.model].get(self._info(ref).name)
        return tensor if ref.rows is None else tensor[slice(*ref.rows)]

    def resident(self, refs: Iterable[Ref]) -> bool:
        """Whether these tensors stay where a kernel finds them."""
        return self._residence.resident(refs)

    def give_back(self, refs: Iterable[Ref]) -> None:
        """Take streamed tensors' pages out of memory. Harmless while they are in use: they are read again."""
        self._residence.give_back(refs)

    def unmap(self, ref: Ref) -> None:
        """Take any tensor's pages out of memory; as harmless."""
        if ref.model in self.derived:
            self.derived.unmap(ref)
        elif self.has(ref):
            self.endpoints[ref.model].release(self._info(ref).name)

    def release(self, refs: Iterable[Ref]) -> None:
        """Drop tensors and their statistics: a merge to disk streams through the pool."""
        for ref in refs:
            self._residence.forget(ref)
            self.statistics.forget(ref)

    def derive(self, method: str, compute: Compute, jobs: Sequence[Job], survey: Survey | None = None) -> str:
        """Make a derived model known, computed when a tensor of it is first read. Returns its name; see Derived."""
        count, model = len(self.derived), self.derived.add(method, compute, jobs, survey)
        if len(self.derived) > count:
            self._plan()
        return model

    def add(self, name: str, what: str, checkpoint: Checkpoint) -> None:
        """One more endpoint; see joined.py, which also says `what`. Raises BadInput where the budget has no room."""
        self.endpoints[name], self.joined[name] = checkpoint, what
        try:
            self._met()
        except BadInput:
            self.drop((name,))
            raise

    def drop(self, names: Iterable[str]) -> None:
        """Let endpoints that joined go."""
        for name in names:
            self.release(Ref(name, tensor) for tensor in self.endpoints[name].tensors)
            del self.endpoints[name], self.joined[name]
        self._met()

    def _met(self) -> None:
        self._ties = Ties(self.endpoints)
        self.__dict__.pop("layouts", None)
        self._plan()

    def read_all(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Read every byte once: content hashes, Gram matrices, and the check for NaN and infinity. progress(bytes read,
        bytes in all) is called after each tensor. Raises CheckpointError naming tensor and endpoint of the first task
        vector that is not finite."""
        self._hashes |= hash_endpoints(self, self._hash, partial(check_task_vectors, self), progress)

    def content_hashes(self) -> dict[str, str]:
        """SHA-256 of each endpoint's tensors, but for those that joined."""
        for model in [name for name in self.endpoints if name not in self._hashes and name not in self.joined]:
            names = self.endpoints[model].tensors
            self._hashes[model] = combine_hashes({name: self._hash(Ref(model, name)) for name in names})
        return dict(self._hashes)

    def _hash(self, ref: Ref) -> str:
        if not self.resident((ref,)):
            self._residence.use(ref)
        return self.endpoints[ref.model].tensor_hash(ref.tensor)

    def _info(self, ref: Ref) -> TensorInfo:
        checkpoint = self.endpoints.get(ref.model)
        if checkpoint is None:
            raise BadInput(ref.model, "not in the pool", ", ".join(self.endpoints))
        info = checkpoint.tensors.get(self._ties.stored(ref))
        if info is None:
            raise CheckpointError(ref.model, f"no tensor {ref.tensor!r}", "every tensor of the base")
        return info

    def _stored_names(self, model: str) -> list[str]:
        return [name for name in self.endpoints[model].tensors if Ref(model, name) not in self.left_out]

    def reserve(self, size: int) -> None:
        """Leave so many bytes of the budget to others, such as activations of a fit, and no more than that. Raises
        BadInput where what must be there then has no room; without a budget nothing changes."""
        before = self._reserved
        if self._limits[0] is not None and size != before:
            self._reserved = size
            try:
                self._plan()
            except BadInput:
                self._reserved = before
                raise

    def _plan(self) -> None:
        budget, host = self._limits[0] and self._limits[0] - self._reserved, self._limits[1]
        self._residence.follow(plan_pool(self, budget, host, self._streams))
