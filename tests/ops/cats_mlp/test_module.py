"""CATSMLP as a module: weights shared, state dicts, dtypes, layouts, copies."""

from __future__ import annotations

import copy
import functools
import pickle
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import subquad
from subquad.nn import CATSMLP, dense_state_dict
from subquad.nn._gated import activation_name
from subquad.nn._options import CatsConfig
from subquad.nn.cats_mlp import GatedMLP
from subquad.reference.cats_mlp import cats_mlp as oracle

pytestmark = pytest.mark.filterwarnings("ignore:.*native kernels are not in use")  # any backend will do

H, I = 24, 80  # noqa: E741
LAYOUTS = ("auto", "strided", "keep")


class Config:
    pretraining_tp = 1


class Dense(nn.Module):
    """A gated MLP as model libraries write it."""

    def __init__(self, bias: bool = False, act: object = None, hidden: int = H, neurons: int = I) -> None:
        super().__init__()
        self.config = Config()
        self.gate_proj = nn.Linear(hidden, neurons, bias)
        self.up_proj = nn.Linear(hidden, neurons, bias)
        self.down_proj = nn.Linear(neurons, hidden, bias)
        self.act_fn = nn.SiLU() if act is None else act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Fused(nn.Module):
    """The same with gate and up in one projection."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(H, 2 * I, bias)
        self.down_proj = nn.Linear(I, H, bias)
        self.activation_fn = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * self.activation_fn(gate))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def dense() -> Dense:
    return Dense()


def expected(mlp: nn.Module, x: torch.Tensor, threshold: float, activation: str = "silu") -> torch.Tensor:
    """float64 oracle on the dense module's own weights."""
    if hasattr(mlp, "gate_up_proj"):
        (wg, wu), bias = mlp.gate_up_proj.weight.chunk(2), mlp.gate_up_proj.bias
        bg, bu = (None, None) if bias is None else bias.chunk(2)
    else:
        wg, wu, bg, bu = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.gate_proj.bias, mlp.up_proj.bias
    down = mlp.down_proj
    wide = [None if t is None else t.detach().double() for t in (x, wg, wu, down.weight, bg, bu, down.bias)]
    t = torch.tensor(threshold, dtype=torch.float64)
    return oracle(*wide[:4], t, b_gate=wide[4], b_up=wide[5], b_down=wide[6], activation=activation)


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return ((got.double() - want.double()).norm() <= tolerance * want.double().norm()).item()


# --- conversion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [Dense, Fused])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_forward_equals_oracle(kind: type, bias: bool, layout: str, tokens: int) -> None:
    mlp = kind(bias)
    x = torch.randn(tokens, H)
    want, want_dense = expected(mlp, x, 0.05), mlp(x)
    module = CATSMLP.from_llama_mlp(mlp, threshold=0.05, down_layout=layout)
    with torch.no_grad():
        assert close(module(x), want)
        assert close(module(x.view(tokens, 1, H)), want.view(tokens, 1, H))
        module.enabled = False
        assert close(module(x), want_dense)
    assert not close(want_dense, want, 1e-3)


@pytest.mark.parametrize("kind", [Dense, Fused])
def test_shares_the_linear_objects(kind: type) -> None:
    mlp = kind()
    children, parameters = dict(mlp.named_children()), dict(mlp.named_parameters())
    module = CATSMLP.from_llama_mlp(mlp)
    assert {name: child for name, child in children.items() if isinstance(child, nn.Linear)} == dict(
        module.named_children()
    )
    assert [id(p) for p in parameters.values()] == [id(p) for p in module.parameters()]
    assert list(parameters) == [name for name, _ in module.named_parameters()]
    if kind is Fused:
        x = torch.randn(3, H)
        assert torch.equal(module.gate(x), mlp.gate_up_proj(x)[:, :I])


def test_can_leave_the_original_alone(dense: Dense) -> None:
    module = CATSMLP.from_llama_mlp(dense, share_weights=False)
    assert dense.down_proj.weight.is_contiguous()
    with torch.no_grad():
        module.gate_proj.weight.zero_()
    assert dense.gate_proj.weight.abs().sum() > 0
    assert module.to_dense() is not dense


