"""Replay tables: real merges with all their answers, and what stands for the models once a table is there.

A table is a few thousand genomes of one world, each with its answers to every item: random ones around the start, and
the candidates of searches on all items, so that good merges are among them. A network that maps genomes to chances of
solving each item is fitted to it (a surrogate benchmark: arXiv:2509.02555), and every item gets a threshold: an item is
solved where its chance is above that. So a simulated merge has answers as items have them, the same each time it is
asked and flipping one after the other as genes move, thousands of merges a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from merge3.engine import LocalEngine
from merge3.pool import Pool
from merge3.registration import Registration
from merge3.search import optimizers
from merge3.search.config import EvolveConfig
from merge3.search.gathering import random_genomes
from merge3.search.questions import load_questions
from merge3.space import Space

RANDOM, SEARCHES, GENERATIONS = 800, 3, 30


@dataclass
class Table:
    """genomes: float64 [merges, genes]; answers: bool [merges, items]; tasks: of every item, int [items]; low, high,
    start: of the space, float64 [genes]; norms: of its genes, see space.norms."""

    genomes: np.ndarray
    answers: np.ndarray
    tasks: np.ndarray
    low: np.ndarray
    high: np.ndarray
    start: np.ndarray
    norms: np.ndarray

    def save(self, file: Path) -> None:
        """Bits, compressed."""
        np.savez_compressed(file, **vars(self))

    @staticmethod
    def load(file: Path) -> Table:
        """One that was saved."""
        with np.load(file) as found:
            return Table(**{name: found[name] for name in found.files})


def gather(config: EvolveConfig, seed: int, told=print) -> Table:
    """Ask the models of a configuration. Minutes."""
    questions = load_questions(config)
    engine = LocalEngine(Pool.open(config.models[0], config.models[1:]))
    space = Space(config.genome.definition(), engine.info().layout)
    asked = Registration(tuple(questions.search), space.definition)
    low, high = space.bounds()
    settings, genomes, answers = config.optimizer, [], []

    def ask(some: list[np.ndarray]) -> np.ndarray:
        found = np.array([evaluation.answers() for evaluation in engine.evaluate(asked, some)]) > 0.5
        genomes.extend(some)
        answers.extend(found)
        told(f"{len(genomes)} merges, the best solves {max(a.mean() for a in answers):.3f}")
        return found.mean(1)

    ask(random_genomes(space, space.initial(), RANDOM, seed, settings.sigma))
    for number in range(SEARCHES):
        how = settings.sigma, settings.population, 1000 * seed + number
        optimizer = optimizers.make("cma", space.initial(), low, high, *how)
        for _ in range(GENERATIONS):
            some = optimizer.ask()
            optimizer.tell(some, ask(some).tolist(), [0.0] * len(some))
    names = sorted({item.task for item in questions.search})
    tasks = np.array([names.index(item.task) for item in questions.search])
    norms = engine.relative_norms(space.definition)
    return Table(np.array(genomes), np.array(answers), tasks, low, high, space.initial(), norms)


class Stand:
    """In place of the models. fidelity: on merges that it was not fitted to: of their accuracies the share of variance
    that it explains, the mean absolute error, and how many single answers it predicts."""

    def __init__(self, table: Table, seed: int = 0, steps: int = 3000):
        self.table = table
        rng, torch_rng = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        order = rng.permutation(len(table.genomes))
        left, fitted = order[: len(order) // 10], order[len(order) // 10 :]
        x = torch.tensor((table.genomes - table.low) / (table.high - table.low), dtype=torch.float32)
        y = torch.tensor(table.answers, dtype=torch.float32)
        torch.manual_seed(seed)
        sizes = (x.shape[1], 256, 256, y.shape[1])
        layers = [part for a, b in pairwise(sizes) for part in (torch.nn.Linear(a, b), torch.nn.GELU())][:-1]
        self.network = torch.nn.Sequential(*layers)
        optimizer = torch.optim.AdamW(self.network.parameters(), 2e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            some = torch.tensor(fitted)[torch.randint(len(fitted), (128,), generator=torch_rng)]
            loss = torch.nn.functional.binary_cross_entropy_with_logits(self.network(x[some]), y[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        chances = self.chances(table.genomes[left])
        truth, found = table.answers[left].mean(1), chances.mean(1)
        self.fidelity = {
            "explained": float(1 - ((truth - found) ** 2).sum() / ((truth - truth.mean()) ** 2).sum()),
            "error": float(np.abs(truth - found).mean()),
            "answers": float(((chances > 0.5) == table.answers[left]).mean()),
        }

    @torch.no_grad()
    def chances(self, genomes: np.ndarray) -> np.ndarray:
        """Of solving each item, float64 [merges, items]."""
        x = (np.asarray(genomes) - self.table.low) / (self.table.high - self.table.low)
        return torch.sigmoid(self.network(torch.tensor(x, dtype=torch.float32))).double().numpy()

    def accuracy(self, genomes: np.ndarray) -> np.ndarray:
        """What a search is after: the mean over tasks, float64 [merges]."""
        return self.by_task(self.chances(genomes)).mean(1)

    def by_task(self, values: np.ndarray) -> np.ndarray:
        """Means of [merges, items] by task: [merges, tasks]."""
        tasks = self.table.tasks
        return np.stack([values[:, tasks == task].mean(1) for task in range(tasks.max() + 1)], axis=1)
