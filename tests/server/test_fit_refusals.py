"""What the daemon refuses of a fit: one line, the right code, and room for the next one."""

import json
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from merge3.engine import LocalEngine
from merge3.errors import Busy, ItemsError, Merge3Error, RecipeError
from merge3.learn.fit import Fit
from merge3.learn.fitting import FitError
from merge3.pool import Pool
from merge3.registration import Registration
from merge3.rpc import merge3_pb2 as pb
from merge3.tasks import LogitsError, read_items
from tests.server.calling import refused
from tests.server.fitting import TASKS, begun, by_hand, free, learning, local, remote, told


def numbers(count=2, groups=39, value=0.1):
    return np.full((count, groups), value, "<f4").tobytes()


def state(step=1, shape=(2, 39), **more):
    """Of this world's pool, but for what is said."""
    fields = {"raw": numbers(), "exp_avg": numbers(), "exp_avg_sq": numbers()} | more
    return pb.FitState(step=step, shape=shape, **fields)


NAN = np.full((2, 39), np.nan, "<f4").tobytes()
HOSTILE_STATES = {
    "empty": (pb.FitState(), "state: shape: found []; expected [2 experts, groups]"),
    "step": (state(step=9), "state: step: found 9; expected at most 8, the fit's"),
    "ranks": (state(shape=(78,)), "state: shape: found [78]"),
    "many ranks": (state(shape=(1,) * 1000), "state: shape: found [1, 1, 1, 1]"),
    "experts": (state(shape=(39, 2)), "state: shape: found [39, 2]"),
    "no groups": (state(shape=(2, 0), raw=b"", exp_avg=b"", exp_avg_sq=b""), "state: shape: found [2, 0]"),
    "short": (state(exp_avg=numbers()[:-1]), "state: exp_avg: 311 bytes; expected 312, float32 [2, 39]"),
    "long": (state(raw=numbers() + b"\0"), "state: raw: 313 bytes"),
    "missing": (state(exp_avg_sq=b""), "state: exp_avg_sq: 0 bytes"),
    "nan": (state(raw=NAN), "state: raw: numbers that are NaN or infinite"),
    "infinite": (state(exp_avg=numbers(value=np.inf)), "state: exp_avg: numbers that are NaN or infinite"),
    "negative": (state(exp_avg_sq=numbers(value=-1.0)), "state: exp_avg_sq: negative numbers"),
    "groups": (
        state(shape=(2, 7), **dict.fromkeys(("raw", "exp_avg", "exp_avg_sq"), numbers(groups=7))),
        "state: coefficients [2, 7]; expected [2, ",
    ),
    "overflowing": (state(shape=(2, 2**32 - 1)), "numbers; expected at most 250000"),
    "large": (
        state(shape=(2, 130_000), raw=numbers(groups=130_000)),
        "state: shape: 260000 numbers; expected at most 250000",
    ),
}


@pytest.mark.parametrize("case", HOSTILE_STATES)
def test_states_that_are_none(daemon, tiny_world, case):
    bad, words = HOSTILE_STATES[case]
    _, _, request = by_hand(daemon, tiny_world, steps=8)
    request.state.CopyFrom(bad)
    code = "RESOURCE_EXHAUSTED" if "at most 250000" in words else "INVALID_ARGUMENT"
    refused(lambda: daemon.stub().Fit(request, timeout=60), code, words)


def test_huge_numbers_are_no_numbers_at_the_end(daemon, tiny_world):
    """What a float can hold is a state; where a loss is none, that is said, and the daemon goes on."""
    engine, what, _ = by_hand(daemon, tiny_world, method="expert_kl", steps=8)
    first = next(step for step in engine.fit(what.asked, what.fit) if step.state is not None).state
    huge = replace(first, raw=torch.full_like(first.raw, 3e38))
    with pytest.raises(FitError, match=rf"fit: step {first.step + 1}\b.*; expected (a )?finite"):
        free(lambda: list(engine.fit(what.asked, what.fit, huge)))
    assert told(free(lambda: list(engine.fit(what.asked, what.fit)))) == told(local(what))


