"""Any recipe as the nearest genome: against means by hand, and the exact inverse for recipes of the space's own."""

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from merge3.checkpoint.layout import Layout, layout
from merge3.errors import BadInput, ConfigError, Merge3Warning
from merge3.methods import METHODS
from merge3.parameters import evaluate
from merge3.recipe import Recipe, load_yaml
from merge3.space import PRESETS, Space, SpaceDefinition

LAYER = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm")
STACK = [f"model.layers.{i}.{n}.weight" for i in range(4) for n in LAYER]
EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
NAMES = [*STACK, EMBED, NORM, HEAD]
LAYOUT = layout(NAMES)


def space(method="task_arithmetic", **changes):
    definition = dict(models=("a", "b"), method=method, base="base") | changes
    return Space(SpaceDefinition(**definition), LAYOUT)


def recipe(method="task_arithmetic", a=0.5, b=0.5, base="base", parameters=None, **more):
    """One of `models`; a, b: settings of their weights."""
    models = [{"model": m, "parameters": {"weight": w}} for m, w in (("a", a), ("b", b))]
    data = {"merge_method": method, "models": models, "parameters": parameters or {}} | more
    return Recipe.parse(data | ({"base_model": base} if base else {}))


def fitted(seed, low=0.0, high=1.5):
    """{tensor: value}, and the setting that says so, tensor by tensor in another order than the layout's."""
    rng = np.random.default_rng(seed)
    values = {name: float(rng.uniform(low, high)) for name in NAMES}
    return values, [{"filter": name, "value": values[name]} for name in reversed(NAMES)]


def mean(values, *names):
    """Of the tensors that have one of these names in theirs."""
    return np.mean([value for name, value in values.items() if any(part in name for part in names)])


# -- by hand


def test_every_gene_is_the_mean_of_its_tensors():
    (a, setting_a), (b, setting_b) = fitted(1), fitted(2)
    s = space(layer_granularity=2, filters=("mlp",))
    genome = s.project(recipe(a=setting_a, b=setting_b)).reshape(s.shape)
    for m, values in enumerate((a, b)):
        expected = {(0, 0): values[EMBED], (0, 1): values[EMBED]}  # outside the layers filters do not count
        expected |= {(3, k): mean(values, NORM, HEAD) for k in (0, 1)}
        for group, layers in ((1, (0, 1)), (2, (2, 3))):
            expected[group, 0] = mean(values, *(f"layers.{i}.mlp" for i in layers))
            others = [f"layers.{i}.{n}" for i in layers for n in ("self_attn", "input_layernorm")]
            expected[group, 1] = mean(values, *others)
        for (group, k), value in expected.items():
            assert genome[group, m, k, 0] == pytest.approx(value, abs=1e-15), (m, group, k)


def test_without_groups_of_their_own_the_outer_tensors_count_with_the_layers_they_are_merged_with():
    values, setting = fitted(3)
    one = space(layer_granularity=0).project(recipe(a=setting, b=setting))
    assert one == pytest.approx([np.mean(list(values.values()))] * 2, abs=1e-15)
    s = space(preset="evolve", layer_granularity=2, filters=("mlp",))
    genome = s.project(recipe(a=setting, b=setting)).reshape(s.shape)[:, 0, :, 0]
    rest = [f"layers.{i}.{n}" for i in range(4) for n in ("self_attn", "input_layernorm")]
    assert genome[0, 1] == pytest.approx(mean(values, EMBED, *rest[:4]), abs=1e-15)
    assert genome[1, 1] == pytest.approx(mean(values, NORM, HEAD, *rest[4:]), abs=1e-15)
    assert genome[1, 0] == pytest.approx(mean(values, "layers.2.mlp", "layers.3.mlp"), abs=1e-15)


