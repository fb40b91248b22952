"""Packing: many prompts on end give what each gives alone, on every path through attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel

from models.text import attention
from models.text.attention import ReadKeys, packed_attention
from models.text.base_model import layers_of
from models.text.embedding import embed
from models.text.encoder import Encoder
from models.text.lora import Lora
from models.text.lora_dropout import Seeds
from models.text.packing import batches, pack, round_down, round_up
from models.text.prompts import Prompts, prompts, take
from tests.models import tiny
from tests.models.tiny import CPU

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (tiny.llama, {}),
    "bert": (tiny.bert, {}),
    "roberta": (tiny.roberta, {}),
    "both ways": (tiny.llama, {"attention": "both"}),
    "suffix": (tiny.llama, {"suffix_tokens": 3}),
}


@pytest.fixture(params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Encoder:
    base, shape = KINDS[request.param]
    return tiny.encoder(base(tmp_path / "base"), **shape)


def some_prompts(encoder: Encoder, count: int = 9) -> Prompts:
    return prompts(encoder.tokenize(tiny.items(count)), np.arange(count), encoder.limit)[0]


def plain(encoder: Encoder, source: Prompts, pooling: str) -> np.ndarray:
    """The same embeddings from transformers' own attention over one padded batch."""
    model = AutoModel.from_pretrained(encoder.spec.base, attn_implementation="eager", dtype=torch.float32).eval()
    rows = [
        [*encoder.head, *take(source, np.asarray([row])).token_T.tolist(), *encoder.tail] for row in range(len(source.length_B))
    ]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    attended = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    with torch.no_grad():
        hidden = model(input_ids=ids, attention_mask=attended).last_hidden_state
    start = {"mean": len(encoder.head), "mean_all": 0}
    pooled = []
    for row, states in zip(rows, hidden, strict=True):
        end = len(row) - (len(encoder.tail) if pooling == "mean" else 0)
        pooled.append(states[len(row) - 1] if pooling == "last" else states[start[pooling] : end].mean(0))
    return torch.stack(pooled).numpy()


@pytest.mark.parametrize("pooling", ["mean", "last", "mean_all"])
def test_packed_embeddings_equal_the_plain_padded_forward(tmp_path: Path, pooling: str) -> None:
    for name in ("llama", "bert", "roberta"):
        encoder = tiny.encoder(getattr(tiny, name)(tmp_path / name), pooling=pooling)
        source = some_prompts(encoder)
        np.testing.assert_allclose(embed(encoder, source), plain(encoder, source, pooling), atol=1e-4)


def test_a_decoder_shares_its_domain_sentence_and_a_bidirectional_encoder_does_not(tmp_path: Path) -> None:
    decoder, both_ways = tiny.encoder(tiny.llama(tmp_path / "a")), tiny.encoder(tiny.bert(tmp_path / "b"))
    own = some_prompts(decoder)
    assert len(decoder.step(own).token_T) == len(decoder.head) + own.length_B.sum()
    assert decoder.step(own).prefix == len(decoder.head)
    each = len(both_ways.head) + len(both_ways.tail)
    assert len(both_ways.step(own).token_T) == own.length_B.sum() + each * len(own.length_B)


def test_an_items_embedding_does_not_depend_on_its_neighbours_or_the_budget(made: Encoder) -> None:
    source = some_prompts(made, 12)
    together = embed(made, source, budget=10_000)
    np.testing.assert_allclose(embed(made, source, budget=1), together, atol=1e-4)
    np.testing.assert_allclose(embed(made, take(source, np.arange(12)[::-1].copy()), budget=90)[::-1], together, atol=1e-4)


def test_robertas_positions_start_behind_the_padding_index_and_others_at_0(tmp_path: Path) -> None:
    for name, first in (("llama", 0), ("bert", 0), ("roberta", 2)):
        encoder = tiny.encoder(getattr(tiny, name)(tmp_path / name))
        step = encoder.step(some_prompts(encoder, 2))
        length = len(encoder.head) + int(step.length_B[0])
        assert step.position_T[:length].tolist() == list(range(first, first + length))
        # 258 positions of which two are never used
        assert encoder.limit + len(encoder.head) + len(encoder.tail) == 256


