"""What is searched is what is exported, whatever the family: a genome's answers on the live model are those of the
exported checkpoint, loaded again."""

import numpy as np
import pytest

from merge3 import LocalEngine, Pool, Registration, SpaceDefinition
from merge3.tasks import Item
from tests.families import FAMILIES, make


def items(kinds):
    """Twelve of each kind."""
    asked = []
    for i in range(12):
        words = " ".join(f"w{(7 * i + 11 * j * j) % 50}" for j in range(3 + i % 3))
        if "classify" in kinds:
            asked.append(Item(f"k{i}", "t", "classify", words, i % 3))
        if "rank" in kinds:
            texts = (f"w{i} w2", f"w{i + 9} w5", f"w{i + 30} w7 w8")
            asked.append(Item(f"r{i}", "t", "rank", words, i % 3, texts, "mrr"))
        if "choice" in kinds:
            asked.append(Item(f"c{i}", "t", "choice", words, i % 3, (f"w{i}", f"w{i + 9} w5", f"w{i + 30}")))
        if "generate" in kinds:
            asked.append(Item(f"g{i}", "t", "generate", words, ("w[1-3]",), metric="regex", max_tokens=4))
    return tuple(asked)


@pytest.mark.parametrize("name", ["Mixtral", "T5", "Jamba", "LLaVA", "BERT", "BERT, classifier"])
def test_what_is_searched_is_what_is_exported(world, name, tmp_path):
    family, tokenizer = FAMILIES[name], world[1]
    make(family, tmp_path)
    base, *experts = (str(tmp_path / model) for model in ("base", "e0", "e1"))
    tokenizer.save_pretrained(base)
    engine = LocalEngine(Pool.open(base, experts))
    definition = SpaceDefinition(tuple(experts), "ties", base)
    space, asked = engine.space(definition), items(family.asks)
    genome = space.initial() * 0.9
    (found,) = engine.evaluate(Registration(asked, definition), [genome])
    engine.export(space.recipe(genome), tmp_path / "out")
    again = LocalEngine(Pool.open(str(tmp_path / "out"), []))
    (expected,) = again.evaluate(Registration(asked), [str(tmp_path / "out")])
    assert np.array_equal(found.answers(), expected.answers()) and 0 < found.value < 1