def test_gradients_of_slices_and_of_the_whole_stack():
    """mergekit's positions: 0 to 1 over a slice's layers, the tensors outside the stack at 0."""
    s = space(layer_granularity=2, models=("a",))
    whole = Recipe.parse(
        {
            "merge_method": "task_arithmetic",
            "base_model": "base",
            "models": [{"model": "a", "parameters": {"weight": [0.0, 0.9]}}],
        }
    )
    assert s.project(whole) == pytest.approx([0, 0.15, 0.75, 0], abs=1e-15)
    slices = [
        {"sources": [{"model": "a", "layer_range": [0, 3], "parameters": {"weight": [0.2, 0.4]}}, *base(0, 3)]},
        {"sources": [{"model": "a", "layer_range": [3, 4]}, *base(3, 4)], "parameters": {"weight": [0.5, 1.0]}},
    ]
    sliced = Recipe.parse({"merge_method": "task_arithmetic", "base_model": "base", "slices": slices})
    assert s.project(sliced) == pytest.approx([0.2, 0.25, 0.7, 0.5], abs=1e-15)  # a slice of one layer is at its end


def base(first, last):
    return [{"model": "base", "layer_range": [first, last]}]


def test_smooth_genes_are_the_least_squares_of_the_tensors_they_share():
    values, setting = fitted(4)
    s = space(smooth=True, layer_granularity=2, models=("a",), filters=("mlp",))
    one = recipe(a=setting)
    one = Recipe.parse(one.to_dict() | {"models": one.to_dict()["models"][:1]})
    genome = s.project(one).reshape(2, 2)  # [group, filter set]
    for k, inside in ((0, True), (1, False)):
        rows, found = [], []
        for name in NAMES:
            layer = LAYOUT.layer_of(name)
            if ("mlp" in name) == inside:
                t = 0.0 if layer is None else layer / 3
                rows.append([1 - t, t])
                found.append(values[name])
        rows, found = np.array(rows), np.array(found)
        assert genome[:, k] == pytest.approx(np.linalg.solve(rows.T @ rows, rows.T @ found), abs=1e-12)


def test_shared_genes_and_those_with_a_default():
    s = space("ties", layer_granularity=2, genes=("weight", "density", "lambda"))
    half = [{"filter": "layers.0", "value": 0.5}, {"filter": "layers.1", "value": 1.0}, {"value": 1.5}]
    genome = s.project(recipe("ties", parameters={"lambda": half}))
    own, shared = s.decoded(genome)
    assert shared["lambda"].tolist() == [1.5, 0.75, 1.5, 1.5]
    assert (own["density"] == 1).all() and (own["weight"] == 0.5).all()  # a recipe's density is 1 where it says none


def test_tensors_that_a_recipe_leaves_out_do_not_count():
    """What is kept from the base needs no value; a gene of nothing else starts as usual."""
    said = [{"filter": f"layers.{i}.mlp", "value": 0.25 * i} for i in range(4)]
    s = space(layer_granularity=2)
    genome = s.project(recipe(a=said)).reshape(s.shape)[:, 0].ravel()
    assert genome == pytest.approx([0.5, 0.125, 0.625, 0.5])  # of two models each starts at 1 / 2
    with pytest.raises(ConfigError, match=r"x\.yaml: a\.weight: missing; expected a value, task_arithmetic needs one"):
        s.project(recipe(a=[{"filter": "nowhere", "value": 1}]), "x.yaml")


def test_what_no_merge_changes_does_not_count():
    """A tied head, say, is all the same in the layout. What a recipe has for the rest of what is merged does count."""
    values, setting = fitted(7)
    tied = [entry for entry in setting if entry["filter"] != HEAD]
    s = space(layer_granularity=2)
    for rest in ({"filter": "*", "value": 0.0}, {"value": 0.0}):
        genome = s.project(recipe(a=[*tied, rest]), unmerged={HEAD}).reshape(s.shape)[:, 0].ravel()
        assert genome[-1] == values[NORM] and genome[0] == values[EMBED]
        assert genome[1] == pytest.approx(mean(values, "layers.0", "layers.1"), abs=1e-15)
        merged = s.project(recipe(a=[*tied, rest])).reshape(s.shape)[:, 0].ravel()
        assert merged[-1] == pytest.approx(values[NORM] / 2) and merged[:-1] == pytest.approx(genome[:-1])
        inside = [entry for entry in setting if "layers." in entry["filter"]]
        outside = s.project(recipe(a=[*inside, rest])).reshape(s.shape)[:, 0].ravel()
        assert outside[0] == 0.0 and outside[-1] == 0.0
    by_hand = s.project(recipe(a=[{"filter": HEAD, "value": 1.0}, {"filter": NORM, "value": 0.5}, {"value": 0.25}]))
    assert by_hand.reshape(s.shape)[:, 0].ravel().tolist() == [0.25, 0.25, 0.25, 0.75]


