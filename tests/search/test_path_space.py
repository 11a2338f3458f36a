"""The space of paths: genomes, their recipes and back; what is refused, before anything is searched."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merge3.checkpoint.layout import Layout
from merge3.errors import ConfigError, Merge3Warning
from merge3.hops import Hop, hops_of, path_recipe
from merge3.recipe import Recipe
from merge3.rpc import spaces
from merge3.space import Space, SpaceDefinition
from merge3.space.path import hop_count

WRITERS = ("o_proj", "down_proj")
NAMES = (
    "input_layernorm.weight",
    "mlp.down_proj.weight",
    "post_attention_layernorm.weight",
    "self_attn.o_proj.weight",
)
LAYERS = 4


def layout(names=NAMES, layers=LAYERS):
    return Layout(
        "model.layers", layers, names, ("model.embed_tokens.weight",), ("model.norm.weight", "lm_head.weight")
    )


def definition(*models, **others):
    return SpaceDefinition(models or ("a", "b"), "passthrough", kind="path", **others)


def hops(text, scales=()):
    """`a0 b3` as hops."""
    found = [Hop(word[0], int(word[1:])) for word in text.split()]
    return [hop._replace(scale=scale) for hop, scale in zip(found, scales)] + found[len(scales) :]


def test_slots_are_all_models_layers_in_order_over_and_over():
    space = Space(definition(repetitions=2), layout())
    assert space.places == tuple(hops("a0 a1 a2 a3 b0 b1 b2 b3") * 2)
    assert space.size == 16 + 16 and space.bits.sum() == 16
    with_base = Space(definition("a", "b", base="c"), layout())
    assert with_base.places[0] == Hop("c", 0) and with_base.models == ("c", "a", "b")


def test_a_search_begins_at_the_first_model_as_it_is():
    space = Space(definition(repetitions=3), layout())
    assert space.path(space.initial()) == tuple(hops("a0 a1 a2 a3"))
    expected = {"merge_method": "passthrough", "slices": [{"sources": [{"model": "a", "layer_range": [0, 4]}]}]}
    assert space.uniform_recipe().to_dict() == expected
    low, high = space.bounds()
    assert ((space.initial() >= low) & (space.initial() <= high)).all() and low.min() == 0 and high.max() == 2.0


def test_pinned_layers_are_on_every_path():
    space = Space(definition(pinned=(1, 2)), layout())
    assert space.path(np.where(space.bits, 0.0, 1.0)) == tuple(hops("a0 a2 a3"))
    assert space.path(space.initial()) == tuple(hops("a0 a1 a2 a3"))
    genome = space.genome(path_recipe(hops("a0 b1 a2 a3", (1.0, 0.5, 1.0, 2.0)), "a", WRITERS))
    assert space.path(genome) == tuple(hops("a0 b1 a2 a3", (1.0, 0.5, 1.0, 2.0)))
    with pytest.raises(ConfigError, match="the first 1 layers of a first, its last 2 last: they are pinned"):
        space.genome(path_recipe(hops("b0 a2 a3"), "a", WRITERS))


def test_a_scale_multiplies_what_enters_a_hop_and_folds_into_all_that_follow():
    """x -> s2 (s1 x + f1) + f2, over s1 s2: the writers of hop k are divided by s1 .. sk."""
    recipe = path_recipe(hops("a0 a1 b2 a3", (2.0, 1.0, 0.25, 1.0)), "a", WRITERS)
    told = [(part.sources[0].layer_range, part.sources[0].parameters.get("scale")) for part in recipe.slices]
    half = [{"filter": "o_proj", "value": 0.5}, {"filter": "down_proj", "value": 0.5}, {"value": 1.0}]
    twice = [{"filter": "o_proj", "value": 2.0}, {"filter": "down_proj", "value": 2.0}, {"value": 1.0}]
    assert told == [((0, 2), half), ((2, 3), twice), ((3, 4), twice)]


def test_what_stands_outside_the_stack_is_the_first_models():
    recipe = path_recipe(hops("b1 b2"), "a", WRITERS)
    told = [(str(part.sources[0].model), part.sources[0].layer_range) for part in recipe.slices]
    assert told == [("a", (0, 0)), ("b", (1, 3)), ("a", (0, 0))]
    assert hops_of(recipe, WRITERS) == tuple(hops("b1 b2"))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_recipe_has_a_genome_whose_recipe_it_is_to_the_last_bit(data):
    pinned = data.draw(st.sampled_from([(), (1, 1), (0, 2)]))
    most = data.draw(st.sampled_from([None, 4, 6]))
    genes = data.draw(st.sampled_from([(), ("slot",), ("slot", "scale")]))
    space = Space(
        definition(repetitions=data.draw(st.integers(1, 3)), pinned=pinned, max_hops=most, genes=genes), layout()
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    genome = rng.uniform(*space.bounds())
    try:
        recipe = space.recipe(genome)
    except ConfigError as error:
        assert "an empty path" in str(error) and not (genome[space.bits] > 0.5).any()
        return
    assert space.recipe(space.genome(recipe)) == recipe == space.recipe(space.project(recipe))
    assert Recipe.parse(recipe.to_dict()) == recipe
    assert hop_count(space, genome) == len(hops_of(recipe, WRITERS)) <= (most or space.hops)
    if most is None:
        on = [place for place, bit in zip(space.places, genome) if bit > 0.5]
        bare = tuple(hop._replace(scale=1.0) for hop in space.path(genome))
        assert bare == (*space.before, *on, *space.after)


def test_of_too_many_slots_those_with_the_highest_numbers_stay_in_order():
    space = Space(definition(max_hops=4, genes=("slot",)), layout())
    assert space.path([0.6, 0.9, 0.1, 0.7, 0.8, 0.2, 0.95, 0.51]) == tuple(hops("a1 a3 b0 b2"))
    assert space.path(np.ones(8)) == tuple(hops("a0 a1 a2 a3"))


REFUSED = {
    "pins outside the range": (
        dict(pinned=(3, 2)),
        r"pinned: found \[3, 2\]; expected \[first, last\]: how many of .* 4 ",
    ),
    "one pin": (dict(pinned=(1,)), "pinned: found"),
    "negative scales": (dict(bounds={"scale": (-1.0, 2.0)}), "bounds: scale: scales from -1; expected scales above 0"),
    "scales of zero": (dict(bounds={"scale": (0.0, 2.0)}), "expected scales above 0"),
    "scales without 1": (dict(bounds={"scale": (1.5, 2.0)}), "1 among them"),
    "bounds of weights": (dict(bounds={"weight": (0.0, 2.0)}), "bounds: found 'weight'; expected scale"),
    "a path shorter than its start": (dict(max_hops=3), "max_hops: found 3; expected 4 or more"),
    "filters": (dict(filters=("mlp",)), "filters: found"),
    "smooth": (dict(smooth=True), "smooth: found"),
    "genes of merges": (dict(genes=("weight",)), "genes: found 'weight'"),
    "no slots": (dict(genes=("scale",)), "slot among them"),
    "no repetition": (dict(repetitions=0), "repetitions: found 0"),
    "more slots than memory": (dict(repetitions=10**9), "at most 100,000 slots"),
    "no recipe": (dict(merged="{"), "merged: found '{'; expected recipes by the names"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_space_of_paths_is_refused_in_one_line(name):
    changes, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message) as error:
        Space(definition(**changes), layout())
    assert "\n" not in str(error.value)


def test_methods_that_merge_and_models_without_a_stack_are_refused():
    with pytest.raises(ConfigError, match="merge_method: found ties; expected passthrough"):
        Space(dataclasses.replace(definition(), method="ties"), layout())
    with pytest.raises(ConfigError, match="empty path"):
        Space(definition(), layout(layers=0))
    with pytest.raises(ConfigError, match="an empty path"):
        Space(definition(), layout()).recipe(np.zeros(16))


@pytest.mark.parametrize("odd", ["post_feedforward_layernorm.weight", "pre_feedforward_layernorm.weight"])
def test_norms_after_a_block_are_refused_with_the_reason(odd):
    with pytest.raises(ConfigError, match="scales fold into a layer only where its norms stand before its blocks"):
        Space(definition(), layout((*NAMES, odd)))


STARTS = {
    "another space": (
        {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 1}}]},
        "found linear",
    ),
    "another order": (path_recipe(hops("b0 a1"), "a", WRITERS).to_dict(), "layer 1 of a as hop 1.*more `repetitions`"),
    "another head": (path_recipe(hops("a0 b1"), "b", WRITERS).to_dict(), "embedding and head of b"),
    "another model": (path_recipe(hops("a0 c1"), "a", WRITERS).to_dict(), "layer 1 of c"),
}


@pytest.mark.parametrize("name", STARTS)
def test_a_start_that_is_no_path_of_the_space_is_refused(name):
    data, message = STARTS[name]
    with pytest.raises(ConfigError, match=message):
        Space(definition(), layout()).project(Recipe.parse(data), "start.yaml")


def test_scales_of_a_start_are_moved_into_the_bounds_aloud():
    recipe = path_recipe(hops("a0 b1", (1.0, 4.0)), "a", WRITERS)
    space = Space(definition(), layout())
    with pytest.warns(Merge3Warning, match=r"moved to 0.5 \.\. 2"):
        found = space.project(recipe, "start.yaml")
    assert space.path(found) == tuple(hops("a0 b1", (1.0, 2.0)))
    with pytest.raises(ConfigError, match="none: the genome's `genes` fix them at 1"):
        Space(definition(genes=("slot",)), layout()).project(recipe, "start.yaml")


def test_definitions_cross_the_wire():
    whole = definition(
        repetitions=3, pinned=(1, 2), max_hops=9, merged='{"merge_method": "linear"}', bounds={"scale": (0.9, 1.5)}
    )
    for one in (whole, definition(), SpaceDefinition(("a",), "ties", "b")):
        assert spaces.space_from(spaces.space_to(one)) == one


def test_other_spaces_are_named_as_before_there_were_paths():
    assert SpaceDefinition(("./math", "./code"), "ties", "./base").hash() == "d15e5acdee7a482c"
    assert len({definition().hash(), definition(repetitions=2).hash(), definition(pinned=(1, 0)).hash()}) == 3
