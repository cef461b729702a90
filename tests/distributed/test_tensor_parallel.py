"""Layers split by neurons and heads, on ranks as threads, beside one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

import subquad.distributed as sd
from subquad import RopeSpec
from subquad.nn import CATSMLP, LawcatAttention, LawcatCache, SinkAttention, SuperlinearAttention

from .programs.common import LIMIT, error, whole
from .threads import caught, on_ranks

HIDDEN = 48


def mesh_of(size: int) -> DeviceMesh:
    return init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))


def moved(module: nn.Module) -> Any:
    """Away from where it starts, so that taps, gates and factors matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return module


def close(found: torch.Tensor, expected: torch.Tensor, limit: float = LIMIT) -> None:
    assert error(found, expected) <= limit


def first(y: Any) -> torch.Tensor:
    return y[0] if isinstance(y, tuple) else y


def trained(module: nn.Module, x: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ...]:
    """Output, gradient of x, and those of all parameters by name."""
    module.zero_grad()
    own = x.clone().requires_grad_()
    y = first(module(own, **options))
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    assert own.grad is not None
    return y.detach(), own.grad, *(whole(p.grad) for p in module.parameters() if p.grad is not None)


def same_as_one_process(
    make: Callable[[], nn.Module], style: Callable[[], Any], size: int, x: torch.Tensor, **options: Any
) -> None:
    one = moved(make())
    expected = trained(one, x, **options)

    def body(rank: int) -> None:
        split = parallelize_module(copy.deepcopy(one), mesh_of(size), style())
        found = trained(split, x, **options)
        for a, b in zip(found, expected, strict=True):
            close(a, b)
        again = trained(split, x, **options)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))

    on_ranks(size, body)


def fused(neurons: int, **options: Any) -> CATSMLP:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj, self.down_proj = nn.Linear(HIDDEN, 2 * neurons, False), nn.Linear(neurons, HIDDEN, False)
            self.act_fn = nn.SiLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            z, u = self.gate_up_proj(x).chunk(2, -1)
            return self.down_proj(self.act_fn(z) * u)

    return CATSMLP.from_llama_mlp(Fused(), **options)


MLPS: dict[str, Callable[[], CATSMLP]] = {
    "one threshold": lambda: CATSMLP(HIDDEN, 64, threshold=0.05),
    "uneven, biases, a threshold for every neuron": lambda: CATSMLP(
        HIDDEN, 67, bias=True, threshold=torch.linspace(0, 0.4, 67), activation="gelu_tanh"
    ),
    "fused": lambda: fused(60, threshold=0.05),
    "kept layout, union": lambda: CATSMLP(HIDDEN, 64, threshold=0.05, down_layout="keep", mask_mode="union"),
}


@pytest.mark.parametrize("name", MLPS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_neurons(name: str, size: int) -> None:
    x = torch.randn(2, 20, HIDDEN, generator=torch.Generator().manual_seed(0))
    same_as_one_process(MLPS[name], sd.CATSParallel, size, x)
    one = moved(MLPS[name]())

    def body(rank: int) -> None:
        split = parallelize_module(copy.deepcopy(one), mesh_of(size), sd.CATSParallel())
        local = split.down_proj.weight.to_local()
        assert local.t().is_contiguous() or split.down_layout == "keep"  # as sparse kernels want it
        with torch.no_grad():
            for tokens in (0, 1, 3):  # sparse
                few = x[:1, :tokens]
                assert split(few).shape == few.shape
                if tokens:
                    close(split(few), one(few))

    on_ranks(size, body)


LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scalar gates, shared key features": {"gate": "scalar", "share_kv_features": True},
    "everything": {
        "use_output_gate": True, "qk_norm": True, "conv_on_v": True, "conv_bias": True, "proj_bias": True,
        "qk_activation": "silu", "tie_qk_feature_map": False,
    },
    "no low rank, one convolution": {"gate_rank": None, "share_qk_conv": True},
    "no gates": {"gate": "none", "normalize": False},
    "window": {"window_size": 5, "affine_window": True},
}  # fmt: skip


def layer_of(heads: int, kv_heads: int, **options: Any) -> LawcatAttention:
    return LawcatAttention(HIDDEN, heads, kv_heads, head_dim=8, layer_idx=0, **options)


