"""What an exported checkpoint is beside its merged weights: dtypes and shapes, config.json, tokenizer, code; and
whether all of it fits together, which is asked before anything is written and again before it gets its final name."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from merge3.checkpoint import open_checkpoint
from merge3.checkpoint.architecture import configuration, loading, tied, why_not
from merge3.checkpoint.beside import speaking_files, template_of
from merge3.checkpoint.depth import stack_section
from merge3.checkpoint.layout import Layout, Ref
from merge3.errors import CheckpointError
from merge3.pool import Pool
from merge3.program import Program
from merge3.recipe import Recipe
from merge3.stacking import Origins, check_kinds, in_place, stacked

Specs = dict[str, tuple[torch.dtype, tuple[int, ...]]]
# Of the model that the output is laid out after. Generation settings go with the tokenizer whose tokens they name.
MODEL_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "image_processor*",
)
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def lead(recipe: Recipe) -> str:
    """The endpoint whose configuration the output has: the base, else the first source."""
    return str(recipe.base_model or recipe.slices[0].base_model or recipe.slices[0].sources[0].model)


def output_dtype(recipe: Recipe, pool: Pool, ref: Ref) -> torch.dtype:
    """out_dtype, else dtype, else what the endpoints' dtypes promote to."""
    name = recipe.out_dtype or recipe.dtype
    return getattr(torch, name) if name else pool.common_dtype(ref)


def output_specs(recipe: Recipe, program: Program, pool: Pool) -> Specs:
    """dtype and shape of every output tensor, in the order of the model."""
    dtypes = {job.name: output_dtype(recipe, pool, job.refs[0]) for job in program.jobs}
    for name, ref in program.copies.items():
        stored = pool.stored_dtype(ref)
        dtypes[name] = output_dtype(recipe, pool, ref) if stored.is_floating_point else stored
    return {name: (dtypes[name], shape) for name, shape in program.shapes.items()}


def output_config(recipe: Recipe, program: Program, specs: Specs, pool: Pool) -> dict[str, Any]:
    """config.json: the lead's, with the output's depth, dtype and whether its output is tied."""
    config = stacked(lead(recipe), program.origins, pool)
    inner = stack_section(config, pool.layouts[lead(recipe)].prefix)
    dtype = next((d for d, _ in specs.values() if d.is_floating_point), None)
    nested = [part for key, part in config.items() if key.endswith("_config") and isinstance(part, dict)]
    for section in (config, inner, *nested):
        for key in ("dtype", "torch_dtype"):
            if dtype is not None and key in section:
                section[key] = str(dtype).removeprefix("torch.")
    if tied(config) and any(name in specs for name in pool.outputs):
        for section in (config, inner):
            if section is config or "tie_word_embeddings" in section:
                section["tie_word_embeddings"] = False
    return config


def check_output(
    config: Mapping[str, Any], specs: Specs, origins: Origins, recipe: Recipe, pool: Pool, where: str
) -> None:
    """Refuse an output that its own configuration does not describe: a parameter missing, one too many, another shape,
    a layer of another kind. origins: of its layers, as a Program has them.

    What the lead itself stores beside its architecture (and transformers ignores) may stay. Architectures that this
    transformers does not know are compared with the lead's own tensors. Raises CheckpointError.
    """
    base = pool.endpoints[lead(recipe)]
    shapes = {name: shape for name, (_, shape) in specs.items()}
    said = loading(config, shapes)
    if said is None:
        _check_buildable(config, recipe, pool, where)
        _check_unknown(shapes, recipe, pool, where)
        check_kinds(lead(recipe), config, origins, pool, where)
        return
    if said.missing:
        name = said.missing[0]
        whole = name in base.tensors or tuple(origins) != in_place(lead(recipe), pool)
        also = "" if whole else f", and {lead(recipe)} lacks it too: its checkpoint is not whole"
        raise CheckpointError(
            where,
            f"the output would lack {name!r}{_more(said.missing)}{also}",
            f"every parameter of {said.architecture}",
        )
    if said.mismatched:
        name, stored, own = said.mismatched[0]
        raise CheckpointError(
            where, f"tensor {name!r} of shape {list(stored)}", f"{list(own)} as config.json says of {said.architecture}"
        )
    extra = [name for name in said.unexpected if name not in base.tensors]
    if extra:
        raise CheckpointError(
            where, f"tensor {extra[0]!r}{_more(extra)} is no parameter of {said.architecture}", "none too many"
        )
    check_kinds(lead(recipe), config, origins, pool, where)


def _check_buildable(config: Mapping[str, Any], recipe: Recipe, pool: Pool, where: str) -> None:
    """What transformers makes of the lead it must make of the output: else its config.json says what cannot be."""
    base = pool.endpoints[lead(recipe)]
    known = configuration(base.config) is not None
    reason = why_not(config) if known else ""
    if reason or loading(base.config, {name: info.shape for name, info in base.tensors.items()}) is not None:
        found = "transformers cannot build the output from its config.json" + (f" ({reason})" if reason else "")
        raise CheckpointError(where, found, f"one as that of {lead(recipe)}, which it builds")


