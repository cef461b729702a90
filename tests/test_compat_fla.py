"""flash-linear-attention's names: arguments and conventions, against recurrences written out here."""

from __future__ import annotations

import pytest
import torch

from subquad.compat import fla


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


def test_reverse() -> None:
    q, k, v, g = inputs(8)
    o, _ = naive(*(x.flip(1) for x in (q, k, v, -g)), 0.5, torch.zeros(2, 3, 8, 6))
    found, _ = fla.fused_recurrent_gla(q, k, v, -g, scale=0.5, reverse=True)
    torch.testing.assert_close(found, o.flip(1))


def test_simple_gla() -> None:
    q, k, v = inputs()
    g = -torch.rand(2, 11, 3)
    o, _ = naive(q, k, v, g.unsqueeze(-1).expand(*g.shape, 8), 8**-0.5, torch.zeros(2, 3, 8, 6))
    torch.testing.assert_close(fla.chunk_simple_gla(q, k, v, g)[0], o)
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
    second = fla.fused_recurrent_linear_attn(q[:, 4:], k[:, 4:], v[:, 4:], initial_state=first[1])
    torch.testing.assert_close(torch.cat([first[0], second[0]], 1), o)
    torch.testing.assert_close(
        fla.chunk_linear_attn(q, k, v, normalize=False)[0], torch.einsum("bhts,bshv->bthv", scores, v)
    )


def test_what_is_not_supported_says_so() -> None:
    q, k, v, g = inputs(8)
    with pytest.raises(ValueError, match="gv: expected None"):
        fla.fused_recurrent_gla(q, k, v, g, gv=v)
    with pytest.raises(ValueError, match="g_gamma: expected None beside g"):
        fla.chunk_simple_gla(q, k, v, torch.zeros(2, 11, 3), torch.zeros(3))
    with pytest.warns(UserWarning, match="head_first is ignored"):
        fla.chunk_gla(q, k, v, -g, head_first=True)