@pytest.mark.parametrize("outer", [2, 40])
def test_a_recipe_of_the_spaces_own_is_its_genomes_however_much_stands_outside(outer):
    pre, post = (tuple(f"{side}.{i}" for i in range(outer)) for side in ("embed", "tower"))
    many = Layout("layers", 4, ("mlp.up_proj", "self_attn.q_proj"), pre, post)
    s = Space(SpaceDefinition(("a", "b"), "task_arithmetic", "base", layer_granularity=1), many)
    genome = np.random.default_rng(0).uniform(*s.bounds())
    np.testing.assert_allclose(s.project(s.recipe(genome)), genome, rtol=0, atol=1e-12)


def test_the_bases_own_genes_are_nobodys():
    """A space may list the base among its models: where it is no expert its genes move nothing."""
    s = space(models=("base", "a", "b"), layer_granularity=0)
    assert s.project(recipe(a=0.7, b=0.2)) == pytest.approx([1 / 3, 0.7, 0.2])


# -- recipes of the space's own

GENES = [name for name, method in METHODS.items() if method.genes]


@hypothesis_settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(GENES),
    st.sampled_from(list(PRESETS)),
    st.sampled_from([0, 1, 2, 4]),
    st.booleans(),
    st.sampled_from([(), ("mlp",), ("q_proj", "mlp")]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_a_recipe_of_the_spaces_own_is_its_genomes(method, preset, granularity, smooth, filters, negative, seed):
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
    names = s.own * int(np.prod(s.shape[:-1])) + s.shared * s.groups
    low, high = s.bounds()
    for i, name in enumerate(names):  # without bounds: those of the gene, so that recipes are allowed
        gene = row.genes[name]
        low[i], high[i] = max(low[i], gene.low), min(high[i], gene.high)
        if preset == "evolve" and gene.folded:
            low[i] = -gene.high
    asked = s.recipe(np.random.default_rng(seed).uniform(low, high))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = s.project(Recipe.parse(load_yaml(asked.to_yaml(), "x")))
    np.testing.assert_allclose(found, s.genome(asked), rtol=0, atol=1e-12)
    if not smooth:
        assert s.recipe(found).to_dict() == asked.to_dict()  # to the last bit where genes share no tensor


# -- bounds


def weights(s, genome):
    return s.decoded(genome)[0]["weight"][..., 0]  # [groups, models]


@pytest.mark.parametrize("preset", ["layerwise", "evolve"])
def test_negative_weights_become_zero_where_they_are_not_allowed(preset):
    """And not their opposite, which the preset `evolve` would decode."""
    s = space(preset=preset, allow_negative_weights=False, layer_granularity=2)
    negative = [{"filter": "layers.2", "value": -0.75}, {"filter": "layers.3", "value": -0.25}, {"value": 0.4}]
    with pytest.warns(Merge3Warning) as told:
        genome = s.project(recipe(a=negative, b=0.3, parameters={"density": 0.5}), "hand.yaml")
    (line,) = told
    outside = "hand.yaml: outside what the search may vary: "
    assert str(line.message).startswith(outside + "weight of a (layers 2 to 3) from ")
    if preset == "layerwise":
        assert str(line.message).endswith(" from -0.5 to 0")
        assert weights(s, genome).tolist() == [[0.4, 0.3], [0.4, 0.3], [0, 0.3], [0.4, 0.3]]
    else:  # norm and head are of the last group: (8 * -0.5 + 2 * 0.4) / 10
        assert str(line.message).endswith(" from -0.32 to 0")
        assert weights(s, genome) == pytest.approx(np.array([[0.4, 0.3], [0, 0.3]]))


def test_what_bounds_change_is_said_in_one_line():
    s = space("ties", layer_granularity=0, bounds={"weight": (0.25, 0.75)}, preset="sakana6")
    with pytest.warns(Merge3Warning) as told:
        genome = s.project(recipe("ties", a=0.9, b=0.1, parameters={"density": 0.01}), "hand.yaml")
    (line,) = told
    expected = "weight of a (layers 0 to 3) from 0.9 to 0.75, and 3 more genes"
    assert str(line.message) == f"hand.yaml: outside what the search may vary: {expected}"
    low, high = s.bounds()
    assert ((genome >= low) & (genome <= high)).all()
    assert s.decoded(genome)[0]["weight"].ravel().tolist() == [0.75, 0.25]
    assert (s.decoded(genome)[0]["density"] == 13 / 256).all()  # the lowest, 0.05, snapped


def test_a_density_of_nothing_is_the_least_that_evolve_knows():
    s = space("ties", preset="evolve", layer_granularity=0, normalize=False)
    with pytest.warns(Merge3Warning, match="density of a .* from 0 to 0.00390625, and 1 more"):
        genome = s.project(recipe("ties", parameters={"density": 0.0, "normalize": False}))
    assert (s.decoded(genome)[0]["density"] == 1 / 256).all()


# -- other methods


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.like])
def test_weights_of_a_task_arithmetic_merge(method):
    (_, a), (_, b) = fitted(5), fitted(6)
    hand = recipe(a=a, b=b)
    plain, s = space(layer_granularity=2), space(method, layer_granularity=2, normalize=False)
    with pytest.warns(Merge3Warning) as told:
        genome = s.project(hand, "fitted.yaml")
    (line,) = told
    said = f"a task_arithmetic merge, not {method}: taken from it: weight; begun as usual: density"
    assert str(line.message) == f"fitted.yaml: {said}"
    own, start = s.decoded(genome)[0], s.decoded(s.initial())[0]
    assert np.array_equal(own["weight"], plain.decoded(plain.project(hand))[0]["weight"])
    assert np.array_equal(own["density"], start["density"])


