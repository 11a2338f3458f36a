"""Genome <-> recipe: exact both ways, mergekit-evolve's decoding, bounds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from merge3.checkpoint.layout import layout
from merge3.errors import ConfigError
from merge3.pool import Pool
from merge3.program import compile
from merge3.recipe import Recipe, load_yaml
from merge3.space import Space, SpaceDefinition

NAMES = [f"model.layers.{i}.{n}.weight" for i in range(4) for n in ("self_attn.q_proj", "mlp.up_proj")]
LAYOUT = layout([*NAMES, "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])


def space(method="ties", **changes):
    definition = dict(models=("a", "b", "c"), method=method, base="base") | changes
    return Space(SpaceDefinition(**definition), LAYOUT)


VARIANTS = [
    dict(), dict(layer_granularity=3), dict(filters=("mlp", "q_proj")), dict(smooth=True, filters=("mlp",)),
    dict(preset="sakana6", method="dare_ties"), dict(genes=("weight", "density", "lambda")), dict(layer_granularity=0),
    dict(method="linear", base=None), dict(method="slerp", models=("a",)), dict(method="della", genes=("weight", "epsilon")),
    dict(preset="evolve", filters=("mlp",), layer_granularity=2), dict(smooth=True, layer_granularity=2, genes=("weight", "lambda")),
]  # fmt: skip


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


def test_every_gene_moves_some_tensor(family):
    """No part of a genome is without effect, but filter sets of tensors that are no layer."""
    pool = Pool.open(str(family / "base"), [str(family / f"e{i}") for i in range(2)])
    models = tuple(str(family / f"e{i}") for i in range(2))
    s = Space(SpaceDefinition(models, "ties", str(family / "base"), genes=("weight", "density", "lambda")), pool.layouts[pool.base])

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
        models=["a", "b", "c"], merge_method="ties", base_model="base", layer_granularity=2, filters=["mlp"],
        normalize=None, allow_negative_weights=False, smooth=False, tokenizer_source=None,
    )  # fmt: skip
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
