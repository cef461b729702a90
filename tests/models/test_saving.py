"""Converted models written and read: shared parameters, and `load_converted` with layers, options and thresholds."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from subquad.convert import convert_mlps
from subquad.convert.record import same_layer
from subquad.integrations.transformers import CatsConfig, LawcatConfig, convert, load_converted, revert
from subquad.nn import CATSMLP, LawcatAttention

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")

pytestmark = pytest.mark.filterwarnings("ignore:.*native kernels are not in use")  # any backend will do
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 60, "initializer_range": 0.2}
TIED = [
    {"share_qk_conv": True},
    {"share_qk_conv": True, "conv_bias": True, "conv_on_v": True},
    {"share_qk_conv": True, "tie_qk_feature_map": False},
    {"tie_qk_feature_map": True, "share_kv_features": True},
]


def build(tied_embeddings: bool = False) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied_embeddings)
    return transformers.LlamaForCausalLM(config).eval()


def train(model: nn.Module) -> nn.Module:
    """New parameters that are not what a conversion starts with."""
    for module in model.modules():
        if isinstance(module, LawcatAttention):
            for parameter in module.new_parameters().values():
                nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(60, (2, 11), generator=torch.Generator().manual_seed(0))


def is_tied(layer: LawcatAttention) -> bool:
    return layer.conv_k.weight is layer.conv_q.weight and layer.conv_k.bias is layer.conv_q.bias


# --- shared parameters ----------------------------------------


@pytest.mark.parametrize("options", TIED)
def test_shared_parameters_are_saved_and_loaded(options: dict[str, Any], ids: torch.Tensor, tmp_path: Path) -> None:
    model = build(tied_embeddings=True)
    convert(model, attention="lawcat", **options)
    want = train(model)(ids).logits
    model.save_pretrained(tmp_path)
    other = load_converted(tmp_path)
    assert torch.equal(other(ids).logits, want)
    if options.get("share_qk_conv"):
        assert all(is_tied(layer.self_attn) for layer in other.model.layers)


MADE: dict[str, Callable[[LawcatAttention], LawcatAttention]] = {
    "itself": lambda layer: layer,
    "copy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "meta": lambda layer: LawcatAttention(
        32, 4, 2, share_qk_conv=True, conv_bias=True, device="meta"
    ).to_empty(device="cpu"),
    "half": lambda layer: copy.deepcopy(layer).half(),
}  # fmt: skip


@pytest.mark.parametrize("made", MADE)
def test_shared_parameters_stay_shared(made: str) -> None:
    layer = LawcatAttention(32, 4, 2, share_qk_conv=True, conv_bias=True)
    nn.init.normal_(layer.conv_q.weight)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    assert len({value.untyped_storage().data_ptr() for value in layer.state_dict().values()}) == len(state)
    other = MADE[made](layer)
    assert is_tied(other)
    for assign in (False, True):
        other.load_state_dict(state, assign=assign)
        assert is_tied(other) and torch.equal(other.conv_k.weight, state["conv_q.weight"].to(other.conv_k.weight.dtype))
    bad = state | {"conv_k.weight": state["conv_k.weight"] + 1}
    with pytest.raises(RuntimeError, match=r"conv_k.weight: expected what conv_q.weight has"):
        other.load_state_dict(bad)
    assert is_tied(other) and torch.equal(other.conv_k.weight, state["conv_q.weight"].to(other.conv_k.weight.dtype))
    other.conv_k = copy.deepcopy(other.conv_k)  # exchanged: no longer shared
    other.load_state_dict(bad)
    assert not is_tied(other.to("cpu")) and not torch.equal(other.conv_k.weight, other.conv_q.weight)


# --- load_converted ----------------------------------------


def mixed() -> nn.Module:
    """Other options in every layer, and one without conversions."""
    model = build()
    convert(model, attention=LawcatConfig(window_size=4, share_qk_conv=True, keep=3), layers=[0])
    convert(model, attention=LawcatConfig(gate="scalar"), mlp=CatsConfig(threshold=0.05, grad="ste"), layers=[1])
    convert(
        model, mlp=CatsConfig(inclusive=True, mask_mode="union", max_sparse_tokens=3, down_layout="keep"), layers=[0]
    )
    model.model.layers[1].mlp.set_threshold(torch.rand(64) * 0.1, target_sparsity=0.5, calibration_tokens=7)
    return train(model)


@pytest.mark.parametrize("variant", [None, "other"])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_everything_comes_back(shard: str, variant: str | None, ids: torch.Tensor, tmp_path: Path) -> None:
    model = mixed()
    want = model(ids).logits
    model.save_pretrained(tmp_path, max_shard_size=shard, variant=variant)
    other = load_converted(tmp_path, variant=variant)
    assert type(other) is type(model) and not other.training
    assert torch.equal(other(ids).logits, want) and torch.equal(other(ids[:1, :2]).logits, model(ids[:1, :2]).logits)
    for one, two in zip(model.model.layers, other.model.layers, strict=True):
        assert type(one.mlp) is type(two.mlp) and type(one.self_attn) is type(two.self_attn)
        if isinstance(one.mlp, CATSMLP):
            assert torch.equal(one.mlp.threshold, two.mlp.threshold) and torch.equal(
                one.mlp.cats_meta, two.mlp.cats_meta
            )
            assert one.mlp.down_proj.weight.stride() == two.mlp.down_proj.weight.stride()
            names = ("inclusive", "mask_mode", "max_sparse_tokens", "grad", "down_layout", "prefill")
            assert all(getattr(one.mlp, name) == getattr(two.mlp, name) for name in names)
        if isinstance(one.self_attn, LawcatAttention):
            assert one.self_attn.config == two.self_attn.config and one.self_attn.keep == two.self_attn.keep
    assert other.config.subquad == model.config.subquad
    other.save_pretrained(tmp_path / "again")  # and from there
    assert torch.equal(load_converted(tmp_path / "again")(ids).logits, want)
    revert(other)
    revert(model)
    assert torch.equal(other(ids).logits, model(ids).logits) and not hasattr(other.config, "subquad")


def test_other_classes_and_dtypes(ids: torch.Tensor, tmp_path: Path) -> None:
    model = mixed()
    model.model.layers[1].self_attn.gate.double()  # its own dtype, for once
    model.save_pretrained(tmp_path)
    base = load_converted(tmp_path, transformers.AutoModel)
    assert isinstance(base.layers[0].self_attn, LawcatAttention) and isinstance(base.layers[1].mlp, CATSMLP)
    assert base.layers[1].self_attn.gate[1].weight.dtype is torch.float64
    base.layers[1].self_attn.gate.float()
    model.model.layers[1].self_attn.gate.float()
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
    half = load_converted(tmp_path, transformers.AutoModelForCausalLM, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.model.layers[1].mlp.threshold, model.model.layers[1].mlp.threshold)


def test_plain_loading_gives_the_dense_model(ids: torch.Tensor, tmp_path: Path) -> None:
    model = mixed()
    model.save_pretrained(tmp_path)
    revert(model)
    dense, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert torch.equal(dense.eval()(ids).logits, model(ids).logits)
    unexpected = info["unexpected_keys"]
    assert any("conv_q" in key for key in unexpected) and any("threshold" in key for key in unexpected)
    dense.save_pretrained(tmp_path / "dense")  # which still says that it was converted
    with pytest.raises(ValueError, match=r"path: expected a parameter 'model.layers.0.self_attn.* got none"):
        load_converted(tmp_path / "dense")


def test_nothing_to_load(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config: expected an entry 'subquad'.* no layer was converted"):
        load_converted(tmp_path)
    convert(model, mlp="cats")
    model.save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())
    text["subquad"]["version"] = 2
    (tmp_path / "config.json").write_text(json.dumps(text))
    with pytest.raises(ValueError, match="config: expected version 1"):
        load_converted(tmp_path)
    text["subquad"]["version"] = 1
    (tmp_path / "config.json").write_text(json.dumps(text))
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    with pytest.raises((ValueError, OSError), match=r"safetensors"):
        load_converted(tmp_path)


def test_the_record_follows_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    config = model.config
    convert(model.model, mlp="cats", layers=[0])  # a part with the same config
    assert [group["layers"] for group in config.subquad["converted"]] == [["layers.0.mlp"]]
    convert_mlps(model, CatsConfig(prefill="dense"), layers=[1, 2])
    groups = config.subquad["converted"]
    assert [group["layers"] for group in groups] == [
        ["model.layers.0.mlp"],
        ["model.layers.1.mlp", "model.layers.2.mlp"],
    ]
    assert groups[1]["options"]["prefill"] == "dense" and json.loads(json.dumps(groups)) == groups
    before = copy.deepcopy(config.subquad)
    monkeypatch.setattr(type(model), "set_submodule", lambda *args, **kwargs: 1 / 0)
    for act in (lambda: convert(model, attention="lawcat"), lambda: revert(model)):
        with pytest.raises(ZeroDivisionError):
            act()
        assert config.subquad == before
    monkeypatch.undo()
    revert(model)
    assert not hasattr(config, "subquad")


def test_layers_are_found_in_models_with_more_or_fewer_modules_around_them() -> None:
    names = ["model.layers.1.mlp", "model.layers.11.mlp"]
    for name in ("layers.1.mlp", "model.layers.1.mlp", "base_model.model.model.layers.1.mlp"):
        assert same_layer(name, names) == names[0]
    for name in ("layers.2.mlp", "mlp", "1.mlp.x"):
        with pytest.raises(ValueError, match="model: expected one layer"):
            same_layer(name, names)
