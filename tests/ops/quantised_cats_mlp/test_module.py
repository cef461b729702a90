"""`QuantisedCATSMLP` and `QuantisedEmbedding`: numbers, bytes, adapters, calibration, what they refuse."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import subquad
from subquad import nn
from subquad.nn.cats_mlp import GatedMLP
from subquad.reference.quantised_linear import FORMATS

pytestmark = pytest.mark.filterwarnings("ignore:.*native kernels are not in use")  # any backend will do
ALL = pytest.mark.parametrize("format", FORMATS)
HIDDEN, NEURONS = 64, 96


class Fused(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = torch.nn.Linear(HIDDEN, 2 * NEURONS)
        self.down_proj = torch.nn.Linear(NEURONS, HIDDEN)
        self.act_fn = torch.nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z, u = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(self.act_fn(z) * u)


def dense(bias: bool = True, seed: int = 0) -> GatedMLP:
    torch.manual_seed(seed)
    gate, up = (torch.nn.Linear(HIDDEN, NEURONS, bias) for _ in range(2))
    return GatedMLP(gate, up, torch.nn.Linear(NEURONS, HIDDEN, bias), "silu").eval()


def rows(tokens: int = 3) -> torch.Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens))


def made(format: str = "int8", **options: Any) -> nn.QuantisedCATSMLP:
    return nn.QuantisedCATSMLP.from_llama_mlp(dense(), weights=format, **options)


def same(a: torch.nn.Module, b: torch.nn.Module, x: torch.Tensor | None = None) -> None:
    x = rows() if x is None else x
    torch.testing.assert_close(a(x), b(x), rtol=1e-4, atol=1e-5)


# --- numbers ----------------------------------------


@ALL
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("tokens", [1, 20])
def test_it_is_cats_of_its_dense_weights(format: str, fused: bool, shared: bool, tokens: int) -> None:
    mlp: torch.nn.Module = Fused() if fused else dense()
    if shared:
        mlp.down_proj = nn.QuantisedLinear.from_linear(mlp.down_proj, format)  # type: ignore[arg-type]
    layer = nn.QuantisedCATSMLP.from_llama_mlp(mlp, weights=format, threshold=0.1)
    assert layer.down_proj.shared == shared and layer.formats == (format, format, format)
    same(layer, nn.CATSMLP.from_llama_mlp(layer.to_dense(), threshold=0.1), rows(tokens))
    assert not torch.allclose(layer(rows(tokens)), layer.to_dense()(rows(tokens)), rtol=1e-3)  # something was skipped


@pytest.mark.parametrize("neurons", [NEURONS, 1056])
def test_codes_of_a_down_projection_are_the_very_numbers(neurons: int) -> None:
    for format in FORMATS:
        linear = nn.QuantisedLinear.from_linear(torch.nn.Linear(neurons, HIDDEN), format)
        down = nn.QuantisedDown.from_linear(linear)
        assert down.scales is not None and down.weight.nbytes + down.scales.nbytes == linear.weight.nbytes
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            assert torch.equal(down.to_dense(dtype).weight, linear.to_linear(dtype).weight)
        assert down.weight.is_contiguous() and down.scales.is_contiguous()
        h, other = (torch.ones(2, 5, neurons, requires_grad=True) for _ in range(2))
        y, want = down(h), linear(other)
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
        y.square().sum().backward()
        want.square().sum().backward()
        torch.testing.assert_close(h.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_a_gate_of_more_bits() -> None:
    layer = made("int4", gate_weights="int8", threshold=0.1)
    assert layer.formats == ("int8", "int4", "int4")
    same(layer, nn.CATSMLP.from_llama_mlp(layer.to_dense(), threshold=0.1))


@ALL
@pytest.mark.parametrize("tokens", [2, 20])
def test_gradients_reach_x_and_biases(format: str, tokens: int) -> None:
    layer = made(format, threshold=0.1)
    other = nn.CATSMLP.from_llama_mlp(layer.to_dense(), threshold=0.1)
    assert sorted(name for name, _ in layer.named_parameters()) == ["down_proj.bias", "gate_proj.bias", "up_proj.bias"]
    found = []
    for mlp in (layer, other):
        x = rows(tokens).requires_grad_()
        mlp(x).square().sum().backward()
        found.append((x.grad, mlp.gate_proj.bias.grad, mlp.up_proj.bias.grad, mlp.down_proj.bias.grad))
        mlp.zero_grad()
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shared", [False, True])
def test_gradient_through_a_called_down_projection(shared: bool) -> None:
    linear = dense().down_proj
    down = nn.QuantisedDown.from_linear(nn.QuantisedLinear.from_linear(linear, "int4") if shared else linear)  # type: ignore[arg-type]
    found = []
    for layer in (down, down.to_dense()):
        h = torch.randn(2, 3, NEURONS, generator=torch.Generator().manual_seed(0)).requires_grad_()
        layer(h).square().sum().backward()
        found.append(h.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


# --- bytes ----------------------------------------

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
}


def _through_torch(layer: Any) -> Any:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _through_state(layer: Any, assign: bool) -> Any:
    other = nn.QuantisedCATSMLP(HIDDEN, NEURONS, bias=True, weights=layer.formats[2], shared=layer.down_proj.shared)
    other.load_state_dict(layer.state_dict(), assign=assign)
    return other


COPIES |= {
    "torch.save": _through_torch,
    "state_dict": lambda layer: _through_state(layer, False),
    "assign": lambda layer: _through_state(layer, True),
    "from_cats": lambda layer: nn.QuantisedCATSMLP.from_cats(layer),
}


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("shared", [False, True])
@ALL
def test_copies_are_the_same_to_the_bit(format: str, copied: str, shared: bool) -> None:
    mlp = dense()
    if shared:
        mlp.down_proj = nn.QuantisedLinear.from_linear(mlp.down_proj, format)  # type: ignore[arg-type]
    layer = nn.QuantisedCATSMLP.from_llama_mlp(mlp, weights=format, threshold=0.07, inclusive=True)
    other = COPIES[copied](layer)
    assert torch.equal(other(rows()), layer(rows())) and other.threshold == layer.threshold and other.inclusive
    assert {k: v.tolist() for k, v in other.state_dict().items()} == {
        k: v.tolist() for k, v in layer.state_dict().items()
    }


def test_safetensors(tmp_path: Path) -> None:
    save = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    layer = made("int4_min", threshold=0.07)
    save.save_model(layer, tmp_path / "x.safetensors")
    other = nn.QuantisedCATSMLP(HIDDEN, NEURONS, bias=True, weights="int4_min")
    save.load_model(other, tmp_path / "x.safetensors", strict=True)
    assert torch.equal(other(rows()), layer(rows()))


@ALL
def test_casts_leave_the_bytes_alone(format: str) -> None:
    layer = made(format, threshold=0.07)
    before = {name: b.clone() for name, b in layer.named_buffers()}
    for cast in (layer.half, layer.bfloat16, lambda: layer.to(torch.float64), lambda: layer.to(torch.bfloat16)):
        cast()
        assert all(b.dtype == before[name].dtype for name, b in layer.named_buffers())
        assert all(torch.equal(b, before[name]) for name, b in layer.named_buffers())
    assert layer.gate_proj.bias.dtype == torch.bfloat16
    y = layer(rows().bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), made(format, threshold=0.07)(rows()), rtol=5e-2, atol=5e-2)


def test_casts_of_everything_leave_bytes_thresholds_and_ties_alone() -> None:
    """As `.type(dtype)` does, which asks no tensor whether it is one of numbers."""
    layer = made(threshold=0.07)
    before, want = {name: b.clone() for name, b in layer.named_buffers()}, layer(rows())
    assert layer.type(torch.float16).gate_proj.bias.dtype == torch.float16
    assert layer(rows().half()).dtype == torch.float16
    layer.type(torch.float32)
    assert all(torch.equal(b, before[name]) and b.dtype == before[name].dtype for name, b in layer.named_buffers())
    torch.testing.assert_close(layer(rows()), want, rtol=1e-2, atol=1e-2)  # biases were in 16 bits
    head = nn.QuantisedLinear.from_linear(torch.nn.Linear(64, 50, False), "int4")
    model = torch.nn.ModuleDict({"head": head, "embed": nn.QuantisedEmbedding.from_bytes(head.weight, format="int4")})
    model.type(torch.bfloat16)
    assert model["head"].weight is model["embed"].weight
    assert model["embed"](torch.tensor([1])).dtype == torch.bfloat16


def test_a_meta_device() -> None:
    layer = nn.QuantisedCATSMLP(HIDDEN, NEURONS, bias=True, weights="int4", device="meta", threshold=0.3)
    assert all(t.is_meta for t in (*layer.parameters(), *layer.buffers()))
    layer.to_empty(device="cpu").load_state_dict(made("int4", threshold=0.07).state_dict())
    assert torch.equal(layer(rows()), made("int4", threshold=0.07)(rows()))
    with torch.device("meta"):
        shell = nn.QuantisedCATSMLP.from_llama_mlp(dense(), weights="int4")
    assert shell.gate_proj.weight.is_meta and shell.gate_proj.weight.shape == layer.gate_proj.weight.shape


@ALL
def test_memory_to_the_byte(format: str) -> None:
    layer = nn.QuantisedCATSMLP.from_llama_mlp(dense(bias=False), weights=format)
    assert layer.original is None
    numbers = 3 * HIDDEN * NEURONS
    own = sum(b.nbytes for name, b in layer.named_buffers() if name.endswith(("weight", "scales")))
    assert own == numbers // 32 * FORMATS[format].group_bytes and not list(layer.parameters())


# --- what stands around it ----------------------------------------


def test_the_threshold_is_that_of_the_quantised_gate() -> None:
    layer = made("int4")
    x = torch.randn(4000, HIDDEN, generator=torch.Generator().manual_seed(5))
    with subquad.CatsCalibrator(layer) as calibrator:
        layer(x)
    calibrator.apply(0.5)
    scores = torch.nn.functional.silu(layer.gate_proj(x)).abs()
    assert 0.48 < (scores <= layer.threshold).float().mean() < 0.52
    (row,) = subquad.sparsity_report(layer, [x[:4], x[4:5]])
    assert row.dense_calls == 0 and row.active_mean is not None and row.tokens == 5
    assert layer.cats_meta[1] == 0.5


def test_share_of_the_bytes_that_is_read() -> None:
    """By hand: 96 neurons, of which three blocks share scales; the gate in 8 bits has 34 of its 34 + 18 + 18 bytes."""
    woken = torch.zeros(NEURONS, dtype=torch.bool)
    woken[[0, 1, 2, 40]] = True
    assert made("int4", gate_weights="int8").share_read(woken) == pytest.approx((34 + 4 / 96 * 36) / 70)
    mlp = dense()
    mlp.down_proj = nn.QuantisedLinear.from_linear(mlp.down_proj, "int4_min")  # type: ignore[arg-type]
    layer = nn.QuantisedCATSMLP.from_llama_mlp(mlp, weights="int4_min")
    assert layer.share_read(woken) == pytest.approx((20 + 4 / 96 * (20 + 16) + 2 / 3 * 4) / 60)
    assert layer.share_read(~torch.zeros(NEURONS, dtype=torch.bool)) == pytest.approx(1.0)
    layer.set_threshold(1e9)
    (row,) = subquad.sparsity_report(layer, [rows(1)])
    assert row.bytes_ratio == pytest.approx(1 / 3)


class Adapter(torch.nn.Module):
    def __init__(self, base: torch.nn.Module) -> None:
        super().__init__()
        self.base_layer, self.low = base, torch.nn.Linear(HIDDEN, NEURONS, False)
        self.in_features, self.out_features = HIDDEN, NEURONS

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.low(x)


@pytest.mark.filterwarnings("ignore:CATSMLP")
def test_adapters_and_hooks_are_called() -> None:
    layer = made("int8", threshold=0.1)
    reference = nn.CATSMLP.from_llama_mlp(layer.to_dense(), threshold=0.1)
    adapter = Adapter(layer.up_proj)
    layer.up_proj = adapter
    reference.up_proj.weight.data += adapter.low.weight
    same(layer, reference)
    assert not layer.reads(rows())
    layer(rows()).sum().backward()
    assert adapter.low.weight.grad is not None and adapter.low.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="up_proj: expected a quantised projection without adapters, got Adapter"):
        layer.to_dense()
    layer = made("int8", threshold=0.1)
    seen: list[torch.Tensor] = []
    layer.down_proj.register_forward_hook(lambda module, args, y: seen.append(y))
    y = layer(rows())
    assert len(seen) == 1
    torch.testing.assert_close(y, made("int8", threshold=0.1)(rows()), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:CATSMLP")
def test_a_dense_projection_among_quantised_ones_is_called() -> None:
    layer = made("int8", threshold=0.1)
    want = layer(rows())
    layer.gate_proj = layer.gate_proj.to_linear()
    torch.testing.assert_close(layer(rows()), want, rtol=1e-4, atol=1e-5)


def test_from_cats_keeps_options_and_threshold() -> None:
    cats = nn.CATSMLP.from_llama_mlp(dense(), inclusive=True, mask_mode="union", max_sparse_tokens=3)
    cats.set_threshold(torch.linspace(0, 0.2, NEURONS), target_sparsity=0.5, calibration_tokens=7)
    layer = nn.QuantisedCATSMLP.from_cats(cats, weights="int8")
    assert torch.equal(layer.threshold, cats.threshold) and torch.equal(layer.cats_meta, cats.cats_meta)
    assert (layer.inclusive, layer.mask_mode, layer.max_sparse_tokens) == (True, "union", 3)
    assert layer.original is None
    assert (layer(rows()) - cats(rows())).norm() < 0.05 * cats(rows()).norm()


# --- what is refused ----------------------------------------


def test_a_dense_checkpoint_is_refused_by_name() -> None:
    layer, before = made(), made().state_dict()
    for assign in (False, True):
        with pytest.raises(
            RuntimeError, match=r"gate_proj.weight: expected uint8 codes of format 'int8', got torch.float32"
        ):
            layer.load_state_dict(dense().state_dict(), strict=False, assign=assign)
        assert torch.equal(layer.gate_proj.weight, before["gate_proj.weight"])
    for format in ("int4", "int4_min"):
        with pytest.raises(RuntimeError, match=r"size mismatch for (gate_proj|up_proj|down_proj).weight"):
            layer.load_state_dict(made(format).state_dict())
    codes = nn.QuantisedLinear(HIDDEN, 68)  # a dense weight of the very shape of its bytes
    with pytest.raises(RuntimeError, match="weight: expected uint8 codes"):
        codes.load_state_dict({"weight": torch.ones(68, 68), "bias": torch.zeros(68)})
    assert not codes.weight.any()


def _with_weight(value: float, name: str = "gate_proj") -> GatedMLP:
    mlp = dense()
    getattr(mlp, name).weight.data[3, 5] = value
    return mlp


WRONG: list[tuple[type[Exception], str, Callable[[], object]]] = [
    (ValueError, "in_features: expected a multiple of 32, got 40", lambda: nn.QuantisedCATSMLP(40, 96)),
    (
        ValueError,
        "in_features: expected a multiple of 32 with shared",
        lambda: nn.QuantisedCATSMLP(64, 40, shared=True),
    ),
    (ValueError, "format: expected one of 'int8'", lambda: nn.QuantisedCATSMLP(64, 96, weights="int2")),
    (ValueError, "mlp.gate_proj: weights: expected one of 'int8'", lambda: made("int9")),
    (ValueError, "mask_mode: expected one of", lambda: made(mask_mode="x")),
    (ValueError, "threshold: expected numbers, got NaN", lambda: made(threshold=float("nan"))),
    (
        ValueError,
        "mlp.gate_proj: weight: expected finite numbers",
        lambda: nn.QuantisedCATSMLP.from_llama_mlp(_with_weight(float("inf"))),
    ),
    (
        ValueError,
        "mlp.down_proj: weight: expected finite numbers",
        lambda: nn.QuantisedCATSMLP.from_llama_mlp(_with_weight(float("nan"), "down_proj")),
    ),
    (
        ValueError,
        "gate_weights: expected None for a fused gate_up_proj",
        lambda: nn.QuantisedCATSMLP.from_llama_mlp(Fused(), weights="int4", gate_weights="int8"),
    ),
    (
        ValueError,
        "mlp.gate_proj: weights: expected 'int8', which the codes are in, got 'int4'",
        lambda: nn.QuantisedCATSMLP.from_cats(made("int8"), weights="int4"),
    ),
    (TypeError, "mlp: expected a CATSMLP, got GatedMLP", lambda: nn.QuantisedCATSMLP.from_cats(dense())),  # type: ignore[arg-type]
    (TypeError, "dtype: expected float32", lambda: made().to_dense(torch.int8)),
    (ValueError, r"h: expected shape \[..., 96\], got \[3, 64\]", lambda: made().down_proj(rows())),
    (ValueError, r"x: expected shape \[..., 64\]", lambda: made()(rows()[:, :32])),
    (ValueError, "embedding_dim: expected a multiple of 32, got 33", lambda: nn.QuantisedEmbedding(4, 33)),
    (
        ValueError,
        "max_norm: expected None",
        lambda: nn.QuantisedEmbedding.from_embedding(torch.nn.Embedding(4, 32, max_norm=1.0)),
    ),
    (
        TypeError,
        "embedding: expected an nn.Embedding",
        lambda: nn.QuantisedEmbedding.from_embedding(torch.nn.Linear(32, 4)),  # type: ignore[arg-type]
    ),
    (
        TypeError,
        "linear: expected an nn.Linear or a QuantisedLinear",
        lambda: nn.QuantisedDown.from_linear(torch.nn.Identity()),  # type: ignore[arg-type]
    ),
]


@pytest.mark.parametrize(("error", "message", "call"), WRONG, ids=[f"{i}-{w[1][:24]}" for i, w in enumerate(WRONG)])
def test_wrong_input(error: type[Exception], message: str, call: Callable[[], object]) -> None:
    with pytest.raises(error, match=message):
        call()


def test_integers_given_as_floats_are_quantised_as_the_numbers_they_are() -> None:
    mlp = dense(bias=False)
    for child in mlp.children():
        child.weight.data = torch.randint(-127, 128, child.weight.shape).float()  # type: ignore[union-attr,operator]
        child.weight.data[:, ::32] = 127.0  # type: ignore[union-attr,index,operator]
    mlp.down_proj.weight.data[::32] = 127.0  # type: ignore[union-attr,index,operator]
    layer = nn.QuantisedCATSMLP.from_llama_mlp(mlp, weights="int8")
    exact = layer.to_dense()
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert torch.equal(getattr(exact, name).weight, getattr(mlp, name).weight)


def test_an_integer_weight_is_refused() -> None:
    linear = torch.nn.Linear(HIDDEN, NEURONS)
    linear.weight = torch.nn.Parameter(torch.ones(NEURONS, HIDDEN, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"weight: expected float32, bfloat16, float16 or float64, got torch.int8"):
        nn.QuantisedLinear.from_linear(linear)


# --- the embedding ----------------------------------------


@ALL
def test_embedding(format: str) -> None:
    embedding = torch.nn.Embedding(50, 64, padding_idx=3, dtype=torch.bfloat16)
    layer = nn.QuantisedEmbedding.from_embedding(embedding, format)
    ids = torch.tensor([[0, 3, 49], [7, 7, 1]])
    exact = subquad.dequantise(layer.weight, format)
    assert torch.equal(layer(ids), exact[ids].bfloat16()) and torch.equal(layer.to_dense()(ids), layer(ids))
    assert torch.equal(layer.to_dense(torch.float32)(ids), exact[ids])
    assert layer.padding_idx == layer.to_dense().padding_idx == 3
    assert torch.equal(layer.float()(ids), exact[ids]) and list(layer.state_dict()) == ["weight"]
    assert layer(ids[:0]).shape == (0, 3, 64)
    with pytest.raises(IndexError):
        layer(torch.tensor([50]))


@pytest.mark.parametrize("how", ["half", "deepcopy", "pickle", "dtype", "device"])
def test_a_tied_embedding_stays_tied(how: str) -> None:
    head = nn.QuantisedLinear.from_linear(torch.nn.Linear(64, 50, False), "int4")
    model = torch.nn.ModuleDict({"head": head, "embed": nn.QuantisedEmbedding.from_bytes(head.weight, format="int4")})
    if how == "deepcopy":
        model = copy.deepcopy(model)
    elif how == "pickle":
        model = pickle.loads(pickle.dumps(model))
    elif how == "half":
        model.half()
    elif how == "dtype":
        model.to(torch.bfloat16)
    else:
        model._apply(lambda t: t.clone())  # as a move to another device makes new tensors
    assert model["head"].weight.data_ptr() == model["embed"].weight.data_ptr()
