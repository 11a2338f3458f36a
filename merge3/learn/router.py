"""A router: which task's variant answers a prompt, by the nearest class mean of what the common model makes of it.

    φ(x) = mean of the last layer's states over x's tokens;  task(x) = argmin_t ‖φ(x) − μ_t‖_C,  μ_t: φ's mean over t
    ‖v‖²_C = vᵀ C⁻¹ v,  C = half of the covariance within tasks + half of its mean variance in every direction

It is the model that is there before a task is known, the one that all tasks have in common, that looks at prompts.
Labels are never read. Directions in which prompts of one task differ say little about which task it is: C takes them
back (Fisher's discriminant, shrunk because prompts are few). A folder keeps it as router.safetensors: `means`, float32
[tasks, width]; `axes` [k, width], the directions in which prompts of a task were seen to differ, and `gains` [k], what
a distance along them counts where any other counts 1; and in the header's metadata the tasks and how prompts are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from merge3.checkpoint import Checkpoint
from merge3.checkpoint.read import read_header
from merge3.errors import BadInput, CheckpointError, ItemsError
from merge3.files import write_atomically
from merge3.tasks import Item
from merge3.tasks.forward import right_padded, without_cache
from merge3.tasks.items import place
from merge3.tasks.kinds import KINDS
from merge3.tasks.requests import Image
from merge3.tasks.score import reader_of
from merge3.tasks.seq2seq import is_pair

FILE = "router.safetensors"
_BATCH = 4096  # padded tokens of a forward pass


@dataclass(frozen=True, eq=False)
class Router:
    """means: float32 [tasks, width]; axes: [k, width], orthonormal; gains: [k]. system: message of the chat template of
    prompts, None where none is applied."""

    tasks: tuple[str, ...]
    means: torch.Tensor
    axes: torch.Tensor
    gains: torch.Tensor
    system: str | None = None

    def route(self, model, folder: Path, items: Sequence[Item]) -> list[str]:
        """The task of each item. model: the live one, as the common model; folder: of the tokenizer.

        Raises ItemsError for prompts that it cannot read, BadInput where its states have another width.
        """
        if not items:
            return []
        found = prompt_states(model, folder, items, self.system)
        if found.shape[1] != self.means.shape[1]:
            expected = f"{found.shape[1]}, as this model's states have"
            raise BadInput("router", f"means of width {self.means.shape[1]}", expected)
        closest = torch.cdist(self._seen(found), self._seen(self.means)).argmin(1)
        return [self.tasks[at] for at in closest.tolist()]

    def _seen(self, states: torch.Tensor) -> torch.Tensor:
        """States in a space where the distance is the plain one."""
        return states + (states @ self.axes.T * (self.gains - 1)) @ self.axes


def fit_router(model, folder: Path, items: Mapping[str, Sequence[Item]], system: str | None = None) -> Router:
    """items: task -> some of its prompts. The others are as of Router.route."""
    states = [prompt_states(model, folder, own, system) for own in items.values()]
    means = torch.stack([own.mean(0) for own in states])
    apart = torch.cat([own - mean for own, mean in zip(states, means)])
    _, size, axes = torch.linalg.svd(apart.double(), full_matrices=False)
    variances = size.square() / len(apart)
    kept = variances > 1e-9 * variances.sum()
    mean = variances.sum() / means.shape[1]
    gains = (mean / (variances[kept] + mean)).sqrt()
    return Router(tuple(items), means, axes[kept].float(), gains.float(), system)


@torch.no_grad()
def prompt_states(model, folder: Path, items: Sequence[Item], system: str | None = None) -> torch.Tensor:
    """float32 [items, width], on the CPU: the mean of the last layer's states over each prompt's tokens.

    Raises ItemsError for what this model cannot read, or where states are no numbers.
    """
    reader = reader_of(items, model, folder, system is not None, system or "")
    requests = [KINDS[item.kind].requests(item, reader)[0] for item in items]
    for item, request in zip(items, requests):
        if reader.limit is not None and _length(request) > reader.limit:
            found = f"a prompt of {_length(request)} tokens, to find its task by"
            raise ItemsError(place(item), found, f"at most {reader.limit}, the model's positions")
    order = sorted(range(len(items)), key=lambda at: _length(requests[at]))
    found: list[torch.Tensor] = [torch.empty(0)] * len(items)
    batch: list[int] = []
    for at in order:
        width = _length(requests[at]) or 16
        if batch and (len(batch) + 1) * width > _BATCH:
            _read(model, requests, batch, found)
            batch = []
        batch.append(at)
    _read(model, requests, batch, found)
    for item, states in zip(items, found):
        if not states.isfinite().all():
            raise ItemsError(place(item), "states that are NaN or infinite", "numbers, to find its task by")
    return torch.stack(found)


def _length(request: Any) -> int:
    """Tokens of a prompt, 0 of an image alone; of a pair its first text's."""
    tokens = getattr(request, "tokens", ())
    return len(tokens[0] if tokens and isinstance(tokens[0], tuple) else tokens)


