"""Converted models written and read: shared parameters, and `load_converted` with layers, options and thresholds."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from subquad.convert import convert_mlps
from subquad.convert.record import same_layer
from subquad.integrations.transformers import CatsConfig, LawcatConfig, convert, load_converted, revert
from subquad.nn import CATSMLP, LawcatAttention

from . import tiny

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")

pytestmark = [
    pytest.mark.usefixtures("no_gradients"),
    pytest.mark.filterwarnings("ignore:.*native kernels are not in use"),  # any backend will do
]
TIED = [
    {"share_qk_conv": True},
    {"share_qk_conv": True, "conv_bias": True, "conv_on_v": True},
    {"share_qk_conv": True, "tie_qk_feature_map": False},
    {"tie_qk_feature_map": True, "share_kv_features": True},
]


def build(tied_embeddings: bool = False) -> nn.Module:
    return tiny.build(initializer_range=0.2, tie_word_embeddings=tied_embeddings)


def train(model: nn.Module) -> nn.Module:
    """New parameters that are not what a conversion starts with."""
    for module in model.modules():
        if isinstance(module, LawcatAttention):
            for parameter in module.new_parameters().values():
                nn.init.normal_(parameter, std=0.3)
    return model


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
    model.model.layers[1].mlp.set_threshold(torch.rand(96) * 0.1, target_sparsity=0.5, calibration_tokens=7)
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


# --- folders that are damaged ----------------------------------------


def _edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """The tensors of a folder with a single file."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _config(folder: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    """What the config says is converted."""
    text = json.loads((folder / "config.json").read_text())
    change(text["subquad"]["converted"])
    (folder / "config.json").write_text(json.dumps(text))


def _cut(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])


def _reshape(name: str, *shape: int) -> Callable[[Path], None]:
    return lambda folder: _edit(folder, lambda t: t.update({name: torch.zeros(shape, dtype=t[name].dtype)}))


def _cast(name: str, dtype: torch.dtype) -> Callable[[Path], None]:
    return lambda folder: _edit(folder, lambda t: t.update({name: t[name].to(dtype)}))


def _drop(*names: str) -> Callable[[Path], None]:
    return lambda folder: _edit(folder, lambda t: [t.pop(name) for name in names if name in t])


CODES, TAPS, GATE = "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.conv_q.weight", "mlp.threshold"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no codes": (_drop(CODES), rf"path: expected codes '{CODES}' among the weights, got none"),
    "no scales": (_drop(f"{CODES[:19]}down_proj.weight"), r"path: expected codes '.*down_proj.weight' .* got none"),
    "no embedding": (
        _drop("model.embed_tokens.weight", "lm_head.weight"),
        r"path: expected codes '(lm_head|model.embed_tokens).weight' among the weights, got none",
    ),
    "other codes": (_reshape(CODES, 96, 34), rf"path: expected codes '{CODES}' in U8 \[96, 68\], got U8 \[96, 34\]"),
    "codes in floats": (_cast(CODES, torch.float32), rf"path: expected codes '{CODES}' in U8 .*, got F32"),
    "no taps": (_drop(TAPS), rf"path: expected a parameter '{TAPS}' among the weights, got none"),
    "other taps": (
        _reshape(TAPS, 3, 4),
        "(?s)path: expected weights that fit model.layers.0.self_attn: .*conv_q.weight",
    ),
    "integer taps": (_cast(TAPS, torch.int32), rf"path: expected floating numbers in '{TAPS}', got torch.int32"),
    "other threshold": (
        _reshape(f"model.layers.0.{GATE}", 7),
        r"(?s)fit model.layers.0.mlp: .*threshold: expected shape",
    ),
    "empty": (lambda folder: _cut(folder, 0), "path: expected a whole safetensors file model.safetensors, got"),
    "no header": (lambda folder: _cut(folder, 100), "path: expected a whole safetensors file model.safetensors, got"),
    "half": (lambda folder: _cut(folder, 60_000), "path: expected a whole safetensors file model.safetensors, got"),
    "unknown": (
        lambda f: _config(f, lambda g: g[0].update(name="x")),
        "config: expected a conversion that .* KeyError",
    ),
    "no options": (
        lambda f: _config(f, lambda g: g[0].pop("options")),
        "config: expected a conversion that .* KeyError",
    ),
    "an option": (
        lambda f: _config(f, lambda g: g[0]["options"].update(colour=3)),
        "config: expected a conversion .*colour",
    ),
    "a layer": (lambda f: _config(f, lambda g: g[0]["layers"].append("layers.9.x")), "model: expected one layer"),
    "another kind of layer": (
        lambda f: _config(f, lambda g: [x["layers"].append("model.norm") for x in g if x["name"] == "linear"]),
        "config: model.norm: expected a layer that was converted, got",
    ),
    "no list": (lambda f: _config(f, lambda g: g.insert(0, 3)), "config: expected a conversion that"),  # type: ignore[arg-type]
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with taps, thresholds and codes."""
    torch.manual_seed(0)
    model = tiny.build(num_hidden_layers=2)
    convert(model, attention=LawcatConfig(), mlp=CatsConfig(threshold=0.1), weights="int8")
    path = tmp_path_factory.mktemp("saved")
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder(damage: str, folder: Path, tmp_path: Path) -> None:
    """Never a model with memory that nobody has written, nor an error without a name."""
    spoil, message = DAMAGES[damage]
    shutil.copytree(folder, tmp_path / "other")
    load_converted(tmp_path / "other")
    spoil(tmp_path / "other")
    with pytest.raises(ValueError, match=message):
        load_converted(tmp_path / "other")


def test_a_damaged_index(tmp_path: Path) -> None:
    mixed().save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    text = index.read_text()
    for wrong, message in (
        ("{", "path: expected a weight_map in model.safetensors.index.json, got JSON"),
        ("{}", "path: expected a weight_map in model.safetensors.index.json, got KeyError"),
        (
            text.replace("conv_q", "conv_x"),
            r"path: expected '.*conv_x.weight' in model-.*, as .*index.json says, got none",
        ),
    ):
        index.write_text(wrong)
        with pytest.raises(ValueError, match=message):
            load_converted(tmp_path)
    index.write_text(text)
    load_converted(tmp_path)
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(ValueError, match=r"path: expected a whole safetensors file model-00002.*, got"):
        load_converted(tmp_path)
    with pytest.raises(TypeError, match="output_loading_info: expected False"):
        load_converted(tmp_path, output_loading_info=True)
