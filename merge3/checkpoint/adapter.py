"""`model+adapter`: a checkpoint with a LoRA adapter applied, made by peft."""

from __future__ import annotations

import tempfile
from pathlib import Path

from merge3.checkpoint.beside import copy_speaking
from merge3.checkpoint.modules import copy_modules
from merge3.checkpoint.read import Checkpoint, open_checkpoint, resolve
from merge3.errors import CheckpointError, Unavailable


def open_with_adapter(
    model: Path, adapter: Path, revision: str | None = None, adapter_revision: str | None = None
) -> Checkpoint:
    """Merge the adapter into the model with peft and open the result (kept until the process ends)."""
    try:
        import peft
    except ImportError:
        raise Unavailable(f"{model}+{adapter}", "adapters need peft", hint="pip install 'merge3-gpu[lora]'") from None
    import transformers

    base = open_checkpoint(model, revision)
    directory = resolve(adapter, adapter_revision)
    if not (directory / "adapter_config.json").exists():
        raise CheckpointError(directory, "no adapter_config.json", "a peft adapter")
    if not (directory / "adapter_model.safetensors").exists():
        raise CheckpointError(directory, "no adapter_model.safetensors", "an adapter in safetensors")
    architecture = (base.config.get("architectures") or ["AutoModelForCausalLM"])[0]
    loader = getattr(transformers, architecture, transformers.AutoModelForCausalLM)
    loaded = loader.from_pretrained(base.path, dtype="auto", trust_remote_code=False, use_safetensors=True)
    try:
        merged = peft.PeftModel.from_pretrained(loaded, str(directory)).merge_and_unload()
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(directory, f"does not fit {model} ({reason})", "an adapter of it") from None
    # TemporaryDirectory objects live in the Checkpoint, so the files go when it does.
    keep = tempfile.TemporaryDirectory(prefix="merge3-adapter-")
    merged.save_pretrained(keep.name, safe_serialization=True)
    copy_speaking(base.path, Path(keep.name))  # as the model it is an adapter of
    copy_modules(base.path, Path(keep.name))
    checkpoint = open_checkpoint(keep.name)
    checkpoint.temporary, checkpoint.adapter = keep, directory
    return checkpoint