def _read(model, requests: Sequence[Any], batch: Sequence[int], found: list[torch.Tensor]) -> None:
    own, device = [requests[at] for at in batch], next(model.parameters()).device
    body = model.get_encoder() if is_pair(model) else getattr(model, "base_model", model)
    if isinstance(own[0], Image):
        states = body(pixel_values=torch.stack([one.pixels for one in own]).to(device)).last_hidden_state.float()
        means = states.flatten(2).mean(2) if states.dim() == 4 else states.mean(1)  # maps of convolutions, or tokens
    else:
        tokens = [one.tokens if not isinstance(one.tokens[0], tuple) else one.tokens[0] for one in own]
        given = right_padded(tokens, getattr(model.config, "pad_token_id", None) or 0, device)
        options = {} if is_pair(model) else without_cache(model)
        states = body(**given, **options).last_hidden_state.float()
        counts = given["attention_mask"][:, :, None]
        means = (states * counts).sum(1) / counts.sum(1)
    for at, mean in zip(batch, means.cpu()):
        found[at] = mean


def save_router(router: Router, folder: Path) -> None:
    """Beside a packed folder's variants, whole or not at all. Raises ResourceError."""
    from safetensors.torch import save as to_bytes

    about = {"tasks": list(router.tasks), "system": router.system}
    tensors = {name: getattr(router, name).contiguous() for name in ("means", "axes", "gains")}
    write_atomically(folder / FILE, to_bytes(tensors, {"router": json.dumps(about)}))


def load_router(folder: Path) -> Router:
    """Raises CheckpointError where the folder has none, or one that is not whole."""
    file = folder / FILE
    if not file.is_file():
        hint = "a recipe with `router:`, a few prompts of every task"
        raise CheckpointError(folder, f"no {FILE}: nothing says which task a prompt belongs to", "", hint)
    checkpoint = Checkpoint(folder, {}, read_header(file))
    try:
        with open(file, "rb") as handle:
            header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
        about = json.loads(header["__metadata__"]["router"])
        tasks, system = tuple(str(task) for task in about["tasks"]), about["system"]
        means, axes, gains = (checkpoint.get(name).clone() for name in ("means", "axes", "gains"))
        assert {means.dtype, axes.dtype, gains.dtype} == {torch.float32}
        assert axes.shape == (len(gains), means.shape[-1]) and gains.dim() == 1
        assert means.dtype == torch.float32 and means.shape[0] == len(set(tasks)) and means.dim() == 2 and tasks
        assert isinstance(about["tasks"], list) and len(set(tasks)) == len(tasks)
        assert system is None or isinstance(system, str)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AssertionError, CheckpointError):
        raise CheckpointError(file, "not a router that merge3 wrote", "the file as it was") from None
    for name, tensor in (("means", means), ("axes", axes), ("gains", gains)):
        if not tensor.isfinite().all():
            raise CheckpointError(file, f"{name} that are NaN or infinite", "finite ones")
    return Router(tasks, means, axes, gains, system)
