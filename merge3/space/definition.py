"""What to search, as a value that crosses the wire and names a run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from merge3.errors import ConfigError
from merge3.recipe import Tokenizer, TokenRow, checks


@dataclass(frozen=True)
class SpaceDefinition:
    """What to search; see `genome:` in the evolve configuration. genes: empty for the method's usual ones;
    kind: a row of SPACES. tokenizer_source, tokens, pad_to_multiple_of: of the recipes' tokenizer, see there.
    repetitions, pinned, max_hops: of a path, see path.py; merged: JSON of the recipes that make those of `models` which
    lie in no folder, as in Recipe.merged. around: JSON of a recipe, as Recipe.to_dict, see around.py.

        definition = SpaceDefinition(("./math", "./code"), "ties", "./base", genes=("weight", "density"))
    """

    models: tuple[str, ...]
    method: str
    base: str | None = None
    layer_granularity: int = 1
    filters: tuple[str, ...] = ()
    smooth: bool = False
    normalize: bool | None = None
    allow_negative_weights: bool = True
    preset: str = "layerwise"
    genes: tuple[str, ...] = ()
    bounds: dict[str, tuple[float, float]] = field(default_factory=dict)
    tokenizer_source: str | None = None
    dtype: str | None = None
    kind: str = "parameters"
    tokens: tuple[TokenRow, ...] = ()
    pad_to_multiple_of: int | None = None
    chat_template: str | None = None
    tower: dict[str, str] = field(default_factory=dict)
    repetitions: int = 1
    pinned: tuple[int, ...] = ()
    max_hops: int | None = None
    merged: str = ""
    around: str = ""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Of every recipe of the space; None where nothing is said of it."""
        if self.tokenizer_source is None:
            return None
        return Tokenizer(self.tokenizer_source, self.tokens, self.pad_to_multiple_of, self.base is not None)

    def merges(self) -> dict[str, Any]:
        """`merged`, read. Raises ConfigError for what is no JSON of that kind."""
        try:
            found = json.loads(self.merged or "{}")
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            expected = "recipes by the names of their models, as JSON"
            raise ConfigError("space: merged", f"found {self.merged[:40]!r}", expected)
        return checks.merged(found, "space: merged")

    def hash(self) -> str:
        """Names the definition: equal definitions, equal hash."""
        data = asdict(self)
        if self.kind == SpaceDefinition.kind:  # so that runs begun before there were kinds can be continued
            del data["kind"]
        if self.repetitions == SpaceDefinition.repetitions:
            del data["repetitions"]
        later = ("tokens", "pad_to_multiple_of", "chat_template", "tower", "pinned", "max_hops", "merged", "around")
        for key in later:  # nor any of these
            if not data[key]:
                del data[key]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
