"""lm-eval's tasks on a live model: every document's answers and scores are those of lm-eval's own evaluation."""

import json
import logging
import math
import random

import numpy as np
import pytest
import yaml

pytest.importorskip("lm_eval")

from merge3 import LocalEngine, Pool, Registration
from merge3.adapters.lm_eval import Settings, load_benchmark
from merge3.errors import ConfigError, ItemsError
from tests.adapters.harness import COUNT, make_models, make_tasks
from tests.worlds import shared

TASKS = ("h_choice", "h_plural", "h_inputs", "h_words", "h_pages", "h_texts", "h_like")
WAYS = {
    "plain": Settings(),
    "fewshot": Settings(num_fewshot=2),
    "chat": Settings(apply_chat_template=True, system_instruction="Be brief."),
    "turns": Settings(num_fewshot=2, apply_chat_template=True, fewshot_as_multiturn=True),
}


@pytest.fixture(scope="module")
def models():
    yield from shared(make_models)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    make_tasks(folder)
    return folder


@pytest.fixture(scope="module")
def engine(models):
    return LocalEngine(Pool.open(str(models / "base"), [str(models / "e0"), str(models / "e1")]))


@pytest.fixture(scope="module")
def own(models):
    """lm-eval's own view of the checkpoint e0."""
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return HFLM(pretrained=str(models / "e0"), device="cpu", dtype="float32", batch_size=5)


@pytest.fixture(scope="module")
def manager(tasks):
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(tasks), include_defaults=False)


def samples(own, manager, names, how):
    """((task, document, filter) -> lm-eval's sample, its results)"""
    import lm_eval

    found = lm_eval.simple_evaluate(
        model=own,
        tasks=list(names),
        task_manager=manager,
        num_fewshot=how.num_fewshot,
        apply_chat_template=how.apply_chat_template,
        fewshot_as_multiturn=how.fewshot_as_multiturn,
        system_instruction=how.system_instruction,
        bootstrap_iters=0,
        log_samples=True,
    )
    rows = {(task, row["doc_id"], row["filter"]): row for task, own in found["samples"].items() for row in own}
    return rows, found["results"]


def answered(engine, models, benchmark):
    (evaluation,) = engine.evaluate(Registration(benchmark.items), [str(models / "e0")])
    assert evaluation.error is None
    return [evaluation.raw[i] for i in range(len(benchmark.items))]


def same(found, expected):
    if isinstance(expected, str):
        return found == expected
    if isinstance(expected, (tuple, list)):
        return math.isclose(found[0], expected[0], rel_tol=1e-4, abs_tol=1e-3) and found[1] == expected[1]
    return math.isclose(found, expected, rel_tol=1e-4, abs_tol=1e-3)


