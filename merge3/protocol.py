"""What a search asks of an engine, and what it is told: the protocol and its values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from merge3.checkpoint.layout import Layout
from merge3.errors import BadInput, Merge3Error
from merge3.experts import ExpertLoss
from merge3.learn.fit import Fit, FitStep
from merge3.learn.fitting import State
from merge3.learn.surgery import Operation, Surgery
from merge3.live.hooks import Adapter
from merge3.recipe import Recipe
from merge3.registration import Registration
from merge3.space import SpaceDefinition
from merge3.tasks.documents import Raw


@dataclass(frozen=True, eq=False)
class Operated:
    """A merge with an adapter for each task: every item is answered with its task's, those of other tasks without.
    subject: a recipe, or the endpoint whose folder has the adapters beside its weights."""

    subject: Recipe | str
    adapters: Mapping[str, Adapter]


@dataclass(frozen=True)
class Varied:
    """A merge with a result for each task. subject: a recipe of such a method, or the endpoint that is a packed folder.
    tasks: whose variant answers, of each of the registration's items; None: that of its own task."""

    subject: Recipe | str
    tasks: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Taken:
    """A recipe or an endpoint in a pool that compacts its experts. stored: of experts as their files have them, as an
    export reads them; else as the pool holds them. A recipe alone is of the latter, an endpoint alone of the former."""

    subject: Recipe | str
    stored: bool


# A genome of the registration's space, a recipe, an endpoint's name, or one of these two with adapters or variants, or
# taken of other weights. A recipe of a method with a result for each task is as Varied(recipe); an endpoint is what
# lies in its folder, no more.
Subject = np.ndarray | Recipe | str | Operated | Varied | Taken
Question = tuple[Registration, Subject]


@dataclass(frozen=True)
class Evaluation:
    """One subject's answers.

    index: of the subject. responses: float64 [items]. objectives: names of values and stderrs, each float64
    [objectives], NaN where there are no responses; error: why not. raw: position -> what the asks of a document came
    to, where its judge is not here (whose response is then NaN). lengths: tokens written for each item, float64
    [items], NaN where one asks for no text; None where no objective needs them. cost: of a forward, in those of the
    base.
    """

    index: int
    recipe_hash: str
    responses: np.ndarray | None
    objectives: tuple[str, ...]
    values: np.ndarray
    stderrs: np.ndarray
    seconds: float
    swap_seconds: float = 0.0
    error: Merge3Error | None = None
    raw: Mapping[int, Raw] = field(default_factory=dict)
    lengths: np.ndarray | None = None
    cost: float = 1.0

    @property
    def value(self) -> float:
        """Of the first objective."""
        return float(self.values[0])

    @property
    def stderr(self) -> float:
        """Of the first objective."""
        return float(self.stderrs[0])

    def answers(self) -> np.ndarray:
        """The responses; raises what kept the subject from giving any."""
        if self.error is not None:
            raise self.error
        if self.raw:
            raise BadInput("documents", f"{len(self.raw)} without a judge", "judges in the registration")
        return self.responses


@dataclass(frozen=True)
class PoolInfo:
    """What a driver may know of a pool.

    endpoints: base first; layout: the base's, what a Space is met with; kept: tensors that are not merged, with the
    reason; host: `local`, or the address of the daemon asked; warnings: what makes models seem not to belong together;
    notes: where language models are merged into one with eyes or ears, and what is lost of compacted experts.
    own_heads: whether endpoints answer with heads of their own, which no recipe merges. tied: outputs that every
    endpoint ties to one other tensor. workers: subjects that are answered at once. experts: how they are held; losses:
    of every one that is compacted. files: those beside the weights that answers depend on -> digests, see Words.files;
    empty where a daemon says nothing of them.
    """

    endpoints: tuple[str, ...]
    content_hashes: dict[str, str]
    parameters: int
    kept: dict[str, str]
    device: str
    layout: Layout
    host: str = "local"
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    own_heads: bool = False
    tied: tuple[str, ...] = ()
    workers: int = 1
    experts: str = "full"
    losses: tuple[ExpertLoss, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def unmerged(self) -> set[str]:
        """Tensors of the layout that no merge changes."""
        return {*self.kept, *self.tied}


class Engine(Protocol):
    """The protocol of LocalEngine and of an engine behind a wire."""

    def info(self) -> PoolInfo:
        """What the pool is; asks nothing of the models."""

    def prepare(self, registration: Registration, recipe: Recipe | None = None) -> None:
        """Tokenise items, open the space, compute its statistics. Raises BadInput for what evaluating would refuse.
        `evaluate` does it by itself; what can be refused at the start should be.

        recipe: whose chat template counts, if not the space's; an engine behind a wire sees it when it is asked.
        """

    def evaluate(self, registration: Registration, subjects: Sequence[Subject]) -> Iterator[Evaluation]:
        """Merge, ask and estimate each subject; evaluations come as they are ready, `index` says whose.

        A subject that cannot be merged or asked has its error in the evaluation; what is no subject's fault (memory, a
        caller who left, a daemon that is away) is raised.
        """

    def evaluate_each(self, questions: Iterator[Question], in_flight: int) -> Iterator[Evaluation]:
        """The same of questions that are not known beforehand: the answers so far may say which comes next.

        `in_flight` questions are taken at first, then one each time that the next evaluation is asked for; never more,
        and in the caller's thread. index: of the question, as they were taken.
        """

    def fit(
        self,
        registration: Registration,
        fit: Fit,
        state: State | None = None,
        told: Callable[[str], None] = lambda line: None,
    ) -> Iterator[FitStep]:
        """Learn weights from the registration's items; steps come as they are done, after `state`'s.

        told: called before the first with what they take of memory, where the models are in this process. Between two
        steps other subjects may be evaluated. Raises RecipeError or ItemsError for what cannot be learned, FitError
        where a loss is no number, ResourceError where memory is too short.
        """

    def forget_fit(self) -> None:
        """Give up what was prepared for a fit and the room it took; an engine behind a wire does it by itself."""

    def operate(self, registration: Registration, recipe: Recipe, surgery: Surgery) -> Operation:
        """Adapters on a recipe's merge: the merge and the experts are asked the registration's items; the operation's
        steps then fit. In this process alone so far.

        Raises RecipeError, ItemsError, BadInput or LogitsError for what cannot be fitted.
        """

    def relative_norms(self, definition: SpaceDefinition) -> np.ndarray:
        """How long the task vectors are that each gene of a space of parameters moves, relative to the weights they
        change; see space.norms. float64 [genes]. Raises ConfigError for a space of another kind."""

    def check(self, recipe: Recipe) -> None:
        """A dry run: raises what merging or exporting the recipe would refuse. Reads and writes no weights."""

    def export(self, recipe: Recipe, directory: Path, seed: int = 0, task: str | None = None) -> dict:
        """Write the merged checkpoint; see export.merge_to_disk. task: of a method with a result for each, whose alone.

        Raises RecipeError, CheckpointError or ResourceError.
        """

    def close(self) -> None:
        """Give up what the engine holds elsewhere."""
