"""The whole search on real models: resume by replay after kill -9, mergekit-evolve files, failures."""

import json
import shutil
import sqlite3
import subprocess

import numpy as np
import pytest
import torch
import yaml

from merge3.client import run
from merge3.engine import LocalEngine
from merge3.errors import ConfigError, ItemsError, ResourceError, ResumeMismatch
from merge3.export import merge_to_disk
from merge3.fitness import mean_over_tasks
from merge3.pool import Pool
from merge3.recipe import Recipe
from merge3.registration import Registration
from merge3.search import optimizers
from merge3.search.config_files import load_config
from merge3.search.journal import Journal
from merge3.search.questions import load_questions
from merge3.space import Space
from merge3.tasks import Item
from tests.asking import answers
from tests.classifiers import make_classifier
from tests.killing import evolving, killed


def journal(directory):
    """Everything a resumed run must repeat to the last bit."""
    with sqlite3.connect(directory / "run.db") as db:
        return db.execute(
            "SELECT generation, position, genome, recipe_hash, responses, value, stderr "
            "FROM candidates JOIN estimates USING (generation, position) ORDER BY 1, 2"
        ).fetchall()


@pytest.fixture(scope="module")
def undisturbed(tiny_world, tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    result = run.evolve(load_config(tiny_world / "evolve.yaml"), directory, quiet=True)
    return directory, result


def test_a_run_leaves_what_it_promises(undisturbed, tiny_world):
    directory, result = undisturbed
    assert {p.name for p in directory.iterdir()} >= {
        "run.db",
        "config.yaml",
        "best.yaml",
        "result.json",
        "report.html",
        "model",
    }
    saved = json.loads((directory / "result.json").read_text())
    assert saved == result
    assert saved["candidates"] == 24 and saved["item_answers"] == 24 * 56 and saved["seconds"] > 0
    assert {
        "base",
        "english",
        "italian",
        "translation",
        "uniform_linear",
        "ties",
        "dare_ties",
        "task_arithmetic",
    } <= set(saved["baselines"])
    assert 0 <= saved["heldout"] <= 1 and all(0 <= v <= 1 for v in saved["baselines"].values())
    page = (directory / "report.html").read_text()
    assert page.count("<svg") >= 3 and "best.yaml" in page and "http" not in page.split("<body>")[1]


def test_what_was_searched_is_what_was_exported(undisturbed, tiny_world):
    directory, result = undisturbed
    config = load_config(tiny_world / "evolve.yaml")
    questions = load_questions(config)
    exported = LocalEngine(Pool.open(str(directory / "model"), []))
    responses = answers(exported, exported.pool.base, questions.subset)
    rows = journal(directory)
    best = max(rows, key=lambda r: r[5])
    assert np.array_equal(responses, np.frombuffer(best[4]))
    assert mean_over_tasks(responses, questions.subset)[0] == result["search_value"]
    recipe = Recipe.from_yaml(directory / "best.yaml")
    assert recipe.hash() == best[3]


def test_killed_runs_resume_to_the_same_bits(undisturbed, tiny_world, tmp_path):
    directory, _ = undisturbed
    config, cut = tiny_world / "evolve.yaml", tmp_path / "run"
    killed(config, cut, (5, 15), 24)
    subprocess.run(evolving(config, cut, "--resume"), check=True, stdout=subprocess.DEVNULL)
    assert journal(cut) == journal(directory)
    assert (cut / "best.yaml").read_bytes() == (directory / "best.yaml").read_bytes()
    first, second = (json.loads((d / "result.json").read_text()) for d in (directory, cut))
    assert first["heldout"] == second["heldout"] and first["baselines"] == second["baselines"]


def test_resuming_with_something_else_is_refused(undisturbed, tiny_world, own_world, tmp_path):
    directory, _ = undisturbed
    config = load_config(tiny_world / "evolve.yaml")
    with pytest.raises(ResumeMismatch, match="this run has begun"):
        run.evolve(config, directory, quiet=True)
    with pytest.raises(ResumeMismatch, match="optimizer is .* when the run began"):
        run.evolve(load_config(tiny_world / "evolve.yaml", seed=4, budget=30), directory, resume=True, quiet=True)
    with pytest.raises(ResumeMismatch, match=r"no run\.db"):
        run.evolve(config, tmp_path / "none", resume=True, quiet=True)
    before = journal(directory)
    lines = (own_world / "english.jsonl").read_text().splitlines()
    (own_world / "english.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    copy = tmp_path / "run"
    shutil.copytree(directory, copy)
    with pytest.raises(ResumeMismatch, match="is .*, was .* when the run began"):
        run.evolve(load_config(own_world / "evolve.yaml"), copy, resume=True, quiet=True)
    assert journal(copy) == before


def test_a_failed_candidate_is_reported_and_the_search_goes_on(own_world, tmp_path):
    """DELLA refuses densities whose epsilon leaves (0, 1): such candidates fail, the run does not."""
    data = yaml.safe_load((own_world / "evolve.yaml").read_text())
    data["genome"] |= {"merge_method": "della", "genes": ["weight", "density", "epsilon"], "layer_granularity": 0}
    data["genome"]["bounds"] = {"epsilon": [0.01, 0.3], "density": [0.2, 0.8]}
    data["optimizer"] = {"budget": 12, "population": 6, "name": "random"}
    (own_world / "della.yaml").write_text(yaml.safe_dump(data))
    result = run.evolve(load_config(own_world / "della.yaml"), tmp_path / "run", quiet=True, export=False)
    errors = [c.error for c in Journal(tmp_path / "run").candidates() if c.error]
    assert 0 < len(errors) < 12 and result["failed"] == len(errors)
    assert all("density ± epsilon" in e for e in errors)


def test_a_mergekit_evolve_file_runs_as_it_is(own_world, tmp_path):
    """Their example's keys, with items in the place of lm-eval task names."""
    text = """
genome:
    models:
      - ./english
      - ./italian
    merge_method: dare_ties
    base_model: ./base
    tokenizer_source: null
    layer_granularity: 2
    normalize: null
    allow_negative_weights: false
    smooth: false
    filters:
      - self_attn
      - mlp
tasks:
  - name: sums
    items: english.jsonl
    weight: 1.0
    metric: acc,none
  - items: translation.jsonl
    weight: 0.5
limit: 10
random_init: false
num_fewshot: 0
shuffle: false
apply_chat_template: false
optimizer: {budget: 8, population: 4}
"""
    (own_world / "theirs.yaml").write_text(text)
    config = load_config(own_world / "theirs.yaml")
    questions = load_questions(config)
    assert {i.task for i in questions.subset} == {"sums", "translation"} and len(questions.subset) == 20
    result = run.evolve(config, tmp_path / "run", quiet=True, export=False)
    assert result["candidates"] == 8
    merge_to_disk(Recipe.from_yaml(tmp_path / "run" / "best.yaml"), tmp_path / "out")


BAD_CONFIGS = {
    "nothing to ask": (dict(tasks=[{"weight": 2}]), "neither a name of lm-eval's nor items"),
    "examples of a file": (dict(tasks=[{"items": "a.jsonl", "num_fewshot": 3}]), "bring their examples in the prompt"),
    "unknown key": (dict(optimiser={}), "optimiser: unknown key.*did you mean 'optimizer'"),
    "unknown inner key": (dict(optimizer={"buget": 3}), "optimizer.buget: unknown key.*did you mean 'budget'"),
    "unknown method": (dict(genome={"models": ["./base"], "merge_method": "tis"}), "unknown method 'tis'"),
    "no tasks": (dict(tasks=[]), "tasks"),
    "weight below 0": (
        dict(tasks=[{"items": "a.jsonl"}, {"items": "b.jsonl", "weight": -2}]),
        r"evolve.yaml: weights: tasks.1: found -2.0; expected a number, not negative",
    ),
    "weight of no number": (dict(tasks=[{"items": "a.jsonl", "weight": float("nan")}]), "tasks.0: found nan"),
    "no weight": (dict(tasks=[{"items": "a.jsonl", "weight": 0}]), "weights: none above zero"),
    "fraction": (dict(heldout={"fraction": 1.5}), "heldout.fraction: found 1.5"),
    "estimator": (dict(estimate={"method": "best"}), "estimate.method: found 'best'; expected 'auto', 'mean'"),
    "bounds": (
        dict(genome={"models": ["./base"], "merge_method": "linear", "bounds": {"weight": [2, 1]}}),
        "expected low < high",
    ),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configurations(tiny_world, tmp_path, case):
    change, message = BAD_CONFIGS[case]
    data = yaml.safe_load((tiny_world / "evolve.yaml").read_text()) | change
    (tmp_path / "evolve.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match=message) as error:
        load_config(tmp_path / "evolve.yaml")
    assert "\n" not in str(error.value)


def test_items_that_all_go_to_the_heldout_split(own_world, tmp_path):
    data = yaml.safe_load((own_world / "evolve.yaml").read_text())
    (own_world / "one.jsonl").write_text('{"kind": "generate", "prompt": "a", "answer": "b"}\n')
    data["tasks"], data["heldout"] = [{"items": "one.jsonl"}], {"fraction": 0.9}
    (own_world / "one.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(ItemsError, match="expected items on both sides"):
        run.evolve(load_config(own_world / "one.yaml"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


# -- optimizers and estimates


@pytest.mark.parametrize("name,assisted", [("cma", False), ("cma", True), ("random", False)])
def test_optimizers_replay_and_leave_numpys_generator_alone(name, assisted):
    def sequence():
        o = optimizers.make(name, np.full(5, 0.5), np.zeros(5), np.ones(5), 0.2, 6, seed=7, assisted=assisted)
        asked = []
        for _ in range(4):
            genomes = o.ask()
            asked += genomes
            o.tell(genomes, [-float(((g - 0.2) ** 2).sum()) for g in genomes], [0.01] * len(genomes))
        return np.array(asked)

    np.random.seed(1)
    first = sequence()
    after = np.random.rand()
    np.random.seed(1)
    assert np.random.rand() == after
    assert np.array_equal(first, sequence())
    assert ((first >= 0) & (first <= 1)).all()


def test_cma_begins_at_the_start_survives_flat_fitness_and_improves():
    o = optimizers.make("cma", np.full(4, 0.5), np.zeros(4), np.ones(4), 0.2, None, seed=0)
    genomes = o.ask()
    assert np.allclose(genomes[0], 0.5)
    for _ in range(5):
        o.tell(genomes, [0.5] * len(genomes), [0.1] * len(genomes))
        genomes = o.ask()
    for _ in range(60):
        fitness = [-float(((g - 0.8) ** 2).sum()) for g in genomes]
        fitness[0] = float("nan")  # a failed candidate
        o.tell(genomes, fitness, [0.0] * len(genomes))
        genomes = o.ask()
    assert max(-float(((g - 0.8) ** 2).sum()) for g in genomes) > -1e-3


def test_mean_over_tasks_weights_tasks_not_items():
    items = [Item(f"a{i}", "a", "generate", "p", ("x",)) for i in range(8)] + [
        Item("b0", "b", "generate", "p", ("x",))
    ] * 2
    responses = np.array([1.0] * 4 + [0.0] * 4 + [1.0, 1.0])
    value, stderr = mean_over_tasks(responses, items)
    assert value == 0.75 and stderr == pytest.approx((0.25 / 8) ** 0.5 / 2)
    assert mean_over_tasks(responses, items, {"a": 3.0, "b": 1.0})[0] == pytest.approx((3 * 0.5 + 1) / 4)


def test_task_weights_count_in_the_search(tiny_world):
    config = load_config(tiny_world / "evolve.yaml")
    pool = Pool.open(config.models[0], config.models[1:])
    engine, questions = LocalEngine(pool), load_questions(config)
    space = Space(config.genome.definition(), pool.layouts[pool.base])
    asked = Registration(tuple(questions.subset), space.definition, weights={"english": 1.0, "translation": 3.0})
    (found,) = engine.evaluate(asked, [space.initial()])
    means = {t: found.responses[[i.task == t for i in questions.subset]].mean() for t in ("english", "translation")}
    assert means["english"] != means["translation"]
    assert found.value == pytest.approx((means["english"] + 3 * means["translation"]) / 4)


def test_the_searched_dtype_is_the_exported_dtype(own_world, tmp_path):
    """Float32 models searched for a bfloat16 merge: candidates answer as the written checkpoint will."""
    data = yaml.safe_load((own_world / "evolve.yaml").read_text())
    data["genome"]["dtype"], data["optimizer"] = "bfloat16", {"budget": 6, "population": 6}
    (own_world / "bf16.yaml").write_text(yaml.safe_dump(data))
    config = load_config(own_world / "bf16.yaml")
    result = run.evolve(config, tmp_path / "run", quiet=True)
    exported = LocalEngine(Pool.open(str(tmp_path / "run" / "model"), []))
    assert next(exported.slot.model.parameters()).dtype == torch.bfloat16
    questions = load_questions(config)
    responses = answers(exported, exported.pool.base, questions.subset)
    assert mean_over_tasks(responses, questions.subset)[0] == result["search_value"]


def test_a_limit_also_bounds_a_random_subset(own_world):
    data = yaml.safe_load((own_world / "evolve.yaml").read_text())
    data |= {"limit": 5, "extract": {"method": "random", "size": 8}}
    (own_world / "limit.yaml").write_text(yaml.safe_dump(data))
    assert len(load_questions(load_config(own_world / "limit.yaml")).subset) == 10


def test_slot_gives_the_bytes_of_the_export(family, tmp_path):
    from safetensors.torch import load_file

    from merge3.live.slot import Slot

    pool = Pool.open(str(family / "base"), [str(family / f"e{i}") for i in range(3)])
    slot = Slot(pool)
    addresses = [p.data_ptr() for p in slot.model.parameters()]
    for method, extra in (("ties", {"density": 0.4}), ("dare_ties", {"density": 0.4}), ("della", {"density": 0.4})):
        recipe = Recipe.parse(
            {
                "merge_method": method,
                "base_model": str(family / "base"),
                "parameters": extra,
                "models": [{"model": str(family / f"e{i}"), "parameters": {"weight": [0.2, 0.9]}} for i in range(3)],
            }
        )
        slot.swap(recipe, seed=5)
        merge_to_disk(recipe, tmp_path / method, seed=5)
        for name, tensor in load_file(tmp_path / method / "model.safetensors").items():
            assert torch.equal(slot.model.state_dict()[name], tensor), (method, name)
    assert [p.data_ptr() for p in slot.model.parameters()] == addresses


def test_heads_stay_with_their_experts(tmp_path):
    from transformers import LlamaForSequenceClassification

    from merge3.live.slot import Slot

    for i, labels in enumerate((2, 3, 5)):
        make_classifier(labels, seed=i).save_pretrained(tmp_path / f"m{i}")
    pool = Pool.open(str(tmp_path / "m0"), [str(tmp_path / "m1"), str(tmp_path / "m2")])
    slot = Slot(pool)
    recipe = Recipe.parse(
        {
            "merge_method": "task_arithmetic",
            "base_model": str(tmp_path / "m0"),
            "models": [{"model": str(tmp_path / f"m{i}"), "parameters": {"weight": 0.5}} for i in (1, 2)],
        }
    )
    slot.swap(recipe)
    ids = torch.tensor([[3, 4, 5]])
    for i, labels in ((0, 2), (1, 3), (2, 5), (0, 2)):
        slot.use_head(str(tmp_path / f"m{i}"))
        assert slot.model(input_ids=ids).logits.shape == (1, labels)
        head = LlamaForSequenceClassification.from_pretrained(tmp_path / f"m{i}").score.weight
        assert torch.equal(slot.model.score.weight, head)


def test_a_merge_answers_with_the_bases_head_whatever_was_asked_before(tmp_path):

    from merge3.world.numbers import ENGLISH
    from merge3.world.tokenizer import make_tokenizer

    for i in range(2):
        make_classifier(3, seed=i, vocabulary=200).save_pretrained(tmp_path / f"m{i}")
    make_tokenizer().save_pretrained(tmp_path / "m0")
    items = [Item(f"k{i}", "k", "classify", f"{ENGLISH[i]} {ENGLISH[2 * i]}", i % 3) for i in range(40)]
    engine = LocalEngine(Pool.open(str(tmp_path / "m0"), [str(tmp_path / "m1")]))
    recipe = Recipe.parse(
        {
            "merge_method": "task_arithmetic",
            "base_model": str(tmp_path / "m0"),
            "models": [{"model": str(tmp_path / "m1"), "parameters": {"weight": 0.5}}],
        }
    )
    before = answers(engine, recipe, items)
    endpoint = answers(engine, str(tmp_path / "m1"), items)
    assert np.array_equal(answers(engine, recipe, items), before) and not np.array_equal(endpoint, before)


def test_space_is_registered_once_and_engines_prefetch_every_threshold(tiny_world):
    config = load_config(tiny_world / "evolve.yaml")
    pool = Pool.open(config.models[0], config.models[1:])
    engine = LocalEngine(pool)
    asked = Registration(tuple(load_questions(config).subset), config.genome.definition())
    engine.prepare(asked)
    start = engine.space(asked.space).initial()
    calls = []
    original = pool.statistics.prefetch_order
    pool.statistics.prefetch_order = lambda requests: calls.append(1) or original(requests)
    import merge3.kernels as kernels

    seen = []
    real = kernels.order_statistics
    try:
        kernels.order_statistics = lambda *a, **k: seen.append(1) or real(*a, **k)
        list(engine.evaluate(asked, [start, start * 0.9]))
    finally:
        kernels.order_statistics = real
    assert calls and not seen  # asked for, and all there


def test_out_of_memory_is_nobodys_answer(tiny_world):
    """Told with numbers and raised, not journalled as a candidate that failed; the next candidate is none the worse."""
    config = load_config(tiny_world / "evolve.yaml")
    engine = LocalEngine(Pool.open(config.models[0], config.models[1:]))
    asked = Registration(tuple(load_questions(config).subset[:4]), config.genome.definition())
    start = engine.space(asked.space).initial()
    (before,) = engine.evaluate(asked, [start])
    hook = engine.slot.model.register_forward_pre_hook(lambda module, inputs: torch.empty(1 << 50))
    for subject in (start, config.models[0]):
        with pytest.raises(ResourceError, match=r"cpu: out of memory: \d+ bytes needed"):
            list(engine.evaluate(asked, [subject]))
    hook.remove()
    (after,) = engine.evaluate(asked, [start])
    assert np.array_equal(before.responses, after.responses)
