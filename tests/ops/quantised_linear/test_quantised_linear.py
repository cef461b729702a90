"""quantised_linear: the generic tests of its spec, the formats, and the module."""

from __future__ import annotations

import pytest
import torch

import subquad
from subquad import nn
from subquad.reference.quantised_linear import FORMATS, pack, unpack
from subquad.testing import Task, generic_tests
from subquad.testing.specs.quantised_linear import SPECS

ALL = pytest.mark.parametrize("format", FORMATS)


@generic_tests(*SPECS)
def test_generic(task: Task, device: str) -> None:
    task.run(device)


def weight_of(rows: int = 40, columns: int = 96, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1


# --- formats ----------------------------------------


@ALL
@pytest.mark.parametrize("size", [1e-9, 1e-6, 1e-3, 1.0, 300.0])
def test_every_weight_is_within_half_a_scale(format: str, size: float) -> None:
    weight = weight_of() * size
    data = subquad.quantise(weight, format)
    _, scale, _ = unpack(data, format)
    error = (subquad.dequantise(data, format, torch.float64) - weight.double()).unflatten(-1, (-1, 32)).abs()
    bound = scale.double().abs().unsqueeze(-1) / 2
    if format == "int4":  # what lies opposite to the largest magnitude has one code less
        groups = weight.double().unflatten(-1, (-1, 32))
        extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
        bound = torch.where((groups * extreme < 0) & (groups.abs() > 7.5 * 2 * bound), 2 * bound, bound)
    if format == "int4_min":
        bound = bound * (1 + 1e-9)
    assert (error <= bound).all()


@ALL
def test_bytes(format: str) -> None:
    """The layout by hand: codes, scales, minima; the low halves of four bits are the first 16 elements."""
    kind = FORMATS[format]
    data = subquad.quantise(weight_of(3, 64), format)
    assert data.shape == (3, 2 * kind.group_bytes) and data.dtype == torch.uint8
    codes, scale, minimum = unpack(data, format)
    row = data[1].tolist()
    for g in range(2):
        group = row[g * kind.code_bytes : (g + 1) * kind.code_bytes]
        by_hand = [c - 256 if c > 127 else c for c in group] if kind.bits == 8 else None
        if kind.bits == 4:
            by_hand = [c & 15 for c in group] + [c >> 4 for c in group]
        assert codes[1, g].tolist() == by_hand
        at = 2 * kind.code_bytes + 2 * g
        assert bytes(row[at : at + 2]) == scale[1, g].numpy().tobytes()
        assert minimum is None or bytes(row[at + 4 : at + 6]) == minimum[1, g].numpy().tobytes()
    packed = data[:, : 2 * kind.code_bytes].unflatten(-1, (2, -1))
    assert torch.equal(pack(packed, scale, minimum), data)


@ALL
@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (300, 1024), (1, 2**19)])
def test_large_weights_are_quantised_in_parts(format: str, shape: tuple[int, int]) -> None:
    weight = weight_of(*shape)
    data = subquad.quantise(weight, format)
    assert torch.equal(data, subquad.reference.quantised_linear.quantise(weight, format)) and data.is_contiguous()
    assert torch.equal(subquad.quantise(weight.t().contiguous().t(), format), data)


@ALL
def test_groups_that_are_all_alike(format: str) -> None:
    for value in (0.0, 0.125, -0.125):
        weight = torch.full((2, 64), value)
        found = subquad.dequantise(subquad.quantise(weight, format), format)
        torch.testing.assert_close(found, weight, rtol=2**-10 if format == "int8" else 0.0, atol=0.0)


@ALL
def test_codes_reach_their_ends_and_no_further(format: str) -> None:
    codes, _, _ = unpack(subquad.quantise(weight_of(200), format), format)
    ends = {"int8": (-127, 127), "int4": (0, 15), "int4_min": (0, 15)}[format]
    assert (int(codes.min()), int(codes.max())) == ends


@ALL
@pytest.mark.parametrize("backend", ["native", "triton", "reference"])
def test_a_foreign_scale(format: str, backend: str) -> None:
    """Codes of -128, scales of zero, of the other sign, infinite or NaN: what a file may hold is what is computed."""
    data = subquad.quantise(weight_of(6, 64), format)
    _, scale, _ = unpack(data, format)
    groups = 2 * FORMATS[format].code_bytes
    data[0, :3] = 0x80
    halves = data[:, groups:].clone().view(torch.float16)
    halves[1, 0], halves[2, 0], halves[3, 1], halves[4, 1] = 0.0, -scale[2, 0], torch.inf, torch.nan
    data[:, groups:] = halves.view(torch.uint8)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    expected = subquad.quantised_linear(x.double(), data, format=format, backend="reference")
    y = subquad.quantised_linear(x, data, format=format, backend=backend)
    assert expected[:, 4].isnan().all() and expected[:, :3].isfinite().all() and expected[:, 5].isfinite().all()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("tokens", range(1, 20))
