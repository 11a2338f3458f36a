"""What to search, as a value that crosses the wire and names a run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class SpaceDefinition:
    """What to search; see `genome:` in the evolve configuration. genes: empty for the method's usual ones;
    kind: a row of SPACES.

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
    tower: dict[str, str] = field(default_factory=dict)

    def hash(self) -> str:
        """Names the definition: equal definitions, equal hash."""
        data = asdict(self)
        if self.kind == SpaceDefinition.kind:  # so that runs begun before there were kinds can be continued
            del data["kind"]
        if not self.tower:  # likewise
            del data["tower"]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
