"""The same matrix fitted by py-irt (Lalor and Rodriguez 2023), an independent implementation, where it is installed."""

import numpy as np
import pytest
import torch

from merge3.irt import Responses
from merge3.irt.bank import sigmoid
from merge3.irt.fitting import fit

models = pytest.importorskip("py_irt.models", reason="py-irt is not installed")


def theirs(y: np.ndarray, dimensions: int, steps: int) -> np.ndarray:
    """Abilities [M, D] by its multidimensional 2PL, trained as its own trainer does (which needs more packages)."""
    import pyro

    M, N = y.shape
    torch.manual_seed(0)
    pyro.clear_param_store()
    model = models.Multidim2PL(num_items=N, num_subjects=M, dims=dimensions)
    decaying = pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.998})
    svi = pyro.infer.SVI(model.get_model(), model.get_guide(), decaying, loss=pyro.infer.Trace_ELBO())
    subjects, items = (torch.tensor(v.ravel()) for v in np.mgrid[:M, :N])
    observed = torch.tensor(y.ravel(), dtype=torch.float32)
    for _ in range(steps):
        svi.step(subjects, items, observed)
        decaying.step()
    found = np.array(model.export()["ability"])
    pyro.clear_param_store()
    return found


@pytest.mark.heavy
@pytest.mark.parametrize("dimensions", [1, 2])
def test_abilities_agree(dimensions):
    g = np.random.default_rng(4)
    theta = g.normal(size=(60, dimensions))
    a, b = np.exp(g.normal(-0.2, 0.6, (300, dimensions))), g.normal(0, 1, 300)
    y = (g.random((60, 300)) < sigmoid(theta @ a.T - b)).astype(float)
    ours = fit(Responses(tuple(map(str, range(60))), tuple(map(str, range(300))), y), dimensions)
    x, z = (np.linalg.qr(v - v.mean(0))[0] for v in (ours.theta, theirs(y, dimensions, 700 * dimensions + 100)))
    assert np.linalg.svd(x.T @ z)[1].min() > 0.98  # several dimensions agree up to rotation