@ALL
def test_tokens_do_not_depend_on_each_other(format: str, tokens: int) -> None:
    """Up to 16 of them to the bit; beyond, the other path, near. 1056 are whole slices and a rest."""
    data = subquad.quantise(weight_of(45, 1056), format)
    x = torch.randn(tokens, 1056, generator=torch.Generator().manual_seed(tokens))
    together = subquad.quantised_linear(x, data, format=format)
    apart = torch.cat([subquad.quantised_linear(row, data, format=format) for row in x.split(1)])
    if tokens <= 16:
        assert torch.equal(together, apart)
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 3])
@ALL
def test_the_rows_of_an_output_layer(format: str, tokens: int) -> None:
    """So many that a share of them takes several rounds."""
    data = subquad.quantise(weight_of(64 * 272 + 5, 32), format)
    x = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(tokens))
    y = subquad.quantised_linear(x, data, torch.arange(len(data)).float(), format=format)
    expected = x.double() @ subquad.dequantise(data, format, torch.float64).t() + torch.arange(len(data))
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-5)


# --- wrong input ----------------------------------------


def test_wrong_input_is_refused_by_name() -> None:
    weight = weight_of()
    data, x = subquad.quantise(weight, "int8"), torch.randn(2, 96)
    for message, call in {
        r"format: expected one of 'int8', 'int4', 'int4_min', got 'int2'": lambda: subquad.quantise(weight, "int2"),
        r"weight: expected shape \[N, K\] with K a multiple of 32, got \[40, 95\]": lambda: subquad.quantise(
            weight[:, :95], "int8"
        ),
        r"weight: expected finite numbers": lambda: subquad.quantise(weight / 0, "int4"),
        r"weight: expected finite numbers of at most 65504": lambda: subquad.quantise(weight + 7e4, "int4_min"),
        r"weight: expected shape \[N, n \* 18\] for format 'int4', got \[40, 102\]": lambda: subquad.quantised_linear(
            x, data, format="int4"
        ),
        r"x: expected shape \[\.\.\., 96\]": lambda: subquad.quantised_linear(x[:, :64], data, format="int8"),
        r"bias: expected shape \[40\], got \[3\]": lambda: subquad.quantised_linear(
            x, data, torch.zeros(3), format="int8"
        ),
        r"in_features: expected a multiple of 32, got 33": lambda: nn.QuantisedLinear(33, 4),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    for message, call in {
        r"weight: expected a uint8 tensor as `quantise` makes it, got torch.float32": lambda: subquad.quantised_linear(
            x, weight, format="int8"
        ),
        r"weight: expected float32, bfloat16, float16 or float64, got torch.uint8": lambda: subquad.quantise(
            data, "int8"
        ),
        r"dtype: expected float32": lambda: subquad.dequantise(data, "int8", torch.int32),
        r"linear: expected an nn.Linear": lambda: nn.QuantisedLinear.from_linear(torch.nn.Conv1d(1, 1, 1)),  # type: ignore[arg-type]
    }.items():
        with pytest.raises(TypeError, match=message):
            call()


# --- the module ----------------------------------------


@ALL
def test_module_computes_what_its_dense_layer_does(format: str) -> None:
    linear = torch.nn.Linear(96, 40)
    layer = nn.QuantisedLinear.from_linear(linear, format)
    dense = layer.to_linear()
    x = torch.randn(2, 3, 96, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, dense(x), rtol=1e-5, atol=1e-5)
    assert layer.bias is linear.bias and dense.bias is linear.bias
    y.square().sum().backward()
    found = x.grad
    x.grad = None
    dense(x).square().sum().backward()
    torch.testing.assert_close(found, x.grad, rtol=1e-4, atol=1e-4)


@ALL
def test_module_keeps_its_bytes(format: str) -> None:
    layer = nn.QuantisedLinear.from_linear(torch.nn.Linear(64, 8), format)
    before = layer.weight.clone()
    for cast in (layer.half, layer.bfloat16, layer.double, layer.float, lambda: layer.to(torch.float16)):
        cast()
        assert torch.equal(layer.weight, before) and layer.weight.dtype == torch.uint8
    layer.float()
    other = nn.QuantisedLinear(64, 8, format=format)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(1, 64)
    assert torch.equal(other(x), layer(x))
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    dense = torch.nn.Linear(64, 8)
    with pytest.raises(RuntimeError, match="weight: expected uint8 codes"):
        other.load_state_dict(dense.state_dict())


def test_bytes_of_a_weight() -> None:
    """Relative to float32: 34, 18 and 20 bytes for 128."""
    for format, size in {"int8": 34, "int4": 18, "int4_min": 20}.items():
        layer = nn.QuantisedLinear(128, 256, False, format=format)
        assert layer.weight.nbytes == 128 * 256 * size // 32


def test_export_with_any_number_of_rows() -> None:
    layer = nn.QuantisedLinear.from_linear(torch.nn.Linear(64, 40), "int4").requires_grad_(False)
    rows = {"x": {0: torch.export.Dim("rows", min=2)}}
    exported = torch.export.export(layer, (torch.randn(3, 5, 64),), dynamic_shapes=rows)
    x = torch.randn(4, 5, 64)
    assert torch.equal(exported.module()(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@ALL
def test_infinite_weights_are_refused_in_every_dtype(format: str, dtype: torch.dtype) -> None:
    for value in (float("inf"), float("-inf"), float("nan")):
        weight = torch.zeros(2, 32, dtype=dtype)
        weight[1, 3] = value
        with pytest.raises(ValueError, match="weight: expected finite numbers"):
            subquad.quantise(weight, format)
    beyond = torch.zeros(1, 32, dtype=torch.bfloat16)
    beyond[0, 0] = -65536.0
    with pytest.raises(ValueError, match="weight: expected finite numbers of at most 65504"):
        subquad.quantise(beyond, "int4_min")
