"""The learned feature map as a module."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import subquad
from subquad.nn import LearnedFeatureMap
from subquad.reference.feature_map import KINDS
from subquad.testing import assert_same_bits


@pytest.mark.parametrize("kind", KINDS)
def test_is_the_function_with_its_layer(kind: str) -> None:
    module = LearnedFeatureMap(3, 10, 6, kind=kind, init="kaiming", eps=1e-3)
    x = torch.randn(2, 5, 3, 10)
    assert_same_bits(module(x), subquad.feature_map(x, module.layer, kind=kind, eps=1e-3))
    assert module(x).shape[-1] == module.out_dim == 12
    assert [name for name, _ in module.named_parameters()] == ["layer"] and module.layer.shape == (3, 10, 6)


def test_its_backend_is_the_one_asked_for() -> None:
    """Of the layer's two ways from projections to features, the composed one too."""
    x = torch.randn(1, 2, 3, 10).double()
    assert LearnedFeatureMap(3, 10, 6, backend="reference", dtype=torch.float64)(x).dtype is torch.float64
    with pytest.raises(TypeError, match=r"^x: backend 'native' expected"):
        LearnedFeatureMap(3, 10, 6, backend="native", dtype=torch.float64)(x)
    with pytest.raises(ValueError, match=r"^backend: expected one of"):
        LearnedFeatureMap(3, 10, 6, backend="other")
    layer = subquad.nn.LawcatAttention(16, 2, backend="reference")
    assert layer.feature_map.backend == "reference"


def test_half_space() -> None:
    module = LearnedFeatureMap(3, 10, 6, fullspace=False)
    assert module(torch.randn(1, 2, 3, 10)).shape[-1] == module.out_dim == 6
    assert "fullspace=False" in repr(module)


@pytest.mark.parametrize(("d", "f"), [(8, 4), (4, 8), (6, 6)])
def test_eye_starts_with_the_first_channels(d: int, f: int) -> None:
    x = torch.randn(1, 3, 2, d)
    y = torch.nn.functional.pad(x, (0, max(0, f - d)))[..., :f]
    assert_same_bits(LearnedFeatureMap(2, d, f)(x), subquad.feature_map(y.contiguous(), torch.eye(f).expand(2, f, f)))


def test_kaiming_is_bounded() -> None:
    layer = LearnedFeatureMap(8, 48, 64, init="kaiming").layer
    assert 0.24 < float(layer.abs().max()) <= 0.25 and abs(float(layer.mean())) < 0.01


@pytest.mark.parametrize("init", ["eye", "kaiming"])
def test_skip_connection(init: str) -> None:
    module = LearnedFeatureMap(2, 6, 6, skip_connection=True, init=init)
    x = torch.randn(1, 4, 2, 6)
    y = torch.einsum("bthd,hdf->bthf", x, module.layer.detach()) + x
    torch.testing.assert_close(module(x), subquad.feature_map(y))
    if init == "eye":
        assert not module.layer.count_nonzero()
    module(x).square().sum().backward()
    assert module.layer.grad is not None and bool(module.layer.grad.count_nonzero())


def test_trains() -> None:
    torch.manual_seed(0)
    module, teacher = LearnedFeatureMap(2, 8, 4), LearnedFeatureMap(2, 8, 4, init="kaiming")
    x = torch.randn(2, 32, 2, 8)
    target = teacher(x).detach()
    optimiser = torch.optim.Adam(module.parameters(), 0.05)
    losses = []
    for _ in range(60):
        loss = (module(x) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_dtype_device_and_state() -> None:
    module = LearnedFeatureMap(2, 8, 4, dtype=torch.bfloat16, skip_connection=False)
    assert module(torch.randn(1, 2, 2, 8).bfloat16()).dtype is torch.bfloat16
    assert list(module.state_dict()) == ["layer"]
    meta = LearnedFeatureMap(2, 8, 4, device="meta")
    assert meta.layer.is_meta
    meta.to_empty(device="cpu").reset_parameters()
    assert_same_bits(meta.layer.detach(), LearnedFeatureMap(2, 8, 4).layer.detach())


def test_autocast() -> None:
    module, x = LearnedFeatureMap(2, 8, 4), torch.randn(1, 2, 2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x).dtype is torch.bfloat16


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "heads": ({"num_heads": 0}, ValueError, "num_heads: expected at least 1, got 0"),
    "dim": ({"head_dim": 2.0}, TypeError, "head_dim: expected an int, got float"),
    "feature_dim": ({"feature_dim": True}, TypeError, "feature_dim: expected an int, got bool"),
    "kind": ({"kind": "none"}, ValueError, "kind: expected one of"),
    "init": ({"init": "zeros"}, ValueError, "init: expected one of 'eye', 'kaiming'"),
    "fullspace": ({"fullspace": 0}, TypeError, "fullspace: expected a bool"),
    "hedgehog2": ({"kind": "hedgehog2", "fullspace": False}, ValueError, "fullspace: expected True"),
    "skip": ({"skip_connection": True}, ValueError, "feature_dim: expected 8 as head_dim"),
}


@pytest.mark.parametrize(("changes", "kind", "message"), BAD.values(), ids=BAD)
def test_errors(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{message}"):
        LearnedFeatureMap(**{"num_heads": 2, "head_dim": 8, "feature_dim": 4, **changes})
