"""lm-eval's tasks as items: found by name, their documents' requests built once, by lm-eval itself.

lm-eval (the extra `lm-eval`) is imported only where a task of its is named. What documents ask crosses to whoever
scores them; what the answers are worth stays here, with lm-eval's own filters and metrics (judging.py).
"""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch

from merge3.adapters.judging import Benchmark, Document, fitness_metric
from merge3.errors import ConfigError, ItemsError, Unavailable
from merge3.tasks import Item
from merge3.tasks.prompts import load_tokenizer
from merge3.tasks.reading import make_document

FEWSHOT_SEED = SEED = 1234  # simple_evaluate's
MAX_TOKENS = 256  # of a generation that names no limit, as in HFLM
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # one setting; the first counts
_IDLE = {"temperature", "top_p", "top_k", "min_p", "do_sample", "use_cache"}  # without effect on greedy decoding


@dataclass(frozen=True)
class Settings:
    """How a task is asked; names and meanings are lm-eval's. metric: `name,filter`, which makes responses; None: the
    default. gen_kwargs: changes to a task's generation arguments."""

    metric: str | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    system_instruction: str | None = None
    fewshot_as_multiturn: bool = False
    gen_kwargs: Mapping[str, Any] = field(default_factory=dict)


def load_benchmark(
    name: str, settings: Settings, folder: str | Path, paths: Sequence[str] = (), fitness: bool = True
) -> Benchmark:
    """A task, group or tag of lm-eval's by name, all its documents as items `task name/document` of one task.

    folder: the checkpoint whose tokenizer writes chat templates. paths: folders of YAML files, searched before
    lm-eval's own tasks. fitness: whether responses are wanted, for which a metric needs a value per document.
    Raises ConfigError for what lm-eval does not know or cannot load, ItemsError for what cannot be asked.
    """
    if settings.fewshot_as_multiturn and not settings.apply_chat_template:
        raise ConfigError(f"task {name!r}: fewshot_as_multiturn", "without apply_chat_template", "both, or neither")
    with _quiet(), _seeded():
        tasks = _tasks(name, tuple(map(str, paths)))
        template = _Template(folder) if settings.apply_chat_template else None
        documents: dict[str, Document] = {}
        items: list[Item] = []
        for leaf, task in tasks.items():
            _configure(leaf, task, settings)
            for number, instances in _built(leaf, task, settings, template).items():
                id = str(number) if leaf == name else f"{leaf}/{number}"
                items.append(_item(id, name, settings.metric or "", instances))
                documents[id] = Document(leaf, task, instances[0].doc, tuple(instances))
    metric = fitness_metric(name, list(tasks.values()), settings.metric, required=fitness)
    items = [replace(item, metric=",".join(metric) if metric else "") for item in items]
    return Benchmark(name, tuple(items), documents, metric)


@functools.lru_cache(4)
def _manager(paths: tuple[str, ...], defaults: bool):
    """lm-eval's index of tasks. Of its own there are nearly 15,000, which take half a minute to read."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        hint = "pip install 'merge3-gpu[lm-eval]'"
        raise Unavailable("tasks", f"lm-eval is not here ({error})", "lm-eval 0.4.13", hint) from None
    _compile_once()
    return TaskManager(include_path=list(paths) or None, include_defaults=defaults)


@functools.cache
def _compile_once() -> None:
    """lm-eval compiles a task's templates anew for every document that is built, and again whenever it is judged, which
    was most of a judgement's time. A template is its text: from here on each is compiled once."""
    from lm_eval.utils import env

    anew = env.from_string
    known = functools.lru_cache(1024)(anew)
    env.from_string = lambda source, *more, **named: anew(source, *more, **named) if more or named else known(source)


def _tasks(name: str, paths: tuple[str, ...]) -> dict[str, Any]:
    """Leaf name -> lm-eval's Task."""
    for path in paths:
        if not Path(path).is_dir():
            raise ConfigError("task_path", f"no directory {path}", "a folder of lm-eval's YAML files")
    manager = _manager(paths, False) if paths else None
    if manager is None or name not in manager.all_tasks:
        manager = _manager(paths, True)
    if name not in manager.all_tasks:
        near = get_close_matches(name, manager.all_tasks, 3)
        expected = "one of " + ", ".join(near) if near else "a task, group or tag that lm-eval lists"
        hint = "own tasks: --task-path, or task_path in the configuration; items in a file: `items: file.jsonl`"
        raise ConfigError("tasks", f"lm-eval has no task {name!r}", expected, hint)
    try:
        found = manager.load([name])["tasks"]
    except Exception as error:  # a dataset, a script, a task's own code: anything can be wrong, and none of it is ours
        reason = f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"[:300]
        hint = "without network its data must be in the cache of `datasets`, or in files that its YAML names"
        raise ConfigError(f"task {name!r}", f"lm-eval cannot load it ({reason})", "its data", hint) from None
    if not found:
        raise ConfigError(f"task {name!r}", "no tasks in it", "at least one")
    return found


