"""Adapters of peft and offloading of accelerate, before and after a conversion."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import subquad
from subquad.integrations.transformers import CatsConfig, LawcatConfig, convert, revert
from subquad.nn import CATSMLP, LawcatAttention

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*native kernels are not in use"),  # any backend will do
    pytest.mark.filterwarnings("ignore:.*must be called, so nothing is skipped"),
]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 60, "initializer_range": 0.2, "pad_token_id": 0, "eos_token_id": None}
MLP, ATTENTION = ("gate_proj", "up_proj", "down_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")


def build(kind: str = "Llama") -> nn.Module:
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**SIZES)).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, 60, (2, 11), generator=torch.Generator().manual_seed(0))


def adapt(model: nn.Module, targets: tuple[str, ...], config: str = "lora", **options: Any) -> Any:
    """A PeftModel around a model, which it changes in place, with adapters that say something."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    if config == "ia3":
        inputs = [name for name in targets if name in ("down_proj", "o_proj")]
        made = peft.IA3Config(target_modules=list(targets), feedforward_modules=inputs)
    else:
        made = peft.LoraConfig(target_modules=list(targets), r=2, use_dora=config == "dora", **options)
    adapted = peft.get_peft_model(model, made)
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "ia3" in name:
            nn.init.normal_(parameter, mean=float(config == "ia3"), std=0.3)
    return adapted.eval()


# --- CATS ----------------------------------------


