"""`CATSMLP` sees its projections as they are at the moment of a call: adapters, hooks, quantised, offloaded, wrapped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations, parametrize, prune

import subquad
from subquad._backends import _warned
from subquad.nn import CATSMLP
from subquad.nn._children import placement, plain
from subquad.nn.cats_mlp import GatedMLP

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*native kernels are not in use"),  # any backend will do
    pytest.mark.filterwarnings("ignore:.*must be called, so nothing is skipped"),
]
H, I, T = 24, 80, 0.05  # noqa: E741


class Fused(nn.Module):
    """As in Phi-3."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(H, 2 * I), nn.Linear(I, H)
        self.activation_fn = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * self.activation_fn(gate))


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return Fused() if kind == "fused" else GatedMLP(nn.Linear(H, I), nn.Linear(H, I), nn.Linear(I, H), "silu")


def composed(mlp: nn.Module, x: torch.Tensor, mode: str = "token", grad: str = "masked") -> torch.Tensor:
    """The definition, by calls of the projections."""
    if hasattr(mlp, "gate_up_proj"):
        z, u = mlp.gate_up_proj(x).chunk(2, dim=-1)
    else:
        z, u = mlp.gate_proj(x), mlp.up_proj(x)
    s = F.silu(z)
    mask = s.abs() > T
    if mode == "union":
        mask = mask.flatten(0, -2).any(0).expand_as(mask)
    h = torch.where(mask, s * u, 0.0)
    if grad == "ste":
        dead = torch.where(mask, 0.0, s * u.detach())
        h = h + dead - dead.detach()
    return mlp.down_proj(h)


class Adapted(nn.Module):
    """LoRA as libraries write it: the base inside, its sizes and weight passed on."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.in_features, self.out_features = base, base.in_features, base.out_features
        self.lora_a, self.lora_b = (
            nn.Linear(base.in_features, 2, bias=False),
            nn.Linear(2, base.out_features, bias=False),
        )

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_b(self.lora_a(x))


class Sub(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1.5 * super().forward(x)


class Quantised(torch.Tensor):
    """Weights of another class, which say something else than their numbers."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            return F.linear(args[0], 2 * args[1].as_subclass(torch.Tensor), *args[2:], **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})


def adapt(mlp: nn.Module, name: str) -> None:
    setattr(mlp, name, Adapted(getattr(mlp, name)))


def subclass(mlp: nn.Module, name: str) -> None:
    base = getattr(mlp, name)
    other = Sub(base.in_features, base.out_features)
    other.load_state_dict(base.state_dict())
    setattr(mlp, name, other)


def hook(mlp: nn.Module, name: str) -> None:
    getattr(mlp, name).register_forward_hook(lambda module, args, y: 1.5 * y)


def pre_hook(mlp: nn.Module, name: str) -> None:
    getattr(mlp, name).register_forward_pre_hook(lambda module, args: (1.5 * args[0],))


def forward_of_the_object(mlp: nn.Module, name: str) -> None:
    child = getattr(mlp, name)
    child.forward = lambda x: 1.5 * type(child).forward(child, x)


def offload(mlp: nn.Module, name: str) -> None:
    child = getattr(mlp, name)
    kept = {part: p.detach().clone() for part, p in child.named_parameters()}
    for part, p in child.named_parameters():
        setattr(child, part, nn.Parameter(p.detach().to("meta")))
    child.forward = lambda x: F.linear(x, **kept)


def quantise(mlp: nn.Module, name: str) -> None:
    child = getattr(mlp, name)
    child.weight = nn.Parameter(child.weight.detach().as_subclass(Quantised))


def weight_norm(mlp: nn.Module, name: str) -> None:
    child = parametrizations.weight_norm(getattr(mlp, name))
    with torch.no_grad():
        child.parametrizations.weight.original0.mul_(1.5)


def parametrized(mlp: nn.Module, name: str) -> None:
    class Half(nn.Module):
        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return w / 2

    parametrize.register_parametrization(getattr(mlp, name), "weight", Half())


