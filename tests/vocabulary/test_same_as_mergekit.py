"""The same rows, tensor by tensor, as mergekit 0.1.5 for the same YAML; the same size in config.json, and the same
number for every token."""

import importlib.util
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from merge3.errors import Merge3Warning
from merge3.export import merge_to_disk
from merge3.recipe import Recipe
from tests.speakers import make_speakers
from tests.worlds import shared

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(importlib.util.find_spec("mergekit") is None, reason="mergekit is not installed"),
]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WORLDS = {
    "plain": {},
    "padded": dict(padded=21),
    "tied": dict(tied=True),
    "bf16": dict(dtype=torch.bfloat16, padded=5),
    "bpe": dict(bpe=True),
}
W = {"base": 0.2, "one": 0.5, "two": 0.3}


def recipe(root, names, method="linear", base="base", weights=W, **changes):
    models = []
    for name in names:
        models.append({"model": str(root / name)})
        if method != "slerp":
            models[-1]["parameters"] = {"weight": weights.get(name, 0.0)}
    data = {"merge_method": method, "models": models} | changes
    return data | ({"base_model": str(root / base)} if base else {})


def chosen(root):
    """Per-token sources of every kind. w3: all have it; x1: `one` and `two`; y1: `two` alone; new: nobody."""
    source = lambda name: {"source": str(root / name)}
    other = lambda name, **which: {"source": {"kind": "model_token", "model": str(root / name), **which}}
    return {
        "x1": source("two"),
        "x0": {"source": {"kind": "zero"}},
        "y1": other("base", token="w7"),
        "y2": other("one", token_id=11),
        "w8": other("two", token="<|im_end|>") | {"force": True},
        "w4": {"source": {"kind": "zero"}, "force": True},
        "new": other("one", token="w39"),
        "newer": {"source": {"kind": "zero"}},
    }


def cases(worlds):
    """name -> recipe"""
    plain, padded, tied, bf16, bpe = (worlds[name] for name in WORLDS)
    three, experts = ("base", "one", "two"), ("one", "two")
    # the rows of a model as they are
    yield "rows_of_two", recipe(plain, three, weights={"two": 1.0}, tokenizer_source="union")
    for name, root in (("rows_of_two_without_base", plain), ("rows_of_two_without_base_bf16", bf16)):
        yield name, recipe(root, three, base=None, weights={"two": 1.0}, tokenizer_source="union")
    yield "rows_of_one_bpe", recipe(bpe, three, weights={"one": 1.0}, tokenizer_source="union")
    yield "union_without_base", recipe(plain, ("one", "two", "base"), base=None, tokenizer_source="union")
    yield "union_without_base_bf16", recipe(bf16, three, base=None, tokenizer_source="union")
    yield "union_task_arithmetic", recipe(plain, experts, "task_arithmetic", tokenizer_source="union")
    yield "union_ties", recipe(plain, experts, "ties", parameters={"density": 0.6}, tokenizer_source="union")
    yield "union_ties_dense", recipe(padded, experts, "ties", tokenizer={"source": "union"})
    yield "union_slerp", recipe(plain, ("one",), "slerp", parameters={"t": 0.4}, tokenizer_source="union")
    yield "union_tied", recipe(tied, three, tokenizer_source="union")
    block = {"source": "union", "pad_to_multiple_of": 64}
    yield "union_multiple", recipe(plain, three, tokenizer=block)
    yield "rows_of_one_bf16", recipe(bf16, three, weights={"one": 1.0}, tokenizer=block)
    yield "base_padded", recipe(padded, experts, "task_arithmetic", tokenizer_source="base")
    yield "model", recipe(plain, experts, "task_arithmetic", tokenizer_source=str(plain / "one"))
    yield "model_padded", recipe(padded, three, tokenizer={"source": str(padded / "two"), "pad_to_multiple_of": 64})
    for name in ("base", "two"):
        rows = recipe(plain, three, weights={name: 1.0}, tokenizer={"source": "union", "tokens": chosen(plain)})
        yield f"tokens_of_{name}", rows
    yield "tokens_tied", recipe(tied, three, tokenizer=block | {"tokens": chosen(tied)})
    narrow = dict(dtype="float32", out_dtype="bfloat16")  # mergekit's arithmetic in bfloat16 rounds at every step
    tokens = block | {"tokens": chosen(bf16)}
    yield "rows_of_one_with_tokens_bf16", recipe(bf16, three, weights={"one": 1.0}, tokenizer=tokens)
    # Means are of the models' dtype, not of the recipe's: within one rounding of mergekit's.
    yield "out_dtype_without_base", recipe(bf16, three, base=None, tokenizer_source="union", **narrow)
    mixed = [{"model": str(root / name)} for root, name in ((plain, "base"), (tied, "one"), (plain, "two"))]
    for entry, weight in zip(mixed, (0.0, 1.0, 0.0)):
        entry["parameters"] = {"weight": weight}
    heads = {"merge_method": "linear", "base_model": mixed[0]["model"], "models": mixed, "tokenizer_source": "union"}
    yield "one_tied_of_three", heads
    dtypes = [{"model": str(root / name)} for root, name in ((plain, "base"), (bf16, "one"), (bf16, "two"))]
    for entry in dtypes:
        entry["parameters"] = {"weight": 0.5}
    yield "dtypes", {"merge_method": "linear", "models": dtypes, "tokenizer_source": "union"}
    ranges = [
        {"sources": [{"model": str(plain / n), "layer_range": r, "parameters": {"weight": W[n]}} for n in three]}
        for r in ([0, 1], [1, 2])
    ]
    for template in ("auto", "chatml"):
        yield f"template_{template[:4]}", recipe(plain, three, tokenizer_source="union", chat_template=template)
    base = str(plain / "base")
    yield "slices", {"merge_method": "linear", "base_model": base, "slices": ranges, "tokenizer_source": "union"}


