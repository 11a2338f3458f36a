"""The item bank: what calibration learned of the items, and of the models that answered them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from merge3.irt.responses import ResponsesError

_FORMAT = 1


@dataclass(frozen=True, eq=False)
class ItemBank:
    """Item response theory: P(model m solves item i) = σ(a_i · θ_m − b_i).

    a: discriminations [N, D]; b: difficulties [N] (intercepts: larger is harder); theta: abilities
    [M, D], all float64. a_sd, b_sd, theta_sd: posterior standard deviations of the same shapes.
    item_covariance: [N, D + 1, D + 1] of (a_i, b_i); theta_covariance: [M, D, D].
    meta: how it was fitted.

        bank = irt.fit(irt.read_responses("answers.csv"))
        bank.probability(bank.theta)  # [M, N]
    """

    items: tuple[str, ...]
    models: tuple[str, ...]
    a: np.ndarray
    b: np.ndarray
    theta: np.ndarray
    item_covariance: np.ndarray
    theta_covariance: np.ndarray
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def dimensions(self) -> int:
        """D, of the abilities."""
        return self.a.shape[1]

    @property
    def a_sd(self) -> np.ndarray:
        """Of the discriminations, [N, D]."""
        return np.sqrt(np.einsum("ndd->nd", self.item_covariance)[:, :-1])

    @property
    def b_sd(self) -> np.ndarray:
        """Of the difficulties, [N]."""
        return np.sqrt(self.item_covariance[:, -1, -1])

    @property
    def theta_sd(self) -> np.ndarray:
        """Of the abilities, [M, D]."""
        return np.sqrt(np.einsum("mdd->md", self.theta_covariance))

    def probability(self, theta: np.ndarray) -> np.ndarray:
        """[C, D] abilities -> [C, N] chances of solving each item."""
        return sigmoid(np.atleast_2d(theta) @ self.a.T - self.b)

    def save(self, directory: str | Path, name: str = "bank") -> None:
        """Write directory/name.safetensors and directory/name.json."""
        from safetensors.numpy import save

        from merge3.files import write_atomically

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(
            directory / f"{name}.safetensors", save({k: np.ascontiguousarray(v) for k, v in self._arrays().items()})
        )
        described = {"format": _FORMAT, "items": self.items, "models": self.models, "meta": self.meta}
        write_atomically(directory / f"{name}.json", json.dumps(described, indent=1))

    @staticmethod
    def load(directory: str | Path, name: str = "bank") -> ItemBank:
        """Read what `save` wrote. Raises ResponsesError naming the file that is missing or damaged."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        path = Path(directory) / f"{name}.json"
        try:
            described = json.loads(path.read_text(encoding="utf-8"))
            arrays = load_file(path.with_suffix(".safetensors"))
            if described["format"] != _FORMAT:
                raise ResponsesError(path, f"format {described['format']}", f"format {_FORMAT}")
            bank = ItemBank(tuple(described["items"]), tuple(described["models"]), **arrays, meta=described["meta"])
        except OSError as error:
            raise ResponsesError(error.filename or path, error.strerror or str(error), "an item bank") from None
        except (SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise ResponsesError(path, f"{type(error).__name__}: {error}"[:200], "an item bank") from None
        n, d = len(bank.items), bank.a.shape[-1]
        expected = {
            "a": (n, d),
            "b": (n,),
            "theta": (len(bank.models), d),
            "item_covariance": (n, d + 1, d + 1),
            "theta_covariance": (len(bank.models), d, d),
        }
        for key, shape in expected.items():
            if arrays[key].shape != shape:
                raise ResponsesError(path, f"{key} of shape {arrays[key].shape}", f"{shape}")
        return bank

    def _arrays(self) -> dict[str, np.ndarray]:
        names = ("a", "b", "theta", "item_covariance", "theta_covariance")
        return {name: getattr(self, name) for name in names}


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))
