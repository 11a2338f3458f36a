"""Items, prompts and scoring, each against a plain transformers loop on real models."""

import json

import numpy as np
import pytest
import torch

from merge3.errors import ItemsError
from merge3.tasks import Item, Scorer, read_items, split_heldout
from merge3.tasks.decoder import cut
from merge3.tasks.kinds import KINDS
from merge3.tasks.likelihoods import PlainRows, SharedRows
from merge3.tasks.lm import LM
from merge3.tasks.prompts import Reader
from merge3.tasks.requests import Written, share_prefix
from tests.classifiers import make_classifier


def requests(items, tokenizer):
    """What items ask of a model."""
    return [KINDS[item.kind].request(item, Reader(tokenizer)) for item in items]


def words(rng, count):
    return " ".join(f"w{rng.integers(60)}" for _ in range(count))


def choice_items(prefix_words, count=17):
    rng = np.random.default_rng(prefix_words)
    prefix = words(rng, prefix_words)
    return [
        Item(
            f"c{i}",
            "c",
            "choice",
            f"{prefix} {words(rng, 1 + i % 5)}".strip(),
            int(rng.integers(3)),
            tuple(words(rng, 1 + (i + j) % 3) for j in range(3)),
            "acc_norm" if i % 2 else "acc",
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("prefix_words", [0, 20])
def test_choices_match_a_plain_loop(world, name, prefix_words):
    folder, tokenizer, models = world
    items = choice_items(prefix_words)
    prefix, rest = share_prefix(requests(items, tokenizer))
    assert bool(prefix) == (prefix_words > 0)
    for batch_tokens in (64, 4096):
        expected = dict(PlainRows(prefix, rest, "cpu", torch.float32, batch_tokens)(models[name]))
        found = dict(SharedRows(prefix, rest, "cpu", torch.float32, batch_tokens)(models[name]))
        assert sorted(found) == sorted(expected) == list(range(len(items)))
        for index, likelihoods in found.items():
            assert torch.equal(likelihoods.lengths, expected[index].lengths)
            assert torch.allclose(likelihoods.sums, expected[index].sums.float(), atol=2e-4)
    scorer = Scorer(items, models[name], folder)
    assert type(scorer.asked[0].question) is SharedRows
    right = []
    for i, item in enumerate(items):
        values = expected[i].sums / expected[i].lengths if item.metric == "acc_norm" else expected[i].sums
        right.append(float(values.argmax() == item.answer))
    assert scorer.score(models[name]).tolist() == right


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("prefix_words", [0, 15])
def test_generation_matches_transformers(world, name, prefix_words):
    folder, tokenizer, models = world
    rng = np.random.default_rng(prefix_words)
    prefix = words(rng, prefix_words)
    items = [
        Item(
            f"g{i}",
            "g",
            "generate",
            f"{prefix} {words(rng, 1 + i % 6)}".strip(),
            ("x",),
            metric="exact",
            max_tokens=3 + i % 8,
        )
        for i in range(13)
    ]
    question = LM(models[name], tokenizer, batch_tokens=100).generate(requests(items, tokenizer))
    found = dict(question(models[name]))
    assert len(found) == len(items) and len(question.batches) > 1
    for item, written in ((items[i], w) for i, w in found.items()):
        ids = torch.tensor([tokenizer(item.prompt)["input_ids"]])
        mask = torch.ones_like(ids)
        out = models[name].generate(ids, attention_mask=mask, max_new_tokens=item.max_tokens, do_sample=False)
        new = out[0, ids.shape[1] :]
        assert written.text == tokenizer.decode(new, skip_special_tokens=True)
        assert list(written.tokens) == [token for token in new.tolist() if token != tokenizer.eos_token_id]


def test_generation_stops_at_a_stop_string(world):
    _, tokenizer, models = world

    def written(**more):
        item = Item("g", "g", "generate", "w1 w2", ("x",), metric="exact", max_tokens=12, **more)
        ((_, found),) = LM(models["llama"], tokenizer).generate(requests([item], tokenizer))(models["llama"])
        return found

    whole = written()
    third = whole.text.split()[2]
    stopped = written(stop=(third,))
    assert stopped.text == cut(whole.text, (third,)) != whole.text
    assert stopped.tokens == whole.tokens[: len(stopped.tokens)] and len(stopped.tokens) <= 3


def test_metrics():
    def response(metric, answer, text):
        item = Item("i", "t", "generate", "p", (answer,), metric=metric)
        return KINDS["generate"].response(item, Written(text, ()))

    assert response("exact", "a b", " a b\n") == 1.0 and response("exact", "a", "a b") == 0.0
    assert response("", "a", "a") == 1.0  # the first metric is the default
    assert response("number", "1234.5", "so it is 1,234.50.") == 1.0 and response("number", "4", "4 or 5") == 0.0
    assert response("number", "-3", "= -3") == 1.0 and response("number", "3", "none") == 0.0
    assert response("regex", r"^yes\b", "yes!") == 1.0 and response("regex", r"^yes\b", "yesterday") == 0.0
    with pytest.raises(ItemsError, match="its pattern .* takes more than 1.0 s on 200 characters"):
        response("regex", r"(.*a){25}b", "a" * 200)


def test_text_classification(world, tmp_path):
    folder, tokenizer, _ = world
    names = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    model = make_classifier(3, seed=1, vocabulary=62, **names).eval()
    rng = np.random.default_rng(0)
    items = [Item(f"k{i}", "k", "classify", words(rng, 1 + i % 7), ("a", 1, "c")[i % 3]) for i in range(20)]
    expected = []
    for item in items:
        ids = torch.tensor([tokenizer(item.prompt)["input_ids"]])
        label = item.answer if isinstance(item.answer, int) else names["label2id"][item.answer]
        expected.append(float(model(input_ids=ids).logits.argmax() == label))
    assert Scorer(items, model, folder).score(model).tolist() == expected
    with pytest.raises(ItemsError, match="expected one of a, b, c"):
        Scorer([Item("x", "k", "classify", "w1", "d")], model, folder)
    with pytest.raises(ItemsError, match="kind 'choice' for a LlamaForSequenceClassification"):
        Scorer(choice_items(0, 1), model, folder)


def test_image_classification(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=8,
            patch_size=4,
            num_labels=4,
        )
    ).eval()
    lines, pixels = [], []
    for i in range(6):
        array = np.random.default_rng(i).standard_normal((3, 8, 8)).astype(np.float32)
        np.save(tmp_path / f"{i}.npy", array)
        pixels.append(torch.from_numpy(array))
        lines.append(json.dumps({"kind": "classify", "image": f"{i}.npy", "answer": i % 4}))
    (tmp_path / "items.jsonl").write_text("\n".join(lines))
    expected = model(pixel_values=torch.stack(pixels)).logits.argmax(-1) == torch.arange(6) % 4
    assert (
        Scorer(read_items(tmp_path / "items.jsonl"), model, tmp_path).score(model).tolist()
        == expected.double().tolist()
    )


def test_heldout_split_is_disjoint_stable_and_by_task():
    items = [Item(f"{t}{i}", t, "generate", "p", ("a",)) for t in "ab" for i in range(50)]
    search, heldout = split_heldout(items, 0.3, seed=1)
    assert len(heldout) == 30 and not {i.id for i in search} & {i.id for i in heldout}
    assert split_heldout(list(reversed(items)), 0.3, seed=1)[1] == list(reversed(heldout))
    assert split_heldout(items, 0.3, seed=2)[1] != heldout
    assert split_heldout(items, 0.0, seed=1) == (items, [])
    with pytest.raises(ItemsError, match="task 'a': 1 items, of which a held-out fraction of 0.7 takes 1"):
        split_heldout(items[:1], 0.7, seed=0)
