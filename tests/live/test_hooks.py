"""Adapters before a live model's head: which module that is, what they change, that all ways of asking meet them."""

import copy

import pytest
import torch
import torch.nn.functional as F

from merge3 import Pool, Slot
from merge3.errors import BadInput
from merge3.live.hooks import Adapter, adapted, head_of, width_of
from merge3.tasks.forward import logits_at
from merge3.tasks.likelihoods import PlainRows, SharedRows
from merge3.tasks.lm import LM
from merge3.tasks.prompts import load_tokenizer
from merge3.tasks.requests import Choices, Start, share_prefix
from tests.classifiers import make_classifier
from tests.families import FAMILIES, walked

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def random_adapter(width, rank=4, seed=0, size=0.5):
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, width, generator=generator), torch.randn(width, rank, generator=generator)
    return Adapter(down, size * up)


def made(name, config, **settings):
    import transformers

    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**settings)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def llama():
    return made("LlamaForCausalLM", "LlamaConfig", **SMALL, vocab_size=32)


HEADS = [
    ("LlamaForCausalLM", "LlamaConfig", {**SMALL, "vocab_size": 32}, "lm_head"),
    ("LlamaForSequenceClassification", "LlamaConfig", {**SMALL, "vocab_size": 32}, "score"),
    ("GPT2ForSequenceClassification", "GPT2Config", {"n_embd": 16, "n_layer": 1, "n_head": 2}, "score"),
    ("BertForSequenceClassification", "BertConfig", SMALL, "classifier"),
    ("RobertaForSequenceClassification", "RobertaConfig", SMALL, "classifier.out_proj"),
    ("ViTForImageClassification", "ViTConfig", {**SMALL, "image_size": 8, "patch_size": 4}, "classifier"),
    ("T5ForConditionalGeneration", "T5Config", {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1}, "lm_head"),
    (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        "classifier.1",
    ),
]


@pytest.mark.parametrize("name, config, settings, head", HEADS, ids=[row[0] for row in HEADS])
def test_the_head_is_found(name, config, settings, head):
    model = made(name, config, **settings)
    assert head_of(model) is model.get_submodule(head) and width_of(model) == 16


def test_a_model_without_a_head_is_refused():
    with pytest.raises(BadInput, match=r"^surgery: a BertModel without a head; expected a language model or"):
        head_of(made("BertModel", "BertConfig", **SMALL))
    with pytest.raises(BadInput, match=r"^surgery: a ViTForImageClassification without a head"):
        model = made("ViTForImageClassification", "ViTConfig", **SMALL, image_size=8, patch_size=4, num_labels=0)
        head_of(model)


def test_what_the_head_is_given_is_z_minus_u_relu_d_z(llama):
    adapter = random_adapter(16)
    z = llama.model(input_ids=IDS).last_hidden_state
    expected = llama.lm_head(z - F.linear(F.relu(F.linear(z, adapter.down)), adapter.up))
    plain = llama(input_ids=IDS).logits
    with adapted(llama, adapter):
        found = llama(input_ids=IDS).logits
    torch.testing.assert_close(found, expected)
    assert (found - plain).abs().max() > 0.1
    assert torch.equal(llama(input_ids=IDS).logits, plain)  # and it is gone again


@pytest.mark.parametrize("name", walked(name for name, family in FAMILIES.items() if set(family.asks) - {"rank"}))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_family_meets_it_and_one_whose_up_is_zero_changes_no_bit(name, dtype):
    import transformers

    family = FAMILIES[name]
    torch.manual_seed(0)
    try:
        config = transformers.AutoConfig.for_model(family.kind, **family.settings)
        model = getattr(transformers, family.model)(config).eval().requires_grad_(False).to(dtype)
    except (AttributeError, ImportError, KeyError, ValueError) as error:
        pytest.skip(f"transformers cannot build it here: {error}")
    inputs = {key: t.to(dtype) if t.is_floating_point() else t for key, t in family.inputs().items()}
    plain = model(**inputs).logits
    adapter = random_adapter(width_of(model))
    with adapted(model, adapter._replace(up=torch.zeros_like(adapter.up))):
        assert torch.equal(model(**inputs).logits, plain)
    with adapted(model, adapter):
        found = model(**inputs).logits
    assert not torch.equal(found, plain) and found.dtype == plain.dtype and found.shape == plain.shape


def test_it_is_gone_after_an_error(llama):
    plain = llama(input_ids=IDS).logits
    with pytest.raises(RuntimeError, match="on purpose"):
        with adapted(llama, random_adapter(16)):
            raise RuntimeError("on purpose")
    assert torch.equal(llama(input_ids=IDS).logits, plain)