def pruned(mlp: nn.Module, name: str) -> None:
    child = getattr(mlp, name)
    prune.custom_from_mask(child, "weight", torch.arange(child.weight.numel()).view(child.weight.shape) % 3)


def wrapped(mlp: nn.Module, name: str) -> None:
    setattr(mlp, name, nn.Sequential(getattr(mlp, name), nn.Dropout(0.0)))


def transposed(mlp: nn.Module, name: str) -> None:
    """As a merged adapter leaves it: a layout that the operator does not take."""
    child = getattr(mlp, name)
    strides = (2, 2 * child.weight.shape[0])
    child.weight.data = torch.empty_strided(child.weight.shape, strides).copy_(1.5 * child.weight.data)


CHANGES = (
    adapt, subclass, hook, pre_hook, forward_of_the_object, offload, quantise, weight_norm, parametrized, pruned, wrapped,
    transposed,
)  # fmt: skip
CHILDREN = [
    (kind, name)
    for kind, names in (("split", ("gate", "up", "down")), ("fused", ("gate_up", "down")))
    for name in names
]


def gradients(function: Callable[[torch.Tensor], torch.Tensor], module: nn.Module) -> list[torch.Tensor]:
    torch.manual_seed(3)
    x = torch.randn(5, H, requires_grad=True)
    module.zero_grad()
    function(x).square().sum().backward()
    return [x.grad, *(p.grad.clone() for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize(("kind", "name"), CHILDREN)
@pytest.mark.parametrize("change", CHANGES)
def test_a_child_that_came_later_counts(change: Callable[[nn.Module, str], None], kind: str, name: str) -> None:
    module = CATSMLP.from_llama_mlp(build(kind), threshold=T)
    before = module(torch.ones(3, H))
    change(module, f"{name}_proj")
    assert not module.reads(torch.ones(3, H))
    assert (module(torch.ones(3, H)) - before).abs().max() > 1e-3 or change in (offload, wrapped)
    for tokens in (1, 5, 40):
        x = torch.randn(tokens, 1, H)
        with torch.no_grad():
            torch.testing.assert_close(module(x), composed(module, x))
    for grad in ("masked", "ste"):
        module.grad = grad
        got, want = gradients(module, module), gradients(lambda x, g=grad: composed(module, x, grad=g), module)
        assert len(got) == len(want) > 1
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(module.to_dense()(x), composed_dense(module, x))


def composed_dense(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if hasattr(mlp, "gate_up_proj"):
        z, u = mlp.gate_up_proj(x).chunk(2, dim=-1)
    else:
        z, u = mlp.gate_proj(x), mlp.up_proj(x)
    return mlp.down_proj(F.silu(z) * u)


@pytest.mark.parametrize("change", [c for c in CHANGES if c is not wrapped])
def test_converting_what_is_changed_already(change: Callable[[nn.Module, str], None]) -> None:
    mlp = build("split").train()
    change(mlp, "up_proj")
    module = CATSMLP.from_llama_mlp(mlp, threshold=T)
    x = torch.randn(3, H)
    with torch.no_grad():
        torch.testing.assert_close(module(x), composed(mlp, x))
    assert module.threshold.device.type == "cpu" and mlp.training


def test_dropout_of_an_adapter_does_not_make_a_module_another() -> None:
    mlp = build("split").train()
    mlp.up_proj = Adapted(mlp.up_proj)
    mlp.up_proj.lora_a = nn.Sequential(nn.Dropout(0.9), mlp.up_proj.lora_a)
    CATSMLP.from_llama_mlp(mlp)
    assert mlp.up_proj.lora_a[0].training


@pytest.mark.parametrize(("kind", "name"), [("split", "gate"), ("fused", "gate_up")])
def test_calibration_sees_what_the_gate_says(kind: str, name: str) -> None:
    module, x = CATSMLP.from_llama_mlp(build(kind), threshold=T), torch.randn(200, H)
    adapt(module, f"{name}_proj")
    with subquad.CatsCalibrator(module) as calibrator, torch.no_grad():
        torch.testing.assert_close(module(x), composed_dense(module, x))
    calibrator.apply(sparsity=0.4)
    s = F.silu(module.gate(x))
    assert abs((s.abs() <= module.threshold).float().mean().item() - 0.4) < 2e-3
    (row,) = subquad.sparsity_report(module, [x[:4]])
    assert row.dense_calls == row.calls == 1 and row.bytes_ratio == 1.0
    assert abs(row.active_mean - (s[:4].abs() > module.threshold).float().mean().item()) < 1e-6


def test_options_hold_when_children_are_called() -> None:
    module, x = CATSMLP.from_llama_mlp(build("split"), threshold=T), torch.randn(20, H)
    adapt(module, "up_proj")
    with torch.no_grad():
        module.mask_mode = "union"
        torch.testing.assert_close(module(x[:3]), composed(module, x[:3], "union"))
        assert [module(x[0]).shape, module(x[:0]).shape] == [(H,), (0, H)]
        module.mask_mode, module.prefill = "token", "dense"
        torch.testing.assert_close(module(x), composed_dense(module, x))
        torch.testing.assert_close(module(x[:16]), composed(module, x[:16]))
        module.enabled = False
        torch.testing.assert_close(module(x[:3]), composed_dense(module, x[:3]))
        module.enabled, module.inclusive = True, True
        s = F.silu(module.gate_proj(x[:1]))
        module.set_threshold(s.abs()[0])  # every neuron at its very threshold
        torch.testing.assert_close(module(x[:1]), composed_dense(module, x[:1]))
        module.inclusive = False
        torch.testing.assert_close(module(x[:1]), module.down_proj.bias[None])


def test_a_dead_neuron_is_nothing_whatever_its_up_projection_says() -> None:
    module = CATSMLP.from_llama_mlp(build("split"), threshold=1e9)
    adapt(module, "up_proj")
    with torch.no_grad():
        module.up_proj.base_layer.bias.fill_(torch.inf)
        assert torch.equal(module(torch.randn(2, H)), module.down_proj.bias.expand(2, H))


@pytest.mark.filterwarnings("default:.*must be called, so nothing is skipped")
def test_it_is_said_once() -> None:
    module, x = CATSMLP.from_llama_mlp(build("split"), threshold=T), torch.randn(2, H)
    adapt(module, "down_proj")
    _warned.clear()
    module(x)  # with gradients nothing would be skipped in any case
    with torch.no_grad():
        module(torch.randn(20, H))
        with pytest.warns(subquad.SubquadWarning, match=r"down_proj \(Adapted\) is no plain Linear.* must be called"):
            module(x)
        module(x)


@pytest.mark.parametrize("layout", ["auto", "keep"])
def test_the_layout_goes_back_inside_an_adapter(layout: str) -> None:
    mlp = build("split")
    weight = mlp.down_proj.weight
    values = weight.clone()
    module = CATSMLP.from_llama_mlp(mlp, down_layout=layout)
    for change in (adapt, wrapped):
        change(module, "down_proj")
    module.lay_out()
    assert weight.is_contiguous() == (layout == "keep")
    assert module.to_dense() is mlp and weight.is_contiguous() and torch.equal(weight, values)
    assert mlp.down_proj is module.down_proj


@pytest.mark.heavy
def test_a_graph_is_made_of_what_is_there() -> None:
    """Compiled again after an adapter came; exported with the operator, not with calls."""
    module, x = CATSMLP.from_llama_mlp(build("split"), threshold=T).requires_grad_(False), torch.randn(3, H)
    for strict in (False, True):
        graph = torch.export.export(module, (x,), strict=strict).graph
        assert any("cats_mlp_fwd" in str(node.target) for node in graph.nodes)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), composed(module, x))
    for name in ("gate_proj", "down_proj"):
        adapt(module, name)
        torch.testing.assert_close(compiled(x), composed(module, x))


# --- plain ---------------------------------------------------------------------------------------------------------------------


def test_plain() -> None:
    child = nn.Linear(2, 2)
    assert plain(child, nn.Linear) and not plain(child, nn.Module) and not plain(None, nn.Linear)
    child.forward = child.forward  # as accelerate leaves it behind
    assert plain(child, nn.Linear)
    child.forward = nn.Linear(2, 2).forward  # of another
    assert not plain(child, nn.Linear)
    del child.forward
    child.compile(backend="eager")  # in place: the same function
    assert plain(child, nn.Linear) and not plain(torch.compile(child, backend="eager"), nn.Linear)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: 2 * y)
    try:
        assert not plain(child, nn.Linear)
    finally:
        handle.remove()
    assert plain(child, nn.Linear)
    child.weight = nn.Parameter(child.weight.detach().as_subclass(Quantised))
    assert not plain(child, nn.Linear)


