"""What `subquad bench` measures weights in few bits against: each library that is there multiplies by the same weights."""

from __future__ import annotations

import pytest
import torch

import subquad
from subquad.bench import quantised_peers
from subquad.reference.quantised_linear import FORMATS
from subquad.testing.spec import Sampler
from subquad.testing.specs.quantised_cats_mlp import draw as draw_cats
from subquad.testing.specs.quantised_linear import draw as draw_linear


@pytest.mark.parametrize("name", quantised_peers.LIBRARIES)
@pytest.mark.parametrize("format", FORMATS)
def test_products_are_those_of_the_dequantised_weights(name: str, format: str) -> None:
    """But for activations in 8 bits, for torch's one scale a row, and for Q4_K, quantised anew."""
    if name.split()[0] in quantised_peers.absent():
        pytest.skip(f"{name} is not installed")
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(64, 256, generator=generator), torch.randn(5, 256, generator=generator)
    data = subquad.quantise(weight, format)
    call = quantised_peers.LIBRARIES[name](data, format)
    if call is None:
        pytest.skip("it has no such format")
    expected = x @ subquad.dequantise(data, format).t()
    bound = 0.06 if name == "ggml Q4_K" else 0.03
    for tokens in (1, 5):  # ggml's repacked rows meet four tokens at a time, and the rest one by one
        assert (call(x[:tokens]).float() - expected[:tokens]).norm() <= bound * expected[:tokens].norm()


@pytest.mark.parametrize("format", FORMATS)
def test_every_case_has_a_peer_and_dense_cats_is_what_they_compute(format: str) -> None:
    linear = draw_linear(Sampler(), "linear", 2, 64, 96, format)
    assert quantised_peers.peers("quantised_linear", linear)
    assert quantised_peers.peers("cats_mlp", linear) == {}
    cats = draw_cats(Sampler(), "cats", 2, 256, 512, format=format, threshold=-1.0)
    args = {name: value for name, value in cats.args.items() if value is not None}
    expected = subquad.quantised_cats_mlp(**args, **cats.kwargs)
    found = quantised_peers.peers("quantised_cats_mlp", cats)
    assert found
    for name, call in found.items():  # in 4 bits the down projection, quantised the other way, is off by 15 %
        bound = 0.05 if format == "int8" else 0.25
        assert (call().float() - expected).norm() <= bound * expected.norm(), name


@pytest.mark.parametrize(
    ("name", "rows", "columns"), [("ggml repacked", 7, 256), ("ggml Q4_K", 7, 256), ("ggml Q4_K", 8, 128)]
)
def test_ggml_is_asked_what_it_takes(name: str, rows: int, columns: int) -> None:
    """Rows by eight, and whole blocks."""
    if "ggml" in quantised_peers.absent():
        pytest.skip("ggml is not installed")
    assert quantised_peers.LIBRARIES[name](subquad.quantise(torch.ones(rows, columns), "int4"), "int4") is None


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised_peers, "find_spec", lambda name: None)
    quantised_peers._ggml_libraries.cache_clear()
    assert quantised_peers.absent() == ["onnxruntime", "ggml"]
    data = subquad.quantise(torch.ones(2, 32), "int8")
    for name in ("onnxruntime", "ggml", "ggml repacked", "ggml Q4_K"):
        assert quantised_peers.LIBRARIES[name](data, "int8") is None
    quantised_peers._ggml_libraries.cache_clear()
