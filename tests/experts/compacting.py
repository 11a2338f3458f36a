"""Experts compacted by other means than the product's: the oracle of these tests."""

import shutil

import numpy as np
import torch
from safetensors.torch import load_file, save_file


def bits(tensor):
    """Its bits, as integers."""
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def residual(base, expert, density):
    """Sorted by |τ|, and by place where that is equal: so many of the first are the expert's, all others the base's."""
    most = min(expert.numel(), max(1, round(density * expert.numel())))
    tau = np.abs(expert.float().numpy().ravel() - base.float().numpy().ravel())
    differ = (bits(expert) != bits(base)).numpy().ravel()
    if differ.sum() <= most:
        return expert.clone()
    found = bits(base).flatten().clone()
    chosen = [place for place in np.lexsort((np.arange(len(tau)), -tau))[:most] if tau[place] > 0]
    found[chosen] = bits(expert).flatten()[chosen]
    return found.view(expert.dtype).reshape(expert.shape)


def int8(base, expert):
    """Row by row, τ rounded to 255 steps."""
    rows = []
    for b, e in zip(base.reshape(-1, base.shape[-1]), expert.reshape(-1, base.shape[-1])):
        tau = (e.float() - b.float()).numpy()
        scale = np.abs(tau).max() / np.float32(127)
        steps = np.rint(tau / scale) if scale else np.zeros_like(tau)
        rows.append((b.float() + torch.from_numpy(scale * steps.astype(np.float32))).to(e.dtype))
    return torch.stack(rows).reshape(expert.shape)


def compacted(base, expert, option):
    """A tensor as it comes back from being held so."""
    if expert.dim() < 2 or base.shape != expert.shape:
        return expert
    return int8(base, expert) if option == "int8" else residual(base, expert, float(option.split(":")[1]))


def write(folder, base, experts, option):
    """Checkpoints of the base and of experts whose weights are compacted, in a folder. Returns their paths."""
    theta = load_file(base / "model.safetensors")
    shutil.copytree(base, folder / "base")
    for expert in experts:
        shutil.copytree(expert, folder / expert.name)
        weights = load_file(expert / "model.safetensors")
        found = {name: compacted(theta[name], tensor, option) for name, tensor in weights.items()}
        save_file(found, folder / expert.name / "model.safetensors", {"format": "pt"})
    return [str(folder / name) for name in ("base", *(expert.name for expert in experts))]