def test_placement() -> None:
    mlp = build("split").bfloat16()
    assert placement(mlp.up_proj) == (torch.device("cpu"), torch.bfloat16)
    adapt(mlp, "up_proj")
    assert placement(mlp.up_proj)[1] is torch.bfloat16  # of the base, not of what was added
    mlp.up_proj.base_layer.weight.requires_grad_(False).data = torch.zeros(I, H // 2, dtype=torch.uint8)
    mlp.up_proj.base_layer.bias = None
    assert placement(mlp.up_proj)[1] is torch.float32
    assert placement(nn.Linear(2, 2, device="meta"))[0].type == "meta"
    packed = nn.Module()
    packed.register_buffer("qweight", torch.zeros(2, 2, dtype=torch.int32, device="meta"))
    assert placement(packed) == (torch.device("meta"), torch.float32)


@pytest.mark.parametrize("place", [lambda: torch.device("meta"), FakeTensorMode])
@pytest.mark.parametrize("per_channel", [False, True])
def test_without_values(place: Callable[[], Any], per_channel: bool) -> None:
    """Shapes alone: on the meta device, and of fake tensors."""
    with place():
        module = CATSMLP(H, I, threshold=torch.rand(I) if per_channel else 0.1)
        for tokens in (2, 40):
            x = torch.randn(tokens, H)
            with torch.no_grad():
                assert module(x).shape == x.shape
            with subquad.use_backend("reference"):
                assert module(x).shape == x.shape
        module.load_state_dict(module.state_dict())
        assert CATSMLP.from_llama_mlp(build("split"), threshold=T)(torch.randn(2, H)).shape == (2, H)
        assert "without values" in repr(module)


@pytest.mark.parametrize("kind", ["split", "fused"])
def test_float64_modules_are_converted(kind: str) -> None:
    mlp = build(kind).double()
    module, x = CATSMLP.from_llama_mlp(mlp, threshold=T), torch.randn(5, H, dtype=torch.float64)
    with torch.no_grad():
        assert module.reads(x)
        torch.testing.assert_close(module(x), composed(mlp, x))


def test_wrong_arguments_of_the_module_are_named() -> None:
    for name, make in {
        "hidden_size": lambda: CATSMLP("24", I),
        "intermediate_size": lambda: CATSMLP(H, 2.0),
        "max_sparse_tokens": lambda: CATSMLP(H, I, max_sparse_tokens=1.5),
        "inclusive": lambda: CATSMLP(H, I, inclusive="no"),
        "x": lambda: CATSMLP(H, I)([1.0]),
        "module": lambda: subquad.nn.dense_state_dict(None),
    }.items():
        with pytest.raises(TypeError, match=f"^{name}: expected "):
            make()


def test_export_with_any_number_of_tokens() -> None:
    module, tokens = CATSMLP(H, I, threshold=T), torch.export.Dim("tokens", min=2, max=64)
    exported = torch.export.export(module, (torch.randn(5, H),), dynamic_shapes={"x": {0: tokens}}).module()
    for count in (3, 40):
        x = torch.randn(count, H)
        torch.testing.assert_close(exported(x), module(x))