REFUSED = {
    "pool": (dict(pool_id="nowhere"), "NOT_FOUND", "'nowhere' is not open"),
    "items": (dict(items_id="nothing"), "NOT_FOUND", "'nothing' is not registered with this pool"),
    "task": (dict(experts={"french": "{base}"}), "INVALID_ARGUMENT", "experts: task 'french': none of the items'"),
    "expert": (dict(experts={"english": "nobody"}), "INVALID_ARGUMENT", "task 'english': model: found 'nobody'"),
    "long names": (dict(experts={"e" * 100_000: "n"}), "INVALID_ARGUMENT", "experts: task 'eeee"),
    "empty": (dict(recipe=""), "INVALID_ARGUMENT", "recipe"),
    "no yaml": (dict(recipe="{" * 50), "INVALID_ARGUMENT", "recipe"),
    "large": (dict(recipe="x" * 1_000_001), "RESOURCE_EXHAUSTED", "recipe: 1000001 characters"),
}
RECIPES = {
    "no learned method": (dict(merge_method="linear"), "'linear' learns nothing"),
    "no base": (dict(base_model=None), "base_model: missing"),
    "weights": (dict(parameters={"weight": 1}), "parameters.weight: given, and supermerge learns all weights"),
    "model": (dict(models=[{"model": "/etc"}]), "model '/etc' is not in the pool"),
    "key": (dict(fit={"stepss": 1}), "fit.stepss: unknown key"),
    "long key": (dict(fit={"x" * 100_000: 1}), "fit.xxxx"),
    "start": (dict(fit={"start": 1.0}), "fit: start: found 1"),
    "huge start": (dict(fit={"start": 1e308, "bound": "none"}), "fit: start: found 1e+308"),
    "huge rate": (dict(fit={"learning_rate": 1e300}), "fit.learning_rate: found 1e+300"),
    "survivors": (dict(merge_method="adamerging++"), "merge_method: adamerging++ makes experts of its own; expected"),
    "groups by size": (dict(fit={"groups": {"size": 2}}), "fit.groups: every group opens models of its own"),
    "surgery": (dict(surgery={"rank": 2}), "surgery: a daemon answers without adapters"),
}


@pytest.mark.parametrize("case", [*REFUSED, *RECIPES])
def test_what_is_no_fit_is_one_line_and_a_code(daemon, tiny_world, case):
    _, what, request = by_hand(daemon, tiny_world, steps=8)
    if case in RECIPES:
        changes, words = RECIPES[case]
        code, data = "INVALID_ARGUMENT", what.fit.recipe.to_dict() | changes
        request.recipe = yaml.safe_dump({key: value for key, value in data.items() if value is not None})
    else:
        changes, code, words = REFUSED[case]
        for name, value in changes.items():
            if name == "experts":
                request.experts.clear()
                request.experts.update({task: m.format(base=what.models[0]) for task, m in value.items()})
            else:
                setattr(request, name, value)
    refused(lambda: daemon.stub().Fit(request, timeout=60), code, words)


ENDLESS = "0x" + "F" * 4000


@pytest.mark.parametrize(
    "text",
    [
        *(f"fit: {{{key}: {ENDLESS}}}" for key in ("steps", "seed", "learning_rate", "start", "trim", "batch")),
        f"fit: {{items: [{ENDLESS}]}}",
        f"fit: {{groups: {{size: {ENDLESS}}}}}",
        f"fit:\n  ? {ENDLESS}\n  : 1",
        f"parameters: {{weight: {ENDLESS}}}",
        f"? {ENDLESS}\n: 1",
        f"merge_method: {ENDLESS}",
    ],
    ids=lambda text: text.replace(ENDLESS, "endless"),
)
def test_numbers_that_are_too_long_to_be_shown(daemon, tiny_world, text):
    """Python writes no number of more than 4300 digits, and reads such ones in hexadecimal."""
    _, what, request = by_hand(daemon, tiny_world, steps=8)
    data = what.fit.recipe.to_dict()
    for key in yaml.safe_load(text):
        data.pop(key, None)
    request.recipe = yaml.safe_dump(data) + text + "\n"
    refused(lambda: daemon.stub().Fit(request, timeout=60), "INVALID_ARGUMENT", "found a number of 4000 hex")


def test_more_numbers_than_the_daemon_takes_again(tiny_world, start):
    """A fit that could not be continued is refused before its first step is told, and the driver is told at once."""
    daemon = start(tiny_world, limits={"coefficients": 70, "turn": 0.2})
    engine, what, request = by_hand(daemon, tiny_world, steps=300)
    stream, found = daemon.stub().Fit(request), []
    words = "fit: level: 78 numbers to learn; expected at most 70 (a coarser level)"
    refused(lambda: found.extend(stream), "RESOURCE_EXHAUSTED", words, reason="busy")
    assert not found
    engine.patience = 20.0
    for broken in (False, True):
        if broken:  # what the driver waits for after that is its own fit of before, and nothing else
            break_first(engine)
        began = time.monotonic()
        with pytest.raises(Busy, match="78 numbers to learn; expected at most 70"):
            free(lambda: list(engine.fit(what.asked, what.fit)), until_words="one is under way")
        assert time.monotonic() - began < 10
    layers = learning(tiny_world, steps=3, level="layer")
    assert len(free(lambda: list(engine.fit(layers.asked, layers.fit)))) == 3


