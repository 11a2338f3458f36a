"""A recipe compiled: what a program says before anything is read, and what its steps read when they are run."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from merge3 import METHODS, Pool, Recipe, merge_to_disk
from merge3.checkpoint import Checkpoint
from merge3.checkpoint.layout import Ref
from merge3.errors import RecipeError
from merge3.export import check_recipe
from merge3.methods import execute
from merge3.methods.base import REQUIRED
from merge3.program import compile

VALUES = {"weight": 0.4, "density": 0.5, "epsilon": 0.1, "t": 0.3, "scale": 0.5}
Q = "model.layers.{}.self_attn.q_proj.weight"


def recipe_of(family, method, **parameters):
    """A recipe over the base and as many experts as the method takes, up to three."""
    row = METHODS[method]
    needed = [name for name, p in row.parameters.items() if p.default is REQUIRED or name in ("density", "scale")]
    values = {name: VALUES[name] for name in needed} | parameters
    models = [{"model": str(family / f"e{i}")} for i in range(min(3, row.experts[1]))]
    data = {"merge_method": method, "models": models, "parameters": values}
    if row.base != "source":
        data["base_model"] = str(family / "base")
    return Recipe.parse(data)


@pytest.fixture(scope="module")
def pool(family):
    return Pool.open(str(family / "base"), [str(family / f"e{i}") for i in range(3)])


def test_a_dry_run_reads_no_weights(family, monkeypatch):
    pool = Pool.open(str(family / "base"), [str(family / f"e{i}") for i in range(3)])

    def refuse(checkpoint, name):
        raise AssertionError(f"{name} of {checkpoint.path} was read")

    monkeypatch.setattr(Checkpoint, "get", refuse)
    monkeypatch.setattr(Checkpoint, "tensor_hash", refuse)
    for method in METHODS:
        program = compile(recipe_of(family, method), pool)
        assert len(program.jobs) == len(program.shapes) == len(pool.base_checkpoint.tensors), method
        check_recipe(recipe_of(family, method), pool)
    with pytest.raises(AssertionError, match="was read"):  # what ties has to know of task vectors
        compile(recipe_of(family, "ties"), pool).steps(program.shapes, pool.statistics)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_step_reads_its_refs_and_no_more(family, pool, method):
    program = compile(recipe_of(family, method), pool)
    jobs = {job.name: job for job in program.jobs}
    read = []

    def get(ref):
        read.append(ref)
        return pool.get(ref)

    for name, step in program.steps({Q.format(0), Q.format(3), "model.norm.weight"}, pool.statistics).items():
        read.clear()
        execute([(name, step, torch.empty(program.shapes[name]))], get)
        assert read == list(step.refs), name  # base first
        assert set(step.refs) <= set(jobs[name].refs), name
        assert all(ref.tensor == name for ref in step.refs)
    if METHODS[method].base == "required":
        assert all(job.refs == (Ref(str(family / "base"), job.name), *job.sources) for job in program.jobs)


def test_steps_are_made_for_what_is_asked_in_the_order_of_the_output(family, pool):
    program = compile(recipe_of(family, "ties"), pool)
    names = list(program.shapes)
    assert list(program.steps(set(names), pool.statistics)) == names
    few = program.steps({names[7], names[2], "no such tensor"}, pool.statistics)
    assert list(few) == [names[2], names[7]]
    whole = program.steps(names, pool.statistics)
    assert all((few[name].coefficients == whole[name].coefficients).all() for name in few)


def test_layers_know_where_their_configuration_comes_from(family, pool):
    parts = [("e0", [0, 3]), ("e1", [1, 4])]
    slices = [{"sources": [{"model": str(family / m), "layer_range": layers}]} for m, layers in parts]
    program = compile(Recipe.parse({"merge_method": "passthrough", "slices": slices}), pool)
    origins = [(str(family / "e0"), i) for i in range(3)] + [(str(family / "e1"), i) for i in range(1, 4)]
    assert program.layers == 6 and list(program.origins) == origins
    assert program.steps({Q.format(4)}, pool.statistics)[Q.format(4)].refs == (Ref(str(family / "e1"), Q.format(2)),)


def test_what_is_kept_is_a_copy_and_what_is_tied_is_not_there(tied_family, tmp_path):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tied_family / "e0")
    model.resize_token_embeddings(70)
    model.save_pretrained(tmp_path / "longer")
    models = [str(tied_family / "e1"), str(tmp_path / "longer")]
    pool = Pool.open(str(tied_family / "base"), models)
    entries = [{"model": m, "parameters": {"weight": 0.5}} for m in models]
    data = {"merge_method": "task_arithmetic", "base_model": str(tied_family / "base"), "models": entries}
    program = compile(Recipe.parse(data), pool)
    embedding, base = "model.embed_tokens.weight", str(tied_family / "base")
    assert program.copies == {embedding: Ref(base, embedding)}
    assert program.kept[embedding].startswith("shape [70, 32] in ")
    assert program.ties == {} and "lm_head.weight" not in program.shapes  # nobody stores an output
    assert list(program.shapes)[-1] == embedding  # what is kept comes last
    steps = program.steps(program.shapes, pool.statistics)
    assert steps[embedding].refs == (Ref(base, embedding),)
    result = merge_to_disk(Recipe.parse(data), tmp_path / "out", pool)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert result["kept"] == program.kept
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == program.shapes


def test_a_program_is_one_value(family, pool):
    recipe = recipe_of(family, "dare_ties")
    program = compile(recipe, pool)
    assert program == compile(recipe, pool) != compile(recipe_of(family, "dare_ties", density=0.4), pool)
    with pytest.raises(dataclasses.FrozenInstanceError):
        program.jobs = ()


def test_what_does_not_fit_is_named(family, pool):
    recipe = recipe_of(family, "ties")
    with pytest.raises(RecipeError, match="^r.yaml: merge_method: unknown method 'tied'.*did you mean 'ties'"):
        compile(dataclasses.replace(recipe, method="tied"), pool, "r.yaml")
    other = Pool.open(str(family / "base"), [str(family / "e0")])
    with pytest.raises(RecipeError, match="e1' is not in the pool"):
        compile(recipe, other)
