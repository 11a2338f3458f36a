"""Rows that read a prefix where it lies answer as rows that have it as tokens of their own."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from merge3.tasks import roomy, writing
from merge3.tasks.likelihoods import PlainRows, SharedRows
from merge3.tasks.lm import LM
from merge3.tasks.prefix import prefix_cache
from merge3.tasks.requests import Choices, Start
from merge3.tasks.shared_prefix import SharedPrefix, Unsupported

SIZES = dict(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, head_dim=8,
    max_position_embeddings=128, initializer_range=0.2,
)  # fmt: skip
PREFIX = tuple(range(3, 17))
ASKED = [
    Choices((5, 9, 2), ((7,), (8, 3, 4), (1, 1)), greedy=True),
    Choices((31,), ((4, 40), (2,), (9, 9, 9, 9)), greedy=True),
    Choices((6, 6, 6, 6, 6, 8), ((11, 12), (13,)), greedy=True),
]


def model(kind, config, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    return kind(config(**(SIZES | changes))).to(dtype).eval()


@pytest.mark.parametrize("dtype,close", [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
@pytest.mark.parametrize(
    "kind,config,groups", [(LlamaForCausalLM, LlamaConfig, 4), (LlamaForCausalLM, LlamaConfig, 2),
                           (Qwen2ForCausalLM, Qwen2Config, 1)],
)  # fmt: skip
def test_as_plain_rows(kind, config, groups, dtype, close):
    live = model(kind, config, dtype, num_key_value_heads=groups)
    how = (PREFIX, ASKED, "cpu", dtype, 4096)
    plain, once = dict(PlainRows(*how)(live)), dict(SharedRows(*how, once=True)(live))
    for index, expected in plain.items():
        assert torch.allclose(once[index].sums, expected.sums.float(), atol=close)
        if dtype == torch.float32:
            assert once[index].greedy.tolist() == expected.greedy.tolist()
    assert live.config._attn_implementation == "sdpa"


def test_weights_that_change_change_the_prefix():
    live = model(LlamaForCausalLM, LlamaConfig)
    question = LM(live).loglikelihoods([Choices((*PREFIX, *r.tokens), r.choices) for r in ASKED])
    assert question.once
    first = dict(question(live))
    with torch.no_grad():
        for p in live.parameters():
            p.mul_(1.3)
    second = dict(question(live))
    expected = dict(PlainRows(question.prefix, [*ASKED], "cpu", torch.float32, 4096)(live))
    for index in expected:
        assert torch.allclose(second[index].sums, expected[index].sums.float(), atol=1e-3)
        assert not torch.allclose(first[index].sums, second[index].sums, atol=1e-3)


def test_attention_of_another_kind_is_noticed_and_answered_otherwise():
    """Gemma 2 bends its scores before the softmax: the parts cannot be put together again."""
    live = model(Gemma2ForCausalLM, Gemma2Config, num_key_value_heads=2, sliding_window=64)
    live.set_attn_implementation("eager")
    with torch.inference_mode():
        once = SharedPrefix(live, prefix_cache(live, PREFIX, "cpu"))
        with pytest.raises(Unsupported, match="softcap"), once.before_rows():
            live(input_ids=torch.tensor([[1, 2]]), attention_mask=torch.zeros(1, 1, 2, 2), use_cache=False)
    assert live.config._attn_implementation == "eager"
    asked = [Choices((*PREFIX, *r.tokens), r.choices) for r in ASKED]
    question = LM(live).loglikelihoods(asked)
    assert not getattr(question, "once", False)
    found, expected = dict(question(live)), dict(PlainRows((), asked, "cpu", torch.float32, 4096)(live))
    for index in expected:
        assert torch.allclose(found[index].sums, expected[index].sums.float(), atol=1e-3)


def test_continuations_read_the_prefix_where_it_lies():
    live = model(LlamaForCausalLM, LlamaConfig, num_key_value_heads=2)
    asked = [Start((*PREFIX, *tokens), 3 + at) for at, tokens in enumerate([(5, 9, 2), (31,), (6, 6, 6, 6, 8)])]
    question = writing.continuations(live, asked, _Words(), frozenset(), "cpu", 4096)
    assert question.prefix == PREFIX and writing._ONCE[live]
    for at, written in question(live):
        ids = torch.tensor([asked[at].tokens])
        expected = live.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3 + at, do_sample=False)
        assert list(written.tokens) == expected[0, ids.shape[1] :].tolist()


class _Words:
    def decode(self, tokens, skip_special_tokens=True):
        return " ".join(map(str, tokens))


def test_room_grows_where_answers_are_long(monkeypatch):
    live = model(LlamaForCausalLM, LlamaConfig)
    asked = [Start((*PREFIX, *tokens), 25 + at) for at, tokens in enumerate([(5, 9, 2), (31,)])]
    ample = {at: w.tokens for at, w in writing.continuations(live, asked, _Words(), frozenset(), "cpu", 4096)(live)}
    moved = []
    grow = roomy.RoomyLayer._move
    monkeypatch.setattr(roomy, "STEP", 2)
    counted = lambda self, rows, room: (moved.append(room), grow(self, rows, room))
    monkeypatch.setattr(roomy.RoomyLayer, "_move", counted)
    scant = {at: w.tokens for at, w in writing.continuations(live, asked, _Words(), frozenset(), "cpu", 4096)(live)}
    assert scant == ample and len(set(moved)) > 1


def test_rows_that_bring_copies_of_a_prefix_are_few_enough_for_their_keys(monkeypatch):
    """On a GPU; of a device without storage here, as only batches are looked at."""
    live = model(LlamaForCausalLM, LlamaConfig)
    with torch.inference_mode():
        cache = live(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert roomy.token_bytes(live) == held // 3
    asked = [Start((*PREFIX, *range(4, 4 + n)), 3) for n in (1, 2, 3, 4, 5, 6)]
    monkeypatch.setattr(writing, "_reads_once", lambda *_: False)
    monkeypatch.setattr(writing, "KEPT", 2 * roomy.token_bytes(live) * (len(PREFIX) + 9))
    sizes = lambda device: [
        len(batch) for batch, _ in writing.continuations(live, asked, _Words(), frozenset(), device, 4096).batches
    ]
    assert sizes("cpu") == [6] and sizes("meta") == [2, 2, 2]


def test_what_is_prepared_grows_with_the_tokens_asked_not_with_their_squares():
    """A benchmark's prompts are all prepared before the first is asked: masks of theirs would be gigabytes."""
    asked = [Choices((*range(1, 40),) * 20, ((1, 2), (3, 4))) for _ in range(40)]
    rows = SharedRows((), asked, "cpu", torch.float32, 4096)
    held = 0
    for batch in rows.batches:
        tensors = [*batch.inputs.values(), *(value for value in vars(batch).values() if torch.is_tensor(value))]
        held += sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    assert held < 32 * sum(len(request.tokens) for request in asked)


def test_what_greedy_decoding_writes_is_known_as_such():
    """The likeliest token after a prompt, two of them, and the same with another last one."""
    live = model(LlamaForCausalLM, LlamaConfig)
    prompt = (*PREFIX, 5, 9)
    ids = torch.tensor([prompt])
    first, second = live.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False, eos_token_id=None
    )[0, -2:].tolist()
    asked = [Choices(prompt, ((first,), (first, second), (first, (second + 1) % 50), ((first + 1) % 50,)), greedy=True)]
    for rows in (PlainRows((), asked, "cpu", torch.float32, 4096), SharedRows((), asked, "cpu", torch.float32, 4096)):
        assert dict(rows(live))[0].greedy.tolist() == [True, True, False, False]
    rest = [Choices(prompt[len(PREFIX) :], asked[0].choices, greedy=True)]
    once = SharedRows(PREFIX, rest, "cpu", torch.float32, 4096, once=True)
    assert dict(once(live))[0].greedy.tolist() == [True, True, False, False]
