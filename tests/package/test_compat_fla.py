"""flash-linear-attention's names: arguments and conventions, against recurrences written out here."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import subquad
from subquad.compat import fla

# Parameters of FLA 0.6, in its order; ours may have more after them.
SIGNATURES = {
    "chunk_gla": "q k v g scale initial_state output_final_state state_v_first cu_seqlens cu_seqlens_cpu",
    "fused_recurrent_gla": "q k v gk gv scale initial_state output_final_state reverse state_v_first cu_seqlens",
    "chunk_simple_gla": "q k v g g_gamma scale initial_state output_final_state state_v_first cu_seqlens cu_seqlens_cpu",
    "fused_recurrent_simple_gla": "q k v g g_gamma scale initial_state output_final_state reverse state_v_first cu_seqlens",
    "fused_chunk_simple_gla": "q k v g g_gamma scale initial_state output_final_state cu_seqlens",
    "chunk_linear_attn": "q k v scale initial_state output_final_state normalize cu_seqlens",
    "fused_chunk_linear_attn": "q k v scale initial_state output_final_state normalize cu_seqlens",
    "fused_recurrent_linear_attn": "q k v scale initial_state output_final_state reverse normalize cu_seqlens",
    "causal_conv1d": "x weight bias residual initial_state output_final_state activation backend cu_seqlens cu_seqlens_cpu",
    "causal_conv1d_update": "x cache residual weight bias activation",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_parameters_stand_where_fla_has_them(name: str) -> None:
    function = getattr(fla, name)
    positional = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == SIGNATURES[name].split()
    assert name in fla.__all__


def inputs(*extra: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(2, 11, 3, d, generator=generator) for d in (8, 8, 6, *extra)]


def naive(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, scale: float, s: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """g [B, T, H, K]."""
    outputs = []
    for t in range(q.shape[1]):
        s = s * g[:, t].exp().unsqueeze(-1) + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        outputs.append(scale * (q[:, t].unsqueeze(-1) * s).sum(-2))
    return torch.stack(outputs, 1), s


def test_gla() -> None:
    q, k, v, g = inputs(8)
    s0 = torch.randn(2, 3, 8, 6)
    o, s = naive(q, k, v, -g, 8**-0.5, s0)
    for function in (fla.chunk_gla, fla.fused_recurrent_gla):
        found, state = function(q, k, v, -g, initial_state=s0, output_final_state=True)
        torch.testing.assert_close(found, o)
        torch.testing.assert_close(state, s)
    assert fla.chunk_gla(q, k, v, -g)[1] is None
    found, state = fla.chunk_gla(q, k, v, -g, initial_state=s0.mT, output_final_state=True, state_v_first=True)
    torch.testing.assert_close(found, o)
    torch.testing.assert_close(state, s.mT.contiguous())
    found, state = fla.chunk_gla(q, k, v, -g, None, s0.bfloat16(), True, chunk_size=16)
    o, s = naive(q, k, v, -g, 8**-0.5, s0.bfloat16().float())
    torch.testing.assert_close(found, o)
    torch.testing.assert_close(state, s)


def test_reverse() -> None:
    q, k, v, g = inputs(8)
    s0 = torch.randn(2, 3, 8, 6)
    o, s = naive(*(x.flip(1) for x in (q, k, v, -g)), 0.5, s0)
    options: dict[str, Any] = {"scale": 0.5, "reverse": True, "output_final_state": True}
    found, state = fla.fused_recurrent_gla(q, k, v, -g, initial_state=s0, **options)
    torch.testing.assert_close(found, o.flip(1))
    torch.testing.assert_close(state, s)
    head = -torch.rand(2, 11, 3)
    o, s = naive(*(x.flip(1) for x in (q, k, v, head.unsqueeze(-1).expand(2, 11, 3, 8))), 0.5, s0)
    found, state = fla.fused_recurrent_simple_gla(q, k, v, head, initial_state=s0.mT, state_v_first=True, **options)
    torch.testing.assert_close(found, o.flip(1))
    torch.testing.assert_close(state, s.mT.contiguous())


def test_reverse_of_packed_sequences() -> None:
    """Every sequence as alone, with its own states."""
    q, k, v, g = (x[:1] for x in inputs(8))
    bounds = torch.tensor([0, 4, 4, 11])
    s0, z0 = torch.rand(3, 3, 8, 6), torch.rand(3, 1, 3, 8)
    options: dict[str, Any] = {"reverse": True, "normalize": True, "output_final_state": True}
    o, (s, z) = fla.fused_recurrent_gla(q, k, v, -g, initial_state=(s0, z0), cu_seqlens=bounds, **options)
    for i, (a, b) in enumerate(((0, 4), (4, 4), (4, 11))):
        part = [x[:, a:b] for x in (q, k, v, -g)]
        alone = fla.fused_recurrent_gla(*part, initial_state=(s0[i : i + 1], z0[i : i + 1]), **options)
        torch.testing.assert_close(o[:, a:b], alone[0])
        torch.testing.assert_close(s[i : i + 1], alone[1][0])
        torch.testing.assert_close(z[i : i + 1], alone[1][1])


def test_normalised_gates() -> None:
    """What FLA lacks: the pair of states, or the column of ones that stands for z."""
    q, k, v, g = inputs(8)
    ones = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    s0 = torch.rand(2, 3, 8, 7)
    o, s = naive(q, k, ones, -g, 0.3, s0)
    expected = o[..., :-1] / (o[..., -1:] + 1e-3)
    options: dict[str, Any] = {"scale": 0.3, "output_final_state": True, "normalize": True, "eps": 1e-3}
    pair = s0[..., :-1], s0[..., -1].unsqueeze(1)
    for function in (fla.chunk_gla, fla.fused_recurrent_gla):
        found, state = function(q, k, v, -g, initial_state=s0, **options)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(state, s)
        found, (state, z) = function(q, k, v, -g, initial_state=pair, **options)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(state, s[..., :-1].contiguous())
        torch.testing.assert_close(z, s[..., -1].unsqueeze(1).contiguous())
    head = -torch.rand(2, 11, 3)
    found, (state, z) = fla.chunk_simple_gla(
        q, k, v, head, initial_state=(pair[0].mT, pair[1]), state_v_first=True, **options
    )
    o, s = naive(q, k, ones, head.unsqueeze(-1).expand(2, 11, 3, 8), 0.3, s0)
    torch.testing.assert_close(found, o[..., :-1] / (o[..., -1:] + 1e-3))
    torch.testing.assert_close(state, s[..., :-1].mT.contiguous())
    assert z.shape == (2, 1, 3, 8)


def test_simple_gla() -> None:
    q, k, v = inputs()
    g = -torch.rand(2, 11, 3)
    o, _ = naive(q, k, v, g.unsqueeze(-1).expand(*g.shape, 8), 8**-0.5, torch.zeros(2, 3, 8, 6))
    for function in (fla.chunk_simple_gla, fla.fused_chunk_simple_gla, fla.fused_recurrent_simple_gla):
        torch.testing.assert_close(function(q, k, v, g)[0], o)
    gamma = torch.tensor([-0.1, -0.2, 0.0])
    fixed = gamma.expand(2, 11, 3)
    torch.testing.assert_close(fla.chunk_simple_gla(q, k, v, g_gamma=gamma)[0], fla.chunk_simple_gla(q, k, v, fixed)[0])


def test_linear_attn() -> None:
    q, k, v = inputs()
    scores = torch.einsum("bthk,bshk->bhts", q, k).tril() * 8**-0.5
    expected = torch.einsum("bhts,bshv->bthv", scores / scores.sum(-1, keepdim=True), v)
    o, (s, z) = fla.chunk_linear_attn(q, k, v, output_final_state=True)
    torch.testing.assert_close(o, expected)
    assert s.shape == (2, 3, 8, 6) and z.shape == (2, 1, 3, 8)
    first = fla.chunk_linear_attn(q[:, :4], k[:, :4], v[:, :4], output_final_state=True)
    rest = [x[:, 4:] for x in (q, k, v)]
    second = fla.fused_recurrent_linear_attn(*rest, initial_state=first[1], normalize=True)
    torch.testing.assert_close(torch.cat([first[0], second[0]], 1), o)
    plain = torch.einsum("bhts,bshv->bthv", scores, v)
    torch.testing.assert_close(fla.chunk_linear_attn(q, k, v, normalize=False)[0], plain)
    torch.testing.assert_close(fla.fused_recurrent_linear_attn(q, k, v)[0], plain)  # FLA's default differs here


def test_gradients_reach_the_states() -> None:
    q, k, v = inputs()
    state = [x.bfloat16().requires_grad_() for x in (torch.rand(2, 3, 8, 6), torch.rand(2, 1, 3, 8))]
    o, (s, z) = fla.chunk_linear_attn(q, k, v, initial_state=tuple(state), output_final_state=True)
    grads = torch.autograd.grad(o.sum() + s.sum() + z.sum(), state)
    wide = [x.detach().double().requires_grad_() for x in state]
    o, s = naive(*(x.double() for x in (q, k, torch.cat([v, torch.ones_like(v[..., :1])], -1))),
                 torch.zeros(2, 11, 3, 8, dtype=torch.double), 8**-0.5,
                 torch.cat([wide[0], wide[1].squeeze(1).unsqueeze(-1)], -1))  # fmt: skip
    expected = torch.autograd.grad((o[..., :-1] / (o[..., -1:] + 1e-10)).sum() + s.sum(), wide)
    for a, b in zip(grads, expected, strict=True):
        assert a.dtype is torch.bfloat16
        torch.testing.assert_close(a.double(), b, rtol=1e-2, atol=1e-2)


def test_short_convolution() -> None:
    """States are W wide; prefill and steps make the whole."""
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(shape, generator=generator) for shape in ((2, 9, 5), (5, 4), (5,)))
    r = torch.randn(2, 9, 5, generator=generator)
    whole = subquad.causal_conv1d(x, w, b, residual=r, activation="silu")[0]
    y, cache = fla.causal_conv1d(x[:, :6], w, b, r[:, :6], output_final_state=True, activation="silu", backend="triton")
    assert cache.shape == (2, 5, 4)
    torch.testing.assert_close(y, whole[:, :6])
    more, _ = fla.causal_conv1d(x[:, 6:], w, b, r[:, 6:], initial_state=cache, activation="silu")
    torch.testing.assert_close(more, whole[:, 6:])
    for t in range(6, 9):
        rows = {6: x[:, t], 7: x[:, t : t + 1], 8: x[None, :, t]}[t]
        step, same = fla.causal_conv1d_update(rows, cache, r[:, t].view(rows.shape), w, b, "silu")
        assert same is cache and step.shape == rows.shape
        torch.testing.assert_close(step.view(2, 5), whole[:, t])
    assert torch.equal(cache, x[:, 5:].mT)


def test_what_is_not_supported_says_so() -> None:
    q, k, v, g = inputs(8)
    with pytest.raises(ValueError, match="gv: expected None"):
        fla.fused_recurrent_gla(q, k, v, g, gv=v)
    with pytest.raises(ValueError, match="g_gamma: expected None beside g"):
        fla.chunk_simple_gla(q, k, v, torch.zeros(2, 11, 3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"g_gamma: expected shape \[H\]"):
        fla.chunk_simple_gla(q, k, v, g_gamma=torch.zeros(2, 3))
    with pytest.raises(TypeError, match=r"weight: expected a torch\.Tensor"):
        fla.causal_conv1d_update(torch.zeros(1, 2), torch.zeros(1, 2, 4))
    with pytest.warns(UserWarning, match="head_first is ignored"):
        fla.chunk_gla(q, k, v, -g, head_first=True)