def close(found, expected):
    return np.allclose(np.asarray(found, dtype=float), np.asarray(expected, dtype=float), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_documents_are_scored_as_by_lm_eval(engine, models, tasks, own, manager, way):
    expected, results = samples(own, manager, TASKS, WAYS[way])
    for name in TASKS:
        benchmark = load_benchmark(name, WAYS[way], models / "e0", [tasks], fitness=False)
        check_documents(engine, models, benchmark, expected, results)


def test_what_a_task_draws_when_it_is_loaded_is_drawn_as_by_lm_eval(engine, models, tasks, own, tmp_path):
    from lm_eval.tasks import TaskManager

    random.seed(99)
    state = random.getstate()
    benchmark = load_benchmark("h_shuffled", Settings(), models / "e0", [tasks], fitness=False)
    assert random.getstate() == state
    make_tasks(tmp_path)  # the same in another folder: what was drawn is kept beside the data
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    expected, results = samples(own, manager, ["h_shuffled"], Settings())
    check_documents(engine, models, benchmark, expected, results)


def check_documents(engine, models, benchmark, expected, results):
    """Raw answers, every metric of every document under every filter, and what all come to."""
    name, raws = benchmark.name, answered(engine, models, benchmark)
    assert len(benchmark.items) == COUNT
    for item, raw in zip(benchmark.items, raws):
        for filtered, values in benchmark._metrics(item, raw):
            row = expected[name, int(item.id), filtered]
            for answer, resps in zip(raw, row["resps"], strict=True):
                assert same(answer, resps[0]), (item.id, answer, resps)
            for metric, value in values.items():
                assert close(value, row[metric]), (item.id, metric, value, row[metric])
    table = benchmark.table(benchmark.items, raws)[name]
    for metric, value in table.items():
        assert close(value, results[name][metric]), metric
    if benchmark.metric:
        assert len({benchmark.judge(item, raw) for item, raw in zip(benchmark.items, raws)}) > 1 or name == "h_words"


def test_a_group_and_a_tag_are_one_task_of_items(engine, models, tasks, own, manager):
    expected, results = samples(own, manager, ["h_both"], Settings())
    for name in ("h_both", "h_tag"):
        benchmark = load_benchmark(name, Settings(), models / "base", [tasks])
        raws = answered(engine, models, benchmark)
        scores = {item.id: benchmark.judge(item, raw) for item, raw in zip(benchmark.items, raws)}
        assert {item.task for item in benchmark.items} == {name} and len(scores) == 2 * COUNT
        for id, score in scores.items():
            leaf, number = id.split("/")
            assert score == expected[leaf, int(number), "none"]["acc"]
        assert math.isclose(np.mean(list(scores.values())), results["h_both"]["acc,none"])


def test_a_text_longer_than_the_model_is_read_in_windows(engine, models, tasks):
    benchmark = load_benchmark("h_pages", Settings(), models / "base", [tasks], fitness=False)
    longest = max(len(item.asks[0][1].split()) for item in benchmark.items)
    assert longest > 256, "no document is longer than the model's positions"


@pytest.mark.parametrize(
    "name,how,said",
    [
        ("h_choise", Settings(), "no task 'h_choise'.*h_choice"),
        ("h_choice", Settings(metric="f1"), "metric: found 'f1'; expected acc,none, acc_norm,none"),
        ("h_words", Settings(metric="perplexity,none"), "all documents together in h_words.*acc,none"),
        ("h_pages", Settings(), "none has a value per document"),
        ("h_texts", Settings(), "not named, and there are several; expected exact_match,first-word, exact_match,whole"),
        ("h_texts", Settings(metric="exact_match,last"), "found 'exact_match,last'"),
        ("h_texts", Settings(gen_kwargs={"do_sample": True}), "at random"),
        ("h_texts", Settings(gen_kwargs={"num_beams": 3}), "num_beams"),
        ("h_choice", Settings(fewshot_as_multiturn=True), "without apply_chat_template"),
        ("h_choice", Settings(num_fewshot=50), "prompts cannot be built"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_line(models, tasks, monkeypatch, name, how, said):
    import merge3.adapters.lm_eval as adapter

    own = adapter._manager
    monkeypatch.setattr(adapter, "_manager", lambda paths, defaults: own(paths, False))  # 15,000 files take a while
    with pytest.raises(ConfigError, match=said) as caught:
        load_benchmark(name, how, models / "base", [str(tasks)])
    assert "\n" not in str(caught.value)


def test_a_template_that_fails_or_is_missing(models, tasks, tmp_path):
    import shutil

    folder = shutil.copytree(models / "base", tmp_path / "base")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system') }}")
    how = Settings(apply_chat_template=True)
    with pytest.raises(ItemsError, match="apply_chat_template: the chat template fails: no system"):
        load_benchmark("h_choice", how, folder, [tasks])
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ItemsError, match="no chat template"):
        load_benchmark("h_choice", how, folder, [tasks])


def test_a_digest_says_which_answers_are_right(models, tmp_path):
    """Prompts and choices are the items'; what is held against answers is not."""

    def made(name, label=0, metric="acc"):
        folder = tmp_path / name
        folder.mkdir()
        documents = [{"text": "one", "options": ["two", "six"], "label": own} for own in (label, 1, 0, 1)]
        (folder / "documents.jsonl").write_text("\n".join(map(json.dumps, documents)) + "\n")
        data = {"task": "own", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice"}
        data |= {"doc_to_text": "{{text}}", "doc_to_choice": "{{options}}", "doc_to_target": "{{label}}"}
        files = {"data_files": {"test": str(folder / "documents.jsonl")}, "cache_dir": str(folder / "cache")}
        data |= {"dataset_kwargs": files, "metric_list": [{"metric": metric, "aggregation": "mean"}]}
        (folder / "own.yaml").write_text(yaml.safe_dump(data))
        return load_benchmark("own", Settings(), models / "base", [folder])

    first, moved, other = made("a"), made("b"), made("c", label=1)
    assert first.items == moved.items == other.items
    assert first.digest() == moved.digest() != other.digest()
    assert made("d", metric="acc_norm").digest() != first.digest()


def test_data_that_is_not_there(models, tmp_path):
    (tmp_path / "gone.yaml").write_text(
        "task: gone\ndataset_path: json\ndataset_kwargs: {data_files: {test: /nowhere/at/all.jsonl}}\n"
        "test_split: test\noutput_type: loglikelihood\ndoc_to_text: a\ndoc_to_target: b\n"
    )
    with pytest.raises(ConfigError, match="task 'gone': lm-eval cannot load it .*all.jsonl"):
        load_benchmark("gone", Settings(), models / "base", [tmp_path])


def test_documents_do_not_stand_in_files(tmp_path):
    from merge3.tasks import read_items

    file = tmp_path / "items.jsonl"
    file.write_text(json.dumps({"kind": "loglikelihood", "prompt": "a", "answer": "b"}))
    with pytest.raises(ItemsError, match="kind is 'loglikelihood'; expected choice"):
        read_items(file)


# -- searched, and through the daemon


def configuration(models, tasks, folder, changes=None):

    from merge3.search.config_files import load_config

    data = {
        "genome": {
            "models": [str(models / "e0"), str(models / "e1")],
            "base_model": str(models / "base"),
            "merge_method": "task_arithmetic",
        },
        "tasks": [
            {"name": "h_choice", "weight": 2.0, "metric": "acc,none", "num_fewshot": 1},
            {"name": "h_like", "apply_chat_template": True, "gen_kwargs": {"max_gen_toks": 6}},
            {"name": "h_words", "metric": "acc,none"},
        ],
        "task_path": str(tasks),
        "optimizer": {"budget": 12, "population": 6, "seed": 2},
        "extract": {"method": "random", "size": 5},
    } | (changes or {})
    file = folder / "evolve.yaml"
    file.write_text(yaml.safe_dump(data))
    return load_config(file)


def journal(folder):
    import contextlib

    from merge3.search.journal import Journal

    with contextlib.closing(Journal(folder)) as opened:
        return [(c.genome.tolist(), c.responses.tolist(), c.value) for c in opened.candidates()]


def test_a_search_over_tasks_exports_what_it_searched(models, tasks, tmp_path, own, manager):
    """Held-out accuracy in the result is what lm-eval says of the exported model's held-out documents."""
    from lm_eval.models.huggingface import HFLM

    from merge3.client import run
    from merge3.search.questions import load_questions

    config = configuration(models, tasks, tmp_path)
    result = run.evolve(config, tmp_path / "run", quiet=True)
    held = load_questions(config).heldout
    exported = HFLM(pretrained=str(tmp_path / "run" / "model"), device="cpu", dtype="float32", batch_size=5)
    expected, _ = samples(exported, manager, ["h_choice"], Settings(num_fewshot=1))
    own_scores = [expected["h_choice", int(item.id), "none"]["acc"] for item in held if item.task == "h_choice"]
    assert len(own_scores) == 4 and math.isclose(result["heldout_detail"]["tasks"]["h_choice"], np.mean(own_scores))
    assert result["item_answers"] >= 12 * 15


def test_a_search_is_continued_and_runs_on_a_daemon_alike(models, tasks, tmp_path, monkeypatch):
    from merge3.client import run
    from merge3.client.channel import Target
    from tests.server.daemons import Thread

    config = configuration(models, tasks, tmp_path)
    run.evolve(config, tmp_path / "whole", quiet=True, export=False)
    seen = []
    stopped = lambda self: len(seen) >= 7 or seen.append(1)
    with monkeypatch.context() as patch:
        patch.setattr(run.StopOnInterrupt, "__call__", stopped)
        assert run.evolve(config, tmp_path / "part", quiet=True, export=False) is None
    run.evolve(config, tmp_path / "part", resume=True, quiet=True, export=False)
    assert journal(tmp_path / "part") == journal(tmp_path / "whole")
    daemon = Thread(models)
    try:
        run.evolve(config, tmp_path / "remote", quiet=True, target=Target(daemon.address))
    finally:
        daemon.kill()
    assert journal(tmp_path / "remote") == journal(tmp_path / "whole")
    assert (tmp_path / "remote" / "model" / "config.json").exists()


def test_evaluate_prints_lm_evals_metrics_and_writes_a_row_per_document(models, tasks, tmp_path, own, manager):
    from tests.commands import client

    rows = tmp_path / "rows.jsonl"
    done = client(
        "evaluate", models / "e0", "--task", "h_texts", "--task", "h_pages", "--task-path", tasks,
        "--metric", "exact_match,whole", "--limit", 9, "--responses", rows, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    written = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [(row["task"], row["item"]) for row in written] == [("h_texts", str(n)) for n in range(9)]
    assert result["tasks"]["h_texts"]["items"] == 9 and "h_pages" not in result["tasks"]
    assert set(result["metrics"]["h_pages"]["h_pages"]) == {"word_perplexity,none", "bits_per_byte,none"}


def test_a_document_that_is_too_long(models, tasks, tmp_path):
    from merge3.client import run

    long = {"name": "h_choice", "apply_chat_template": True, "system_instruction": "one red cat " * 90}
    config = configuration(models, tasks, tmp_path, {"tasks": [long]})
    with pytest.raises(ItemsError, match="document 0 of task 'h_choice'.*at most 256, the model's positions"):
        run.evolve(config, tmp_path / "run", quiet=True)


def test_without_lm_eval(models, monkeypatch):
    import sys

    import merge3.adapters.lm_eval as adapter
    from merge3.errors import Unavailable

    adapter._manager.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(Unavailable, match=r"lm-eval is not here .*pip install 'merge3-gpu\[lm-eval\]'"):
        load_benchmark("arc_easy", Settings(), models / "base")


def test_a_template_is_compiled_once(models, tasks, monkeypatch):
    """However many documents it is applied to, and by whatever they say."""
    from lm_eval.utils import apply_template, env

    benchmark = load_benchmark("h_choice", Settings(), str(models / "base"), [str(tasks)])
    compiled, compile_ = [], env.compile
    monkeypatch.setattr(env, "compile", lambda source, *more, **named: compiled.append(source) or compile_(source))
    raws = [tuple((-float(at), False) for at, _ in enumerate(item.asks)) for item in benchmark.items]
    first = [benchmark.judge(item, raw) for item, raw in zip(benchmark.items, raws)]
    assert len(compiled) <= 3 < len(benchmark.items) and 0 < sum(first) < len(first)
    compiled.clear()
    assert [benchmark.judge(item, raw) for item, raw in zip(benchmark.items, raws)] == first and not compiled
    for value in ("a", "b"):
        assert apply_template("never seen before: {{value}}", {"value": value}) == f"never seen before: {value}"
    assert compiled == ["never seen before: {{value}}"]
