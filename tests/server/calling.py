"""Calls by hand: what is refused, and how; a recipe of the world's models."""

import grpc
import pytest

from merge3.recipe import Recipe
from merge3.rpc import merge3_pb2 as pb


def refused(call, code, *words, reason=None):
    """The call fails with a status, one line that says why, and a machine-readable reason."""
    with pytest.raises(grpc.RpcError) as caught:
        found = call()
        if hasattr(found, "__next__"):
            list(found)
    error = caught.value
    assert error.code().name == code, (error.code(), error.details())
    for word in words:
        assert word in error.details(), error.details()
    assert "\n" not in error.details() and "Traceback" not in error.details()
    trailing = dict(error.trailing_metadata())
    detail = pb.Error.FromString(trailing["merge3-error-bin"])
    assert detail.reason and detail.request_id == trailing["x-request-id"]
    if reason:
        assert detail.reason == reason
    return detail


def recipe(world, method="ties", **parameters):
    models = world.config.models
    return Recipe.parse(
        {
            "merge_method": method,
            "base_model": models[0],
            "parameters": parameters,
            "models": [{"model": m, "parameters": {"weight": 0.5}} for m in models[1:]],
        }
    )
