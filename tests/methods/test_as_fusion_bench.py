"""Merges by linear algebra against fusion_bench's own code, where it is installed (make test installs it)."""

from pathlib import Path

import pytest
import torch

from tests.fusing import fusion_bench, missing
from tests.methods.deriving import derived

pytestmark = [pytest.mark.parity, missing]
SHAPES = {
    "embeddings.weight": (50, 16),
    "encoder.layers.0.attention.weight": (24, 24),
    "encoder.layers.0.attention.bias": (24,),
    "encoder.layers.0.layer_norm1.weight": (24,),
    "encoder.layers.0.up.weight": (64, 24),
    "encoder.layers.1.down.weight": (24, 64),
    "convolution.weight": (8, 3, 2, 2),
}


def task_vectors(experts, scale, dtype=torch.float32, seed=0):
    """name -> what an expert changed, low-rank changes and noise as of tuned models, of every expert."""
    rng, found = torch.Generator().manual_seed(seed), []
    draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)
    for _ in range(experts):
        own = {}
        for name, shape in SHAPES.items():
            own[name] = draw(*shape)
            if len(shape) == 2:
                own[name] += 2 * draw(shape[0], 3) @ draw(3, shape[1])
        found.append({name: (scale * tensor).to(dtype) for name, tensor in own.items()})
    return found


def spectral():
    """(method, its arguments) of every case but doge's."""
    for experts in (1, 3, 5):
        yield "iso_c", {"vectors": task_vectors(experts, 0.01)}
        yield "tsv_m", {"vectors": task_vectors(experts, 0.01)}
    for scale in (0.001, 0.1):
        yield "wudi", {"vectors": task_vectors(4, scale)}


def projective():
    """The same of doge, which knows no convolutions."""
    for scale, eta, keep, subspace in ((0.003, 0.07, 0.3, 6), (0.03, 0.4, 0.5, 3)):
        vectors = task_vectors(3, scale)
        for own in vectors:
            del own["convolution.weight"]
        yield "doge", {"vectors": vectors, "eta": eta, "keep": keep, "subspace": subspace}


CASES = [*spectral(), *projective()]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """What it makes of every case, in a process of its own."""
    folder = tmp_path_factory.mktemp("fusion_bench")
    return fusion_bench(folder, CASES, Path(__file__).with_name("run_fusion_bench.py"))


def assert_near(ours, theirs, share):
    """share: of the norm of theirs, that the difference may have."""
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert float((ours[name] - theirs[name]).norm()) <= share * float(theirs[name].norm()), name


def test_spectral_merges(theirs):
    for (method, given), expected in zip(spectral(), theirs):
        assert_near(derived(method, **given), expected, 1e-5)


def test_three_hundred_steps_of_wudi_go_somewhere(theirs):
    """Or the test above would show little."""
    name, seen = "encoder.layers.0.up.weight", 0
    for (method, given), expected in zip(spectral(), theirs):
        if method == "wudi":
            moved = expected[name] - sum(own[name] for own in given["vectors"])
            seen += float(moved.abs().max()) > 2e-3  # of 3e-3 that so many steps could
    assert seen == 2


def test_doge_as_it_is_set_there(theirs):
    """Its own names, matrices of an encoder's layers, and nothing else changed."""
    for (method, given), expected in zip(projective(), theirs[len(list(spectral())) :]):
        assert_near(derived(method, **given, others=False), expected, 1e-4)
        changed = {name for name, tensor in expected.items() if tensor.any()}
        assert changed == {name for name, shape in SHAPES.items() if "encoder" in name and len(shape) == 2}
