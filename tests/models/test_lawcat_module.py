"""`LawcatAttention` against its definition in float64, alone: sequences, caches, padding, packing, options, errors."""

from __future__ import annotations

import itertools
from dataclasses import fields
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import subquad
from subquad.nn import LawcatAttention, LawcatCache, LearnedFeatureMap, _lawcat_steps
from subquad.nn._options import LawcatConfig
from subquad.nn._window import window_terms
from subquad.reference.feature_map import KINDS

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "multi-head": {"num_kv_heads": 4},
    "shared": {"share_kv_features": True},
    "untied": {"tie_qk_feature_map": False, "share_qk_conv": True},
    "untied-shared": {"tie_qk_feature_map": False, "share_kv_features": True},
    "scalar": {"gate": "scalar", "gate_rank": None},
    "no-gate": {"gate": "none"},
    "plain": {"normalize": False, "feature_dim": 3},
    "silu": {"qk_activation": "silu", "conv_bias": True, "conv_size": 2},
    "one-tap": {"conv_size": 1},
    "rope": {"rope": "linear"},
    "window": {"window_size": 5},
    "affine": {"window_size": 3, "affine_window": True, "rope": "linear", "share_kv_features": True},
    "before": {"window_size": 5, "linear_covers_window": False, "share_kv_features": True},
    "before-scalar": {"window_size": 3, "linear_covers_window": False, "gate": "scalar", "conv_on_v": True},
    "lolcats": {
        "window_size": 4, "linear_covers_window": False, "linear_scale": 1.0, "rope": "linear", "gate": "none",
        "tie_qk_feature_map": False, "conv_size": 1,
    },
    "values": {"conv_on_v": True, "conv_bias": True, "qk_norm": True},
    "gated": {"use_output_gate": True},
}  # fmt: skip
each_option = pytest.mark.parametrize("name", OPTIONS)