def reference(query_THD: Tensor, key_KGD: Tensor, value_KGD: Tensor, q_S1: Tensor, k_S1: Tensor, longest_q: int, longest_k: int,
              *, scale: float, window_size: tuple[int, int], enable_gqa: bool = False) -> Tensor:  # fmt: skip
    """What torch's variable-length attention computes on a GPU: causal from the end where keys outnumber queries."""
    out = torch.zeros_like(query_THD)
    for sequence in range(len(q_S1) - 1):
        q, k, v = (states[start:end].transpose(0, 1) for states, start, end in (
            (query_THD, q_S1[sequence], q_S1[sequence + 1]), (key_KGD, k_S1[sequence], k_S1[sequence + 1]),
            (value_KGD, k_S1[sequence], k_S1[sequence + 1])))  # fmt: skip
        assert q.shape[1] <= longest_q and k.shape[1] <= longest_k
        groups = q.shape[0] // k.shape[0]
        assert enable_gqa == (groups > 1)
        scores = q @ k.repeat_interleave(groups, 0).transpose(1, 2) * scale
        if window_size == (-1, 0):
            ahead = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + k.shape[1] - q.shape[1])
            scores = scores.masked_fill(ahead, float("-inf"))
        out[q_S1[sequence] : q_S1[sequence + 1]] = (scores.softmax(-1) @ v.repeat_interleave(groups, 0)).transpose(0, 1)
    return out


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., Tensor] = reference) -> None:
    """From now on encoders find variable-length attention, and `kernel` computes it."""
    monkeypatch.setattr(attention, "varlen", SimpleNamespace(varlen_attn=kernel))
    monkeypatch.setattr(attention, "OPTIONS", frozenset({"scale", "window_size", "enable_gqa"}))
    monkeypatch.setattr(Encoder, "variable", property(lambda self: True))


@pytest.mark.parametrize("fill", [0, 4, 16])
def test_the_plan_for_variable_length_attention_gives_the_same_embeddings(
    made: Encoder, monkeypatch: pytest.MonkeyPatch, fill: int
) -> None:
    source = some_prompts(made)
    padded = embed(made, source)
    as_on_a_gpu(monkeypatch)
    made.fill = fill
    assert made.step(source).packing.pad_SQ is None
    np.testing.assert_allclose(embed(made, source), padded, atol=1e-4)