@pytest.mark.parametrize(
    "act, name",
    [
        (nn.SiLU(), "silu"),
        (F.silu, "silu"),
        ("swish", "silu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (F.gelu, "gelu"),
        (functools.partial(F.gelu, approximate="tanh"), "gelu_tanh"),
        (nn.ReLU(), "relu"),
        (F.relu, "relu"),
    ],
)
def test_activations_are_recognised(act: object, name: str) -> None:
    assert activation_name(act) == name
    mlp = Dense(act=act if not isinstance(act, str) else F.silu)
    x = torch.randn(3, H)
    module = CATSMLP.from_llama_mlp(mlp, threshold=0.02)
    with torch.no_grad():
        assert module.activation == name and close(module(x), expected(mlp, x, 0.02, name))


def test_transformers_activations_are_recognised() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.activations import ACT2FN

    known = {"silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
    x = torch.linspace(-4, 4, 100, dtype=torch.float64)
    for theirs, ours in known.items():
        assert activation_name(ACT2FN[theirs]) == ours
        torch.testing.assert_close(ACT2FN[theirs](x), subquad.reference.cats_activation.activate(x, ours))
    for other in ("quick_gelu", "relu2", "mish", "gelu_10"):
        with pytest.raises(ValueError, match="activation: expected"):
            activation_name(ACT2FN[other])


def reject(mlp: nn.Module, match: str, **options: object) -> None:
    before = {name: (p, p.data_ptr(), p.stride()) for name, p in mlp.named_parameters()}
    with pytest.raises(ValueError, match=match):
        CATSMLP.from_llama_mlp(mlp, **options)
    assert all((p, p.data_ptr(), p.stride()) == before[name] for name, p in mlp.named_parameters())


def test_rejects_what_it_cannot_represent() -> None:
    class Scaled(Dense):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0.5 * super().forward(x)

    mlp = Dense()
    mlp.up_proj = nn.Sequential(mlp.up_proj)
    reject(mlp, r"mlp.up_proj: expected a linear map with in_features and out_features, got Sequential")
    mlp = Dense()
    mlp.config = type("C", (), {"pretraining_tp": 2})()
    reject(mlp, "pretraining_tp: expected 1, got 2")
    reject(Scaled(), "Scaled does not compute")
    reject(Dense(act=nn.Tanh()), "activation: expected .* got Tanh")
    mlp = Dense()
    mlp.gate_proj.weight.data = mlp.gate_proj.weight.data.to(torch.complex64)
    reject(mlp, r"mlp.gate_proj.weight: expected .* torch.complex64")
    mlp = Dense()
    mlp.up_proj = nn.Linear(H, I + 1, bias=False)
    reject(mlp, r"mlp.up_proj.weight: expected shape \(80, 24\)")
    mlp = Dense()
    mlp.up_proj.half()
    reject(mlp, r"mlp.up_proj.weight: expected torch.float32")
    reject(nn.Linear(3, 3), "expected a module with gate_proj")


@pytest.mark.parametrize(
    "options, match",
    [
        ({"mask_mode": "row"}, "mask_mode: expected"),
        ({"prefill": "sparse"}, "prefill: expected"),
        ({"grad": "none"}, "grad: expected"),
        ({"down_layout": "copy"}, "down_layout: expected one of 'auto', 'strided', 'keep', got 'copy'"),
        ({"backend": "cuda"}, "backend: expected"),
        ({"max_sparse_tokens": 17}, "max_sparse_tokens: expected 0 to 16, got 17"),
        ({"threshold": float("nan")}, "threshold: expected numbers, got NaN"),
        ({"threshold": torch.zeros(3)}, r"threshold: expected shape \[\] or \[80\], got \[3\]"),
    ],
)
def test_rejects_bad_options(options: dict[str, object], match: str) -> None:
    reject(Dense(), match, **options)
    with pytest.raises(ValueError, match=match):
        CATSMLP(H, I, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_to_dense_gives_the_original_back(dense: Dense, layout: str) -> None:
    x = torch.randn(4, H)
    want, parameters = dense(x), [(id(p), p.stride(), p.clone()) for p in dense.parameters()]
    module = CATSMLP.from_llama_mlp(dense, threshold=0.1, down_layout=layout).eval()
    back = module.to_dense()
    assert back is dense and not back.training
    assert all(
        (id(p), p.stride()) == (i, s) and torch.equal(p, v)
        for p, (i, s, v) in zip(back.parameters(), parameters, strict=True)
    )
    assert torch.equal(back(x), want)


def test_to_dense_gives_any_layout_back(dense: Dense) -> None:
    """A weight that is a part of a wider buffer has its strides again; one of another shape is contiguous."""
    weight = dense.down_proj.weight
    weight.data = torch.randn(H, I + 8)[:, :I]
    values, strides = weight.clone(), weight.stride()
    module = CATSMLP.from_llama_mlp(dense)
    assert weight.stride() == (1, H)
    module.to_dense()
    assert weight.stride() == strides and torch.equal(weight, values)
    module.lay_out()
    weight.data = torch.randn(I, H)[:, :5].t()
    module.restore_layout()
    assert weight.shape == (5, I) and weight.is_contiguous()


def test_options_are_those_of_the_config(dense: Dense) -> None:
    """Every field of `CatsConfig` is an option of both constructors, under the same name, and takes effect."""
    other = {
        "threshold": 0.5, "inclusive": True, "mask_mode": "union", "prefill": "dense", "max_sparse_tokens": 3,
        "grad": "ste", "backend": "reference", "down_layout": "keep",
    }  # fmt: skip
    assert set(other) == {field.name for field in fields(CatsConfig)}
    for module in (CATSMLP(H, I, **other), CATSMLP.from_llama_mlp(dense, **other)):
        assert {name: getattr(module, name) for name in other} == other
    plain = CATSMLP(H, I)
    assert all(getattr(plain, f.name) == f.default for f in fields(CatsConfig) if f.name != "threshold")
    for make in (lambda: CATSMLP(H, I, layout="keep"), lambda: CATSMLP.from_llama_mlp(dense, layout="keep")):
        with pytest.raises(TypeError, match="'layout'"):
            make()


def test_to_dense_follows_replaced_children(dense: Dense) -> None:
    module = CATSMLP.from_llama_mlp(dense)
    module.gate_proj = nn.Linear(H, I, bias=False)
    assert module.to_dense().gate_proj is module.gate_proj


def test_to_dense_of_a_constructed_module() -> None:
    module = CATSMLP(H, I, bias=True, activation="gelu")
    x = torch.randn(2, H)
    back = module.to_dense()
    assert isinstance(back, GatedMLP) and back.down_proj is module.down_proj
    assert close(back(x), module(x))


# --- threshold -------------------------------------------------------------------------------------------------------


def test_new_module_is_dense() -> None:
    module = CATSMLP(H, I)
    assert module.threshold.item() == -1.0 and module.threshold.dtype == torch.float32
    assert module.cats_meta.tolist() == [1.0, -1.0, 0.0, 0.0]


def test_set_threshold(dense: Dense) -> None:
    module = CATSMLP.from_llama_mlp(dense)
    address = module.threshold.data_ptr()
    module.set_threshold(0.25, target_sparsity=0.5, calibration_tokens=100)
    assert module.threshold.item() == 0.25 and module.threshold.data_ptr() == address  # captured graphs see the change
    assert module.cats_meta.tolist() == [1.0, 0.5, 100.0, 0.0]
    channels = torch.linspace(-1, 1, I, dtype=torch.float64)
    module.set_threshold(channels)
    assert torch.equal(module.threshold, channels.float()) and module.cats_meta[1] == -1
    channels[:] = 7
    assert module.threshold.max() == 1
    bad = channels.clone()
    bad[3] = float("nan")
    for value, match in ((bad, "NaN"), (float("nan"), "NaN"), (torch.zeros(I, 1), "shape"), (torch.zeros(1), "shape")):
        with pytest.raises(ValueError, match=match):
            module.set_threshold(value)
    assert module.threshold.max() == 1
    module.set_threshold(float("inf"))
    with torch.no_grad():
        assert torch.equal(module(torch.randn(2, H)), torch.zeros(2, H))


def test_per_channel_threshold_selects_channels(dense: Dense) -> None:
    threshold = torch.full((I,), -1.0)
    threshold[::2] = float("inf")
    module = CATSMLP.from_llama_mlp(dense, threshold=threshold)
    x = torch.randn(3, H)
    with torch.no_grad():
        h = F.silu(dense.gate_proj(x)) * dense.up_proj(x)
        h[:, ::2] = 0
        assert close(module(x), h @ dense.down_proj.weight.t())


def test_inclusive_keeps_ties() -> None:
    mlp = Dense(act=nn.ReLU(), hidden=1, neurons=2)
    with torch.no_grad():
        for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            linear.weight.fill_(1.0)
    module = CATSMLP.from_llama_mlp(mlp, threshold=1.0)
    x = torch.ones(1, 1)
    with torch.no_grad():
        assert module(x).item() == 0.0
        module.inclusive = True
        assert module(x).item() == 2.0 and module.cats_meta[3] == 1.0


def test_repr_tells_the_state(dense: Dense) -> None:
    module = CATSMLP.from_llama_mlp(dense, threshold=0.125)
    assert "threshold=0.125" in repr(module) and "target" not in repr(module)
    module.set_threshold(0.5, target_sparsity=0.7)
    module.enabled = False
    assert "target_sparsity=0.7, enabled=False" in repr(module)
    assert "threshold [80] in [0, 0]" in repr(CATSMLP(H, I, threshold=torch.zeros(I)))
    assert "without values" in repr(CATSMLP(H, I, device="meta"))


# --- dtype and device ------------------------------------------------------------------------------------------------

T = 0.1234567890123  # rounds in every narrow type


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.to(torch.float16),
        lambda m: nn.Sequential(m).to(dtype=torch.bfloat16)[0],
        lambda m: m.double(),
        lambda m: m.to_empty(device="cpu"),
        lambda m: m.share_memory(),
    ],
)
def test_threshold_is_never_rounded(dense: Dense, move: object, per_channel: bool) -> None:
    value = torch.linspace(T, 1, I) if per_channel else torch.tensor(T)
    module = CATSMLP.from_llama_mlp(dense, threshold=value)
    module.set_threshold(value, target_sparsity=T, calibration_tokens=4099)
    meta = module.cats_meta.clone()
    move(module)
    for buffer, kept in ((module.threshold, value), (module.cats_meta, meta)):
        assert buffer.dtype == torch.float32 and torch.equal(buffer, kept)
    assert module.down_proj.weight.t().is_contiguous()


def test_meta_device_and_back(dense: Dense) -> None:
    state = CATSMLP.from_llama_mlp(dense, threshold=0.3).state_dict()
    for module in (CATSMLP(H, I, device="meta"), CATSMLP(H, I, threshold=0.2, inclusive=True).to("meta")):
        assert module.threshold.is_meta and module.down_proj.weight.is_meta
        module.to_empty(device="cpu")
        assert module.threshold.item() == -1.0 and module.cats_meta[:3].tolist() == [1.0, -1.0, 0.0]
        assert module.cats_meta[3] == module.inclusive
        module.load_state_dict(state)
        x = torch.randn(2, H)
        with torch.no_grad():
            assert module.threshold == torch.tensor(0.3) and close(module(x), expected(dense, x, 0.3))


def test_bfloat16_module_runs(dense: Dense) -> None:
    module = CATSMLP.from_llama_mlp(dense, threshold=T).bfloat16()
    x = torch.randn(3, H).bfloat16()
    with torch.no_grad():
        y = module(x)
    assert y.dtype == torch.bfloat16 and close(y, expected(dense, x, T), 2e-2)


# --- state dicts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense_checkpoint_loads_strictly_and_keeps_the_threshold(layout: str) -> None:
    checkpoint = Dense().state_dict()
    module = CATSMLP.from_llama_mlp(Dense(), threshold=0.2, inclusive=True, down_layout=layout)
    strides, parameter = module.down_proj.weight.stride(), module.down_proj.weight
    module.load_state_dict(checkpoint, strict=True)
    assert module.threshold == torch.tensor(0.2) and module.inclusive and module.cats_meta[3] == 1
    assert module.down_proj.weight is parameter and module.down_proj.weight.stride() == strides
    fresh = Dense()
    fresh.load_state_dict(checkpoint)
    x = torch.randn(4, H)
    module.inclusive = False
    with torch.no_grad():
        assert close(module(x), expected(fresh, x, 0.2))
    del checkpoint["up_proj.weight"]
    with pytest.raises(RuntimeError, match="up_proj"):
        module.load_state_dict(checkpoint, strict=True)


def test_own_checkpoint_loads_into_the_dense_module(dense: Dense) -> None:
    other = Dense()
    module = CATSMLP.from_llama_mlp(dense, threshold=0.2)
    state = dense_state_dict(nn.Sequential(module))
    assert set(state) == {f"0.{name}" for name in other.state_dict()}
    nn.Sequential(other).load_state_dict(state, strict=True)
    other.load_state_dict(dense_state_dict(module), strict=True)
    assert torch.equal(other.down_proj.weight, module.down_proj.weight)


def test_state_dict_is_contiguous(dense: Dense) -> None:
    module = nn.Sequential(CATSMLP.from_llama_mlp(dense))
    assert not module[0].down_proj.weight.is_contiguous()
    assert all(value.is_contiguous() for value in module.state_dict().values())
    assert module.state_dict(keep_vars=True)["0.down_proj.weight"] is dense.down_proj.weight


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("source", ["scalar", "channels"])
@pytest.mark.parametrize("target", ["scalar", "channels"])
def test_safetensors_round_trip(tmp_path, dense: Dense, layout: str, assign: bool, source: str, target: str) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    value = {"scalar": T, "channels": torch.linspace(0, T, I)}
    module = CATSMLP.from_llama_mlp(dense, inclusive=True)
    module.set_threshold(value[source], target_sparsity=0.5, calibration_tokens=77)
    safetensors.save_file(module.state_dict(), tmp_path / "mlp.safetensors")
    other = CATSMLP(H, I, threshold=value[target], down_layout=layout)
    other.load_state_dict(safetensors.load_file(tmp_path / "mlp.safetensors"), strict=True, assign=assign)
    assert torch.equal(other.threshold, module.threshold) and torch.equal(other.cats_meta, module.cats_meta)
    assert other.inclusive and other.cats_meta.tolist() == [1.0, 0.5, 77.0, 1.0]
    assert other.down_proj.weight.t().is_contiguous() == (layout in ("auto", "strided"))
    x = torch.randn(4, H)
    with torch.no_grad():
        assert close(other(x), module(x))


def test_narrow_or_bad_thresholds_in_a_checkpoint(dense: Dense) -> None:
    module = CATSMLP.from_llama_mlp(dense, threshold=0.2)
    state = module.state_dict() | {"threshold": torch.tensor(0.5, dtype=torch.float16)}
    for assign in (False, True):
        module.load_state_dict(state, assign=assign)
        assert module.threshold.dtype == torch.float32 and module.threshold == 0.5
    for bad, match in (
        ({"threshold": torch.tensor(float("nan"))}, "threshold: expected numbers, got NaN"),
        ({"threshold": torch.zeros(3)}, "threshold: expected shape"),
        ({"cats_meta": torch.tensor([99.0, 0, 0, 0])}, "format 99 is newer"),
        ({"cats_meta": torch.zeros(2)}, "cats_meta: expected shape"),
    ):
        with pytest.raises(RuntimeError, match=match):
            module.load_state_dict(state | bad)
        assert module.threshold == 0.5


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_strided_keeps_shape_identity_values_and_memory(dense: Dense) -> None:
    weight, values = dense.down_proj.weight, dense.down_proj.weight.clone()
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.1)
    module = CATSMLP.from_llama_mlp(dense)
    assert module.down_proj.weight is weight and weight.shape == (H, I) and weight.stride() == (1, H)
    assert torch.equal(weight, values)
    assert weight.untyped_storage().nbytes() == values.untyped_storage().nbytes()
    module(torch.randn(3, H)).sum().backward()
    optimizer.step()
    assert not torch.equal(weight, values) and weight.stride() == (1, H)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_change_of_the_weight_is_seen(dense: Dense, layout: str) -> None:
    """Also those that no version counter counts: nothing is derived from a weight and kept."""
    module = CATSMLP.from_llama_mlp(dense, threshold=0.05, down_layout=layout)
    weight, x = dense.down_proj.weight, torch.randn(3, H)

    def check() -> None:
        with torch.no_grad():
            assert close(module(x), expected(dense, x, 0.05))

    check()
    with torch.no_grad():
        weight.mul_(2)
    check()
    weight.data.mul_(3)
    check()
    weight.data.copy_(torch.randn(H, I))
    check()
    module.load_state_dict(Dense().state_dict())
    check()
    weight.data = torch.randn(H, I)
    check()
    torch.utils.swap_tensors(weight, nn.Parameter(torch.randn(H, I)))
    check()
    dense.down_proj.weight = nn.Parameter(torch.randn(H, I))
    check()
    module.set_down_layout("strided")
    assert dense.down_proj.weight.stride() == (1, H)
    check()
    module(x).sum().backward()
    assert dense.down_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent_and_keep_the_layout(dense: Dense, layout: str, duplicate) -> None:
    module = CATSMLP.from_llama_mlp(dense, threshold=0.05, down_layout=layout)
    x = torch.randn(3, H)
    with torch.no_grad():
        want = module(x)
        other = duplicate(module)
        assert other.down_proj.weight.stride() == module.down_proj.weight.stride()
        module.down_proj.weight.zero_()
        module.set_threshold(9.0)
        assert close(other(x), want)
    assert other.to_dense() is not dense and other.to_dense().down_proj is other.down_proj
    assert other.to_dense().down_proj.weight.is_contiguous()
    assert all(value.is_contiguous() for value in other.state_dict().values())


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Dense, Fused])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_equal_the_masked_dense_module(kind: type, layout: str) -> None:
    mlp = kind(True)
    x = torch.randn(5, H, requires_grad=True)

    def masked(x: torch.Tensor) -> torch.Tensor:
        if kind is Fused:
            z, u = mlp.gate_up_proj(x).chunk(2, dim=-1)
        else:
            z, u = mlp.gate_proj(x), mlp.up_proj(x)
        s = F.silu(z)
        return mlp.down_proj(s * (s.abs() > 0.05) * u)

    masked(x).square().sum().backward()
    want = [x.grad.clone()] + [p.grad.clone() for p in mlp.parameters()]
    x.grad = None
    mlp.zero_grad()
    module = CATSMLP.from_llama_mlp(mlp, threshold=0.05, down_layout=layout)
    for training in (True, False):
        module.train(training)(x).square().sum().backward()
        for got, reference in zip([x.grad, *(p.grad for p in module.parameters())], want, strict=True):
            assert close(got, reference)
        x.grad = None
        module.zero_grad()


@pytest.mark.heavy
@pytest.mark.parametrize("layout", ["auto", "keep"])
@pytest.mark.parametrize("tokens", [2, 20])
def test_compiles_in_one_graph(dense: Dense, layout: str, tokens: int) -> None:
    module = CATSMLP.from_llama_mlp(dense, threshold=0.05, down_layout=layout).requires_grad_(False)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    x = torch.randn(tokens, H)
    assert close(compiled(x), expected(dense, x, 0.05))
    module.set_threshold(0.2)  # read from the buffer: no new graph needed
    assert close(compiled(x), expected(dense, x, 0.2))


def test_train_and_requires_grad_carry_over(dense: Dense) -> None:
    dense.eval().requires_grad_(False)
    module = CATSMLP.from_llama_mlp(dense)
    assert not module.training and not any(p.requires_grad for p in module.parameters())