def layer_of(name: str, **more: Any) -> LawcatAttention:
    torch.manual_seed(0)
    layer = LawcatAttention(32, 4, **{"num_kv_heads": 2, "layer_idx": 0, **OPTIONS[name], **more})
    with torch.no_grad():
        for parameter in layer.parameters():  # far from the tame start
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def positions(t: int, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.outer(torch.arange(start, start + t).float(), 0.5 ** torch.arange(4))
    angle = torch.cat([angle, angle], -1)[None]
    return angle.cos(), angle.sin()


def defined(layer: LawcatAttention, x: torch.Tensor) -> torch.Tensor:
    """The layer in float64, token by token, every weight of a past token written out."""
    layer = layer.double()
    t, d = x.shape[1], layer.head_dim
    heads, kv = layer.num_heads, layer.num_kv_heads
    cos, sin = (p.double()[:, :, None, : d // 2] for p in positions(t))
    q, k, v = (p(x.double()).unflatten(-1, (-1, d)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    if layer.q_norm is not None:
        q, k = (
            y * (y.square().mean(-1, True) + 1e-6).rsqrt() * n.weight for y, n in ((q, layer.q_norm), (k, layer.k_norm))
        )

    def rotate(y: torch.Tensor) -> torch.Tensor:
        a, b = y.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    rotated = rotate(q), rotate(k).repeat_interleave(heads // kv, 2)
    if layer.rope == "linear":
        q, k = rotate(q), rotate(k)
    if not layer.share_kv_features:
        k = k.repeat_interleave(heads // kv, 2)

    def convolved(y: torch.Tensor, conv: Any) -> torch.Tensor:
        y = F.pad(y.flatten(2).mT, (conv.kernel_size - 1, 0))
        y = F.conv1d(y, conv.weight, conv.bias, groups=y.shape[1]).mT.unflatten(-1, (-1, d))
        return F.silu(y) if conv.activation else y

    def features(y: torch.Tensor, conv: Any, phi: Any) -> torch.Tensor:
        y = convolved(y, conv)
        weight = phi.layer.repeat_interleave(y.shape[2] // phi.num_heads, 0)
        y = torch.einsum("bthd,hdf->bthf", y, weight)
        return (
            torch.cat([y.softmax(-1), (-y).softmax(-1)], -1).clamp_min(1e-12).repeat_interleave(heads // y.shape[2], 2)
        )

    phi_k = layer.feature_map if layer.feature_map_k is None else layer.feature_map_k
    q, k = features(q, layer.conv_q, layer.feature_map), features(k, layer.conv_k, phi_k)
    v = v if layer.conv_v is None else convolved(v, layer.conv_v)
    v = v.repeat_interleave(heads // kv, 2)
    g = torch.zeros_like(k)
    if layer.gate is not None:
        u = torch.nn.Sequential.forward(layer.gate, x.double()).unflatten(-1, (kv, -1))
        g = (F.logsigmoid(u) / 16).repeat_interleave(heads // kv, 2).expand_as(k)
    out = []
    scale = k.shape[-1] ** -0.5 if layer.linear_scale is None else layer.linear_scale
    for i in range(t):
        seen = i + 1 if layer.linear_covers_window else max(0, i + 1 - layer.window_size)
        passed = (g[:, : i + 1].sum(1, True) - g[:, : i + 1].cumsum(1))[:, :seen].exp()
        weights = scale * torch.einsum("bhk,bjhk->bhj", q[:, i], passed * k[:, :seen])
        near = torch.einsum("bhj,bjhv->bhv", weights, v[:, :seen])
        total = weights.sum(-1, keepdim=True)
        if layer.window_size:
            first = max(0, i - layer.window_size + 1)
            logits = torch.einsum("bhd,bjhd->bhj", rotated[0][:, i], rotated[1][:, first : i + 1]) * d**-0.5
            e = (logits - logits.amax(-1, keepdim=True)).exp()
            w = layer.window_factor.sigmoid()[:, None]
            rest = 1 - w if layer.affine_window else 1
            near = w * torch.einsum("bhj,bjhv->bhv", e, v[:, first : i + 1]) + rest * near
            total = w * e.sum(-1, keepdim=True) + rest * total
        out.append(near / (total + layer.eps) if layer.normalize else near)
    mixed = torch.stack(out, 1)
    if layer.output_gate is not None:
        mixed = mixed * (mixed.square().mean(-1, True) + 1e-5).rsqrt() * layer.output_norm.weight
        mixed = mixed * F.silu(layer.output_gate(x.double())).unflatten(-1, (-1, d))
    return layer.o_proj(mixed.flatten(2))


@each_option
def test_definition(name: str) -> None:
    layer, x = layer_of(name), torch.randn(2, 19, 32)
    got = layer(x, positions(19))[0]
    grads = torch.autograd.grad(got.square().sum(), list(layer.parameters()))
    want = defined(layer, x)
    expected = torch.autograd.grad(want.square().sum(), list(layer.parameters()))
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    for (parameter, _), a, b in zip(layer.named_parameters(), grads, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5 * float(b.abs().max()) + 1e-6, msg=parameter)


@each_option
@pytest.mark.parametrize("lengths", [(19,), (1, 1, 17), (7, 1, 1, 10), (3, 12, 4)])
def test_cache(name: str, lengths: tuple[int, ...]) -> None:
    """Any split into calls gives what one call gives."""
    layer, x = layer_of(name), torch.randn(2, sum(lengths), 32)
    cache, parts, start = LawcatCache(), [], 0
    with torch.no_grad():
        whole = layer(x, positions(x.shape[1]))[0]
        for length in lengths:
            part = x[:, start : start + length]
            parts.append(layer(part, positions(length, start), past_key_values=cache)[0])
            start += length
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=2e-6)
    assert cache.states[0].seen == start


@each_option
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_one_operator_decodes_what_several_do(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """`lawcat_decode_step` against the separate operators: outputs and every state, with a row that is skipped."""
    layer = layer_of(name, clamp_min=-0.06).to(dtype)
    x, mask = torch.randn(3, 9, 32).to(dtype), torch.ones(3, 9)
    mask[1, 7] = 0
    calls = []
    fused = _lawcat_steps.lawcat_decode_step
    monkeypatch.setattr(_lawcat_steps, "lawcat_decode_step", lambda *a, **k: calls.append(1) or fused(*a, **k))
    found = {}
    for apart in (False, True):
        if apart:
            monkeypatch.setattr(layer, "_fuses", lambda: False)
        cache, outputs = LawcatCache(), []
        for first, last in ((0, 5), (5, 6), (6, 7), (7, 8), (8, 9)):
            piece = tuple(p.to(dtype) for p in positions(last - first, first))
            outputs.append(layer.mix(x[:, first:last], piece, mask[:, :last], cache))
        assert len(calls) == (0 if layer.window_size else 4), "the four single tokens go through one operator"
        found[apart] = [torch.cat(outputs, 1), *cache.states[0].tensors().values()]
    for one, two in zip(found[False], found[True], strict=True):
        tolerance = 1e-5 if dtype is torch.float32 else 3e-2
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)


def called(layer: LawcatAttention, x: torch.Tensor) -> torch.Tensor:
    """The layer before `o_proj` as its children make it, each of them called."""

    def features(y: torch.Tensor, conv: Any, phi: Any) -> torch.Tensor:
        y = conv(y)[0].unflatten(-1, (-1, layer.head_dim))
        heads = y.shape[2]
        if getattr(phi, "num_heads", heads) != heads:
            wide = LearnedFeatureMap(
                heads, phi.head_dim, phi.feature_dim, kind=phi.kind, fullspace=phi.fullspace,
                skip_connection=phi.skip_connection, eps=phi.eps,
            )  # fmt: skip
            wide.layer.data = phi.layer.detach().repeat_interleave(heads // phi.num_heads, 0)
            phi = wide
        return phi(y)

    phi_k = layer.feature_map if layer.feature_map_k is None else layer.feature_map_k
    q = features(layer.q_proj(x), layer.conv_q, layer.feature_map)
    k = features(layer.k_proj(x), layer.conv_k, phi_k)
    v = layer.v_proj(x) if layer.conv_v is None else layer.conv_v(layer.v_proj(x))[0]
    g = layer.gate(x) if layer.gate_kind == "scalar" else layer.gate(x).unflatten(-1, (layer.num_kv_heads, -1))
    o = subquad.gated_linear_attention(q, k, v.unflatten(-1, (-1, layer.head_dim)), g, normalize=True, eps=layer.eps)
    return (o[0] if isinstance(o, tuple) else o).flatten(2)


def check_exchanged(layer: LawcatAttention, before: torch.Tensor, x: torch.Tensor) -> None:
    """The exchange counts, and counts alike in sequences, in pieces, and in single steps with a row that is skipped."""
    whole, cache = layer.mix(x), LawcatCache()
    assert not torch.allclose(whole, before, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(whole, called(layer, x), rtol=1e-5, atol=1e-5)
    pieces = [layer.mix(piece, past_key_values=cache) for piece in x.split([4, 1, 1, 2], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-5)
    cache, mask = LawcatCache(), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 1]])
    pieces = [layer.mix(x[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache) for t in range(4)]
    torch.testing.assert_close(torch.cat(pieces, 1)[0], whole[0, :4], rtol=1e-5, atol=1e-5)
    alone = layer.mix(x[1:, [0, 1, 3]])[0]
    torch.testing.assert_close(torch.cat(pieces, 1)[1, [0, 1, 3]], alone, rtol=1e-5, atol=1e-5)


CHANGES: list[dict[str, Any]] = [
    *({"kind": kind} for kind in KINDS if kind != "softmax"), *({"kind": kind, "fullspace": False} for kind in KINDS[:4]),
    {"skip_connection": True}, {"skip_connection": True, "fullspace": False, "kind": "elu1"}, {"eps": 0.3},
]  # fmt: skip


@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: "-".join(map(str, change.values())))
@torch.no_grad()
def test_prefill_is_decoding_with_any_feature_map(change: dict[str, Any], heads: int) -> None:
    layer, x = layer_of("scalar", tie_qk_feature_map=heads > 1), torch.randn(2, 8, 32)
    before = layer.mix(x)
    names = ("feature_map",) if heads > 1 else ("feature_map", "feature_map_k")
    for name in names:
        setattr(layer, name, LearnedFeatureMap(heads, 8, 8, **change))
        getattr(layer, name).layer.add_(0.3 * torch.randn(heads, 8, 8))
    check_exchanged(layer, before, x)


class Elu(torch.nn.Module):
    """A feature map with nothing in common with ours but its call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.elu(3 * x) + 1


class Slower(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -x[..., :16].abs()


class Shifted(torch.nn.Module):
    """A wrapper that changes the call of what it wraps."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return shifted(self.inner(*args, **kwargs))


def shifted(y: Any) -> Any:
    return (shifted(y[0]), *y[1:]) if isinstance(y, tuple) else y + 0.3 * torch.arange(y.shape[-1]).cos()


def wrap(layer: LawcatAttention, name: str) -> None:
    setattr(layer, name, Shifted(getattr(layer, name)))


def hook(layer: LawcatAttention, name: str) -> None:
    getattr(layer, name).register_forward_hook(lambda module, args, y: shifted(y))


def patch(layer: LawcatAttention, name: str) -> None:
    child = getattr(layer, name)
    forward = child.forward
    child.forward = lambda *args, **kwargs: shifted(forward(*args, **kwargs))


CHILDREN = ("q_proj", "k_proj", "v_proj", "conv_q", "conv_k", "conv_v", "feature_map", "gate")


@pytest.mark.parametrize("name", CHILDREN)
@pytest.mark.parametrize("how", [wrap, hook, patch])
@torch.no_grad()
def test_children_are_seen_as_they_are(name: str, how: Any) -> None:
    """A module of another class, a hook, another forward of the object: whatever a call of the child does, counts."""
    layer, x = layer_of("default", conv_on_v=True), torch.randn(2, 8, 32)
    before = layer.mix(x)
    how(layer, name)
    check_exchanged(layer, before, x)


@pytest.mark.parametrize(("name", "other"), [("feature_map", Elu()), ("gate", Slower())])
@torch.no_grad()
def test_feature_maps_and_gates_of_another_class(name: str, other: torch.nn.Module) -> None:
    layer, x = layer_of("default"), torch.randn(2, 8, 32)
    before = layer.mix(x)
    setattr(layer, name, other)
    assert not layer._fuses() and layer_of("default")._fuses()
    check_exchanged(layer, before, x)


@torch.no_grad()
def test_sequences_replace_states() -> None:
    """Whoever holds the tensors of a state goes on to hold the old ones, exchanged convolutions or not."""
    layer, cache = layer_of("default", conv_on_v=True), LawcatCache()
    wrap(layer, "conv_k")
    layer.mix(torch.randn(2, 4, 32), past_key_values=cache)
    held = cache.states[0].tensors()
    before = {name: value.clone() for name, value in held.items()}
    layer.mix(torch.randn(2, 4, 32), past_key_values=cache)
    assert all(torch.equal(value, before[name]) for name, value in held.items())


def test_gradients_with_an_exchanged_feature_map() -> None:
    layer, x = layer_of("scalar"), torch.randn(2, 8, 32)
    layer.feature_map = LearnedFeatureMap(4, 8, 8, skip_connection=True)
    grads = []
    for function in (layer.mix, lambda x: called(layer, x)):
        loss = function(x).square().sum()
        grads.append(torch.autograd.grad(loss, [layer.feature_map.layer, layer.conv_q.weight, layer.k_proj.weight]))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


def test_cache_memory_is_constant() -> None:
    for name in ("default", "window", "before", "values"):
        layer, cache, sizes = layer_of(name), LawcatCache(), set()
        with torch.no_grad():
            for i in range(12):
                layer(torch.randn(2, 1, 32), positions(1, i), past_key_values=cache)
                if i >= 8:
                    sizes.add(sum(x.numel() for x in cache.states[0].tensors().values()))
        assert len(sizes) == 1


MASKS = {
    "left": [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1]],
    "right": [[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]],
    "interior": [[1, 0, 1, 0, 0, 1, 1], [0, 1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1]],
}


@pytest.mark.parametrize("where", MASKS)
@pytest.mark.parametrize("filler", [float("nan"), 1e30])
@pytest.mark.parametrize("name", ["default", "scalar", "shared", "values", "gated"])
def test_padding_changes_nothing(where: str, filler: float, name: str) -> None:
    """Every token has the output it has in its sequence alone; then decoding goes on from the same states."""
    layer, mask = layer_of(name), torch.tensor(MASKS[where])
    x = torch.where(mask.bool()[..., None], torch.randn(3, 7, 32), filler)
    cache = LawcatCache()
    more = torch.randn(3, 1, 32)
    with torch.no_grad():
        got = layer.mix(x, attention_mask=mask, past_key_values=cache)
        before = {name: value.clone() for name, value in cache.states[0].tensors().items()}
        skipping = torch.tensor([[1], [0], [1]])
        step = layer.mix(more, attention_mask=torch.cat([mask, skipping], 1), past_key_values=cache)
        for row in range(3):
            keep = mask[row].bool()
            if not keep.any():
                continue
            alone = LawcatCache()
            want = layer.mix(x[row : row + 1, keep], past_key_values=alone)[0]
            torch.testing.assert_close(got[row, keep], want, rtol=1e-5, atol=1e-6)
            if row == 1:
                assert not step[row].any()
                for field in ("s", "z", "conv_q", "conv_k"):
                    assert torch.equal(getattr(cache.states[0], field)[row], before[field][row])
            else:
                torch.testing.assert_close(step[row], layer.mix(more[row : row + 1], past_key_values=alone)[0])
        assert not got[~mask.bool()].any()


@pytest.mark.parametrize("name", ["window", "affine", "before", "before-scalar"])
def test_padding_of_the_hybrid(name: str) -> None:
    layer, mask = layer_of(name), torch.tensor(MASKS["left"][:2])
    x = torch.where(mask.bool()[..., None], torch.randn(2, 7, 32), float("nan"))
    cos, sin = positions(7)
    shifted = positions(7, -2)
    both = torch.cat([shifted[0], cos]), torch.cat([shifted[1], sin])
    with torch.no_grad():
        got = layer.mix(x, both, mask)
        torch.testing.assert_close(got[0, 2:], layer.mix(x[:1, 2:], positions(5))[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got[1:], layer.mix(x[1:], (cos, sin)), rtol=1e-5, atol=1e-6)


def test_masks_of_four_dimensions() -> None:
    layer, x = layer_of("default"), torch.randn(2, 7, 32)
    tokens = torch.tensor(MASKS["left"][:2])
    causal = torch.ones(7, 7, dtype=torch.bool).tril() & tokens.bool()[:, None, None]
    additive = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)
    with torch.no_grad():
        want = layer.mix(x, attention_mask=tokens)
        assert torch.equal(layer.mix(x, attention_mask=causal), want)
        assert torch.equal(layer.mix(x, attention_mask=additive), want)
        with pytest.raises(ValueError, match="attention_mask: expected a causal mask"):
            layer(x, attention_mask=torch.ones_like(causal))


def test_packed_sequences_equal_separate_ones() -> None:
    layer, x = layer_of("default"), torch.randn(1, 40, 32)
    bounds = [0, 3, 3, 35, 40]
    with torch.no_grad():
        got = layer(x, cu_seqlens=torch.tensor(bounds))[0]
        parts = [layer(x[:, a:b])[0] for a, b in itertools.pairwise(bounds) if b > a]
    torch.testing.assert_close(got, torch.cat(parts, 1), rtol=1e-5, atol=1e-6)


def test_a_cache_with_gradients() -> None:
    """One token after others, with gradients on: the states are not changed in place, and the gradient is that of one call."""
    layer, x = layer_of("default"), torch.randn(2, 6, 32)
    expected = torch.autograd.grad(layer(x)[0][:, -1].square().sum(), layer.conv_k.weight)
    cache = LawcatCache()
    layer(x[:, :-1], past_key_values=cache)
    found = torch.autograd.grad(layer(x[:, -1:], past_key_values=cache)[0].square().sum(), layer.conv_k.weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_beams() -> None:
    """Sequences of a cache can be chosen and repeated, in all of its layers."""
    layer, x, cache = layer_of("default"), torch.randn(3, 6, 32), LawcatCache()
    other = layer_of("default", layer_idx=1)
    rows = torch.tensor([2, 0, 2, 1])
    with torch.no_grad():
        want = [each(x[rows])[0][:, -1:] for each in (layer, other)]
        for each in (layer, other):
            each(x[:, :-1], past_key_values=cache)
        cache.reorder_cache(rows)
        found = [each(x[rows, -1:], past_key_values=cache)[0] for each in (layer, other)]
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("window", "past"), [(1, 0), (4, 0), (4, 3), (4, 9), (50, 2)])
def test_window_terms(window: int, past: int) -> None:
    """Against the whole matrix, gradients through the maximum included."""
    generator = torch.Generator().manual_seed(window)
    t = 11
    q, k, v = (torch.randn(2, n, h, 6, generator=generator) for n, h in ((t, 4), (past + t, 2), (past + t, 2)))
    visible = torch.rand(2, past + t, generator=generator) > 0.3
    tensors = [x.requires_grad_() for x in (q, k, v)]

    def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)
        age = torch.arange(t)[:, None] + past - torch.arange(past + t)
        seen = ((age >= 0) & (age < window))[None, None] & visible[:, None, None]
        logits = (torch.einsum("bqhd,bkhd->bhqk", q, k) * 6**-0.5).masked_fill(~seen, -torch.inf)
        peak = logits.amax(-1, keepdim=True)
        e = (logits - peak.masked_fill(peak == -torch.inf, 0)).exp().masked_fill(~seen, 0)
        return torch.einsum("bhqk,bkhd->bqhd", e, v), e.sum(-1).mT[..., None]

    results, grads = [], []
    for function in (dense, lambda *a: window_terms(*a, window, visible)):
        terms = function(*tensors)
        weights = torch.Generator().manual_seed(1)
        loss = sum((x * torch.randn(x.shape, generator=weights)).sum() for x in terms)
        results.append(terms)
        grads.append(torch.autograd.grad(loss, tensors))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    layer, x = layer_of("default"), torch.randn(2, 33, 32)
    low = layer_of("default").to(dtype)
    with torch.no_grad():
        got = low(x.to(dtype))[0].float()
        for a, b in zip(layer.parameters(), low.parameters(), strict=True):
            a.copy_(b)
        want = layer(x.to(dtype).float())[0]
    assert got.dtype is torch.float32
    assert float((got - want).norm() / want.norm()) < 2e-2


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["default", "scalar"])
def test_compiles_without_a_break(name: str) -> None:
    layer = layer_of(name)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for t in (5, 9, 17):
        x = torch.randn(2, t, 32)
        torch.testing.assert_close(compiled(x)[0], layer(x)[0], rtol=1e-5, atol=1e-6)


def test_state_dict_round_trip() -> None:
    first, second = layer_of("default"), LawcatAttention(32, 4, 2)
    second.load_state_dict(first.state_dict())
    x = torch.randn(1, 5, 32)
    assert torch.equal(first(x)[0], second(x)[0])
    assert not any("original" in name for name in first.state_dict())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_heads": 3, "num_kv_heads": 2, "head_dim": 8}, ValueError, "num_kv_heads: expected a divisor of 3"),
        ({"num_heads": 0}, ValueError, "num_heads: expected at least 1"),
        ({"head_dim": 2.5}, TypeError, "head_dim: expected an int"),
        ({"gate": "tensor"}, ValueError, "gate: expected"),
        ({"rope": "both"}, ValueError, "rope: expected"),
        ({"conv_size": 9}, ValueError, "kernel_size"),
        ({"window_size": -1}, ValueError, "window_size"),
        ({"linear_covers_window": False}, ValueError, "linear_covers_window: expected True without a window"),
        ({"linear_scale": float("nan")}, ValueError, "linear_scale: expected a finite number"),
        ({"window_size": 4, "normalize": False}, ValueError, "window_size: expected 0 with normalize=False"),
        ({"share_qk_conv": True, "share_kv_features": True}, ValueError, "share_qk_conv: expected False"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LawcatAttention(**{"hidden_size": 32, "num_heads": 4, "num_kv_heads": 2} | options)


def test_options_are_those_of_the_config() -> None:
    """Every field of `LawcatConfig` is an option of the constructor; no other is."""
    other: dict[str, Any] = {
        "feature_dim": 3, "conv_size": 2, "conv_bias": True, "qk_activation": "silu", "share_qk_conv": True,
        "conv_on_v": True, "tie_qk_feature_map": False, "gate": "scalar", "gate_rank": 5, "gate_logit_normalizer": 8.0,
        "clamp_min": -0.5, "normalize": False, "eps": 1e-3, "rope": "linear", "window_size": 0, "affine_window": True,
        "linear_covers_window": True, "linear_scale": 0.5, "share_kv_features": False, "use_output_gate": True,
        "feature_init": "kaiming", "keep": 5, "backend": "reference",
    }  # fmt: skip
    assert set(other) == {field.name for field in fields(LawcatConfig)}
    layer, default = LawcatAttention(32, 4, 2, **other), LawcatAttention(32, 4, 2)
    own = ("feature_dim", "normalize", "eps", "rope", "affine_window", "linear_scale", "keep", "backend")
    assert all(getattr(layer, name) == other[name] for name in own)
    assert (layer.gate_kind, layer.gate.normalizer, layer.gate.clamp_min) == ("scalar", 8.0, -0.5)
    assert layer.gate[0].out_features == 5 and layer.feature_map.init == "kaiming" and layer.feature_map_k is not None
    assert layer.conv_q.kernel_size == 2 and layer.conv_q.bias is not None and layer.conv_q.activation == "silu"
    assert layer.conv_v is not None and layer.output_gate is not None and layer.conv_k.weight is layer.conv_q.weight
    assert default.feature_dim == 4 and default.gate_kind == LawcatConfig().gate and default.gate[0].out_features == 16
    with pytest.raises(TypeError, match="'taps'"):
        LawcatAttention(32, 4, 2, taps=3)


class Softmax(torch.nn.Module):
    """An attention of a model, as far as a conversion looks at it."""

    def __init__(self, hidden: int, heads: int, width: int) -> None:
        super().__init__()
        self.head_dim = width
        self.q_proj = torch.nn.Linear(hidden, heads * width)
        self.k_proj, self.v_proj = (torch.nn.Linear(hidden, 2 * width) for _ in range(2))
        self.o_proj = torch.nn.Linear(heads * width, hidden)
        self.q_norm = torch.nn.RMSNorm(width)


class Allocated(TorchDispatchMode):
    """Bytes of every storage that operators make."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            self.storages.setdefault(storage.data_ptr(), storage)  # kept alive, so that no address comes twice
        return result


@pytest.mark.parametrize("options", [{}, {"conv_on_v": True, "use_output_gate": True, "window_size": 4}])
def test_from_attention_allocates_nothing_in_vain(options: dict[str, Any]) -> None:
    attention = Softmax(256, 4, 64).eval()
    attention.q_proj.train()
    with Allocated() as allocated:
        layer = LawcatAttention.from_attention(attention, **options)
    kept = {p.untyped_storage().data_ptr() for p in layer.new_parameters().values()}
    assert kept <= set(allocated.storages)
    vain = [storage.nbytes() for address, storage in allocated.storages.items() if address not in kept]
    assert sum(vain) <= 2 * 4 * 64 * 32  # the start of a feature map, and nothing of the size of a projection
    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm")
    assert all(getattr(layer, name) is getattr(attention, name) for name in parts) and layer.k_norm is None
    assert [n for n, m in layer.named_modules() if m.training] == ["q_proj"]  # each in the mode it was in


def test_bad_calls() -> None:
    x = torch.randn(2, 5, 32)
    layer = layer_of("default", layer_idx=None)
    for arguments, message in (
        ({"past_key_values": LawcatCache()}, "layer_idx: expected the layer's number"),
        ({"past_key_values": object()}, "layer_idx"),
        ({"attention_mask": torch.ones(2, 4)}, "attention_mask: expected shape"),
        ({"attention_mask": torch.ones(2, 1, 4, 5)}, "attention_mask: expected"),
        ({"attention_mask": subquad.IntervalMask.causal(5, 5)}, "another IntervalMask"),
        ({"output_attentions": True}, "output_attentions"),
        ({"cu_seqlens": torch.tensor([0, 5]), "attention_mask": torch.ones(2, 5)}, "cu_seqlens: expected None"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(x, **arguments)
    with pytest.raises(ValueError, match="past_key_values: expected a LawcatCache"):
        layer_of("default")(x, past_key_values=object())
    with pytest.raises(ValueError, match="position_embeddings: expected"):
        layer_of("window")(x)
    with pytest.raises(ValueError, match="original: expected"):
        layer.to_attention()
    with pytest.raises(ValueError, match="attention: expected q_proj"):
        LawcatAttention.from_attention(torch.nn.Linear(2, 2))
