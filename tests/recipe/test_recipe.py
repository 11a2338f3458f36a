"""Recipes: what loads, what survives a round trip, and one clear line for everything else."""

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as settings_of
from hypothesis import strategies as st

from merge3.errors import BadInput, RecipeError
from merge3.export import merge_to_disk
from merge3.methods import METHODS, VARIANTS
from merge3.methods.variants import MERGER
from merge3.parameters import by_tensor, evaluate, indexed
from merge3.pool import Pool
from merge3.program import compile
from merge3.recipe import ModelRef, Recipe


def ties(family, **changes):
    data = {
        "merge_method": "ties",
        "base_model": str(family / "base"),
        "models": [{"model": str(family / f"e{i}"), "parameters": {"weight": 0.5}} for i in range(2)],
        "parameters": {"density": 0.5},
    }
    return data | changes


scalars = st.one_of(st.floats(-2, 2, allow_nan=False), st.integers(-3, 3), st.booleans())
settings = st.one_of(
    scalars,
    st.lists(st.floats(-2, 2), min_size=1, max_size=4),
    st.lists(
        st.fixed_dictionaries({"filter": st.sampled_from(["mlp", "attn"]), "value": scalars}), min_size=1, max_size=3
    ),
)


@given(st.dictionaries(st.sampled_from(["weight", "density", "lambda", "t"]), settings, max_size=3), st.booleans())
def test_yaml_round_trip_is_exact(parameters, sliced):
    source = {"model": "org/model@rev+./lora", "parameters": parameters}
    data = {"merge_method": "ties", "base_model": "base", "dtype": "bfloat16"}
    if sliced:
        data["slices"] = [{"sources": [source | {"layer_range": [0, 2]}], "parameters": parameters}]
    else:
        data["models"] = [source]
    recipe = Recipe.parse(data)
    again = Recipe.parse(yaml.safe_load(recipe.to_yaml()))
    assert again.to_dict() == recipe.to_dict() and again.hash() == recipe.hash()


def test_model_references():
    ref = ModelRef.parse("org/name@v2+adapter@v3")
    assert (ref.path, ref.revision, ref.lora) == ("org/name", "v2", ModelRef("adapter", "v3"))
    assert str(ref) == "org/name@v2+adapter@v3"
    assert ModelRef.parse({"model": {"path": "a"}, "lora": {"path": "b"}}) == ModelRef("a", None, ModelRef("b"))


def test_parameter_values_by_filter_and_layer():
    setting = [{"filter": "mlp", "value": [0.0, 1.0, 0.0]}, {"value": 7}]
    assert evaluate(setting, "layers.1.mlp.up", 0.25) == 0.5
    assert evaluate(setting, "layers.1.attn.q", 0.25) == 7
    assert evaluate([{"filter": "mlp", "value": 1}], "attn", 0.0) is None
    assert evaluate([True, False], "x", 0.9) is True


words = st.sampled_from(("model", "layers", "0", "1", "10", "mlp", "q_proj", "weight"))
names = st.lists(st.lists(words, min_size=1, max_size=6).map(".".join), min_size=1, max_size=30)


@settings_of(max_examples=25)
@given(names, st.data())
def test_many_conditions_are_looked_up_as_few_are(names, data):
    """The first that fits counts, be it a whole name, a part of one, or for every tensor."""
    parts = st.sampled_from(names).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, 30), st.integers(0, 40)))
    pattern = st.one_of(st.sampled_from(names), parts.map(lambda p: p[0][p[1] : p[2]] or "no part of any name"))
    patterns = data.draw(st.lists(pattern, min_size=32, max_size=60))
    conditions = [{"filter": pattern, "value": i} for i, pattern in enumerate(patterns)]
    for entry in data.draw(st.sampled_from([[], [{"value": -1}], [{"filter": "*", "value": -1}]])):
        conditions.insert(data.draw(st.integers(0, len(conditions))), entry)
    quick = indexed({"weight": conditions})["weight"]
    assert quick is not conditions and list(quick) == conditions
    for name in [*names, "another.name", ""]:
        fitting = (c["value"] for c in conditions if c.get("filter") in (None, "*") or c["filter"] in name)
        assert evaluate(quick, name, 0.0) == evaluate(conditions, name, 0.0) == next(fitting, None)


@settings_of(max_examples=50)
@given(names)
def test_names_that_are_parts_of_others_come_after_them(names):
    names = list(dict.fromkeys(names))
    apart = not any(one != other and one in other for one in names for other in names)
    found = [entry["filter"] for entry in by_tensor(dict.fromkeys(names, 0.5))]
    assert found == (names if apart else sorted(names, key=lambda name: -len(name)))