def rotation(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.arange(tokens)[None, :, None] * torch.tensor([1.0, 0.3, 0.1, 0.03]).repeat(2)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("size", [2, 3])
def test_heads(name: str, size: int) -> None:
    x = torch.randn(2, 19, HIDDEN, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 19, dtype=torch.bool)
    mask[0, :4] = False
    options = {"position_embeddings": rotation(19)} if "window" in name else {"attention_mask": mask}
    same_as_one_process(lambda: layer_of(2 * size, size, **LAYERS[name]), sd.LawcatParallel, size, x, **options)


SOFTMAX: dict[str, Callable[..., nn.Module]] = {
    "sinks": lambda *sizes, **options: SinkAttention(
        *sizes, sink_tokens=2, window=5, learned_sink=True, bias=True, **options
    ),
    "superlinear": lambda *sizes, **options: SuperlinearAttention(
        *sizes, sw_index=2, num_spans=2, backward_factor=2.0, qkv_bias=True, o_bias=True, **options
    ),
}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", SOFTMAX)
def test_heads_of_softmax(name: str, size: int) -> None:
    """Norms of q and k, which all queries share, biases, a rotation of the layer's own; packed sequences."""
    rope = RopeSpec(30.0 ** -(torch.arange(4) / 4), 8)
    one = moved(SOFTMAX[name](HIDDEN, 2 * size, size, 8, qk_norm=True, rope=rope, layer_idx=0))
    x = torch.randn(1, 40, HIDDEN, generator=torch.Generator().manual_seed(0))
    options = {"cu_seqlens": torch.tensor([0, 9, 40])}
    expected = trained(one, x, **options)

    def body(rank: int) -> None:
        layer = copy.deepcopy(one)
        assert sd.parallelize(layer, mesh_of(size)) == [""]
        for a, b in zip(trained(layer, x, **options), expected, strict=True):
            close(a, b)
        with pytest.raises(ValueError, match="expected a size that divides the 1 key heads"):
            sd.parallelize(SOFTMAX[name](HIDDEN, 2, 1, 8), mesh_of(size))

    on_ranks(size, body)


@pytest.mark.parametrize("name", ["plain", "everything", "window"])
def test_decoding_has_states_of_own_heads(name: str) -> None:
    one = moved(layer_of(4, 2, **LAYERS[name]))
    x, positions = torch.randn(2, 12, HIDDEN, generator=torch.Generator().manual_seed(0)), rotation(12)

    def steps(layer: nn.Module) -> tuple[torch.Tensor, LawcatCache]:
        cache, parts = LawcatCache(), []
        for low, high in ((0, 9), (9, 10), (10, 11), (11, 12)):
            pair = (positions[0][:, low:high], positions[1][:, low:high])
            parts.append(layer(x[:, low:high], position_embeddings=pair, past_key_values=cache)[0])
        return torch.cat(parts, 1), cache

    with torch.no_grad():
        expected, whole_cache = steps(one)

    def body(rank: int) -> None:
        split = parallelize_module(copy.deepcopy(one), mesh_of(2), sd.LawcatParallel())
        with torch.no_grad():
            found, cache = steps(split)
        close(found, expected)
        own, all_heads = cache.states[0].s, whole_cache.states[0].s
        assert 2 * own.shape[1] == all_heads.shape[1]
        close(own, all_heads.chunk(2, 1)[rank])

    on_ranks(2, body)


def test_one_message_each_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one for each whole parameter that is trained."""
    calls: list[tuple[int, ...]] = []
    real = torch.distributed.all_reduce
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, **k: (calls.append(tuple(x.shape)), real(x, **k))[1])
    x = torch.randn(2, 5, HIDDEN)
    for make, style, partial in (
        (lambda: CATSMLP(HIDDEN, 64, bias=True, threshold=0.05), sd.CATSParallel, []),  # b_down is behind the sum
        (lambda: layer_of(4, 2), sd.LawcatParallel, [(16, HIDDEN)]),
    ):
        calls.clear()
        one = make()
        on_ranks(
            2, lambda rank, s=style, m=one: trained(parallelize_module(copy.deepcopy(m), mesh_of(2), s()), x) and None
        )
        expected = [tuple(x.shape)] * 2 + partial
        assert sorted(calls) == sorted(2 * expected)


def test_parameters_look_whole() -> None:
    """To optimizers and state dicts; a copy is split, too."""
    one = moved(CATSMLP(HIDDEN, 66, threshold=torch.linspace(0, 0.4, 66)))
    x = torch.randn(2, 20, HIDDEN, generator=torch.Generator().manual_seed(0))
    stepped = copy.deepcopy(one)

    def step(module: nn.Module) -> None:
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        trained(module, x)
        optimizer.step()

    step(stepped)

    def body(rank: int) -> None:
        split = parallelize_module(copy.deepcopy(one), mesh_of(3), sd.CATSParallel())
        state = split.state_dict()
        assert {name: v.shape for name, v in state.items()} == {name: v.shape for name, v in one.state_dict().items()}
        for name, value in one.state_dict().items():
            assert torch.equal(whole(state[name]), value)
        copied = copy.deepcopy(split)
        step(copied)
        close(copied(x), stepped(x), 1e-4)  # AdamW divides tiny gradients by themselves
        close(split(x), one(x))
        thresholds = torch.linspace(0.3, 0, 66)
        split.set_threshold(thresholds)
        assert torch.equal(whole(split.threshold), thresholds) and split.threshold.to_local().numel() == 22
        split_state = split.state_dict()
        split.set_threshold(0.1)
        other = copy.deepcopy(one)
        other.set_threshold(0.1)
        with torch.no_grad():
            close(split(x[:1, :2]), other(x[:1, :2]))
        split.load_state_dict({**split.state_dict(), "threshold": split_state["threshold"]})
        assert torch.equal(whole(split.threshold), thresholds)
        if rank == 0:
            assert "threshold [66] in parts" in repr(split)  # asks no other rank

    on_ranks(3, body)


@pytest.mark.parametrize("style", [sd.CATSParallel, sd.LawcatParallel])
def test_bfloat16(style: Any) -> None:
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    x = torch.randn(1, 6, HIDDEN, **options, generator=torch.Generator().manual_seed(0))
    mlp = style is sd.CATSParallel
    one = moved(CATSMLP(HIDDEN, 64, threshold=0.05, **options) if mlp else layer_of(4, 2, **options))

    def body(rank: int) -> None:
        y = first(parallelize_module(copy.deepcopy(one), mesh_of(2), style())(x))
        assert y.dtype == torch.bfloat16
        close(y, first(one(x)), 2e-2)

    on_ranks(2, body)


def test_nan_of_one_rank_reaches_its_token_alone() -> None:
    one = layer_of(4, 2)
    x = torch.randn(1, 6, HIDDEN)
    x[0, 4] = torch.nan

    def body(rank: int) -> None:
        y = parallelize_module(copy.deepcopy(one), mesh_of(2), sd.LawcatParallel())(x)[0]
        assert y[:, :4].isfinite().all() and y[:, 4:].isnan().all()

    on_ranks(2, body)


# --- what is refused ----------------------------------------


def refused(size: int, make: Callable[[int, DeviceMesh], Any], message: str) -> None:
    """On all ranks, before anything has changed, and the group goes on."""

    def body(rank: int) -> str:
        mesh = mesh_of(size)
        text = caught(lambda: make(rank, mesh))
        sd.agree(mesh, fine=True)
        return text

    for text in on_ranks(size, body):
        assert message in text


def split_twice(rank: int, mesh: DeviceMesh) -> None:
    mlp = CATSMLP(HIDDEN, 64)
    parallelize_module(mlp, mesh, sd.CATSParallel())
    parallelize_module(mlp, mesh, sd.CATSParallel())


def hooked(rank: int, mesh: DeviceMesh) -> None:
    mlp = CATSMLP(HIDDEN, 64)
    mlp.up_proj.register_forward_hook(lambda *_: None)
    parallelize_module(mlp, mesh, sd.CATSParallel())


def quantised(rank: int, mesh: DeviceMesh) -> None:
    from subquad.nn import QuantisedCATSMLP

    parallelize_module(QuantisedCATSMLP(64, 96), mesh, sd.CATSParallel())


def exchanged(rank: int, mesh: DeviceMesh) -> None:
    layer = layer_of(4, 2)
    layer.conv_q = nn.Identity()
    parallelize_module(layer, mesh, sd.LawcatParallel())


def summed_elsewhere(rank: int, mesh: DeviceMesh) -> None:
    layer = layer_of(4, 2, qk_norm=True)
    layer.k_norm.weight.register_post_accumulate_grad_hook(lambda p: None)  # type: ignore[union-attr]
    parallelize_module(layer, mesh, sd.LawcatParallel())


def norm_of_all(rank: int, mesh: DeviceMesh) -> None:
    layer = LawcatAttention(HIDDEN, 4, 2, head_dim=8, parts={"q_norm": nn.RMSNorm(32)})
    parallelize_module(layer, mesh, sd.LawcatParallel())


REFUSED: dict[str, tuple[int, Callable[[int, DeviceMesh], Any], str]] = {
    "key heads": (
        3, lambda _, mesh: parallelize_module(layer_of(4, 2), mesh, sd.LawcatParallel()),
        "mesh: expected a size that divides the 2 key heads, got 3",
    ),
    "neurons of a fused projection": (
        3, lambda _, mesh: parallelize_module(fused(64), mesh, sd.CATSParallel()),
        "mesh: expected a size that divides the 64 neurons of gate_up_proj, got 3",
    ),
    "twice": (2, split_twice, "gate_proj.weight: expected a whole parameter, got a DTensor"),
    "a hook": (2, hooked, "up_proj: expected a Linear with weights that can be read and no hooks, got Linear"),
    "few bits": (2, quantised, "expected a CATSMLP, got a QuantisedCATSMLP"),
    "a part exchanged": (2, exchanged, "conv_q: expected a ShortConvolution with weights that can be read"),
    "a gradient with a hook": (2, summed_elsewhere, "k_norm.weight: expected no hook of its gradient"),
    "a norm over all heads": (2, norm_of_all, "q_norm.weight: expected one for every head of 8, got [32]"),
    "another layer": (
        2, lambda _, mesh: parallelize_module(nn.Linear(4, 4), mesh, sd.CATSParallel()),
        "expected a CATSMLP, got a Linear",
    ),
    "no converted layers": (2, lambda _, mesh: sd.parallelize(nn.Linear(4, 4), mesh), "model: expected layers made by"),
    "no mesh": (2, lambda *_: sd.parallelize(CATSMLP(HIDDEN, 64), None), "TypeError: mesh: expected a DeviceMesh, got NoneType"),
    "two dimensions": (
        2,
        lambda *_: sd.parallelize(
            CATSMLP(HIDDEN, 64), init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
        ),
        "mesh: expected a mesh of one dimension, got ('dp', 'tp'); pass mesh['tp']",
    ),
    "two dimensions without names": (
        2,
        lambda *_: sd.parallelize(CATSMLP(HIDDEN, 64), init_device_mesh("cpu", (1, 2))),
        "mesh: expected a mesh of one dimension, got 2 without names; give it mesh_dim_names, of which one is passed",
    ),
    "options that differ": (
        2,
        lambda rank, mesh: sd.parallelize(CATSMLP(HIDDEN, 64, prefill=("masked", "dense")[rank]), mesh),
        "options: expected the same on all ranks of the group",
    ),
    "embeddings that differ": (
        2,
        lambda rank, mesh: sd.parallelize(nn.Sequential(nn.Embedding(7 + rank, HIDDEN), CATSMLP(HIDDEN, 64)), mesh),
        "0.weight: expected the same on all ranks of the group, got ((7, 48), torch.float32) on rank 0, ((8, 48)",
    ),
    "thresholds that differ": (
        2,
        lambda rank, mesh: sd.parallelize(CATSMLP(HIDDEN, 64, threshold=0.1 * rank), mesh),
        "threshold: expected the same on all ranks of the group, got 0.0 on rank 0, 0.1",
    ),
    "one rank alone is wrong": (
        2,
        lambda rank, mesh: sd.parallelize(CATSMLP(HIDDEN, 64) if rank else nn.Linear(4, 4), mesh),
        "model: expected layers made by",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    refused(*REFUSED[name])


def test_a_rank_that_is_not_in_the_mesh_is_told() -> None:
    def body(rank: int) -> str:
        mesh = DeviceMesh("cpu", [0, 1])
        return caught(lambda: sd.parallelize(CATSMLP(HIDDEN, 64), mesh))

    assert on_ranks(3, body) == ["nothing"] * 2 + [
        "ValueError: mesh: expected a mesh that has this rank (2), got one of [0, 1]"
    ]


def test_a_part_of_a_layer_is_not_asked_for_the_whole() -> None:
    mlp, layer = CATSMLP(HIDDEN, 64), layer_of(4, 2)

    def body(rank: int) -> list[str]:
        mesh = mesh_of(2)
        one = parallelize_module(copy.deepcopy(mlp), mesh, sd.CATSParallel())
        other = parallelize_module(copy.deepcopy(layer), mesh, sd.LawcatParallel())
        other.conv_k.weight = nn.Parameter(other.conv_k.weight.full_tensor().detach())
        x = torch.zeros(1, 2, HIDDEN)
        return [caught(one.to_dense), caught(lambda: one.gate(x)), caught(lambda: other(x))]

    for found in on_ranks(2, body):
        assert "expected whole weights, got those that parallelize has split" in found[0]
        assert "expected whole weights where gates are asked for" in found[1]
        assert "conv_k.weight: expected a parameter that is split over 2 processes, got a whole one" in found[2]