def _configure(name: str, task: Any, settings: Settings) -> None:
    """As simple_evaluate does. Raises ConfigError for what can't be run here."""
    if getattr(task, "UNSAFE_CODE", False):
        raise ConfigError(f"task {name!r}", "runs code that models write (unsafe_code)", "a task that does not")
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError(f"task {name!r}", "asks about images or sound", "a task of texts")
    if settings.gen_kwargs and task.get_config("generation_kwargs") is not None:
        task.set_config(key="generation_kwargs", value=dict(settings.gen_kwargs), update=True)
    shots = task.get_config("num_fewshot")
    if settings.num_fewshot is not None and shots != 0:  # a task that says 0 keeps it
        task.set_config(key="num_fewshot", value=settings.num_fewshot)
    elif shots is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)


def _built(name: str, task: Any, settings: Settings, template: _Template | None) -> dict[int, list]:
    """Number of a document -> its requests, in order. All documents at once, whoever is asked later: their examples
    are drawn one after the other."""
    try:
        task.build_all_requests(
            limit=None,
            rank=0,
            world_size=1,
            system_instruction=settings.system_instruction,
            apply_chat_template=settings.apply_chat_template,
            fewshot_as_multiturn=settings.fewshot_as_multiturn,
            chat_template=template,
            tokenizer_name="",
        )
    except ItemsError:
        raise
    except Exception as error:  # a task's own code
        reason = f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"[:300]
        raise ConfigError(f"task {name!r}", f"its prompts cannot be built ({reason})", "prompts") from None
    documents: dict[int, list] = {}
    for instance in task.instances:
        documents.setdefault(instance.doc_id, []).append(instance)
    return {number: sorted(own, key=lambda instance: instance.idx) for number, own in documents.items()}


def _item(id: str, task: str, metric: str, instances: Sequence[Any]) -> Item:
    """A document's requests as one item."""
    where, asks, generation = f"document {id} of task {task!r}", [], {}
    kinds = {instance.request_type for instance in instances}
    if len(kinds) > 1:
        raise ItemsError(where, f"requests of types {', '.join(sorted(kinds))}", "of one type")
    for instance in instances:
        *texts, last = instance.args
        if isinstance(last, Mapping):
            generation = dict(last)
            texts.append("")
        else:
            texts.append(last)
        if not all(isinstance(text, str) for text in texts) or not 1 <= len(texts) <= 2:
            raise ItemsError(where, f"a request {instance.args!r:.100}", "texts")
        asks.append(("", *texts) if len(texts) == 1 else tuple(texts))
    max_tokens, stop = _greedy(generation, where) if generation else (1, ())
    return make_document(id, task, kinds.pop(), tuple(asks), where, metric, max_tokens, stop)


def _greedy(arguments: dict[str, Any], where: str) -> tuple[int, tuple[str, ...]]:
    """(max_tokens, stop texts) of lm-eval's generation arguments. Raises ConfigError for what is not greedy."""
    until = arguments.pop("until", None) or []
    stop = (until,) if isinstance(until, str) else tuple(until)
    limits = [arguments.pop(name, None) for name in _LIMITS]
    count = next((int(limit) for limit in limits if limit is not None), MAX_TOKENS)
    drawn = arguments.get("do_sample")
    if drawn or (drawn is None and float(arguments.get("temperature") or 0) > 0):
        expected = "do_sample: false: answers drawn at random would differ from candidate to candidate"
        raise ConfigError(where, f"generation arguments {arguments}", expected, "gen_kwargs: {do_sample: false}")
    if odd := sorted(set(arguments) - _IDLE):
        raise ConfigError(where, f"generation argument {odd[0]}: {arguments[odd[0]]!r}", "until and max_gen_toks")
    return count, tuple(text for text in stop if text)


class _Template:
    """A checkpoint's chat template as lm-eval calls it. Raises ItemsError where there is none, or it fails."""

    def __init__(self, folder: str | Path):
        self.tokenizer = load_tokenizer(folder)
        if not getattr(self.tokenizer, "chat_template", None):
            raise ItemsError("apply_chat_template", "the tokenizer has no chat template", "one that has, or false")

    def __call__(self, history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        from jinja2 import TemplateError

        go_on = not add_generation_prompt  # with a text that the answer begins with
        how = {"tokenize": False, "add_generation_prompt": add_generation_prompt, "continue_final_message": go_on}
        try:
            return self.tokenizer.apply_chat_template(history, **how)
        except (TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(dict.fromkeys(message["role"] for message in history))
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            hint = "a template without system messages takes no system_instruction, and no task's description"
            found = f"the chat template fails: {reason}"
            raise ItemsError("apply_chat_template", found, f"one for {roles}", hint) from None


@contextmanager
def _seeded() -> Iterator[None]:
    """Random numbers as simple_evaluate seeds them: some tasks shuffle documents or choices when they are loaded."""
    before, also = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(SEED)
    try:
        with torch.random.fork_rng([]):
            torch.manual_seed(SEED)
            yield
    finally:
        random.setstate(before)
        np.random.set_state(also)


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval and datasets tell of every step; here what goes wrong is an error, and the rest is ours to tell."""
    names = ("lm_eval", "datasets", "evaluate")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