def test_a_scale_that_is_not_searched_is_not_lost():
    """λ = 0.5 of a task_arithmetic merge: taken where it is searched, refused where all candidates have 1."""
    hand = recipe(parameters={"lambda": 0.5})
    s = space("dare_linear", genes=("weight", "lambda"), layer_granularity=0)
    with pytest.warns(Merge3Warning, match="not dare_linear: taken from it: weight, lambda$"):
        assert s.project(hand).tolist() == [0.5, 0.5, 0.5]
    expected = r"lambda: 0\.5 for model\.embed_tokens\.weight; expected 1\.0, which every candidate has \(or lambda"
    with pytest.raises(ConfigError, match=expected):
        space("dare_linear", layer_granularity=0).project(hand)


def test_whether_weights_are_divided_by_their_sum_is_never_mixed_up():
    """Against what a merge does with its weights, for every method that can normalize, both presets, both ways."""
    seen = set()
    for name, row in METHODS.items():
        if "normalize" not in row.parameters or "weight" not in row.genes:
            continue
        for preset in ("layerwise", "evolve"):
            for said in (None, True, False):
                for wanted in (None, True, False):
                    base = None if row.base == "source" else "base"
                    s = space(name, preset=preset, normalize=wanted, base=base, layer_granularity=2)
                    hand = recipe(name, base=base, parameters={} if said is None else {"normalize": said})
                    candidate = s.uniform_recipe().parameters.get("normalize", row.parameters["normalize"].default)
                    hands = hand.parameters.get("normalize", row.parameters["normalize"].default)
                    seen.add(candidate == hands)
                    if candidate == hands:
                        s.project(hand)
                        continue
                    with pytest.raises(ConfigError, match=f"normalize: {hands} for .*; expected {candidate}") as e:
                        s.project(hand)
                    assert f"(or `normalize: {str(hands).lower()}` in the genome)" in str(e.value)
    assert seen == {True, False}
    with pytest.raises(ConfigError, match="normalize: False for .*; expected True, which every candidate has"):
        space("ties").project(recipe())  # of a task_arithmetic merge too


def test_parameters_without_effect_do_not_matter():
    plain = {"int8_mask": True, "density": 0.3, "rescale": True}
    assert (space().project(recipe(parameters=plain)) == 0.5).all()


# -- what no genome is near to


def sliced(*ranges, models=("a", "b", "base")):
    parts = []
    for span in ranges:
        spans = [span] * len(models) if isinstance(span[0], int) else span
        sources = [{"model": m, "layer_range": list(r), "parameters": {"weight": 0.5}} for m, r in zip(models, spans)]
        parts.append({"sources": sources})
    return Recipe.parse({"merge_method": "task_arithmetic", "base_model": "base", "slices": parts})


