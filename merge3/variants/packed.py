"""One model per task in a folder: an ordinary checkpoint of what all tasks have in common, and beside it two files.

variants.safetensors holds the parts that kinds.py makes, named `<task>/<part>/<tensor>`, each task's own head as
`<task>/head/<tensor>` where experts keep theirs, and the router's means. variants.json says what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from merge3.checkpoint import Checkpoint, open_checkpoint
from merge3.checkpoint.layout import Ref
from merge3.checkpoint.read import INDEX, SINGLE, TensorInfo, read_header
from merge3.checkpoint.write import CheckpointWriter, Spec
from merge3.errors import BadInput, CheckpointError, RecipeError
from merge3.files import resource_error
from merge3.methods import VARIANTS, Unpacked, execute
from merge3.methods.variants import parameters_of
from merge3.pool import Pool
from merge3.program import Program
from merge3.recipe import Recipe, nearest
from merge3.variants.about import ABOUT, FILE, fingerprint, read_about, write_about
from merge3.variants.kinds import KINDS, Kind
from merge3.variants.source import Parts, Source

_MISSING = object()
_OF_HEADS = ("id2label", "label2id", "num_labels", "problem_type")  # what a configuration says of them


@dataclass(frozen=True, eq=False)
class Variants:
    """A folder of variants, open. tasks: task -> what is said of it: model, varied (names of tensors that differ from
    the common model's), bytes, config (of its own head), and what its kind needs. common: the checkpoint.

        variants = Variants.open("packed")
        slot.show(variants, "math")
    """

    folder: Path
    common: Checkpoint
    parts: Checkpoint
    kind: Kind
    tasks: Mapping[str, Mapping[str, Any]]
    about: Mapping[str, Any]
    device: torch.device
    _there: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)  # copies on another device

    @staticmethod
    def open(folder: str | Path, device: torch.device | str = "cpu") -> Variants:
        """Read headers, and a little of every tensor. Raises CheckpointError where the files are not whole, or are not
        those that were written together."""
        folder = Path(folder)
        about = read_about(folder)
        if not (folder / FILE).is_file():
            raise CheckpointError(folder, f"no {FILE}", f"the file that was written with {ABOUT}")
        parts = Checkpoint(folder, {}, read_header(folder / FILE))
        variants = Variants(
            folder,
            open_checkpoint(folder),
            parts,
            KINDS[about["parts"]],
            about["tasks"],
            about,
            torch.device(device),
        )
        if about["content"]["parts"] != fingerprint(parts):
            raise CheckpointError(folder / FILE, f"not the file that was written with {ABOUT}", "both of one merge")
        if about["content"]["common"] != fingerprint(variants.common):
            found = f"another model than {FILE} was written for"
            raise CheckpointError(folder, found, "the merge's own, as it was", "--no-variants asks it as it is")
        return variants

    def check(self, task: str, where: str = "task") -> None:
        """Raises BadInput for a task without a variant."""
        if task not in self.tasks:
            raise BadInput(where, f"no variant {task!r}", ", ".join(self.tasks), nearest(task, self.tasks))

    def steps(self, task: str | None, before: str | None = None) -> dict[str, Any]:
        """What makes the live model a task's (None: the common one) where it is now that of `before`: name -> step, of
        tensors that differ. Raises BadInput."""
        if task is not None:
            self.check(task)
        names = [] if task is None else list(self.tasks[task]["varied"])
        left = set(self.tasks[before]["varied"]) if before is not None else set()
        found = {}
        for name in names:
            seen = before if name in left else None
            found[name] = self.kind.step(self.part, self.shared(name), name, task, self.tasks[task], seen)
        for name in left - set(names):
            found[name] = self.tensor_step(name)
        return found

    def tensor_step(self, name: str) -> Any:
        """The common tensor as it is."""
        return Unpacked("places", (self.shared(name), None, None, None))

    def tensor(self, name: str, task: str) -> torch.Tensor:
        """One tensor of a task's model, in the common one's dtype; its own head where it has one."""
        if (own := self.head(name, task)) is not None:
            return own
        if name not in self._varied[task]:
            return self.common.get(name)
        common = self.shared(name)
        out = torch.empty_like(common)
        step = self.kind.step(self.part, common, name, task, self.tasks[task], None)
        step.whole = True
        execute([(name, step, out)], lambda ref: ref)
        return out.cpu()

    def head(self, name: str, task: str) -> torch.Tensor | None:
        """A tensor of the task's own head; None where it has the common model's."""
        stored = f"{task}/head/{name}"
        return self.parts.get(stored) if stored in self.parts.tensors else None

    def own_head(self, task: str) -> dict[str, TensorInfo]:
        """The tensors of the task's own head, by their names in a model; empty where it has the common one."""
        prefix, parts = f"{task}/head/", self.parts.tensors
        return {name.removeprefix(prefix): info for name, info in parts.items() if name.startswith(prefix)}

    def spec(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Of a tensor of the common model."""
        info = self.common.tensors[name]
        return info.dtype, info.shape

    def config(self, task: str) -> dict[str, Any]:
        """config.json of a task's model."""
        return self.common.config | self.tasks[task].get("config", {})

    def side_files(self) -> dict[str, Path]:
        """What a task's checkpoint has beside its weights and configuration: name in the folder -> file. No other
        weights, which are for the common model (a router, adapters), and none of another model's folder within."""
        files = {file.relative_to(self.folder).as_posix(): file for file in sorted(self.folder.rglob("*"))}
        others = {file.parent for file in files.values() if file.name in (ABOUT, "mergekit_config.yml")} - {self.folder}
        found = {}
        for name, file in files.items():
            own = name in (ABOUT, INDEX, "config.json") or (file.suffix == ".safetensors" and "/" not in name)
            hidden = any(part.startswith(".") for part in Path(name).parts)
            if file.is_file() and not own and not hidden and others.isdisjoint(file.parents):
                found[name] = file
        return found

    def sizes(self) -> dict[str, Any]:
        """Bytes: of each task's parts, of what is not a task's own (`base`), of the common checkpoint's tensors, of all
        files in the folder, and of the experts that they stand for."""
        tasks = {task: told["bytes"] for task, told in self.tasks.items()}
        of_parts = sum(info.nbytes for info in self.parts.tensors.values())
        return {
            "tasks": tasks,
            "base": of_parts - sum(tasks.values()),
            "common": sum(info.nbytes for info in self.common.tensors.values()),
            "folder": sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file()),
            "experts": sum(self.about["experts_bytes"].values()),
        }

    @cached_property
    def _varied(self) -> dict[str, set[str]]:
        return {task: set(told["varied"]) for task, told in self.tasks.items()}

    def names_in(self, endpoint: Checkpoint) -> dict[str, str]:
        """Tensor of the folder -> what it is called in a pool that has the folder as this endpoint. Raises
        CheckpointError where the pool has made other tensors of them, as of a vocabulary."""
        places = {(info.file, info.offset, info.shape): name for name, info in endpoint.tensors.items()}
        found = {}
        for name, info in self.common.tensors.items():
            if (info.file, info.offset, info.shape) not in places:
                there = f"{name!r} has other rows in this pool than in the folder"
                raise CheckpointError(self.folder, there, "a pool without a vocabulary of its own")
            found[name] = places[info.file, info.offset, info.shape]
        return found

    def shared(self, name: str) -> torch.Tensor:
        """The common model's tensor, on the device."""
        return self._placed(f"common {name}", lambda: self.common.get(name))

    def part(self, name: str, default: Any = _MISSING) -> torch.Tensor:
        """A part, on the device."""
        if name not in self.parts.tensors and default is not _MISSING:
            return default
        return self._placed(name, lambda: self.parts.get(name))

    def _placed(self, name: str, read: Callable[[], torch.Tensor]) -> torch.Tensor:
        if self.device.type == "cpu":
            return read()
        if name not in self._there:
            self._there[name] = read().to(self.device)
        return self._there[name]


@dataclass(frozen=True, eq=False)
class Head:
    """The head of a task's model, as live/heads.py asks a checkpoint for one. names: in the pool -> in the folder."""

    variants: Variants
    task: str
    names: Mapping[str, str]

    @property
    def config(self) -> Mapping[str, Any]:
        """With the task's labels."""
        return self.variants.config(self.task)

    def get(self, name: str) -> torch.Tensor:
        """A tensor, by its name in the pool."""
        return self.variants.tensor(self.names[name], self.task)


def write_parts(folder: Path, recipe: Recipe, program: Program, pool: Pool, where: str = "recipe", **told: Any) -> None:
    """Beside the common checkpoint in `folder`, which is there: the two files. told: more for variants.json.

    Raises RecipeError, CheckpointError or ResourceError.
    """
    common, row = open_checkpoint(folder), VARIANTS[recipe.method]
    source = Source(program, pool, common, parameters_of(recipe, where), where)
    parts = KINDS[row.parts].pack(source)
    heads = _heads(source)
    specs = dict(parts.specs) | {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in heads.items()}
    if not specs:
        raise RecipeError(where, "no tensor that differs between tasks", "at least one")
    with CheckpointWriter(folder / "variants", specs, shard_size=2**63) as writer, torch.no_grad():
        for name, tensor in _all(parts, heads):
            writer.put(name, tensor.cpu())
    try:
        (folder / "variants" / SINGLE).rename(folder / FILE)
        (folder / "variants").rmdir()
    except OSError as error:
        raise resource_error(folder, error) from None
    written, told_of = read_header(folder / FILE), parts.about()
    tasks = {}
    for task, model in program.tasks.items():
        own = [name for name in specs if name.startswith(f"{task}/")]
        tasks[task] = {"model": model, "bytes": _bytes(specs, own), **told_of[task]}
        if heads:
            config = pool.endpoints[model].config
            tasks[task]["config"] = {key: config[key] for key in _OF_HEADS if key in config}
        tasks[task]["varied"] = list(parts.varied[task])
    about = {
        "method": recipe.method,
        "parts": row.parts,
        "content": {"common": fingerprint(common), "parts": fingerprint(Checkpoint(folder, {}, written))},
        "recipe": recipe.to_dict(),
        "experts_bytes": {m: sum(i.nbytes for i in pool.endpoints[m].tensors.values()) for m in program.tasks.values()},
        "tied": dict(program.ties),
        "tasks": tasks,
    }
    write_about(folder, about | told)


def check_parts(recipe: Recipe, program: Program, pool: Pool, specs: Mapping[str, Spec], where: str = "recipe") -> int:
    """Bytes that the parts take, or more. specs: of the common model. Raises RecipeError or CheckpointError for what
    `write_parts` would refuse, but for what only weights can tell."""
    settings, kind = parameters_of(recipe, where), KINDS[VARIANTS[recipe.method].parts]
    kind.check(program, pool)
    sizes = [kind.most(j, specs[j.name][0].itemsize, len(program.tasks), settings) for j in program.varied]
    heads = [pool.endpoints[ref.model].tensors[ref.tensor].nbytes for _, ref in _own_heads(program, pool)]
    return sum(sizes) + sum(heads)


def _all(parts: Parts, heads: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    yield from parts.tensors()
    yield from heads.items()


def _heads(source: Source) -> dict[str, torch.Tensor]:
    """Part -> each task's own head, where no recipe merges heads."""
    found = {}
    for task, ref in _own_heads(source.program, source.pool):
        tensor, there = source.pool.stored(ref), source.common.tensors.get(ref.tensor)
        found[f"{task}/head/{ref.tensor}"] = tensor if there is None else tensor.to(there.dtype)
    return found


def _own_heads(program: Program, pool: Pool) -> list[tuple[str, Ref]]:
    """(task, a tensor of its head), whatever the base calls its own."""
    if not any(name in pool.fixed for name in pool.heads.get(pool.base, ())):
        return []
    return [(task, Ref(model, n)) for task, model in program.tasks.items() for n in pool.heads.get(model, ())]


def _bytes(specs: Mapping[str, Any], names) -> int:
    total = 0
    for name in names:
        dtype, shape = specs[name]
        total += dtype.itemsize * int(torch.Size(shape).numel())
    return total
