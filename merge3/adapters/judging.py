"""What answers to lm-eval's documents are worth: by the tasks' own filters and metrics, never ours."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from merge3.errors import ConfigError, ItemsError
from merge3.tasks import Item
from merge3.tasks.documents import Raw
from merge3.tasks.items import place, shown

DEFAULT = ("acc", "none")  # mergekit-evolve's metric
Metric = tuple[str, str]  # (name, filter)
_RULES = ("doc_to_target", "doc_to_choice", "process_results", "filter_list", "metric_list")  # of a task's YAML


class Document(NamedTuple):
    """A document of lm-eval's: the name of its task, the Task, the document, its requests (Instances)."""

    leaf: str
    task: Any
    doc: Any
    instances: tuple


@dataclass(frozen=True)
class Benchmark:
    """A task, group or tag of lm-eval's as items. documents: item id -> the document; metric: what makes responses,
    None where only tables are wanted."""

    name: str
    items: tuple[Item, ...]
    documents: Mapping[str, Document]
    metric: Metric | None

    def judge(self, item: Item, raw: Raw) -> float:
        """A document's response: its value by the metric. Raises ItemsError where that is no number in [0, 1]."""
        name, wanted = self.metric
        for filtered, values in self._metrics(item, raw, wanted):
            if filtered == wanted and name in values:
                return _response(values[name], name, item)
        raise ItemsError(place(item), f"its task gives it no {','.join(self.metric)}", "a value for every document")

    def digest(self) -> str:
        """Of what says which answers are right: the documents, and what their tasks make of answers."""
        tasks = {document.leaf: document.task for document in self.documents.values()}
        rules = {leaf: {key: task.get_config(key) for key in _RULES} for leaf, task in tasks.items()}
        documents = [[id, document.leaf, document.doc] for id, document in self.documents.items()]
        named = lambda value: getattr(value, "__qualname__", type(value).__qualname__)  # a repr may say where it lies
        told = json.dumps([rules, documents], default=named, skipkeys=True)
        return hashlib.sha256(told.encode()).hexdigest()

    def first(self, limit: int | None) -> list[Item]:
        """The first documents of every leaf task, as lm-eval's limit has them; None: all."""
        chosen, counts = [], Counter()
        for item in self.items:
            leaf = self.documents[item.id].leaf
            counts[leaf] += 1
            if limit is None or counts[leaf] <= limit:
                chosen.append(item)
        return chosen

    def table(self, items: Sequence[Item], raws: Sequence[Raw]) -> dict[str, dict[str, float]]:
        """Leaf task -> {"metric,filter": value over these documents, by lm-eval's own aggregation}."""
        found: dict[str, dict[Metric, list]] = {}
        tasks = {}
        for item, raw in zip(items, raws):
            document = self.documents[item.id]
            tasks[document.leaf] = document.task
            for filtered, values in self._metrics(item, raw):
                for name, value in values.items():
                    found.setdefault(document.leaf, {}).setdefault((name, filtered), []).append(value)
        table: dict[str, dict[str, float]] = {}
        for leaf, metrics in found.items():
            aggregations, own = tasks[leaf].aggregation(), table.setdefault(leaf, {})
            for (name, filtered), values in metrics.items():
                own[f"{name},{filtered}"] = float(aggregations.get(name, _mean)(values))
        return table

    def _metrics(self, item: Item, raw: Raw, only: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
        """(filter, metric -> the document's value)"""
        leaf, task, doc, built = self.documents[item.id]
        instances = []
        for instance, answer in zip(built, raw, strict=True):
            # Greedy answers are all the same, however often a task wants them.
            resps = [answer] * (instance.repeats or 1)
            instances.append(replace(instance, resps=resps, filtered_resps={}))
        try:
            for own in task._filters:
                if only is None or own.name == only:
                    own.apply(instances)
                    yield own.name, task.process_results(doc, [i.filtered_resps[own.name] for i in instances])
        except Exception as error:  # a task's own code
            reason = f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"[:300]
            raise ItemsError(place(item), f"task {leaf} fails on its answers ({reason})", "metrics") from None


def fitness_metric(name: str, tasks: Sequence[Any], wanted: str | None, required: bool = True) -> Metric | None:
    """The metric that makes responses: as spelled, `name,filter`; else `acc,none`; else the only one there is.

    required: False for None where there is none such. Raises ConfigError for a metric that some of the tasks
    have not, that has no value per document, or of which less is better.
    """
    where = f"task {name!r}: metric"
    usable = {metric: [_fault(task, metric) for task in tasks] for metric in _all_metrics(tasks)}
    good = [metric for metric, faults in usable.items() if not any(faults)]
    spelled = lambda metrics: ", ".join(",".join(metric) for metric in metrics) or "none of its metrics"
    if wanted is None:
        if DEFAULT in good or len(good) == 1:
            return DEFAULT if DEFAULT in good else good[0]
        if not required:
            return None
        if good:
            raise ConfigError(where, "not named, and there are several", spelled(good))
        fault = next((f for faults in usable.values() for f in faults if f), "none")
        raise ConfigError(where, f"none has a value per document that a search can use ({fault})", "such a metric")
    metric = tuple(wanted.split(",", 1))
    if len(metric) == 1:
        filters = {filtered for other, filtered in usable if other == wanted}
        metric = (wanted, filters.pop() if len(filters) == 1 else "none")
    if metric not in good and not required:
        return None
    if metric not in usable:
        raise ConfigError(where, f"found {wanted!r}", spelled(good))
    if fault := next((f for f in usable[metric] if f), None):
        raise ConfigError(where, f"{','.join(metric)} {fault}", spelled(good))
    return metric


def _all_metrics(tasks: Sequence[Any]) -> list[Metric]:
    found: dict[Metric, None] = {}
    for task in tasks:
        for name in task.aggregation():
            for own in task._filters:
                found[name, own.name] = None
    return list(found)


def _fault(task: Any, metric: Metric) -> str | None:
    """Why a task's metric makes no responses; None where it does."""
    from lm_eval.api.metrics import mean

    name, filtered = metric
    leaf = task.get_config("task")
    if name not in task.aggregation() or filtered not in {own.name for own in task._filters}:
        return f"is not there in {leaf}"
    if task.aggregation()[name] is not mean:
        return f"is one of all documents together in {leaf}: no document has a value of its own"
    if not task.higher_is_better().get(name, True):
        return f"is better the lower it is in {leaf}: a search looks for what is high"
    return None


def _response(value: Any, name: str, item: Item) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number <= 1:
        raise ItemsError(place(item), f"its {name} is {shown(value)}", "a number from 0 to 1, as responses are")
    return number


def _mean(values: Sequence[Any]) -> float:
    return sum(values) / len(values)
