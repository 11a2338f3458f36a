"""lm-eval's tasks on a live encoder-decoder model: every document's answers are those of lm-eval's own evaluation.

But for the length of what is written: lm-eval gives a decoder as many tokens more as the longest prompt of its batch
has; here `max_gen_toks` is what it says.
"""

import logging

import pytest
import torch

pytest.importorskip("lm_eval")

from merge3 import LocalEngine, Pool
from merge3.adapters.lm_eval import Settings, load_benchmark
from tests.adapters.harness import make_models, make_tasks
from tests.adapters.test_lm_eval import answered, check_documents, samples
from tests.worlds import shared

LIKELY = ("h_choice", "h_plural", "h_inputs", "h_words", "h_pages")
WRITTEN = ("h_texts", "h_like")


@pytest.fixture(scope="module")
def speakers():
    yield from shared(make_models)


def test_documents_are_scored_as_by_lm_eval(speakers, tmp_path):
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(speakers / "base")
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        pad_token_id=1,
        eos_token_id=1,
        decoder_start_token_id=1,
    )
    for seed, name in enumerate(("base", "e0", "e1")):
        torch.manual_seed(seed)
        model = T5ForConditionalGeneration(config)
        for p in model.parameters():
            p.data.add_(torch.randn(p.shape) * 0.2)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "tasks").mkdir()
    make_tasks(tmp_path / "tasks")
    engine = LocalEngine(Pool.open(str(tmp_path / "base"), [str(tmp_path / "e0"), str(tmp_path / "e1")]))
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    own = HFLM(pretrained=str(tmp_path / "e0"), device="cpu", dtype="float32", batch_size=5)
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    expected, results = samples(own, manager, LIKELY + WRITTEN, Settings())
    for name in LIKELY + WRITTEN:
        benchmark = load_benchmark(name, Settings(), tmp_path / "e0", [tmp_path / "tasks"], fitness=False)
        if name in LIKELY:
            check_documents(engine, tmp_path, benchmark, expected, results)
            continue
        for item, (text,) in zip(benchmark.items, answered(engine, tmp_path, benchmark)):
            row = next(row for key, row in expected.items() if key[:2] == (name, int(item.id)))
            assert text and row["resps"][0][0].startswith(text.rstrip("\ufffd"))
