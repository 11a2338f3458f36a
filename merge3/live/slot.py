"""The slot: a live transformers model whose weights a recipe overwrites in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import torch

from merge3.checkpoint.layout import Layout, Ref
from merge3.checkpoint.naming import by_token
from merge3.errors import CheckpointError, ConfigError, RecipeError
from merge3.hops import Hop, hops_of, outside_of, writers_known
from merge3.live.binding import bind
from merge3.live.heads import Heads, Labelled
from merge3.live.load import load_model, promoted
from merge3.live.overlap import Overlap
from merge3.live.path import Path
from merge3.live.writing import Writer, in_place, kept_wide
from merge3.memory import MemoryPlan
from merge3.methods.execute import Output
from merge3.pool import Pool
from merge3.program import Program, compile
from merge3.recipe import Recipe
from merge3.stacking import check_live
from merge3.variants import Head, Kept, Variants


class Shown(NamedTuple):
    """Whose variants a live model has the weights of. task: None for what all have in common. model: the endpoint that
    is their folder, None for a recipe's; names: of its tensors, in the folder -> in the pool, where they differ. asked:
    the recipe and seed; kept: what the recipe keeps."""

    variants: Variants
    task: str | None = None
    model: str | None = None
    names: Mapping[str, str] = MappingProxyType({})
    asked: tuple[Recipe, int] | None = None
    kept: Mapping[str, str] = MappingProxyType({})


class Slot:
    """One model over a pool. dtype: of its weights (default: what the endpoints' dtypes promote to).

    Parameters keep their addresses for the slot's whole life, so what was captured or compiled over them stays valid
    from candidate to candidate. The exception are heads: one of another shape is another Parameter (see Heads).

    overlap: on a GPU, merge layer by layer while the layers before already compute (see overlap.py) instead of
    the whole model in one launch. The weights are the same; where it pays, `benchmarks/gpu_check.py` tells.

        slot = Slot(Pool.open("base", ["math", "italian"]))
        slot.swap(Recipe.from_yaml("ties.yaml"))
        slot.model(input_ids)
    """

    def __init__(self, pool: Pool, dtype: torch.dtype | None = None, overlap: bool = False):
        self.pool = pool
        self.model = load_model(pool, dtype or promoted(pool))
        self._weights = bind(self.model, pool)
        self._rounded = kept_wide(self._weights, pool, dtype)
        if pool.vocabulary is not None:  # the file's rows are others
            self._copy(pool.base, [name for name in self._weights if by_token(name)])
        self._heads = Heads(self.model, pool, self._weights)
        self._writer = Writer(pool)
        self._overlap = Overlap(self.model, self._layout, pool.device) if overlap else None
        self.path = Path(self.model, pool)
        self._writers = writers_known(self._layout.layer_names)
        # Whose embedding and head a path has, while they are in place, and under which plan.
        self._ends: tuple[tuple[str, str], MemoryPlan] | None = None
        held = {name: self._rounded.get(name, tensor.dtype) for name, tensor in self.written().items()}
        self._kept = Kept(pool, pool.derived_folder, held)
        self._shown: Shown | None = None  # whose the weights are, and which task's

    def swap(
        self,
        recipe: Recipe,
        seed: int = 0,
        where: str = "recipe",
        task: str | None = None,
        stored: bool = False,
    ) -> dict[str, str]:
        """Overwrite the model with the recipe's merge. Returns tensors that are kept, with the reason.

        seed: of random keeps; the same seed drops the same elements for every candidate. task: of a method with a
        result per task, whose; None: what all have in common. Where only the task changes only what differs is written.
        stored: of experts as their files have them, however the pool holds them: what an export writes.
        A path is followed through layers as they lie in the pool: of its weights only those outside the stack are
        written. Raises RecipeError if another recipe makes another number of layers than the base has, BadInput for
        another task.
        """
        shown = self._shown
        if task is not None and shown is not None and shown.asked == (recipe, seed):
            shown.variants.check(task)
            self._vary(task)
            self._heads.show_merged()
            return shown.kept
        program = self.compile(recipe, where)
        if stored and self.pool.whole is not self.pool:
            self.run(compile(recipe, self.pool.whole, where), seed, self.pool.whole)
            return program.kept
        if (hops := self._hops(recipe)) is not None:
            self._outside(program, outside_of(recipe), seed)
            self.path.follow(hops)
            return program.kept
        if task is None:
            self.run(program, seed)
            return program.kept
        variants = self.variants(recipe, seed, where, program)
        variants.check(task)
        self.run(program, seed)
        self._shown = Shown(variants, asked=(recipe, seed), kept=program.kept)
        self._vary(task)
        self._heads.show_merged()
        return program.kept

    def variants(
        self, recipe: Recipe, seed: int = 0, where: str = "recipe", program: Program | None = None
    ) -> Variants:
        """What the recipe's tasks differ by, packed by the first call. Raises RecipeError for an ordinary recipe."""
        program = program or self.compile(recipe, where)
        if not program.tasks:
            raise RecipeError(where, f"{recipe.method} makes one model for all tasks", "a method with one for each")
        return self._kept.of(recipe, program, seed, where)

    def lend(self, variants: Variants, model: str) -> None:
        """Have the heads of a packed folder's tasks, of the endpoint `model`, at hand as `model:task`; see use_head.
        Raises CheckpointError where its tensors are not as in this live model."""
        names = variants.names_in(self.pool.endpoints[model])
        heads = self.pool.heads.get(model, ())
        for stored, name in names.items():
            weight = self._weights.get(name)
            if name not in heads and weight is not None and tuple(weight.shape) != variants.spec(stored)[1]:
                found = f"tensor {stored!r} of shape {list(variants.spec(stored)[1])}"
                raise CheckpointError(model, found, f"{list(weight.shape)}, as in the live model, to vary it")
        there = {name: stored for stored, name in names.items()}
        for task in variants.tasks if heads else ():
            self._heads.lent[f"{model}:{task}"] = Head(variants, task, there), heads

    def show(self, variants: Variants, model: str, task: str | None = None) -> None:
        """Overwrite the model with a task's variant of a packed folder that the pool has as the endpoint `model`, the
        task's head included; None: with what all have in common. Raises BadInput, or CheckpointError as `lend`."""
        if task is not None:
            variants.check(task)
        if self._shown is None or self._shown.variants is not variants or self._shown.model != model:
            self.lend(variants, model)
            self.load(model)
            self._shown = Shown(variants, None, model, variants.names_in(self.pool.endpoints[model]))
        self._vary(task)
        lent = f"{model}:{task}"
        self.use_head(lent if lent in self._heads.lent else model)

    def _vary(self, task: str | None) -> None:
        shown, variants = self._shown, self._shown.variants
        if task == shown.task:
            return
        weights, outputs, rounded = self.written(), [], dict(self._rounded)
        aside = self.pool.heads.get(shown.model, ())  # of an endpoint they are lent
        for stored, step in variants.steps(task, shown.task).items():
            name = shown.names.get(stored, stored)
            if name in aside or name not in weights:
                continue
            out, dtype = weights[name], variants.spec(stored)[0]
            if out.dtype != dtype:
                rounded[name] = dtype
            if not in_place(out, name, rounded):
                step.whole = True
            outputs.append((name, step, out))
        self._settle()
        self._shown = None  # whatever interrupts this leaves neither
        self._run(outputs, 0, rounded)
        self._share(variants.about["tied"])
        self._shown = shown._replace(task=task)

    def run(self, program: Program, seed: int = 0, pool: Pool | None = None) -> None:
        """Overwrite the model with what a program of this pool makes; see `swap`. pool: another one of the same models,
        whose program it is."""
        self._shown = None
        outputs = program.outputs(self.written(), (pool or self.pool).statistics)
        if pool is not None:
            self._settle()
            Writer(pool).run(outputs, seed, self._rounded)
        elif self._overlap:
            self._run_by_layer(outputs, seed)
        else:
            self._run(outputs, seed)
        self._share(program.ties)
        if self._heads.merged:
            self._settle()
            self._heads.show_merged()

    def _outside(self, program: Program, ends: tuple[str, str], seed: int) -> None:
        """Write what a path has outside the stack, if it is not there."""
        if self._ends is not None and self._ends[0] == ends and self._ends[1] is self.pool.memory:
            return
        self._shown, layout = None, self._layout
        self._settle()
        outside = {name: tensor for name, tensor in self.written().items() if layout.layer_of(name) is None}
        self._run(program.outputs(outside, self.pool.statistics), seed)
        self._share(program.ties)
        self._ends = ends, self.pool.memory

    def _hops(self, recipe: Recipe) -> tuple[Hop, ...] | None:
        """The path that a recipe is, if it is one that can be followed; another one as deep as the base is a merge like
        others. Raises ConfigError for one that is neither."""
        hops = hops_of(recipe, self._writers)
        if hops is None:
            return None
        try:
            self.path.check(dict.fromkeys(hop.model for hop in hops))
        except ConfigError:
            if len(hops) != self._layout.layers:
                raise
            return None
        return hops

    def _leave(self) -> None:
        """The model's own layers again, and nothing of a path."""
        self.path.leave()
        self._ends = None

    def written(self) -> dict[str, torch.Tensor]:
        """What a swap writes: checkpoint name -> the live tensor, and the model's stack what they are. Of a head that
        recipes merge it is the merge's own, which is shown afterwards."""
        self._leave()
        # Buffers that the model computes itself are not among its weights; heads may be every endpoint's own.
        own = set(self.pool.heads.get(self.pool.base, ()))
        return {name: tensor for name, tensor in self._weights.items() if name not in own} | self._heads.merged

    def placed(self) -> dict[str, torch.Tensor]:
        """As `written`, but heads that recipes merge are where the model has them when they are shown."""
        self.use_head(None)
        return self.written() | {name: self.model.get_parameter(name) for name in self._heads.merged}

    def write_together(self, candidates: Sequence[list[Output]], seed: int) -> None:
        """Write the same outputs of several candidates, beside the model; see Writer."""
        self._settle()
        self._writer.run_together(candidates, seed, self._rounded)

    def compile(self, recipe: Recipe, where: str = "recipe") -> Program:
        """What `swap` would run. Raises RecipeError for what it would refuse."""
        program = compile(recipe, self.pool, where)
        followed = self._hops(recipe) is not None
        if not followed:
            check_live(program.origins, self.pool, where)
        aside = {*self.pool.fixed, *self.pool.heads.get(self.pool.base, ())}
        for name in self._weights:  # what no source has would stay the last swap's
            if followed and self._layout.layer_of(name) is not None:
                continue
            if name not in program.shapes and name not in program.ties and name not in aside:
                raise RecipeError(where, f"tensor {name!r} is in none of its models", "a base_model that has it")
        return program

    def load(self, model: str, stored: bool = True) -> None:
        """Overwrite the model with an endpoint, head included; a language model in the base's tower. stored: as its
        files have it; else as the pool holds it."""
        self._shown = None
        self._settle()
        self._leave()
        self.use_head(model)
        self._copy(model, self._weights, stored)

    def _copy(self, model: str, names: Iterable[str], stored: bool = True) -> None:
        pool = self.pool.whole if stored and model not in self.pool.joined else self.pool
        with torch.no_grad():
            for name in names:
                ref, weight = Ref(model, name), self._weights[name]
                if name in self.pool.heads.get(model, ()):
                    continue
                if model in self.pool.towers:  # what a language model lacks is the base's, whatever was here before
                    weight.copy_(pool.get(Ref(self.pool.base, name)))
                if not pool.has(ref):
                    continue
                tensor = pool.get(ref)
                if tensor.shape != weight.shape:  # more, or fewer, tokens: the rows that both have
                    if tensor.shape[1:] != weight.shape[1:]:
                        continue
                    rows = min(len(tensor), len(weight))
                    tensor, weight = tensor[:rows], weight[:rows]
                weight.copy_(tensor)

    def use_head(self, model: str | None) -> None:
        """Put an endpoint's own head (tensors outside the backbone) on the live model, or (None) the head of the merge
        that was swapped in last: the base's where heads answer different questions. See Heads for its addresses."""
        self._heads.show(model)

    @property
    def lent_heads(self) -> dict[str, tuple[Labelled, Sequence[str]]]:
        """Heads of models that are no endpoints, to be put on as theirs are: name -> (checkpoint, head's tensors)."""
        return self._heads.lent

    def _run(self, outputs: list[Output], seed: int, rounded: Mapping[str, torch.dtype] | None = None) -> None:
        self._writer.run(outputs, seed, self._rounded if rounded is None else rounded)

    def _run_by_layer(self, outputs: list[Output], seed: int) -> None:
        self._settle()
        stages: dict[int | None, list[Output]] = {}
        for output in outputs:
            stages.setdefault(self._layout.layer_of(output[0]), []).append(output)
        order = sorted(stages, key=lambda stage: -1 if stage is None else stage)
        self._overlap.run((stage, partial(self._run, stages[stage], seed)) for stage in order)

    def _share(self, ties: dict[str, str]) -> None:
        """A merge of models that all tie their output, in a live model that holds it apart for the sake of others."""
        for name in self.pool.outputs:
            source = ties.get(name)
            if source is not None and name in self._weights:
                self._settle()
                with torch.no_grad():
                    self._weights[name].copy_(self._weights[source])

    @property
    def _layout(self) -> Layout:
        return self.pool.layouts[self.pool.base]

    def _settle(self) -> None:
        if self._overlap:
            self._overlap.settle()