def layers_of(family, method, text, parameter):
    """What a recipe of two models has for each of four layers. text: of its `parameters`."""
    models = "".join(f"  - model: {family / name}\n" for name in ("base", "e0"))
    head = f"merge_method: {method}\nbase_model: {family / 'base'}\nmodels:\n{models}"
    recipe = Recipe.parse(yaml.safe_load(f"{head}parameters:\n  {parameter}: {text}\n"))
    jobs = {job.name: job for job in compile(recipe, Pool.open(str(family / "base"), [str(family / "e0")])).jobs}
    return [jobs[f"model.layers.{i}.mlp.up_proj.weight"].shared[parameter] for i in range(4)]


@pytest.mark.parametrize("text", ["[0, 5e-1, 1]", "[0, '0.5', 1.0]", '["0", 5E-1, "1e0"]', "[{value: [0, 5e-1, 1]}]"])
def test_a_number_that_yaml_reads_as_a_text_is_a_number_in_a_list_too(family, text):
    """As in mergekit; a list with a text in it chose one of its entries for every layer."""
    assert layers_of(family, "slerp", text, "t") == layers_of(family, "slerp", "[0, 0.5, 1]", "t")
    assert layers_of(family, "slerp", text, "t") == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_whole_numbers_are_not_cut(family):
    for text in ("7.9", "'7.9'", "[5, 7.9]", "[{filter: mlp, value: 7.9}, {value: 5}]"):
        with pytest.raises(RecipeError, match=r"max_iter: found '?7\.9'?; expected a whole number"):
            layers_of(family, "karcher", text, "max_iter")
    assert layers_of(family, "karcher", "7.0", "max_iter") == [7] * 4
    assert layers_of(family, "karcher", "'1e1'", "max_iter") == [10] * 4
    found = layers_of(family, "karcher", "[5, 10]", "max_iter")  # 6.67 and 8.33 between
    assert found == [5, 7, 8, 10] and all(type(n) is int for n in found)


