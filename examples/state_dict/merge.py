"""Merge plain state dicts with the kernels: two calls, no pool, no files.

python examples/state_dict/merge.py
"""

import torch

from merge3 import kernels
from merge3.kernels import DENSITY, RESCALE, WEIGHT, Modes


def merge(base: dict, experts: list[dict], weights: list[float], density: float = 1.0, seed: int = 0) -> dict:
    """DARE: keep a random `density` of every task vector, scale it up again, add `weights` of them to the base."""
    names = list(base)
    coefficients = kernels.coefficients(len(names), len(experts))  # [tensors, experts, fields], neutral
    coefficients[..., WEIGHT] = torch.tensor(weights)
    coefficients[..., DENSITY], coefficients[..., RESCALE] = density, 1 / density
    out = {name: torch.empty_like(tensor) for name, tensor in base.items()}
    kernels.merge_(
        list(out.values()),
        list(base.values()),
        [expert[name] for name in names for expert in experts],
        coefficients,
        torch.ones(len(names)),
        Modes("random" if density < 1 else "all", seed=seed),
        torch.tensor([kernels.tensor_id(name) for name in names]),
    )
    return out


if __name__ == "__main__":
    torch.manual_seed(0)
    base = torch.nn.Linear(512, 512).state_dict()
    experts = [{name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in base.items()} for _ in range(3)]
    whole = merge(base, experts, [0.5, 0.3, 0.2])
    sparse = merge(base, experts, [0.5, 0.3, 0.2], density=0.3)
    plain = {
        name: base[name] + sum(w * (e[name] - base[name]) for w, e in zip((0.5, 0.3, 0.2), experts)) for name in base
    }
    print("largest difference to plain torch:", max(float((whole[n] - plain[n]).abs().max()) for n in base))
    print("mean change, all of the task vectors:", float((whole["weight"] - base["weight"]).mean()))
    print("mean change, a random 30 % of them:  ", float((sparse["weight"] - base["weight"]).mean()))