def test_an_adapter_of_another_width_is_refused(llama):
    with pytest.raises(BadInput, match=r"^surgery: an adapter of width 8; expected 16, as the head of this LlamaFor"):
        with adapted(llama, random_adapter(8)):
            pass


def test_it_is_right_before_and_after_places_are_picked(llama):
    """logits_at picks in a hook of its own: adapters work place by place, so the order does not matter."""
    adapter, places = random_adapter(16), torch.tensor([1, 3, 6])
    expected = llama.lm_head(adapter.changed(llama.model(input_ids=IDS).last_hidden_state)).flatten(0, 1)[places]
    with adapted(llama, adapter):  # picks last
        torch.testing.assert_close(logits_at(llama, places, input_ids=IDS), expected)
    pick = llama.lm_head.register_forward_pre_hook(lambda head, given: (given[0].flatten(0, 1)[places][None],))
    try:
        with adapted(llama, adapter):  # picks first
            torch.testing.assert_close(llama(input_ids=IDS).logits[0], expected)
    finally:
        pick.remove()


def without_hooks(model, adapter):
    """The same model with the adapter inside its head, as a module."""

    class Head(torch.nn.Module):
        def __init__(self, head):
            super().__init__()
            self.head, self.weight = head, head.weight

        def forward(self, z):
            return self.head(z - F.linear(F.relu(F.linear(z, adapter.down)), adapter.up))

    found = copy.deepcopy(model)
    found.lm_head = Head(found.lm_head)
    return found


@pytest.fixture(scope="module")
def english(tiny_world):
    """(a live model, its tokenizer)"""
    slot = Slot(Pool.open(str(tiny_world / "base"), [str(tiny_world / "english")]))
    slot.load(str(tiny_world / "english"))
    return slot.model, load_tokenizer(tiny_world / "base")


def test_choices_meet_it_in_shared_and_in_plain_rows(english):
    model, _ = english
    adapter = random_adapter(width_of(model), size=0.05)
    choices = ((20, 21), (22,), (23, 24, 25))
    requests = [Choices((*range(3, 40), 40 + i, 50), choices, greedy=True) for i in range(4)]
    prefix, rest = share_prefix(requests)
    assert prefix
    arguments = (prefix, rest, torch.device("cpu"), torch.float32, 4096)
    expected = dict(PlainRows(*arguments)(without_hooks(model, adapter)))
    plain = dict(PlainRows(*arguments)(model))
    with adapted(model, adapter):
        ways = [dict(PlainRows(*arguments)(model)), dict(SharedRows(*arguments)(model))]
        ways.append(dict(SharedRows(*arguments, once=True)(model)))
        ways.append(dict(LM(model).loglikelihoods(requests)(model)))
    for found in ways:
        for index, one in expected.items():
            torch.testing.assert_close(found[index].sums.double(), one.sums, atol=1e-3, rtol=1e-4)
            assert torch.equal(found[index].greedy, one.greedy)
    assert max(float((plain[i].sums - expected[i].sums).abs().max()) for i in plain) > 0.1


def test_what_is_written_is_written_with_it(english):
    model, tokenizer = english
    adapter = random_adapter(width_of(model), size=0.05)
    for shared in (range(3, 40), range(7, 9)):  # a prefix that is worth sharing, and one that is not
        requests = [Start((*shared, 40 + i), 5) for i in range(3)]
        with adapted(model, adapter):
            found = {i: written.tokens for i, written in LM(model, tokenizer).generate(requests)(model)}
        assert found == {
            i: greedy(without_hooks(model, adapter), request, tokenizer) for i, request in enumerate(requests)
        }
        assert found != {i: greedy(model, request, tokenizer) for i, request in enumerate(requests)}


@torch.no_grad()
def greedy(model, request, tokenizer):
    """A whole forward per token, without any cache."""
    ids = list(request.tokens)
    for _ in range(request.max_tokens):
        token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    return tuple(ids[len(request.tokens) :])


def test_it_stays_before_a_head_that_is_exchanged(tmp_path):
    """Endpoints' heads are copied into the module that the hook is on, also where shapes differ."""
    for i, labels in enumerate((3, 5)):
        make_classifier(labels, seed=i).save_pretrained(tmp_path / f"m{i}")
    slot = Slot(Pool.open(str(tmp_path / "m0"), [str(tmp_path / "m1")]))
    adapter, ids = random_adapter(16), torch.tensor([[3, 4, 5]])
    z = slot.model.model(input_ids=ids).last_hidden_state[:, -1]
    with adapted(slot.model, adapter):
        for model in ("m0", "m1"):
            slot.use_head(str(tmp_path / model))
            expected = adapter.changed(z) @ slot.model.score.weight.T
            torch.testing.assert_close(slot.model(input_ids=ids).logits, expected)
