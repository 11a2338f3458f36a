"""Genome <-> recipe: exact both ways, mergekit-evolve's decoding, bounds."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from merge3.checkpoint.layout import layout
from merge3.engine import LocalEngine
from merge3.errors import ConfigError
from merge3.methods import METHODS
from merge3.methods.base import for_models
from merge3.pool import Pool
from merge3.program import compile
from merge3.recipe import Recipe, load_yaml
from merge3.search.baselines import default_merges
from merge3.space import PRESETS, SPACES, Space, SpaceDefinition

NAMES = [f"model.layers.{i}.{n}.weight" for i in range(4) for n in ("self_attn.q_proj", "mlp.up_proj")]
LAYOUT = layout([*NAMES, "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])


def space(method="ties", **changes):
    definition = dict(models=("a", "b", "c"), method=method, base="base") | changes
    return Space(SpaceDefinition(**definition), LAYOUT)


VARIANTS = [
    dict(),
    dict(layer_granularity=3),
    dict(filters=("mlp", "q_proj")),
    dict(smooth=True, filters=("mlp",)),
    dict(preset="sakana6", method="dare_ties"),
    dict(genes=("weight", "density", "lambda")),
    dict(layer_granularity=0),
    dict(method="linear", base=None),
    dict(method="slerp", models=("a",)),
    dict(method="della", genes=("weight", "epsilon")),
    dict(preset="evolve", filters=("mlp",), layer_granularity=2),
    dict(smooth=True, layer_granularity=2, genes=("weight", "lambda")),
]


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.sampled_from(range(len(VARIANTS))), st.integers(0, 2**31))
def test_recipe_and_genome_invert_each_other(variant, seed):
    s = space(**VARIANTS[variant])
    low, high = (np.where(np.isfinite(b), b, d) for b, d in zip(s.bounds(), (-1.5, 1.5)))
    genome = np.random.default_rng(seed).uniform(low, high)
    recipe = s.recipe(genome)
    again = Recipe.parse(load_yaml(recipe.to_yaml(), "x"))
    assert s.genome(again).shape == genome.shape
    assert s.recipe(s.genome(again)).to_dict() == recipe.to_dict()  # through YAML, to the last bit


SEARCHED = [name for name, method in METHODS.items() if method.genes]


@hypothesis_settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(SEARCHED),
    st.sampled_from(list(PRESETS)),
    st.sampled_from([0, 1, 2, 4]),
    st.booleans(),
    st.sampled_from([(), ("mlp",), ("q_proj", "mlp")]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_every_methods_genes_survive_every_preset(method, preset, granularity, smooth, filters, negative, seed):
    """Whatever a recipe can hold comes back from its YAML to the last bit; what is snapped, from the nearest step."""
    row = METHODS[method]
    s = space(
        method,
        models=("a", "b", "c")[: row.experts[1]],
        base=None if row.base == "source" else "base",
        layer_granularity=granularity,
        smooth=smooth,
        filters=filters,
        preset=preset,
        genes=tuple(row.genes),
        allow_negative_weights=negative,
    )
    low, high = (np.where(np.isfinite(b), b, d) for b, d in zip(s.bounds(), (-1.5, 1.5)))
    asked = np.random.default_rng(seed).uniform(low, high)
    recipe = s.recipe(asked)
    held = s.genome(Recipe.parse(load_yaml(recipe.to_yaml(), "x")))
    assert s.recipe(held).to_dict() == recipe.to_dict()
    assert np.array_equal(s.genome(s.recipe(held)), held)
    if filters or preset == "evolve":  # a tensor outside the stack has one filter set's value; signs are folded
        return
    off = np.abs(held - asked)
    names = s.own * int(np.prod(s.shape[:-1])) + s.shared * s.groups
    steps = np.array([row.genes[name].steps for name in names])
    assert (off[steps == 0] == 0).all() and (off * steps <= 0.5).all()


def test_rows_search_their_own_genes_from_inside_their_bounds():
    for method in METHODS.values():
        assert set(method.searched) | set(method.prefetch_search) <= set(method.genes), method.name
        for name, gene in method.genes.items():
            assert gene.low <= for_models(gene.start, 3) <= gene.high, (method.name, name)
            parameter = method.parameters[name]
            assert parameter.low <= gene.low < gene.high <= parameter.high, (method.name, name)


def test_thresholds_are_fetched_ahead_where_densities_are_searched(family):
    models = tuple(str(family / f"e{i}") for i in range(2))

    def asked(method, *genes):
        """Ranks asked for when a space is opened, by how many."""
        pool = Pool.open(str(family / "base"), models)
        found = []
        original = pool.statistics.prefetch_order

        def prefetch_order(requests):
            requests = list(requests)
            found.extend(len(ranks) for _, _, ranks in requests)
            original(requests)

        pool.statistics.prefetch_order = prefetch_order
        definition = SpaceDefinition(models, method, str(family / "base"), genes=genes)
        LocalEngine(pool).space(definition)
        return found

    assert max(asked("ties")) == 255
    assert asked("ties", "weight") == asked("dare_ties") == asked("breadcrumbs") == []


def test_every_gene_moves_some_tensor(family):
    """No part of a genome is without effect, but filter sets of tensors that are no layer."""
    pool = Pool.open(str(family / "base"), [str(family / f"e{i}") for i in range(2)])
    models = tuple(str(family / f"e{i}") for i in range(2))
    definition = SpaceDefinition(models, "ties", str(family / "base"), genes=("weight", "density", "lambda"))
    s = Space(definition, pool.layouts[pool.base])

    def parameters(genome):
        return [(j.name, j.shared, j.per_source) for j in compile(s.recipe(genome), pool).jobs]

    start = s.initial()
    before = parameters(start)
    for i in range(s.size):
        changed = start.copy()
        changed[i] += 0.125
        assert parameters(changed) != before, i


def test_groups_outside_the_stack_are_their_own():
    s = space("task_arithmetic", base="base")
    assert s.shape == (6, 3, 1, 1)
    genome = s.initial()
    genome[0] = 1.75
    recipe = s.recipe(genome)
    weight = recipe.slices[0].sources[0].parameters["weight"]
    assert {"filter": "model.embed_tokens.weight", "value": 1.75} in weight
    assert weight[-1] == {"value": pytest.approx(1 / 3)}
    assert isinstance(recipe.slices[1].sources[0].parameters["weight"], float)


def test_start_is_the_uniform_merge_and_inside_the_bounds():
    for variant in VARIANTS:
        s = space(**variant)
        low, high = s.bounds()
        assert ((s.initial() >= low) & (s.initial() <= high)).all()
    assert space("linear", base=None).initial() == pytest.approx(1 / 3)


def test_densities_are_snapped_to_256_steps():
    s = space(layer_granularity=0, preset="sakana6")
    genome = s.initial()
    genome[1] = 0.3
    density = s.recipe(genome).slices[0].sources[0].parameters["density"]
    assert density == round(0.3 * 256) / 256


def test_the_evolve_preset_decodes_like_mergekit():
    genome_module = pytest.importorskip("mergekit.evo.genome")
    import torch

    definition = genome_module.ModelGenomeDefinition.model_construct(
        models=["a", "b", "c"],
        merge_method="ties",
        base_model="base",
        layer_granularity=2,
        filters=["mlp"],
        normalize=None,
        allow_negative_weights=False,
        smooth=False,
        tokenizer_source=None,
    )
    theirs = genome_module.ModelGenome.__new__(genome_module.ModelGenome)
    theirs.definition, theirs.num_layers = definition, 4
    ours = space("ties", preset="evolve", layer_granularity=2, filters=("mlp",), allow_negative_weights=False)
    x = np.random.default_rng(0).normal(size=ours.size)
    expected = theirs.genotype_merge_config(torch.tensor(x))
    found = ours.recipe(x)
    for a, b in zip(expected.slices, found.slices):
        for left, right in zip(a.sources, b.sources):
            for name, setting in (left.parameters or {}).items():
                values = [c.value for c in setting]
                assert [c["value"] for c in right.parameters[name]] == values
                assert [c.get("filter") for c in right.parameters[name]] == [c.filter for c in setting]
    assert found.parameters["normalize"] is True


def test_bad_genomes_and_definitions():
    s = space()
    with pytest.raises(ConfigError, match=f"{s.size - 1} values; expected {s.size}"):
        s.recipe(s.initial()[1:])
    bad = s.initial()
    bad[4] = np.nan
    with pytest.raises(ConfigError, match="value 4 is not finite"):
        s.recipe(bad)
    with pytest.raises(ConfigError, match="'gamma' for ties"):
        space(genes=("gamma",))
    with pytest.raises(ConfigError, match="base_model: missing"):
        space(base=None)
    with pytest.raises(ConfigError, match="3 models; expected 1 to 1 for slerp"):
        space("slerp")
    with pytest.raises(ConfigError, match="preset: found 'magic'; expected layerwise, sakana6, evolve"):
        space(preset="magic")


def test_a_kind_is_a_row_of_the_table():
    import merge3

    assert merge3.Space is Space and isinstance(space(), SPACES["parameters"])
    with pytest.raises(ConfigError, match="space: found 'paths'; expected parameters"):
        space(kind="paths")


def test_a_configuration_names_a_kind_of_the_table(tmp_path):
    from merge3.search.config_files import load_config

    def config(**genome):
        data = {"models": ["a"], "merge_method": "ties", "base_model": "base"} | genome
        (tmp_path / "evolve.yaml").write_text(json.dumps({"genome": data, "tasks": [{"items": "x.jsonl"}]}))
        return load_config(tmp_path / "evolve.yaml")

    assert config().genome.definition() == config(space="parameters").genome.definition()
    with pytest.raises(ConfigError, match="genome.space: found 'paths'; expected 'parameters'"):
        config(space="paths")
    with pytest.raises(ConfigError, match="unknown gene 'luck', expected one of weight, "):
        config(bounds={"luck": [0, 1]})


def test_hashes_of_runs_that_began_before_there_were_kinds():
    """A journal is continued only under these."""
    from merge3.search.config import EvolveConfig

    definition = SpaceDefinition(("a", "b"), "ties", "base", bounds={"weight": (0.0, 1.0)}, genes=("weight",))
    assert definition.hash() == "d2aba71069801e77"
    assert replace(definition, kind="another").hash() != definition.hash()
    genome = {"models": ["a", "b"], "merge_method": "ties", "base_model": "base", "layer_granularity": 2}
    config = EvolveConfig.model_validate({"genome": genome, "tasks": [{"items": "x.jsonl"}]})
    assert config.hash() == "2f251a3e4554c1f7"


@pytest.mark.parametrize("variant", [*range(len(VARIANTS)), "full"])
def test_a_definition_crosses_the_wire_whole(variant):
    from merge3.rpc import spaces

    full = dict(
        normalize=False,
        allow_negative_weights=False,
        layer_granularity=0,
        filters=("mlp",),
        genes=("weight",),
        bounds={"weight": (0.0, 1.5), "t": (0.25, 0.5)},
        tokenizer_source="base",
        dtype="float16",
        smooth=True,
        preset="evolve",
    )
    definition = space(**(full if variant == "full" else VARIANTS[variant])).definition
    message = spaces.space_to(definition)
    assert spaces.space_from(type(message).FromString(message.SerializeToString())) == definition


def test_merges_by_hand():
    """Names, order and values that reports of earlier runs are compared by."""
    found = {name: recipe.to_dict() for name, recipe in default_merges("base", ["a", "b"], "bfloat16")}

    def models(weight):
        return [{"model": m, "parameters": {"weight": weight}} for m in ("a", "b")]

    based = {"base_model": "base", "dtype": "bfloat16"}
    half = {"density": 0.5}
    assert list(found.items()) == [
        ("uniform_linear", {"merge_method": "linear", "models": models(1.0), "dtype": "bfloat16"}),
        ("task_arithmetic", {"merge_method": "task_arithmetic", "models": models(0.3)} | based),
        ("task_arithmetic_full", {"merge_method": "task_arithmetic", "models": models(1.0)} | based),
        ("ties", {"merge_method": "ties", "models": models(1.0), "parameters": half | {"normalize": True}} | based),
        ("dare_ties", {"merge_method": "dare_ties", "models": models(0.5), "parameters": half} | based),
    ]
    assert [name for name, _ in default_merges(None, ["a", "b"])] == ["uniform_linear"]