def models(*names, **more):
    listed = [{"model": name, "parameters": {"weight": 0.5}} for name in names]
    return Recipe.parse({"merge_method": "task_arithmetic", "base_model": "base", "models": listed} | more)


REFUSED = {
    "another method": (models("a", "b", merge_method="linear"), {}, "merge_method: found linear; expected task"),
    "of ties": (
        models("a", "b", merge_method="della"),
        dict(method="ties"),
        "merge_method: found della; expected ties or task_arithmetic",
    ),
    "the other way round": (models("a", "b", merge_method="ties"), {}, "found ties; expected task_arithmetic"),
    "no method": (models("a", "b", merge_method="tis"), {}, "merge_method: unknown method 'tis'"),
    "a model less": (models("a"), {}, "models: found a; expected a, b, as in the genome"),
    "a model more": (models("a", "b", "c"), {}, "models: found a, b, c; expected a, b, as"),
    "another model": (models("a", "c"), {}, "models: found a, c; expected a, b, as"),
    "a model twice": (models("a", "b", "b"), {}, "models: found a, b, b; expected a, b, as"),
    "another base": (models("a", "b", base_model="other"), {}, "base_model: found other; expected base, as"),
    "no base": (
        Recipe.parse({"merge_method": "nuslerp", "models": models("a", "b").to_dict()["models"]}),
        dict(method="nuslerp"),
        "base_model: found none; expected base, as",
    ),
    "a base that is merged": (
        models("a", "b", merge_method="linear"),
        dict(method="linear", base=None),
        "models: found a, b, base; expected a, b, as",
    ),
    "layers left out": (sliced((0, 2)), {}, r"slices: the first 2 layers; expected all 4 once, in place"),
    "layers twice": (sliced((0, 3), (2, 4)), {}, r"slices\[1\]: layers \[2, 4\); expected \[3, ..\) of every model"),
    "layers skipped": (sliced((0, 1), (2, 4)), {}, r"slices\[1\]: layers \[2, 4\); expected \[1, ..\)"),
    "layers from elsewhere": (
        sliced([(0, 4), (0, 4), (0, 4)], [(0, 0), (0, 0), (0, 0)]),
        {},
        r"slices\[1\]: layers \[0, 0\); expected \[4",
    ),
    "layers out of step": (
        sliced([(0, 2), (2, 4), (0, 2)], (2, 4)),
        {},
        r"slices\[0\]: layers \[0, 2\), \[2, 4\); expected \[0, ..\) of every model",
    ),
    "too many layers": (sliced((0, 5)), {}, r"layers \[0, 5\)"),
    "a model in some slices": (
        Recipe.parse(
            {
                "merge_method": "task_arithmetic",
                "base_model": "base",
                "parameters": {"weight": 1},
                "slices": [
                    {"sources": [{"model": m, "layer_range": r} for m in names]}
                    for r, names in (([0, 2], ("a", "b", "base")), ([2, 4], ("a", "base")))
                ],
            }
        ),
        {},
        "models: found a; expected a, b",
    ),
    "a density of its own": (
        models("a", "b", merge_method="ties", parameters={"density": 0.5}),
        dict(method="ties", genes=("weight",)),
        r"density of a: 0\.5 for .*; expected 1\.0, which every candidate has \(or density among the genome's `genes`",
    ),
    "no weight": (
        models("a", models=[{"model": "a"}, {"model": "b"}]),
        {},
        r"a\.weight: missing; expected a value",
    ),
    "no number": (models("a", "b", parameters={"lambda": "much"}), {}, "lambda: found 'much'; expected a number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_recipes_that_are_refused(case):
    """In one line that begins with the recipe's name."""
    hand, changes, message = REFUSED[case]
    with pytest.raises(BadInput, match=message) as error:
        space(**changes).project(hand, "hand.yaml")
    assert str(error.value).startswith("hand.yaml: ") and "\n" not in str(error.value)


def test_settings_of_unit_vectors_are_evaluated_as_numbers_are():
    """What the projection rests on: mergekit's interpolation of vectors is that of each number."""
    cells = [np.eye(3)[i] for i in range(3)]
    for t in np.linspace(0, 1, 7):
        shares = evaluate(cells, "x", t)
        assert shares @ [0.25, 0.5, 2.0] == pytest.approx(evaluate([0.25, 0.5, 2.0], "x", t))
