"""The names of the package `superlinear`: arguments, defaults and layout; numbers against `subquad.superlinear_attention`."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import subquad
from subquad import SuperlinearConfig
from subquad.compat import superlinear as compat

_SEARCH = "Q K cache_position attention_mask sw_index {} block_size backward_factor span_power search_power inv_search_power_int"
_PREFILL = (
    "Q1 Q2 K V {} attention_mask sw_index num_spans block_k search_block_q backward_factor forward_factor span_power "
    "search_power inv_search_power_int"
)
_SPANS = (
    "Q2 K V qstart qend cache_position attention_mask sw_index block_k span_len_factor span_power search_power "
    "inv_search_power_int"
)
_DECODE = "Q1 Q2 K V cache_position attention_mask sw_index topk"
# Parameters of superlinear 0.1.0, in its order, without those that only go by keyword; ours may have more after them.
SIGNATURES = {
    "get_search_mask": "cache_position device batch_size attention_mask sw_index",
    "get_search_scores": "Q K qend",
    "get_spans": "Q K cache_position attention_mask sw_index topk",
    "span_search": f"{_SEARCH.format('k')} use_triton",
    "span_search_with_values": _SEARCH.format("k"),
    "span_search_with_values_gqa": _SEARCH.format("k"),
    "span_search_triton": _SEARCH.format("k"),
    "fused_span_attention": _SPANS,
    "fused_span_attention_gqa": _SPANS,
    "prefill": _PREFILL.format("cache_position"),
    "prefill_mha": _PREFILL.format("cache_position"),
    "prefill_gqa": _PREFILL.format("cache_pos"),
    "fused_prefill_with_swtriton_gqa": _PREFILL.format("cache_pos"),
    "fused_prefill_with_swtriton_bucketed_gqa": _PREFILL.format("cache_pos"),
    "fused_prefill_with_swtriton": "Q1 Q2 K V cache_pos attention_mask sw_index topk",
    "decode_span_attention_staged": f"{_DECODE} backward_factor forward_factor",
    "decode_attention": f"{_DECODE} backward_factor forward_factor",
    "decode_span_attention_staged_gqa": (
        f"{_DECODE} enable_gqa block_k backward_factor forward_factor span_power search_power inv_search_power_int force_mode"
    ),
    "decode_attention_gqa": (
        f"{_DECODE} enable_gqa block_k backward_factor forward_factor span_power search_power inv_search_power_int force_mode"
    ),
}
DEFAULTS = {
    "sw_index": 0, "num_spans": 3, "k": 3, "backward_factor": 2.0, "forward_factor": 0.0, "span_power": 0.5,
    "search_power": None, "inv_search_power_int": 2, "attention_mask": None, "cache_pos": None, "cache_position": None,
}  # fmt: skip
README = {"sw_index": 3, "backward_factor": 3.0, "forward_factor": 1.0}


@pytest.fixture(autouse=True)
def _reference() -> Any:
    with subquad.use_backend("reference"):
        yield


@pytest.mark.parametrize("name", SIGNATURES)
def test_parameters_stand_where_the_package_has_them(name: str) -> None:
    parameters = inspect.signature(getattr(compat, name)).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == SIGNATURES[name].split() and name in compat.__all__
    for p in parameters:
        if p.default is not p.empty and p.name in DEFAULTS:
            assert p.default == DEFAULTS[p.name], p.name


def test_every_name_is_there() -> None:
    assert sorted(compat.__all__) == compat.__all__ and all(callable(getattr(compat, name)) for name in compat.__all__)


def drawn(heads: int = 4, kv_heads: int = 2, tokens: int = 40, batch: int = 2) -> list[torch.Tensor]:
    """Q1, Q2, K, V [B, H, L, D]."""
    return [torch.randn(batch, h, tokens, 8) for h in (heads, heads, kv_heads, kv_heads)]


def ours(x: list[torch.Tensor], config: SuperlinearConfig, **options: Any) -> torch.Tensor:
    out = subquad.superlinear_attention(*(y.transpose(1, 2) for y in x), config=config, **options)
    return out.transpose(1, 2)  # type: ignore[union-attr]


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_prompts(kv_heads: int) -> None:
    """All names for the same, whatever the heads are."""
    x, at = drawn(4, kv_heads), torch.arange(40)
    mask = torch.ones(2, 45, dtype=torch.int64)
    mask[1, :13] = 0
    expected = ours(x, SuperlinearConfig(**README, num_spans=2), attention_mask=mask.bool())
    for name in (
        "prefill",
        "prefill_mha",
        "prefill_gqa",
        "fused_prefill_with_swtriton_bucketed_gqa",
        "prefill_bucketed",
    ):
        function = getattr(compat, name)
        assert torch.equal(function(*x, at, mask, 3, 2, 64, 128, 3.0, 1.0), expected), name
        assert torch.equal(function(*x, at, mask, topk=2, **README), expected), name
    by_name = compat.prefill_gqa(*x, cache_position=at, attention_mask=mask, num_spans=2, **README)
    assert torch.equal(by_name, expected)
    factors = {"backward_factor": 3.0, "forward_factor": 1.0}
    found = compat.fused_prefill_with_swtriton(*x, at, mask, 3, 2, sw_block_k=32, use_bf16_pv=False, **factors)
    assert torch.equal(found, expected)
    some = torch.tensor([30, 2, 17])
    rows = compat.prefill(x[0][:, :, some], x[1][:, :, some], *x[2:], some, mask, topk=2, **README)
    torch.testing.assert_close(rows, expected[:, :, some], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize(
    "power", [{}, {"search_power": 0.55, "inv_search_power_int": None, "span_power": 0.55}], ids=str
)
def test_decoding_is_the_row_of_the_prompt(kv_heads: int, power: dict[str, Any]) -> None:
    """With padding of its own in every row and NaN behind the position, where that package differs from itself."""
    x = drawn(4, kv_heads)
    mask = torch.arange(40) >= torch.tensor([[0], [9]])
    factors = {"backward_factor": 3.0, "forward_factor": 1.0}
    whole = compat.prefill(*x, torch.arange(40), mask, 2, **factors, **power)
    for at in (39, 20, 9, 3):
        static = [y.masked_fill(torch.arange(40)[:, None] > at, torch.nan) for y in x[2:]]
        row = [y[:, :, at : at + 1] for y in x[:2]]
        for name in ("decode_attention", "decode_attention_gqa", "decode_span_attention"):
            found = getattr(compat, name)(*row, *static, torch.tensor([at]), mask, 2, 3, **factors, **power)
            torch.testing.assert_close(found, whole[:, :, at : at + 1], atol=1e-6, rtol=1e-6)


def test_search() -> None:
    q, _, k, _ = drawn()
    at, config = torch.arange(40), SuperlinearConfig(sw_index=1, num_spans=2, backward_factor=1.5)
    expected = subquad.span_search(q.transpose(1, 2), k.transpose(1, 2), config=config)
    arguments = {"sw_index": 1, "backward_factor": 1.5}
    for function, count in (
        (compat.span_search, "k"),
        (compat.span_search_with_values_gqa, "k"),
        (compat.get_spans, "topk"),
    ):
        start, anchor, value = function(q, k, at, **{count: 2}, **arguments)
        for found, name in ((start, "start"), (anchor, "anchor"), (value, "score")):
            assert torch.equal(found, getattr(expected, name).transpose(1, 2))
    scores = compat.get_search_scores(q, k, anchor)
    torch.testing.assert_close(scores, value, atol=1e-6, rtol=1e-6)
    end = compat.compute_qend_from_qanchor(anchor, cache_position=at, key_length=40, sw_index=1, forward_factor=0.5)
    ahead = SuperlinearConfig(sw_index=1, num_spans=2, backward_factor=1.5, forward_factor=0.5)
    found = subquad.span_search(q.transpose(1, 2), k.transpose(1, 2), config=ahead).end.transpose(1, 2)
    assert end.dtype is anchor.dtype and torch.equal(end, found)
    assert torch.equal(compat.compute_qend_from_qanchor(anchor.long(), cache_position=at, key_length=40), anchor.long())


def test_search_mask() -> None:
    at = torch.tensor([0, 30, 7, 12])
    keep = torch.ones(2, 35, dtype=torch.bool)
    keep[1, 4] = False
    found = compat.get_search_mask(at, "cpu", 2, keep, 1, kv_length=31)
    assert found.shape == (2, 1, 4, 31) and found.dtype is torch.bool
    for t, p in enumerate(at.tolist()):
        stripes = {p + 1 - i * i for i in range(2, 7)} & set(range(31))
        assert set(found[0, 0, t].nonzero().flatten().tolist()) == stripes
        assert set(found[1, 0, t].nonzero().flatten().tolist()) == stripes - {4}
    assert compat.get_search_mask(at[:2], "cpu").shape == (1, 1, 2, 31)


def test_spans() -> None:
    q, _, k, v = drawn()
    config = SuperlinearConfig(sw_index=2)
    found = subquad.span_search(q.transpose(1, 2), k.transpose(1, 2), config=config)
    expected, _ = subquad.span_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), found.start, found.anchor, config=config
    )
    start, anchor, _ = compat.span_search(q, k, torch.arange(40), sw_index=2)
    for function in (compat.fused_span_attention, compat.span_attention_gqa):
        out = function(q, k, v, start, anchor, torch.arange(40), sw_index=2)
        assert out.shape == (2, 4, 40, 3, 8) and torch.equal(out, expected.transpose(1, 2))


def test_powers() -> None:
    integer, fraction = (
        {"search_power": None, "inv_search_power_int": 3},
        {"search_power": 0.55, "inv_search_power_int": None},
    )
    assert compat.derive_stripe_power_params(**integer) == (3.0, 1 / 3, 3)
    assert compat.derive_stripe_power_params(**fraction) == (1 / 0.55, pytest.approx(0.55), 0)
    assert compat.derive_stripe_power_params(search_power=0.5, inv_search_power_int=None).triton_inv_n == 2
    assert compat.window_len_from_sw_index(65, **fraction) == 2032
    assert [compat.max_stripe_index_for_token_pos(p, **integer) for p in (0, 1, 7, 8, 26, 27)] == [0, 1, 1, 2, 2, 3]
    with pytest.raises(ValueError, match=r"^search_power: expected either"):
        compat.derive_stripe_power_params(search_power=0.5, inv_search_power_int=2)


def test_gradients_reach_everything() -> None:
    x = [y.requires_grad_() for y in drawn()]
    for name in ("prefill", "fused_prefill_with_swtriton_bucketed_gqa", "decode_attention"):
        grads = torch.autograd.grad(getattr(compat, name)(*x, torch.arange(40), sw_index=1).square().sum(), x)
        assert all(g.abs().max() > 0 for g in grads), name
    _, anchor, value = compat.span_search(x[0], x[2], torch.arange(40))
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(value[anchor >= 0].sum(), (x[0], x[2])))


@pytest.mark.parametrize(
    ("call", "message", "kind"),
    [
        (lambda x, at: compat.prefill_gqa(*x), "cache_position: expected it or cache_pos", TypeError),
        (lambda x, at: compat.prefill(x[0][0], *x[1:], at), r"Q1: expected shape \[B, H, L, D\]", ValueError),
        (lambda x, at: compat.prefill(*x[:3], None, at), "V: expected a torch.Tensor", TypeError),
        (lambda x, at: compat.prefill(*x, at, search_power=0.5), "search_power: expected either", ValueError),
        (lambda x, at: compat.prefill(*x, at, topk=9), r"num_spans: expected 1\.\.8", ValueError),
        (lambda x, at: compat.prefill(*x, at + 1), "cache_position: expected numbers", ValueError),
        (lambda x, at: compat.prefill(*x, at, [True]), "attention_mask: expected a torch.Tensor", TypeError),
        (lambda x, at: compat.decode_attention(*x, 3), "cache_position: expected a torch.Tensor", TypeError),
        (lambda x, at: compat.get_search_scores(x[0], x[2], at), "qend: expected 4 dimensions", ValueError),
        (
            lambda x, at: compat.get_search_scores(x[0], x[2], at.expand(2, x[0].shape[1], 1, 40).transpose(2, 3) + 1),
            r"qend: expected numbers below 40, the keys, got 40",
            ValueError,
        ),
        (lambda x, at: compat.get_search_mask(at, "chip"), "device: expected a torch.device", ValueError),
        (
            lambda x, at: compat.fused_prefill_with_swtriton(*x, at, None, 0, 3, key_cache_position=at),
            "key_cache_position: expected None",
            ValueError,
        ),
        (
            lambda x, at: compat.fused_prefill_with_swtriton(*x, at, None, 0, 3, stages=1),
            "stages: expected no",
            TypeError,
        ),
    ],
)
def test_wrong_arguments(call: Any, message: str, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=f"^{message}"):
        call(drawn(), torch.arange(40))
