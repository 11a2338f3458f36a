"""The command merge: a recipe, or one task of a packed folder, to a checkpoint on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from merge3.client.routing import with_router
from merge3.client.terminal import in_few_lines
from merge3.errors import BadInput
from merge3.export import merge_to_disk
from merge3.export_task import merge_task, write_task
from merge3.recipe import Recipe


def merge_files(
    what: Path,
    recipe: Recipe | None,
    out: Path,
    task: str | None,
    seed: int,
    shard_size: int,
    progress: Callable[[int, int], None],
    drop: Iterable[str],
) -> dict[str, Any]:
    """See merge_to_disk. recipe: None where `what` is a packed folder, of which one task is wanted."""
    if recipe is None:
        if task is None:
            raise BadInput(what, "a folder, not a recipe", "--task, which writes a task of a packed folder")
        return write_task(what, task, out, shard_size)
    if task is not None:
        return merge_task(recipe, task, out, None, seed, shard_size, progress, str(what), drop)
    pack = lambda folder: merge_to_disk(recipe, folder, None, seed, shard_size, progress, str(what), drop)
    return with_router(recipe, what, out, pack) if recipe.router else pack(out)


def show_merged(result: Mapping[str, Any]) -> None:
    """What a person reads of it."""
    for line in result["notes"]:
        print(line)
    for line in in_few_lines(result["kept"]):
        print(f"kept as it is: {line}")
    for name, reason in result["left_out"].items():
        print(f"left out: {name} ({reason})")
    if "variants" in result:
        print(f"the merge that all tasks have in common: {result['tensors']} tensors")
        for line in size_lines(result["variants"]):
            print(line)
        print(result["path"])
        return
    print(f"{result['tensors']} tensors, {result['parameters']:,} merged parameters: {result['path']}")


def size_lines(sizes: Mapping[str, Any]) -> list[str]:
    """What a packed folder takes, beside the experts that it stands for."""
    lines = [f"{task}: {size:,} bytes" for task, size in sizes["tasks"].items()]
    beside = f", {sizes['base']:,} of the base" if sizes["base"] else ""
    share = sizes["folder"] / max(1, sizes["experts"])
    lines.append(f"{sizes['folder']:,} bytes in all: {sizes['common']:,} of the common model{beside}")
    lines.append(f"{share:.2f} times what the {len(sizes['tasks'])} experts take ({sizes['experts']:,} bytes)")
    return lines