def elsewhere(worlds):
    """name -> recipe, where mergekit fails or drops rows."""
    plain = worlds["plain"]
    tokens = {"new": {"source": {"kind": "zero"}}}
    yield (
        "base_and_a_new_token",
        recipe(plain, ("one",), "task_arithmetic", tokenizer={"source": "base", "tokens": tokens}),
    )
    layers = [
        {"sources": [{"model": str(plain / n), "layer_range": r}]} for n, r in (("base", [0, 1]), ("one", [1, 2]))
    ]
    yield "stacked", {"merge_method": "passthrough", "slices": layers, "tokenizer_source": "union"}


NAMES = [name for name, _ in cases({name: Path("x") for name in WORLDS})]
EXACT = [n for n in NAMES if "_of_" in n]


@pytest.fixture(scope="module")
def worlds():
    made = {name: shared(make_speakers, **arguments) for name, arguments in WORLDS.items()}
    yield {name: next(world) for name, world in made.items()}
    for world in made.values():
        next(world, None)


@pytest.fixture(scope="module")
def merged(worlds, tmp_path_factory):
    root = tmp_path_factory.mktemp("mergekit")
    (root / "in").mkdir()
    for name, data in (*cases(worlds), *elsewhere(worlds)):
        (root / "in" / f"{name}.yaml").write_text(yaml.safe_dump(data))
    runner = Path(__file__).with_name("run_mergekit.py")
    subprocess.run([sys.executable, str(runner), str(root / "in"), str(root / "theirs")], check=True, timeout=500)
    for name in (*NAMES, *(name for name, _ in elsewhere(worlds))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Merge3Warning)
            merge_to_disk(Recipe.from_yaml(root / "in" / f"{name}.yaml"), root / "ours" / name)
    return root


def pair(merged, name):
    assert not (merged / "theirs" / name / "error.txt").exists(), (merged / "theirs" / name / "error.txt").read_text()
    return merged / "ours" / name, merged / "theirs" / name


def of_tokens(folder):
    """(token -> number, added tokens and whether they are special, a message as its chat template has it)"""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    message = [{"role": "user", "content": "w5"}]
    return tokenizer.get_vocab(), added, tokenizer.apply_chat_template(message, tokenize=False)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_checkpoint(merged, name):
    ours, theirs = pair(merged, name)
    found, expected = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    assert found.keys() == expected.keys()
    for tensor, right in expected.items():
        mine = found[tensor]
        assert mine.shape == right.shape and mine.dtype == right.dtype, tensor
        if name in EXACT:
            assert torch.equal(mine, right), f"{tensor}: {int((mine != right).sum())} of {mine.numel()} differ"
            continue
        # Of merges, what tests/methods/test_parity.py allows: rounding, and an element at a threshold.
        step = 1e-5 if right.dtype == torch.float32 else 2**-7
        scale = right.abs().max().float()
        off = (mine.float() - right.float()).abs() > step * torch.maximum(right.float().abs(), 0.01 * scale)
        assert int(off.sum()) <= (name == "union_ties"), f"{tensor}: {int(off.sum())} differ"
    sizes = [json.loads((folder / "config.json").read_text())["vocab_size"] for folder in (ours, theirs)]
    assert sizes[0] == sizes[1] == len(found[EMBED])
    assert of_tokens(ours) == of_tokens(theirs)


def test_the_cases_are_what_they_are_for(merged):
    """Rows are averaged, padded, truncated, zeroed and moved in them."""
    assert len(NAMES) >= 12
    found = load_file(merged / "ours" / "tokens_of_base" / "model.safetensors")
    numbers, *_ = of_tokens(merged / "ours" / "tokens_of_base")
    assert not found[EMBED][numbers["w4"]].any() and not found[HEAD][numbers["newer"]].any()
    assert torch.equal(found[EMBED][numbers["y1"]], found[EMBED][numbers["w7"]])


def test_a_new_token_over_the_bases_tokenizer(merged, worlds):
    """mergekit changes the tokenizer that it looks up the base's rows in, and then finds a number without a row."""
    assert "KeyError" in (merged / "theirs" / "base_and_a_new_token" / "error.txt").read_text()
    found = load_file(merged / "ours" / "base_and_a_new_token" / "model.safetensors")
    assert found[EMBED].shape[0] == 44 and not found[EMBED][43].any()


def test_tokens_of_models_that_a_slice_leaves_out(merged, worlds):
    """The embedding is the first slice's and the head the last's: where a token is of neither, mergekit writes zeros. A
    pool has one vocabulary, whatever slices say: the rows are those of the model that has them."""
    ours, theirs = (load_file(f / "model.safetensors") for f in pair(merged, "stacked"))
    numbers, *_ = of_tokens(merged / "ours" / "stacked")
    one, base = (load_file(worlds["plain"] / name / "model.safetensors") for name in ("one", "base"))
    own = {name: of_tokens(worlds["plain"] / name)[0] for name in ("one", "base")}
    assert not theirs[EMBED][numbers["x0"]].any() and not theirs[HEAD][numbers["w0"]].any()
    assert torch.equal(ours[EMBED][numbers["x0"]], one[EMBED][own["one"]["x0"]])
    assert torch.equal(ours[HEAD][numbers["w0"]], base[HEAD][own["base"]["w0"]])
    both = torch.tensor([number for token, number in numbers.items() if token in own["base"] and token in own["one"]])
    assert torch.equal(ours[EMBED][both], theirs[EMBED][both]) and torch.equal(ours[HEAD][both], theirs[HEAD][both])