def break_first(engine):
    """The engine's next stream of a fit breaks before it has told anything."""
    real, streams = engine._stub.Fit, []

    def fit(request, metadata):
        streams.append(real(request, metadata=metadata))
        if len(streams) == 1:
            streams[0].cancel()
        return streams[-1]

    engine._stub.Fit = fit


def test_more_steps_than_the_daemon_gives(daemon, tiny_world):
    _, _, request = by_hand(daemon, tiny_world, steps=10**12)
    act = lambda: daemon.stub().Fit(request, timeout=60)
    refused(act, "RESOURCE_EXHAUSTED", "fit: steps: 1000000000000; expected at most 1000")


def test_a_fit_that_is_refused_leaves_room(daemon, tiny_world):
    engine, what, request = by_hand(daemon, tiny_world, steps=3)
    request.state.CopyFrom(HOSTILE_STATES["groups"][0])
    for _ in range(3):
        refused(
            lambda: free(lambda: begun(daemon.stub().Fit(request, timeout=60))),
            "INVALID_ARGUMENT",
            "state: coefficients",
        )
    assert len(free(lambda: list(engine.fit(what.asked, what.fit)))) == 3


def test_errors_are_the_same_class_and_words_on_both_sides(daemon, tiny_world, tmp_path):
    """Items are named by the file and line that only the driver has."""
    row = {"id": "a", "task": "english", "kind": "generate", "prompt": "one", "answer": "t.*", "metric": "regex"}
    row["max_tokens"] = 2
    (tmp_path / "items.jsonl").write_text(json.dumps(row) + "\n")
    what = learning(tiny_world, steps=3)
    asked = Registration((*what.asked.items, *read_items(tmp_path / "items.jsonl")))
    kl = learning(tiny_world, "expert_kl", steps=3)
    unknown = Fit(kl.fit.recipe, dict(kl.fit.experts) | {"english": "nobody"})
    none = Fit(kl.fit.recipe, {"english": kl.models[1]})
    engines = LocalEngine(Pool.open(what.models[0], what.models[1:])), remote(daemon.address, what)
    for question, fit, kind, words in (
        (asked, what.fit, ItemsError, "items.jsonl, line 1: item 'a' of task 'english': its answer is a pattern"),
        (kl.asked, unknown, RecipeError, "task 'english': model: found 'nobody'"),
        (kl.asked, none, RecipeError, "no model for task 'italian'"),
    ):
        both = []
        for engine in engines:
            with pytest.raises(Merge3Error) as caught:
                free(lambda: list(engine.fit(question, fit)))  # noqa: B023
            both.append((type(caught.value), str(caught.value)))
        assert both[0] == both[1] and both[0][0] is kind and words in both[0][1], both


def test_losses_that_are_no_numbers(tiny_world, start, tmp_path):
    """An expert whose logits overflow, and a merge with it: named alike, here and there, by file and line."""
    for name in ("base", *TASKS):
        shutil.copytree(tiny_world / name, tmp_path / name)
    for task in TASKS:
        shutil.copy(tiny_world / f"{task}.jsonl", tmp_path)
    file = tmp_path / "english" / "model.safetensors"
    tensors = load_file(file)
    large = {name: tensor * 1e16 for name, tensor in tensors.items() if "layers.0.mlp" in name}  # its product is not
    save_file(tensors | large, file, metadata={"format": "pt"})
    daemon = start(tmp_path)
    for method, kind, words in (
        ("expert_kl", LogitsError, f"{tmp_path / 'english'}: "),
        ("supermerge", FitError, "fit: step 1, "),
    ):
        what = learning(tmp_path, method, steps=3, level="task")
        both = []
        for engine in (LocalEngine(Pool.open(what.models[0], what.models[1:])), remote(daemon.address, what)):
            with pytest.raises(Merge3Error) as caught:
                list(engine.fit(what.asked, what.fit))
            both.append((type(caught.value), str(caught.value)))
        assert both[0] == both[1] and both[0][0] is kind, both
        assert both[0][1].startswith(f"{words}{tmp_path / 'english.jsonl'}, line "), both
