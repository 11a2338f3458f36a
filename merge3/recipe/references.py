"""How a recipe names a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge3.errors import RecipeError


@dataclass(frozen=True)
class ModelRef:
    """A model: a directory or hub id, a revision, and a LoRA adapter to apply: `path@rev+lora@rev`."""

    path: str
    revision: str | None = None
    lora: ModelRef | None = None

    @staticmethod
    def parse(text: Any, where: str = "model") -> ModelRef:
        """A reference as text, or as mergekit's mapping. Raises RecipeError."""
        if isinstance(text, Mapping):  # mergekit's long form, or a model entry's short one
            model = text.get("model", text)
            if isinstance(model, str) and not text.get("lora"):
                return ModelRef.parse(model, where)
            if not isinstance(model, Mapping) or not isinstance(model.get("path"), str):
                raise RecipeError(where, f"found {dict(text)!r}", "a path or hub id")
            lora = text.get("lora")
            return ModelRef(model["path"], model.get("revision"), ModelRef.parse(lora, where) if lora else None)
        if not isinstance(text, str) or not text.strip():
            raise RecipeError(where, f"found {text!r}", "a path or hub id")
        model, *lora = text.split("+")
        if len(lora) > 1:
            raise RecipeError(where, f"found {text!r}", "at most one `+adapter`")
        path, _, revision = model.partition("@")
        return ModelRef(path, revision or None, ModelRef.parse(lora[0], where) if lora else None)

    @property
    def place(self) -> tuple:
        """Equal where two references name one model, however they are written: by where folders lie, and by the text of
        what is no folder here."""
        folder = Path(self.path).expanduser()
        path = str(folder.resolve()) if folder.is_dir() else os.path.normpath(self.path)
        return path, self.revision, self.lora and self.lora.place

    def __str__(self) -> str:
        text = self.path + (f"@{self.revision}" if self.revision else "")
        return text + (f"+{self.lora}" if self.lora else "")