class Unset(torch.autograd.Function):
    """FlashAttention's backward leaves the gradient of keys that no sequence reads as the memory was: here NaN."""

    @staticmethod
    def forward(ctx: Any, key_KGD: Tensor, read: int) -> Tensor:
        ctx.read = read
        return key_KGD.view_as(key_KGD)

    @staticmethod
    def backward(ctx: Any, grad_KGD: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        unset = torch.arange(len(grad_KGD))[:, None, None] >= ctx.read
        return grad_KGD.masked_fill(unset, torch.nan), None


@pytest.mark.parametrize("fill", [4, 16])
def test_filler_keys_leave_no_trace_in_the_gradient(made: Encoder, monkeypatch: pytest.MonkeyPatch, fill: int) -> None:
    def kernel(query: Tensor, key: Tensor, value: Tensor, q_S1: Tensor, k_S1: Tensor, *rest: Any, **options: Any) -> Tensor:
        assert int(k_S1[-1]) < len(key) or not made.causal, "the step has no filler keys"
        key, value = (Unset.apply(states, int(k_S1[-1])) for states in (key, value))
        return reference(query, key, value, q_S1, k_S1, *rest, **options)

    source = some_prompts(made)
    weights = [weight for weight in made.parameters() if weight.requires_grad]
    plain = torch.autograd.grad(made(made.step(source)).square().sum(), weights, materialize_grads=True)
    as_on_a_gpu(monkeypatch, kernel)
    made.fill = fill
    filled = torch.autograd.grad(made(made.step(source)).square().sum(), weights, materialize_grads=True)
    for found, wanted in zip(filled, plain, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


def test_filled_steps_have_few_shapes() -> None:
    shapes = set()
    for count in range(20, 200):
        lengths = np.full(count, 9)
        source = Prompts(np.ones(lengths.sum(), dtype=np.int32), lengths)
        step = pack(source, (1, 2), causal=True, device=CPU, variable=True, fill=4)
        assert step.packing.q_S1[-1] == len(step.token_T)
        shapes.add((len(step.token_T), len(step.packing.q_S1)))
    assert len(shapes) <= 26  # of 180 steps


@pytest.mark.parametrize("causal", [True, False])
def test_a_key_gets_its_own_gradient_and_that_of_all_its_copies(causal: bool) -> None:
    source = Prompts(np.ones(9, dtype=np.int32), np.asarray([4, 2, 3]))
    packing = pack(source, (1, 2), causal=causal, device=CPU, variable=True, shared=True, fill=4).packing
    assert packing.key_K is not None
    read = int(packing.k_S1[-1])
    states_TGD = torch.randn(int(packing.q_S1[-1]), 2, 4, generator=torch.Generator().manual_seed(3), requires_grad=True)
    weight_KGD = torch.randn(len(packing.key_K), 2, 4, generator=torch.Generator().manual_seed(4))
    key_KGD = ReadKeys.apply(states_TGD, packing.key_K, packing.own_T, packing.copy_CP)  # type: ignore[no-untyped-call]
    assert torch.equal(key_KGD, states_TGD[packing.key_K])
    weight_KGD[read:] = torch.nan  # of keys that no sequence reads
    (found_TGD,) = torch.autograd.grad(key_KGD, states_TGD, weight_KGD)
    wanted_TGD = torch.zeros_like(states_TGD).index_add(0, packing.key_K[:read], weight_KGD[:read])
    torch.testing.assert_close(found_TGD, wanted_TGD)


@pytest.mark.parametrize("budget", [300, 1000, 4096])
def test_a_filled_up_step_is_no_larger_than_its_budget(made: Encoder, monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    source = some_prompts(made, 200)
    wanted = embed(made, source)
    as_on_a_gpu(monkeypatch)
    made.fill = 4
    sizes, step = [], made.step
    monkeypatch.setattr(made, "step", lambda rows: sizes.append(len((packed := step(rows)).token_T)) or packed)
    np.testing.assert_allclose(embed(made, source, budget=budget), wanted, atol=1e-4)
    assert max(sizes) <= budget and len(sizes) > 1


@pytest.mark.parametrize("budget", [1, 6, 255])
def test_a_budget_below_the_smallest_step_or_the_sentence_itself_still_embeds_all(
    made: Encoder, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    source = some_prompts(made)
    wanted = embed(made, source)
    as_on_a_gpu(monkeypatch)
    made.fill = 16
    assert len(made.head) >= 6
    np.testing.assert_allclose(embed(made, source, budget=budget), wanted, atol=1e-4)


@pytest.mark.parametrize("variable", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_without_a_sentence_there_is_nothing_to_share(causal: bool, variable: bool) -> None:
    source = Prompts(np.arange(1, 10, dtype=np.int32), np.asarray([4, 2, 3]))
    step = pack(source, (), causal=causal, device=CPU, variable=variable, shared=True, fill=4)
    assert step.prefix == 0 and step.end == 9 and step.packing.key_K is None
    assert step.token_T[:9].tolist() == source.token_T.tolist() and step.own_N.tolist() == list(range(9))
    assert step.position_T[:9].tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2]
    assert step.packing.q_S1[:4].tolist() == step.packing.k_S1[:4].tolist() == [0, 4, 6, 9]


@pytest.mark.parametrize("rungs", [4, 16])
@pytest.mark.parametrize("count", [1, 255, 256, 257, 1000, 32782, 233016])
def test_the_rung_below_is_one_that_a_step_is_filled_up_to(count: int, rungs: int) -> None:
    below = round_down(count, 256, rungs)
    assert below == count if count < 256 else (below <= count and round_up(below, 256, rungs) == below)
    assert count < 256 or round_up(below + 1, 256, rungs) > count


@pytest.mark.parametrize("count", [1, 15, 16, 17, 100, 1000, 12345])
def test_a_rung_of_the_ladder_is_at_most_a_quarter_above(count: int) -> None:
    assert max(count, 16) <= round_up(count, 16) <= max(16, 1.25 * count + 4)


def test_steps_hold_every_prompt_once_longest_first_within_the_budget() -> None:
    lengths = np.asarray([5, 30, 7, 7, 12, 100])
    steps = batches(lengths, 40, 1)
    assert sorted(np.concatenate(steps).tolist()) == list(range(6))
    assert steps[0].tolist() == [5]
    assert all(sum(lengths[rows] + 1) <= 40 or len(rows) == 1 for rows in steps)


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        pack(Prompts(np.ones(3, dtype=np.int32), np.asarray([3, 0])), (1,), causal=True, device=CPU, variable=False)


@pytest.mark.parametrize("option", [{"softcap": 30.0}, {"s_aux": torch.zeros(2)}, {"sliding_window": 2}])
def test_models_whose_attention_packing_cannot_do_are_refused(option: dict[str, Any]) -> None:
    step = pack(Prompts(np.ones(6, dtype=np.int32), np.asarray([3, 3])), (1,), causal=True, device=CPU, variable=False)
    states = torch.zeros(1, 2, 7, 4)
    with pytest.raises(ValueError, match="take another"):
        packed_attention(nn.Module(), states, states, states, packing=step.packing, **option)


def test_compiled_layers_share_few_programs_over_all_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = tiny.encoder(tiny.llama(tmp_path / "base", num_hidden_layers=4))
    programs: list[object] = []

    def count(graph: Any, _: Any) -> Any:
        programs.append(graph)
        return graph

    monkeypatch.setattr(attention, "varlen", SimpleNamespace(varlen_attn=torch.ops.llmemb_test.same))
    monkeypatch.setattr(attention, "OPTIONS", frozenset())
    monkeypatch.setattr(Encoder, "variable", property(lambda self: True))
    encoder.fill = 4
    for layer in layers_of(encoder.model):
        layer.compile(backend=count, fullgraph=True)
    source = some_prompts(encoder, 200)
    for budget in (1500, 1000, 700, 2500):
        embed(encoder, source, budget=budget)
    assert 1 <= len(programs) <= 4


def test_compiled_layers_take_floats_as_constants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each layer makes them anew on the host, and C++ is compiled for each: most of the first step's time."""
    monkeypatch.setattr(torch._dynamo.config, "specialize_float", False)
    encoder = tiny.encoder(tiny.llama(tmp_path / "base"), lora=Lora(dropout=0.25))
    Seeds(layers_of(encoder.model), CPU)
    floats: list[object] = []

    def look(graph: Any, _: Any) -> Any:
        floats.extend(node for node in graph.graph.nodes if isinstance(node.meta.get("example_value"), torch.SymFloat))
        graphs.append(graph)
        return graph

    graphs: list[Any] = []
    encoder.round_shapes()
    for layer in layers_of(encoder.model.train()):
        layer.forward = torch.compile(layer.forward, dynamic=True, backend=look)
    encoder(encoder.step(some_prompts(encoder)))
    assert graphs and not floats


@torch.library.custom_op("llmemb_test::same", mutates_args={})
def same(q: Tensor, k: Tensor, v: Tensor, q_S1: Tensor, k_S1: Tensor, longest_q: int, longest_k: int, is_causal: bool) -> Tensor:
    """Stands for the GPU's kernel, as opaque to the compiler."""
    return q.clone()


@same.register_fake
def _(q: Tensor, *rest: Any, **options: Any) -> Tensor:
    return torch.empty_like(q)
