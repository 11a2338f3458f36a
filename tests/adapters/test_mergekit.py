"""mergekit's own merges, with and without our kernels under them."""

import subprocess
import sys
import warnings

import pytest
import torch
import yaml
from safetensors.torch import load_file

pytest.importorskip("mergekit")
pytestmark = pytest.mark.parity


@pytest.fixture
def adapter():
    from merge3.adapters import mergekit as adapter

    adapter.install()
    yield adapter
    adapter.uninstall()


def merged(recipe, out):
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    run_merge(
        MergeConfiguration.model_validate(recipe),
        str(out),
        MergeOptions(quiet=True, random_seed=3, copy_tokenizer=False),
    )
    return load_file(out / "model.safetensors")


def recipe(family, method, experts=3, dtype="float32", **parameters):
    return {
        "merge_method": method,
        "base_model": str(family / "base"),
        "dtype": dtype,
        "parameters": parameters,
        "models": [
            {"model": str(family / f"e{i}"), "parameters": {"weight": 0.3 + 0.2 * i, "density": 0.4 + 0.1 * i}}
            for i in range(experts)
        ],
    }


CASES = [
    ("task_arithmetic", {}),
    ("ties", {}),
    ("ties", {"normalize": False, "lambda": 0.7}),
    ("ties", {"rescale": True}),
    ("breadcrumbs", {"gamma": 0.05}),
    ("breadcrumbs_ties", {"gamma": 0.05, "normalize": True}),
]


@pytest.mark.parametrize("method,parameters", CASES)
def test_the_same_weights_to_rounding(family, tmp_path, adapter, method, parameters):
    what = recipe(family, method, **parameters)
    ours = merged(what, tmp_path / "ours")
    adapter.uninstall()
    theirs = merged(what, tmp_path / "theirs")
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        wrong = (ours[name] - tensor).abs() > 1e-5 * tensor.abs() + 1e-7
        # Elements that tie at a threshold may be kept by one and not by the other.
        assert int(wrong.sum()) <= 1, (name, int(wrong.sum()))


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_random_methods_keep_the_same_share(family, tmp_path, adapter, method):
    what = recipe(family, method, experts=1)
    ours = merged(what, tmp_path / "ours")
    again = merged(what, tmp_path / "again")
    adapter.uninstall()
    theirs = merged(what, tmp_path / "theirs")
    base = load_file(family / "base" / "model.safetensors")
    changed = lambda weights: sum(int((weights[n] != base[n]).sum()) for n in base)
    total = sum(t.numel() for t in base.values())
    assert all(torch.equal(ours[n], again[n]) for n in ours)  # mergekit's seed is ours
    assert abs(changed(ours) - changed(theirs)) < 4 * (total * 0.24) ** 0.5 * 1.5
    size = lambda weights: sum(float((weights[n] - base[n]).abs().sum()) for n in base)
    assert abs(size(ours) / size(theirs) - 1) < 0.03


def test_bfloat16_is_closer_to_the_exact_merge(bf16_family, tmp_path, adapter):
    exact = merged(recipe(bf16_family, "ties"), tmp_path / "exact")
    what = recipe(bf16_family, "ties", dtype="bfloat16")
    ours = merged(what, tmp_path / "ours")
    adapter.uninstall()
    theirs = merged(what, tmp_path / "theirs")
    error = lambda weights: sum(float((weights[n].float() - exact[n]).abs().sum()) for n in exact)
    assert error(ours) < error(theirs)


def test_what_the_kernels_do_not_take_is_said_and_left_to_mergekit(family, tmp_path, adapter):
    what = recipe(family, "ties")
    what["models"][0]["parameters"]["density"] = 0.0
    with pytest.warns(UserWarning, match="a density of 0: mergekit computes this itself"):
        ours = merged(what, tmp_path / "ours")
    adapter.uninstall()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = merged(what, tmp_path / "theirs")
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


def test_as_a_command(family, tmp_path, adapter):
    """`python -m` installs the kernels by itself: the bits are those of this process, where they are installed."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(family, "ties")))
    command = [
        sys.executable,
        "-m",
        "merge3.adapters.mergekit",
        str(tmp_path / "recipe.yaml"),
        str(tmp_path / "out"),
        "--no-copy-tokenizer",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    expected = merged(recipe(family, "ties"), tmp_path / "here")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
