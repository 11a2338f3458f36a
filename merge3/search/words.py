"""The tokenizer and chat template that a search will ask with, before its models are opened."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from merge3.checkpoint.beside import Words
from merge3.checkpoint.read import resolve
from merge3.checkpoint.vocabulary import open_vocabulary
from merge3.endpoints import open_endpoints
from merge3.packaging import template_text
from merge3.recipe import ModelRef
from merge3.search.config import EvolveConfig


class AskedWith:
    """folder: whose tokenizer, chat template and positions say what prompts are and how long items may be: the base's,
    or that of the vocabulary which a pool with the configuration's tokenizer will have. Made when it is first asked
    for, it goes with this object."""

    def __init__(self, config: EvolveConfig):
        self._config = config

    @cached_property
    def folder(self) -> Path:
        """See the class. Raises CheckpointError or RecipeError where a pool would."""
        said, models = self._config.genome.chat_template, self._config.models
        template = template_text(said, [_folder(model) for model in models] if said == "auto" else [])
        return self._words.folder(template)

    @cached_property
    def _words(self) -> Words:
        tokenizer = self._config.genome.recipe_tokenizer()
        if tokenizer is None:
            return Words(_folder(self._config.models[0]))
        endpoints, _ = open_endpoints(self._config.models, tower=self._config.genome.tower)
        return open_vocabulary(endpoints, tokenizer).words


def _folder(model: str) -> Path:
    ref = ModelRef.parse(model, "genome")
    return resolve(ref.path, ref.revision)
