"""Fits for tests of the daemon: what is learned, here and there, and requests by hand."""

import json
import time
from types import SimpleNamespace

import grpc

from merge3.client.remote import RemoteEngine
from merge3.engine import LocalEngine
from merge3.errors import Busy
from merge3.learn.fit import Fit
from merge3.pool import Pool
from merge3.recipe import Recipe
from merge3.registration import Registration
from merge3.rpc import fits
from merge3.tasks import read_items

TASKS = ("english", "italian")
METHODS = ("supermerge", "adamerging", "expert_kl")


def learning(folder, method="supermerge", items=12, **settings):
    """(models, what is fitted, what it is learned from) of a folder with the world in it."""
    models = [str(folder / name) for name in ("base", *TASKS)]
    data = {"merge_method": method, "base_model": models[0], "models": [{"model": m} for m in models[1:]]}
    recipe = Recipe.parse(data | {"fit": {"batch": 4, "items": [f"{task}.jsonl" for task in TASKS]} | settings})
    asked = [item for task in TASKS for item in read_items(folder / f"{task}.jsonl")[:items]]
    return SimpleNamespace(
        models=models,
        fit=Fit(recipe, dict(zip(TASKS, models[1:]))),
        asked=Registration(tuple(asked)),
        held=Registration(tuple(read_items(folder / "english.jsonl")[30:])),
    )


def local(what):
    return list(LocalEngine(Pool.open(what.models[0], what.models[1:])).fit(what.asked, what.fit))


def remote(address, what, **options):
    return RemoteEngine(address, what.models, note=lambda text: None, **options)


def told(steps):
    """What a run's history and its result are made of, to compare as text: every bit, and the order of tasks."""
    found = [json.dumps([step.number, step.loss, dict(step.losses)]) for step in steps]
    return found, steps[-1].recipe.to_yaml(), steps[-1].state.raw.tolist()


def by_hand(world, folder, **settings):
    """A request for the daemon's own world."""
    what = learning(folder, **settings)
    engine = RemoteEngine(world.address, what.models)
    request = fits.fit_to(what.fit)
    engine._persist(lambda: engine._address(what.asked, [request]))
    return engine, what, request


def begun(stream):
    next(stream)
    return stream


def free(act, seconds=10, until_words=""):
    """What `act` gives as soon as the pool has no fit under way. until_words: what alone is waited for."""
    until = time.monotonic() + seconds
    while True:
        try:
            return act()
        except (Busy, grpc.RpcError) as error:
            busy = isinstance(error, Busy) or error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            if not busy or until_words not in str(error) or time.monotonic() > until:
                raise
            time.sleep(0.05)