def _check_unknown(shapes: Mapping[str, tuple[int, ...]], recipe: Recipe, pool: Pool, where: str) -> None:
    """Compare tensors with the lead's: all of them where layers are in place. Else those outside the layers, and each
    layer with the lead's at its place; where all of those are alike there may be more, or fewer."""
    first = lead(recipe)
    base, stack = pool.endpoints[first], pool.layouts[first]
    own = {name: info.shape for name, info in base.tensors.items()}
    if not stack.layer_names:
        return
    expected = "the tensors of an unknown architecture"
    if not recipe.whole:
        mine, layers = _by_layer(own, stack), _by_layer(shapes, stack)
        alike = all(mine[layer] == mine[0] for layer in range(stack.layers))
        for layer in range(len(layers)):
            there = mine.get(0 if alike else layer)
            if layers.get(layer) != there:
                found = f"layer {layer} of the output has other tensors than layer {0 if alike else layer} of {first}"
                raise CheckpointError(where, found, expected)
        if not alike and len(layers) != len(mine):
            raise CheckpointError(where, f"{len(layers)} layers, {len(mine)} of several kinds in {first}", expected)
        own, shapes = ({n: s for n, s in found.items() if stack.layer_of(n) is None} for found in (own, shapes))
    if odd := sorted(set(shapes) ^ set(own)):
        raise CheckpointError(where, f"tensor {odd[0]!r} is in one of output and {first} only", expected)
    for name, shape in shapes.items():
        if shape != own[name]:
            found = f"tensor {name!r} of shape {list(shape)}"
            raise CheckpointError(where, found, f"{list(own[name])} as in {first}, of an unknown architecture")


def _by_layer(shapes: Mapping[str, tuple[int, ...]], stack: Layout) -> dict[int, dict[str, tuple[int, ...]]]:
    """layer -> what follows its number -> shape"""
    layers: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if (layer := stack.layer_of(name)) is not None:
            layers.setdefault(layer, {})[name.removeprefix(f"{stack.prefix}.{layer}.")] = shape
    return layers


def check_written(folder: Path, specs: Specs, config: Mapping[str, Any]) -> None:
    """Read the headers of what was written: every tensor is there whole, and config.json is the one checked before."""
    written = open_checkpoint(folder)
    found = {name: (info.dtype, info.shape) for name, info in written.tensors.items()}
    if found != specs or written.config != config:
        raise CheckpointError(
            folder, "what was written differs from what was planned", "the planned tensors", "is the disk sound?"
        )


def _more(names) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def tokenizer_folder(recipe: Recipe, pool: Pool) -> Path:
    """The folder whose tokenizer and generation settings the output has, and candidates are asked with."""
    return pool.vocabulary.folder if pool.vocabulary is not None else pool.endpoints[lead(recipe)].path


def chat_template(recipe: Recipe, pool: Pool) -> str | None:
    """The template that a recipe asks for, as text: what chat_template.jinja holds and prompts are wrapped in. None
    where the tokenizer's own stays."""
    return template_text(recipe.chat_template, [pool.endpoints[str(model)].path for model in recipe.models()])


def template_text(said: str | None, folders: Sequence[Path]) -> str | None:
    """The text of a recipe's `chat_template`. folders: of its models.

    `auto`: the template that most of them have, the first of several; as mergekit does, whose choice among equally many
    is random.
    """
    if said != "auto":
        return _CHATML if said == "chatml" else said
    counted = Counter(text.strip() for folder in folders if (text := template_of(folder)) is not None)
    return counted.most_common(1)[0][0] if counted else None


def template_key(recipe: Recipe | None) -> tuple | None:
    """Equal where `chat_template` is, in one pool, without reading anything."""
    if recipe is None:
        return None
    return recipe.chat_template, tuple(recipe.models()) if recipe.chat_template == "auto" else ()


def side_files(recipe: Recipe, pool: Pool) -> dict[str, Path]:
    """Name in the output -> file to copy: the tokenizer's, generation settings, processors, and code that an `auto_map`
    names."""
    base, donor = pool.endpoints[lead(recipe)].path, tokenizer_folder(recipe, pool)
    found = speaking_files(donor)
    found |= {f.name: f for pattern in MODEL_FILES for f in base.glob(pattern) if f.is_file()}
    described = {json_file for folder in (base, donor) for json_file in folder.glob("*config.json")}
    for file in described:
        found |= {f.name: f for f in _code(file)}
    return found


def _code(config_file: Path) -> list[Path]:
    """The Python files that a configuration's auto_map names, and those they import from their own folder."""
    try:
        names = json.dumps(json.loads(config_file.read_text(encoding="utf-8")).get("auto_map") or {})
    except (OSError, ValueError, AttributeError):
        return []
    waiting = [config_file.parent / f"{module}.py" for module in re.findall(r'"(?:[^"]*--)?(\w+)\.\w+"', names)]
    found: list[Path] = []
    while waiting:
        file = waiting.pop()
        if file in found or not file.is_file():
            continue
        found.append(file)
        text = file.read_text(encoding="utf-8", errors="replace")
        imported = re.findall(r"^\s*(?:from\s+\.(\w+)\s+import|import\s+\.(\w+))", text, re.MULTILINE)
        waiting += [file.parent / f"{name}.py" for pair in imported for name in pair if name]
    return found