def masked(model: nn.Module, threshold: float) -> nn.Module:
    """A dense model whose activation is thresholded."""
    for module in model.modules():
        for name in ("act_fn", "activation_fn"):
            if hasattr(module, name):
                getattr(module, name).register_forward_hook(lambda _, args, s: torch.where(s.abs() > threshold, s, 0))
    return model


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("config", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("kind", ["Llama", "Phi3"])
def test_adapters_of_the_mlp_count(kind: str, config: str, order: str, ids: torch.Tensor) -> None:
    targets = ("gate_up_proj", "down_proj") if kind == "Phi3" else MLP
    dense = adapt(masked(build(kind), 0.05), targets, config)
    model = build(kind)
    if order == "after":
        convert(model, mlp="cats", threshold=0.05)
    model = adapt(model, targets, config)
    if order == "before":
        convert(model, mlp="cats", threshold=0.05)
    with torch.no_grad():
        for part in (ids, ids[:1, :3]):
            torch.testing.assert_close(model(part).logits, dense(part).logits)
    for one in (model, dense):
        one(ids, labels=ids).loss.backward()
    pairs = [(p.grad, q.grad) for p, q in zip(model.parameters(), dense.parameters(), strict=True) if p.requires_grad]
    assert len(pairs) > 3
    for got, want in pairs:
        torch.testing.assert_close(got, want)
        assert want.abs().sum() > 0
    with subquad.CatsCalibrator(model) as one, subquad.CatsCalibrator(dense) as other, torch.no_grad():
        model(ids)
        dense(ids)
    first = next(iter(one.sketches))  # the layers after it see other inputs
    assert torch.equal(one.sketches[first].counts, other.sketches[first].counts)
    merged = model.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
    revert(merged)
    assert all(p.is_contiguous() for p in merged.parameters())


@pytest.mark.parametrize("name", MLP)
@pytest.mark.parametrize("layout", ["auto", "keep"])
def test_one_adapter_merged_and_taken_away(name: str, layout: str, ids: torch.Tensor) -> None:
    model, dense = build(), adapt(build(), (name,))
    base = build()(ids).logits
    convert(model, mlp=CatsConfig(down_layout=layout))
    adapted = adapt(model, (name,))
    with torch.no_grad():
        want = dense(ids).logits
        assert (want - base).abs().max() > 0.01
        torch.testing.assert_close(adapted(ids).logits, want)
        with adapted.disable_adapter():
            torch.testing.assert_close(adapted(ids).logits, base)
        adapted.merge_adapter()
        torch.testing.assert_close(adapted(ids).logits, want)
        adapted.unmerge_adapter()
        model = adapted.unload()
        torch.testing.assert_close(model(ids).logits, base, rtol=1e-4, atol=1e-4)
        assert all(module.reads(torch.zeros(1, 32)) for module in model.modules() if isinstance(module, CATSMLP))


# --- LAWCAT ----------------------------------------


class Scaled(nn.Module):
    """An adapter as somebody may write one."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.in_features, self.out_features = base, base.in_features, base.out_features
        self.low = nn.Linear(base.in_features, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.low(x)


def adapt_by_hand(model: nn.Module, targets: tuple[str, ...]) -> nn.Module:
    torch.manual_seed(1)
    for layer in model.model.layers:
        for name in targets:
            setattr(layer.self_attn, name, Scaled(getattr(layer.self_attn, name)))
    return model


def test_copies_of_a_whole_mlp(ids: torch.Tensor) -> None:
    """Made after a conversion they are of what it made; before, converting would lose them when the adapter is saved."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"], r=2)
    model = build()
    convert(model, mlp="cats", threshold=0.05)
    with torch.no_grad():
        want = model(ids).logits
        torch.testing.assert_close(peft.get_peft_model(model, config).eval()(ids).logits, want)
    with pytest.raises(ValueError, match=r"^base_model\..*\.mlp: mlp: expected the MLP itself, got peft's copies"):
        convert(peft.get_peft_model(build(), config), mlp="cats")


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("o_proj",), ATTENTION])
@pytest.mark.parametrize("by", [adapt, adapt_by_hand])
@pytest.mark.parametrize("layer_local", [False, True])
@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_teacher_and_student_share_adapters(
    kind: str, layer_local: bool, by: Callable[..., nn.Module], targets: tuple[str, ...], ids: torch.Tensor
) -> None:
    dense = by(build(kind), targets)
    model = build(kind)
    convert(model, attention="lawcat")
    model = by(model, targets)
    with torch.no_grad():
        want = dense(ids).logits
    subquad.trainable_parameters(model, stage=1)
    heard: list[torch.Tensor] = []
    layer = next(module for module in dense.modules() if hasattr(module, "o_proj"))
    layer.o_proj.register_forward_pre_hook(lambda _, args: heard.append(args[0]))
    with torch.no_grad():
        dense(ids)
    with subquad.attention_transfer(model, layer_local=layer_local) as transfer:
        torch.testing.assert_close(model(ids, use_cache=False).logits, want)
        losses = dict(transfer.losses)
        if not layer_local:
            transfer.loss().backward()
    student = next(module for module in model.modules() if isinstance(module, LawcatAttention))
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.new_parameters().values() if p.dim() > 1)
    seen: dict[str, Any] = {}
    hook = student.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    with torch.no_grad():
        model(ids, use_cache=False)
        hook.remove()
        said = student.mix(**seen)
    expected = 1000 * F.mse_loss(said, heard[0])  # what the dense model with its adapters says, before o_proj
    torch.testing.assert_close(next(iter(losses.values())).detach(), expected, rtol=1e-4, atol=1e-4)
    revert(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, want)


@pytest.mark.heavy
@pytest.mark.parametrize("config", ["lora", "ia3"])
def test_the_second_stage_trains_adapters_alone(config: str, ids: torch.Tensor) -> None:
    model = adapt(build(), ("q_proj", "o_proj"), config)
    convert(model, attention="lawcat")
    new, chosen = subquad.trainable_parameters(model, stage=1), subquad.trainable_parameters(model, stage=2)
    of = {name: [n.rpartition(f"{name}.")[2] for n in chosen if f".{name}" in n] for name in ATTENTION}
    assert all("lora_" in n or "ia3_" in n for n in (*of["q_proj"], *of["o_proj"])) and of["q_proj"] and of["o_proj"]
    assert of["k_proj"] == of["v_proj"] == ["weight", "weight"] and set(new) < set(chosen)
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert {id(p) for p in model.parameters() if p.grad is not None} == {id(p) for p in chosen.values()}