BAD = {
    "unknown method": (dict(merge_method="tiess"), r"merge_method: unknown method 'tiess'.*did you mean 'ties'"),
    "unknown parameter": (
        dict(parameters={"densty": 0.5}),
        r"densty: ties has no such parameter.*did you mean 'density'",
    ),
    "missing weight": (dict(models=[{"model": "E0"}]), r"E0\.weight: missing for tensor .*, ties needs one"),
    "missing base": (dict(base_model=None), "base_model: missing; ties merges changes from a base"),
    "density above 1": (dict(parameters={"density": 1.5}), r"density: found 1.5; expected a value in \[0, 1\]"),
    "density below 0": (dict(parameters={"density": -0.1}), r"density: found -0.1; expected a value in \[0, 1\]"),
    "density in a filter": (dict(parameters={"density": [{"filter": "mlp", "value": -1}, {"value": 0.5}]}), "found -1"),
    "not a number": (dict(parameters={"density": "half"}), "density: found 'half'; expected a number"),
    "nan": (dict(parameters={"lambda": float("nan")}), "found nan; expected a finite number"),
    "infinity in words": (dict(parameters={"lambda": "inf"}), "found inf; expected a finite number"),
    "a text beyond float64": (dict(parameters={"lambda": [1, "1e400"]}), "found 1e400; expected a finite number"),
    "no flag": (dict(parameters={"normalize": 3}), "normalize: found 3; expected true or false"),
    "unknown key": (dict(modles=[]), "unknown key 'modles'.*did you mean 'models'"),
    "both": (dict(slices=[]), "both `models` and `slices`"),
    "neither": (dict(models=None, _drop="models"), "neither `models` nor `slices`"),
    "modules": (dict(modules={}), "modules: not supported"),
    "dtype": (dict(dtype="float99"), "dtype: found 'float99'"),
    "empty models": (dict(models=[]), "a list with at least one entry"),
    "mixed list": (dict(parameters={"density": [0.5, {"value": 1}]}), "a list that mixes"),
    "list in a list": (
        dict(parameters={"density": [[0.5, 1], [1, 0.5]]}),
        r"parameters\.density: a list with more in it than plain values",
    ),
    "list in a filter's list": (
        dict(parameters={"density": [{"filter": "mlp", "value": [[0.5], [1]]}, {"value": 0.5}]}),
        "density: a list with more in it than plain values",
    ),
    "several filters in one": (
        dict(parameters={"density": [{"filter": ["q_proj", "k_proj"], "value": 1}, {"value": 0.5}]}),
        r"parameters\.density: found filter \['q_proj', 'k_proj'\], expected one text, a part of tensors' names",
    ),
    "a number as a filter": (dict(parameters={"density": {"filter": 12, "value": 1}}), "density: found filter 12, exp"),
    "yes as a filter": (dict(parameters={"density": [{"filter": True, "value": 1}]}), "density: found filter True, ex"),
    "nothing in a list": (dict(parameters={"density": [0.5, None, 1]}), "density: a list with more in it than plain"),
    "huge weight": (dict(parameters={"density": 10**400}), r"parameters\.density: found a number of 333 hex"),
    "huge in a list": (dict(parameters={"density": [0.5, 10**400]}), r"parameters\.density\[1\]: found a number of"),
    "huge range": (dict(slices=[{"sources": [{"layer_range": [0, 1 << 20_000]}]}], _drop=1), "found a number of 5001"),
    "huge key": (dict(fit={1 << 20_000: 1}), "fit: found a number of 5001 hex.*; expected a smaller"),
    "tokenizer of another model": (
        dict(tokenizer_source="other"),
        "tokenizer_source: found 'other'; expected union, base",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_recipes_are_one_clear_line(family, tmp_path, case):
    change, message = BAD[case]
    data = ties(family)
    data = {k: v for k, v in (data | change).items() if v is not None and k != "_drop"}
    text = _dumped(data).replace("E0", str(family / "e0"))
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message.replace("E0", ".*")) as error:
        merge_to_disk(Recipe.from_yaml(tmp_path / "recipe.yaml"), tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def _dumped(data):
    """As YAML, with the longest numbers as a file can have them."""
    Dumper = type("Dumper", (yaml.SafeDumper,), {})
    hexadecimal = lambda dumper, n: dumper.represent_scalar("tag:yaml.org,2002:int", hex(n) if n > 99 else str(n))
    Dumper.add_representer(int, hexadecimal)
    return yaml.dump(data, Dumper=Dumper)


def test_numbers_with_more_digits_than_python_reads(tmp_path):
    (tmp_path / "r.yaml").write_text(f"merge_method: linear\nmodels: [{'9' * 5000}]\n")
    with pytest.raises(RecipeError, match=r"r\.yaml: not YAML \(.*digits.*\); expected a recipe in YAML"):
        Recipe.from_yaml(tmp_path / "r.yaml")


@pytest.mark.parametrize("name", [n for n, p in METHODS["ties"].parameters.items() if p.kind is not bool])
@pytest.mark.parametrize("digits", [401, 5000])
def test_a_number_beyond_float64_is_no_value_of_any_parameter(name, digits):
    with pytest.raises(RecipeError, match=rf"^models: e0\.{name}: found a number beyond float64; expected a smaller"):
        METHODS["ties"].validate(name, 10 ** (digits - 1), "models: e0")


def test_aliases_that_lead_back_to_themselves_end(tmp_path):
    (tmp_path / "r.yaml").write_text("merge_method: linear\nmodels: [{model: a}]\nfit: &fit {again: *fit}\n")
    assert Recipe.from_yaml(tmp_path / "r.yaml").method == "linear"


def test_layer_ranges_are_checked(family):
    def slices(*ranges, method="passthrough"):
        return Recipe.parse(
            {
                "merge_method": method,
                "slices": [{"sources": [{"model": str(family / "e0"), "layer_range": r}]} for r in ranges],
            }
        )

    pool = Pool.open(str(family / "e0"), [])
    with pytest.raises(RecipeError, match=r"layer_range: \[2, 9\) of .*e0; expected at most 4 layers"):
        compile(slices([0, 2], [2, 9]), pool)
    for bad in ([3, 1], [-1, 2], [0], "all", [0.5, 2]):
        with pytest.raises(RecipeError, match="layer_range: found"):
            slices(bad)
    assert compile(slices([0, 3], [1, 4]), pool).layers == 6


def test_a_range_of_layers_under_models_is_all_of_them_or_belongs_in_slices(family, tmp_path):
    """mergekit takes every layer whatever it says; mergekit-evolve writes that of all layers there."""

    def whole(*ranges):
        models = [{"model": str(family / f"e{i}"), "layer_range": r} for i, r in enumerate(ranges)]
        return Recipe.parse({"merge_method": "karcher", "models": models})

    pool = Pool.open(str(family / "e0"), [str(family / "e1")])
    without = Recipe.parse({"merge_method": "karcher", "models": [{"model": str(family / f"e{i}")} for i in (0, 1)]})
    for recipe in (whole([0, 4], [0, 4]), whole(None, [0, 4])):
        assert recipe.whole and compile(recipe, pool) == compile(without, pool)
        assert Recipe.parse(yaml.safe_load(recipe.to_yaml())) == recipe
    hint = r"expected \[0, depth\], which is all layers \(layer ranges belong in `slices`\)"
    for recipe in (whole([0, 2], [0, 2]), whole([0, 4], [0, 3]), whole([0, 4], [0, 9])):
        for sent in (recipe, Recipe.parse(recipe.to_dict())):  # to a daemon, too
            with pytest.raises(RecipeError, match=rf"models: layer_range: \[0, [239]\] .*e[01] has 4 layers; {hint}"):
                compile(sent, pool)
    with pytest.raises(RecipeError, match=rf"models\[1\]: layer_range: found \[2, 4\] under `models`; {hint}"):
        whole([0, 4], [2, 4])
    with pytest.raises(RecipeError, match="layer_range: found 'all'"):
        whole("all", [0, 4])
    with pytest.raises(RecipeError, match=hint):
        merge_to_disk(whole([0, 2], [0, 2]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_number_of_models_is_checked(family):
    pool = Pool.open(str(family / "base"), [str(family / f"e{i}") for i in range(3)])
    models = [{"model": str(family / f"e{i}")} for i in range(2)]
    recipe = Recipe.parse(ties(family) | {"merge_method": "slerp", "parameters": {"t": 0.5}, "models": models})
    with pytest.raises(RecipeError, match="2 models beside the base; expected 1 for slerp"):
        compile(recipe, pool)


def test_not_yaml(tmp_path):
    (tmp_path / "r.yaml").write_text("merge_method: [ties\nmodels:")
    with pytest.raises(RecipeError, match=r"r\.yaml, line \d+: not YAML"):
        Recipe.from_yaml(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match="No such file"):
        Recipe.from_yaml(tmp_path / "none.yaml")


TWICE = {
    "a section": ("models:\n- model: a\n  parameters: {weight: 1}\n  parameters: {density: 1}\n", 5, "parameters", 4),
    "a value": ("models:\n- model: a\n  parameters:\n    weight: 0.7\n    weight: 0.3\n", 6, "weight", 5),
    "in one line": ("models: [{model: a, parameters: {weight: 1, 'weight': 2}}]\n", 2, "weight", 2),
    "at the top": ("models: [{model: a}]\ndtype: float16\nmodels: [{model: b}]\n", 4, "models", 2),
    "numbers": ("models: [{model: a}]\nfit: {16: a, 0x10: b}\n", 3, 16, 3),
    "behind an anchor": ("fit: {groups: &a {b: 1, b: 2}, others: *a}\nmodels: [{model: a}]\n", 2, "b", 2),
}


@pytest.mark.parametrize("case", TWICE)
def test_a_key_that_is_there_twice_is_refused_with_both_lines(tmp_path, case):
    """YAML takes the last, and the first is lost."""
    text, line, key, first = TWICE[case]
    (tmp_path / "r.yaml").write_text("merge_method: linear\n" + text)
    with pytest.raises(RecipeError, match=rf"r\.yaml, line {line}: key {key!r} twice, first in line {first}; expected"):
        Recipe.from_yaml(tmp_path / "r.yaml")


def test_anchors_and_merge_keys_are_no_key_twice(tmp_path):
    text = """
merge_method: linear
models:
- {model: a, parameters: &first {weight: 0.5, normalize: true}}
- {model: b, parameters: &second {<<: *first, weight: 0.25}}
- {model: c, parameters: {<<: *second, weight: 0.125, "<<": 1}}
- {model: d, parameters: {<<: [*first, {density: 1}]}}
- {model: e, parameters: *second}
"""
    (tmp_path / "r.yaml").write_text(text)
    found = [source.parameters for source in Recipe.from_yaml(tmp_path / "r.yaml").slices[0].sources]
    assert found == [model["parameters"] for model in yaml.safe_load(text)["models"]]
    assert [own["weight"] for own in found] == [0.5, 0.25, 0.125, 0.5, 0.25]


def test_every_file_that_users_write_is_read_so(tmp_path):
    from merge3.client.study_config import read_study
    from merge3.search.config_files import load_config
    from merge3_server.settings import read_pool_file

    (tmp_path / "some.yaml").write_text("models: [a]\ngenome: {}\nmodels: [b]\n")
    for read in (Recipe.from_yaml, load_config, read_study, read_pool_file):
        with pytest.raises(BadInput, match=r"some\.yaml, line 3: key 'models' twice, first in line 1"):
            read(tmp_path / "some.yaml")


def test_every_method_documents_itself():
    for name, method in METHODS.items():
        assert method.name == name and method.summary
        assert all(p.help for p in method.parameters.values()), name


def test_every_parameter_of_a_method_is_known_where_it_is_misplaced():
    """The recipe, which knows no methods, keeps their parameters' names for its messages alone."""
    from merge3.recipe import checks

    rows = (*METHODS.values(), *VARIANTS.values())
    assert set(checks.PARAMETERS) == {MERGER, *(name for row in rows for name in row.parameters)}
