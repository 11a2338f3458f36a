"""What a configuration says of rounds: their budgets, the models of the next one, what cannot be searched in rounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from merge3.methods import METHODS
from merge3.registration import ACCURACY
from merge3.space import SpaceDefinition

if TYPE_CHECKING:
    from merge3.search.config import EvolveConfig


def budget_of(config: EvolveConfig, number: int) -> int:
    """Candidates of a round, from 0: all have as many, but for what is left over, which the first ones have."""
    share, more = divmod(config.optimizer.budget, config.optimizer.rounds)
    return share + (number < more)


def next_models(config: EvolveConfig, elites: Sequence[str]) -> list[str]:
    """The models of a later round: elites in the place of the first one's, beside them with `optimizer.originals`; a
    base that is merged itself stays among them."""
    genome = config.genome
    base = [model for model in genome.models if model == genome.base_model]
    others = [model for model in genome.models if model not in base]
    return [*base, *elites, *(others if config.optimizer.originals else ())]


def check_settings(config: EvolveConfig) -> None:
    """Raises ValueError for rounds that no models are needed to refuse."""
    optimizer, genome = config.optimizer, config.genome
    if any(stage.optimizer.get("rounds", 1) != 1 for stage in config.stages):
        raise ValueError("stages: optimizer.rounds in a stage: expected rounds, or stages")
    if optimizer.rounds == 1:
        for key in ("elites", "originals"):
            if getattr(optimizer, key) != type(optimizer).model_fields[key].default:
                raise ValueError(f"optimizer.{key}: of a search in rounds: expected `rounds: 2`, or more, beside it")
        return
    refused = {
        "beside stages: expected one of them": bool(config.stages),
        f"in a search of space {genome.space}: expected {SpaceDefinition.kind}": genome.space != SpaceDefinition.kind,
        "beside race.defend: expected one of them": config.race.defend,
        f"beside objectives ({', '.join(config.names)}): expected {ACCURACY} alone": config.names != (ACCURACY,),
        "beside a tokenizer or tower of the genome's: expected models that share theirs": bool(
            genome.recipe_tokenizer() or genome.tower
        ),
        f"with {genome.merge_method}, which derives an expert of all models once: expected another method": (
            METHODS[genome.merge_method].derive is not None
        ),
    }
    for found, wrong in refused.items():
        if wrong:
            raise ValueError(f"optimizer.rounds: {optimizer.rounds} {found}")
    if (each := budget_of(config, optimizer.rounds - 1)) < optimizer.elites:
        raise ValueError(f"optimizer.elites: {optimizer.elites} of {each} candidates a round: expected at most {each}")
    _check_count(config)


def _check_count(config: EvolveConfig) -> None:
    method, elites = config.genome.merge_method, config.optimizer.elites
    low, high = METHODS[method].experts
    others = len(next_models(config, ()))
    if low <= others + elites <= high:
        return
    takes = f"{low} to {high} models" if low < high else f"{low} model{'s' * (low > 1)}"
    found = f"{elites} elites" + (f" and {others} of the models" if others else "") + f" with {method}"
    least, most = max(1, low - others), high - others
    expected = f"{least} to {most}" if least < most else f"{most}" if most > 0 else "`originals: false`"
    raise ValueError(f"optimizer.elites: {found}, which takes {takes}: expected {expected}")