def test_a_compiled_child_is_heard(ids: torch.Tensor) -> None:
    model, want = build(), build()(ids).logits
    convert(model, attention="lawcat")
    for layer in model.model.layers:
        layer.self_attn.o_proj = torch.compile(layer.self_attn.o_proj, backend="eager")
    with subquad.attention_transfer(model) as transfer, torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, want)
        assert transfer.loss() > 0


# --- accelerate ----------------------------------------


def offload_to_cpu(model: nn.Module, folder: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def offload_to_disk(model: nn.Module, folder: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu"))


def dispatch(model: nn.Module, folder: Path, offloaded: str | None = None) -> None:
    """As `device_map` does, on one device."""
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    parts = ("", "model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    hooks.attach_align_device_hook_on_blocks(
        model,
        execution_device=dict.fromkeys(parts, torch.device("cpu")),
        offload={part: part == offloaded for part in parts},
        weights_map=model.state_dict(),
    )


def dispatch_and_offload(model: nn.Module, folder: Path) -> None:
    dispatch(model, folder, "model.layers.1")


CONVERSIONS: dict[str, dict[str, Any]] = {
    "cats": {"mlp": CatsConfig(threshold=0.05)},
    "lawcat": {"attention": LawcatConfig(conv_bias=True)},
    "window": {
        "attention": LawcatConfig(window_size=4, use_output_gate=True, conv_on_v=True, share_qk_conv=True),
        "mlp": CatsConfig(threshold=0.05),
    },
}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("place", [offload_to_cpu, offload_to_disk, dispatch, dispatch_and_offload])
def test_offloaded_models_run(
    place: Callable[[nn.Module, Path], None], conversion: str, order: str, ids: torch.Tensor, tmp_path: Path
) -> None:
    model, plain = build(), build()
    if order == "before":
        place(model, tmp_path)
    for one in (model, plain):
        torch.manual_seed(2)
        convert(one, **CONVERSIONS[conversion])
    assert not any(
        p.is_meta for m in model.modules() if isinstance(m, LawcatAttention) for p in m.new_parameters().values()
    )
    if order == "after":
        place(model, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits)
        tokens = [one.generate(ids, max_new_tokens=4, do_sample=False) for one in (model, plain)]
        assert torch.equal(*tokens)
    with subquad.attention_transfer(model) if conversion == "lawcat" else torch.no_grad():
        model(ids, use_cache=False)
    if place is dispatch:  # nothing is offloaded: weights are read as ever
        assert all(module.reads(torch.zeros(1, 32)) for module in model.modules() if isinstance(module, CATSMLP))
    revert(model)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, build()(ids).logits)


@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("preloaded", ["LlamaDecoderLayer", "LlamaMLP LlamaAttention CATSMLP LawcatAttention"])
def test_layers_inside_what_is_offloaded_as_a_whole_stay(conversion: str, preloaded: str, ids: torch.Tensor) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    options = {"execution_device": torch.device("cpu"), "preload_module_classes": preloaded.split()}
    for early in (False, True):
        model = build()
        if early:
            convert(model, **CONVERSIONS[conversion])
        with torch.no_grad():
            want = model(ids, use_cache=False).logits
        accelerate.cpu_offload(model, **options)
        with pytest.raises(ValueError, match=r"^model\.layers\.0\..* offloads as a part of"):
            revert(model) if early else convert(model, **CONVERSIONS[conversion])
        with torch.no_grad():
            torch.testing.assert_close(model(ids, use_cache=False).logits, want)
        accelerate.hooks.remove_hook_from_submodules(model)
        revert(model) if early else convert(model, **CONVERSIONS[conversion])


def test_removing_the_hooks_makes_children_plain_again(ids: torch.Tensor, tmp_path: Path) -> None:
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    model = build()
    convert(model, mlp="cats", threshold=0.05)
    want = copy.deepcopy(model)(ids).logits
    offload_to_cpu(model, tmp_path)
    hooks.remove_hook_from_submodules(model)
    mlp = model.model.layers[0].mlp
    assert mlp.reads(torch.zeros(1, 32))
    torch.testing.assert_close(model(ids).logits, want)
