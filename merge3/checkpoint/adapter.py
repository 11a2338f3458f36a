"""`model+adapter`: a checkpoint with a LoRA adapter applied, made by peft."""

from __future__ import annotations

import functools
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from merge3.checkpoint.architecture import refuse_made_up
from merge3.checkpoint.beside import PROCESSORS, copy_speaking, read_json
from merge3.checkpoint.factors import CONVERTED, FILE, PREFIX, SETTINGS, changed_by
from merge3.checkpoint.modules import copy_modules
from merge3.checkpoint.read import Checkpoint, open_checkpoint, read_header, resolve
from merge3.errors import CheckpointError, Unavailable

# What training puts around modules, and leaves in the names of their tensors: torch.compile, FSDP, checkpointing, DDP.
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PARALLEL = re.compile(r"^module\.(?=base_model\.)")
_NAME = re.compile(r"(\.lora_\w+)\.default(?=\.|$)")  # the adapter's, where the model's state was saved as it was


def open_with_adapter(
    model: Path, adapter: Path, revision: str | None = None, adapter_revision: str | None = None
) -> Checkpoint:
    """Merge the adapter into the model with peft and open the result (kept until the process ends).

    Raises CheckpointError where a tensor of either has no place in the other, which peft would leave out.
    """
    try:
        import peft  # noqa: F401
    except ImportError:
        raise Unavailable(f"{model}+{adapter}", "adapters need peft", hint="pip install 'merge3-gpu[lora]'") from None

    base = open_checkpoint(model, revision)
    directory = resolve(adapter, adapter_revision)
    if not (directory / SETTINGS).exists():
        raise CheckpointError(directory, f"no {SETTINGS}", "a peft adapter")
    if not (directory / FILE).exists():
        raise CheckpointError(directory, f"no {FILE}", "an adapter in safetensors")
    start = changed_by(read_json(directory / SETTINGS))
    if start in ("corda", "lora_ga") or "_niter_" in start:  # peft makes the others again: pissa, olora, loftq
        found = f"init_lora_weights {start!r}, which changed the base by data or numbers that are not here"
        raise CheckpointError(directory / SETTINGS, found, "an adapter of the base itself", CONVERTED)
    # TemporaryDirectory objects live in the Checkpoint, so the files go when it does.
    keep = tempfile.TemporaryDirectory(prefix="merge3-adapter-")
    loaded, folder = _loaded(base, model), Path(keep.name)
    try:
        adapted, used = _attached(loaded, directory, folder / "adapter")
        adapted.merge_and_unload().save_pretrained(folder, safe_serialization=True)
    except CheckpointError:
        raise
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, re.error) as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(directory, f"does not fit {model} ({reason})", "an adapter of it") from None
    copy_speaking(base.path, folder)  # as the model it is an adapter of
    for name in PROCESSORS:
        if (base.path / name).is_file() and not (folder / name).exists():
            shutil.copyfile(base.path / name, folder / name)
    copy_modules(base.path, folder)
    checkpoint = open_checkpoint(folder)
    checkpoint.temporary, checkpoint.adapter, checkpoint.warnings = keep, used, base.warnings
    return checkpoint


def _loaded(base: Checkpoint, model: Path) -> torch.nn.Module:
    """The weights that were opened, in the dtypes they are stored in: transformers may choose another file of the
    folder, and another dtype."""
    import transformers

    architecture = (base.config.get("architectures") or [""])[0]
    kind = getattr(transformers, architecture or "-", None)
    dtypes = {info.dtype for info in base.tensors.values() if info.dtype.is_floating_point} or {torch.float32}
    try:
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            settings = kind.config_class.from_pretrained(base.path)
        else:
            settings = transformers.AutoConfig.from_pretrained(base.path, trust_remote_code=False)
            kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(settings)]
        loaded, said = kind.from_pretrained(
            None,
            config=settings,
            state_dict={name: base.get(name) for name in base.tensors},
            dtype=functools.reduce(torch.promote_types, dtypes),
            output_loading_info=True,
        )
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        reason = str(error).split("\n")[0][:200]
        raise CheckpointError(model, f"transformers cannot load it ({reason})", "a supported architecture") from None
    refuse_made_up(model, loaded, said["missing_keys"])
    for name, weight in loaded.named_parameters() if len(dtypes) > 1 else ():
        if (info := base.tensors.get(name)) is not None and info.dtype.is_floating_point:
            weight.data = weight.data.to(info.dtype)
    return loaded


def _attached(loaded: torch.nn.Module, directory: Path, place: Path) -> tuple[torch.nn.Module, Path]:
    """(the model with its adapter, the adapter's folder: `place` where its tensors had to be renamed)."""
    import peft

    keys = {key: _PARALLEL.sub("", _NAME.sub(r"\1", _WRAPPERS.sub("", key))) for key in read_header(directory / FILE)}
    folder = directory if all(key == name for key, name in keys.items()) else _renamed(directory, keys, place)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # said below where they stay missing
        adapted = peft.PeftModel.from_pretrained(loaded, str(folder))
    settings = adapted.active_peft_config
    if settings.is_prompt_learning:
        found = f"peft_type {settings.peft_type.value!r}, which changes prompts"
        raise CheckpointError(directory, found, "an adapter that changes weights")
    said = _load(adapted, folder)
    if said.unexpected_keys:
        placed = {key: _placed(name, loaded) for key, name in keys.items()}
        if placed != keys:
            folder = _renamed(directory, placed, place)
            said = _load(adapted, folder)
    missing = [key for key in said.missing_keys if "vblora_vector_bank" not in key]  # one, which many refer to
    for found, names in (("no place for its tensor", said.unexpected_keys), ("no tensor", missing)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            expected = f"an adapter of {type(loaded).__name__}, as config.json of the base says"
            raise CheckpointError(directory / FILE, f"{found} {sorted(names)[0]!r}{more}", expected)
    return adapted, folder


def _load(adapted: torch.nn.Module, folder: Path):
    """The adapter's weights once more, for what has no counterpart: `missing_keys` and `unexpected_keys`, after all the
    renaming that peft does."""
    mapping = getattr(adapted.get_base_model(), "_checkpoint_conversion_mapping", None)
    return adapted.load_adapter(str(folder), "default", torch_device="cpu", key_mapping=mapping)


def _placed(key: str, model: torch.nn.Module) -> str:
    """The key in a model with a head, where the adapter was trained without one (AutoModel), and the other way."""
    inner, trunk = key.removeprefix(PREFIX), model.base_model_prefix
    first = inner.split(".")[0]
    if inner == key or hasattr(model, first):
        return key
    if hasattr(getattr(model, trunk, None), first):
        return f"{PREFIX}{trunk}.{inner}"
    return PREFIX + inner.removeprefix(f"{trunk}.")


def _renamed(directory: Path, names: Mapping[str, str], place: Path) -> Path:
    """The adapter with other names for its tensors: old -> new."""
    from safetensors.torch import load_file, save_file

    if len(set(names.values())) < len(names):
        twice = next(name for name in names.values() if list(names.values()).count(name) > 1)
        found = " and ".join(repr(key) for key, name in names.items() if name == twice)
        raise CheckpointError(directory / FILE, f"{found} are the same tensor of the model", "one of them")
    place.mkdir(exist_ok=True)
    save_file({names[key]: tensor for key, tensor in load_file(directory / FILE).items()}, place / FILE)
    shutil.copyfile(directory / SETTINGS, place / SETTINGS)
    return place
