"""Weights of a GGUF file taken as they are: bytes, the order of rows, other types, files that do not fit, a whole model."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import subquad
from subquad.convert.gguf import BLOCKS, GgufFile, rows_of
from subquad.integrations.transformers import CatsConfig, convert, load_converted, to_dense
from subquad.nn import QuantisedCATSMLP, QuantisedDown, QuantisedEmbedding, QuantisedLinear
from subquad.reference.quantised_linear import FORMATS, halves, integers, unpack

from . import tiny

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = [
    pytest.mark.usefixtures("no_gradients"),
    pytest.mark.filterwarnings("ignore:.*native kernels are not in use"),  # any backend will do
]
LAYERS = 2
HEADS, KV, HIDDEN = (tiny.SIZES[name] for name in ("num_attention_heads", "num_key_value_heads", "hidden_size"))
TYPES = pytest.mark.parametrize("kind", list(BLOCKS))


def build(**sizes: Any) -> Any:
    return tiny.build(num_hidden_layers=LAYERS, **sizes)


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows in the order of llama's files."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write(path: Path, model: Any, kinds: dict[str, str], permute: bool = True, drop: str = "") -> dict[str, Any]:
    """A file of the model, whose weights become what the file says; the blocks by the model's names.

    Args:
        kinds: type by a part of a name, "" for all others.
        drop: the name of a tensor to leave out.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    blocks = {}
    for name, parameter in model.named_parameters():
        kind = gguf.GGMLQuantizationType[next((k for part, k in kinds.items() if part in name), "F32")]
        kind = kind if parameter.dim() == 2 else gguf.GGMLQuantizationType.F32
        heads = next((n for part, n in (("q_proj", HEADS), ("k_proj", KV)) if part in name and permute), 0)
        weight = permuted(parameter, heads) if heads else parameter
        data = gguf.quantize(weight.numpy(), kind)
        found = torch.tensor(gguf.dequantize(data, kind)).view(weight.shape)
        parameter.copy_(
            found.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape) if heads else found
        )
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target != drop:
            writer.add_tensor(target, data, raw_dtype=kind)
        blocks[name] = data
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return blocks


def blocks_of(module: Any, heads: int = 0) -> torch.Tensor:
    """The bytes of a file's blocks [N, bytes] that a module has, rows of `heads` heads in the order of llama's files."""
    kind = FORMATS[module.format]
    if isinstance(module, QuantisedDown):
        across = integers(module.weight, module.format).flatten(-2).t()  # [H, I]
        numbers = [x.t() for x in halves(module.scales, module.format) if x is not None]
        groups = across.reshape(across.shape[0], -1, 32)
        if kind.bits == 4:
            groups = groups[..., :16] | groups[..., 16:] << 4
        codes = (groups & 0xFF).to(torch.uint8)
    else:
        count = module.in_features // 32
        rows = module.weight if not heads else permuted(module.weight, heads)
        codes = rows[:, : count * kind.code_bytes].unflatten(1, (count, -1))
        numbers = [x for x in unpack(rows, module.format)[1:] if x is not None]
    parts = [x.contiguous().view(torch.uint8).unflatten(1, (-1, 2)) for x in numbers]
    return torch.cat([*parts, codes], -1).flatten(1)


# --- blocks ----------------------------------------


@TYPES
def test_rows_are_the_numbers_and_the_bytes_of_blocks(kind: str) -> None:
    quantisation = gguf.GGMLQuantizationType[kind]
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(0))
    blocks = gguf.quantize(weight.numpy(), quantisation)
    rows = rows_of(blocks, BLOCKS[kind])
    exact = torch.tensor(gguf.dequantize(blocks, quantisation))
    assert torch.equal(subquad.dequantise(rows, BLOCKS[kind]), exact)
    assert rows.shape == blocks.shape
    for row, block in zip(rows.tolist(), blocks.tolist(), strict=True):
        assert Counter(row) == Counter(block)


# --- a small model ----------------------------------------


@pytest.mark.parametrize("permute", [True, False])
@pytest.mark.parametrize("mlp", [None, "cats"])
@TYPES
def test_a_model_of_a_file(kind: str, mlp: str | None, permute: bool, ids: torch.Tensor, tmp_path: Path) -> None:
    model = build()
    blocks = write(tmp_path / "x.gguf", model, {"proj": kind, "embed": "Q8_0"}, permute)
    dense, want = copy.deepcopy(model), model(ids).logits
    report = convert(model, mlp=mlp, weights="gguf", gguf_file=tmp_path / "x.gguf")
    assert not report.left and not any(isinstance(m, (nn.Linear, nn.Embedding)) for m in model.modules())
    assert (model.model.layers[0].mlp.down_proj.format, model.lm_head.format) == (BLOCKS[kind], "int8")
    assert isinstance(model.model.layers[0].mlp, QuantisedCATSMLP) == (mlp is not None)
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-4)
    for name, module in model.named_modules():
        if not isinstance(module, (QuantisedLinear, QuantisedDown, QuantisedEmbedding)):
            continue
        exact: Any = dense.get_submodule(name)
        assert torch.equal(module.to_dense().weight, exact.weight), name
        if not isinstance(module, QuantisedEmbedding):  # which has the bytes of the output layer
            heads = next((n for part, n in (("q_proj", HEADS), ("k_proj", KV)) if part in name and permute), 0)
            key = "model.embed_tokens.weight" if name == "lm_head" else f"{name}.weight"
            assert blocks_of(module, heads).numpy().tobytes() == blocks[key].tobytes(), name
        assert not isinstance(module, QuantisedDown) or module.shared
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_output_layer_of_its_own(ids: torch.Tensor, tmp_path: Path) -> None:
    model = build(tie_word_embeddings=False)
    write(tmp_path / "x.gguf", model, {"lm_head": "Q4_1", "proj": "Q4_0", "embed": "Q8_0"})
    want = model(ids).logits
    convert(model, mlp="cats", weights="gguf", gguf_file=str(tmp_path / "x.gguf"))
    assert model.lm_head.format == "int4_min" and isinstance(model.model.embed_tokens, nn.Embedding)
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-4)


def test_a_model_in_half_precision_and_in_a_wrapper(ids: torch.Tensor, tmp_path: Path) -> None:
    model = build()
    write(tmp_path / "x.gguf", model, {"proj": "Q4_1", "embed": "Q8_0"})
    model.bfloat16()
    wrapper = nn.ModuleDict({"inner": model})
    report = convert(wrapper, weights="gguf", gguf_file=tmp_path / "x.gguf", layers=["inner.model.layers.1"])
    assert len(report) == 7 and report[0].startswith("inner.model.layers.1.")


def test_it_is_saved_and_loaded_without_the_file(ids: torch.Tensor, tmp_path: Path) -> None:
    model = build()
    write(tmp_path / "x.gguf", model, {"proj": "Q4_1", "embed": "Q8_0"})
    convert(model, mlp=CatsConfig(threshold=0.01), weights="gguf", gguf_file=tmp_path / "x.gguf")
    model.save_pretrained(tmp_path / "saved")
    again = load_converted(tmp_path / "saved")
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.model.layers[1].mlp.down_proj.shared and again.model.layers[1].mlp.down_proj.format == "int4_min"


def test_what_is_dense_in_the_file_stays(tmp_path: Path) -> None:
    model = build()
    write(tmp_path / "x.gguf", model, {"v_proj": "F16", "proj": "Q8_0", "embed": "F32"})
    report = convert(model, weights="gguf", gguf_file=tmp_path / "x.gguf")
    assert report.left["model.layers.1.self_attn.v_proj"] == "dense in the file: blk.1.attn_v.weight is in F16"
    assert set(report.left) == {f"model.layers.{i}.self_attn.v_proj" for i in range(2)} | {
        "lm_head",
        "model.embed_tokens",
    }
    assert isinstance(model.lm_head, nn.Linear) and model.lm_head.weight is model.model.embed_tokens.weight


def test_to_dense_gives_the_weights_back(tmp_path: Path) -> None:
    model = build()
    write(tmp_path / "x.gguf", model, {"proj": "Q4_0", "embed": "Q8_0"})
    state = {name: value.clone() for name, value in model.state_dict().items()}
    convert(model, mlp="cats", weights="gguf", gguf_file=tmp_path / "x.gguf")
    to_dense(model)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:invalid value")  # of gguf's own dequantisation
@pytest.mark.parametrize("value", [0.0, torch.inf, torch.nan])
def test_scales_of_a_file_are_taken_as_they_are(value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def quantize(data: Any, kind: Any) -> Any:
        blocks = plain(data, kind)
        if kind.name == "Q8_0":
            blocks[3, :2] = torch.tensor([value], dtype=torch.float16).view(torch.uint8).numpy()
        return blocks

    model, plain = build(), gguf.quantize
    monkeypatch.setattr(gguf, "quantize", quantize)
    write(tmp_path / "x.gguf", model, {"mlp": "Q8_0"})
    convert(model, mlp="cats", weights="gguf", gguf_file=tmp_path / "x.gguf", layers=["model.layers.0.mlp"])
    y = model.model.layers[0].mlp(torch.ones(1, HIDDEN))
    assert bool(y.isfinite().all()) == (value == 0.0)
    assert not model.model.layers[0].mlp.gate_proj.to_dense().weight[3, :32].isfinite().all() or value == 0.0


# --- files that do not fit ----------------------------------------


def refused(model: Any, path: Path, message: str, **options: Any) -> None:
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        convert(model, weights="gguf", gguf_file=path, **options)
    assert {name: id(module) for name, module in model.named_modules()} == before


def test_the_file_of_another_model(tmp_path: Path) -> None:
    model = build()
    write(tmp_path / "x.gguf", model, {"proj": "Q4_1", "embed": "Q8_0"})
    other = copy.deepcopy(model)
    other.model.layers[1].mlp.up_proj.weight[5, 7] += 1e-3
    refused(
        other,
        tmp_path / "x.gguf",
        r"model.layers.1.mlp.up_proj: gguf_file: expected the numbers of the model in blk.1.ffn_up.weight, got others",
        mlp="cats",
    )
    refused(
        build(hidden_size=96, head_dim=16),
        tmp_path / "x.gguf",
        r"q_proj: gguf_file: expected blk.0.attn_q.weight of shape",
    )


def test_a_tensor_that_is_missing(tmp_path: Path) -> None:
    model = build()
    write(tmp_path / "x.gguf", model, {"proj": "Q4_1", "embed": "Q8_0"}, drop="blk.1.ffn_down.weight")
    refused(model, tmp_path / "x.gguf", r"model.layers.1.mlp.down_proj: gguf_file: expected a tensor for this layer")
    model.model.layers[0].self_attn.extra = nn.Linear(HIDDEN, HIDDEN)
    refused(model, tmp_path / "x.gguf", r"model.layers.0.self_attn.extra: gguf_file: expected a tensor for this layer")


@pytest.mark.parametrize("kind", ["Q5_0", "Q5_1"])
def test_other_types_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    model = build()
    write(tmp_path / "x.gguf", model, {"o_proj": kind, "proj": "Q4_1", "embed": "Q8_0"})
    message = (
        rf"o_proj: gguf_file: expected blk.0.attn_output.weight in blocks of Q8_0, Q4_0, Q4_1 or dense, got {kind}"
    )
    refused(model, tmp_path / "x.gguf", message)


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K", "IQ4_NL"])
def test_super_blocks_are_refused_by_name(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package writes none: bytes of zero."""
    quantisation = gguf.GGMLQuantizationType[kind]
    weights, size = gguf.GGML_QUANT_SIZES[quantisation]

    def quantize(data: Any, kind: Any) -> Any:
        if kind is not quantisation:
            return plain(data, kind)
        return torch.zeros(data.shape[0], data.shape[1] // weights * size, dtype=torch.uint8).numpy()

    model, plain = build(hidden_size=256, intermediate_size=256), gguf.quantize
    monkeypatch.setattr(gguf, "quantize", quantize)
    write(tmp_path / "x.gguf", model, {"up_proj": kind, "proj": "Q8_0", "embed": "Q8_0"})
    refused(
        model, tmp_path / "x.gguf", rf"up_proj: .*expected blk.0.ffn_up.weight in blocks of .*, got {kind}", mlp="cats"
    )


def test_an_mlp_that_is_dense_in_part(tmp_path: Path) -> None:
    model = build()
    write(tmp_path / "x.gguf", model, {"layers.1.mlp.down_proj": "F16", "proj": "Q8_0", "embed": "Q8_0"})
    message = r"model.layers.1.mlp.down_proj: expected a weight in few bits like the others, got dense in the file"
    refused(model, tmp_path / "x.gguf", message, mlp="cats")
    assert "model.layers.1.mlp.down_proj" in convert(model, weights="gguf", gguf_file=tmp_path / "x.gguf").left


def test_what_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.gguf").write_bytes(b"x" * 100)
    refused(build(), tmp_path / "x.gguf", "gguf_file: expected a GGUF file, got .*x.gguf")
    refused(build(), tmp_path / "y.gguf", "gguf_file: expected the path of a file, got .*y.gguf")
    writer = gguf.GGUFWriter(tmp_path / "z.gguf", "no architecture")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(build(), tmp_path / "z.gguf", "gguf_file: expected an architecture that .* knows, got 'no architecture'")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match="weights='gguf' needs the Python package gguf; install it with"):
        GgufFile(tmp_path / "x.gguf")


@pytest.mark.parametrize("size", [0, 3, 8, 24, 60, 120, 199, 400, 3000, -1])
def test_a_file_that_was_cut(size: int, tmp_path: Path) -> None:
    """In its header, among its names, among its tensors."""
    model = build()
    write(tmp_path / "x.gguf", model, {"proj": "Q4_0", "embed": "Q8_0"})
    data = (tmp_path / "x.gguf").read_bytes()
    (tmp_path / "x.gguf").write_bytes(data[:size])
    refused(model, tmp_path / "x.gguf", "gguf_file: expected a GGUF file, got .*x.gguf")


# --- a whole model ----------------------------------------


@pytest.mark.slow
def test_smollm2_from_its_file() -> None:
    """Every layer: the bytes of the file, the numbers of the usual loader; and the same log-likelihood of a text."""
    from subquad.demo.model import DemoError, load, texts, weights_file

    try:
        file = weights_file()
    except DemoError as error:
        pytest.skip(str(error))
    subject = load("cpu", "float32")
    model: Any = subject.model
    ids = torch.tensor([subject.tokenizer(texts()[1][:1500])["input_ids"]])
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    want = model(ids, labels=ids).loss
    exact = {name: p for name, p in model.named_parameters()}
    full = sum(p.nbytes for p in exact.values())
    report = convert(model, mlp="cats", weights="gguf", gguf_file=file)
    assert not report.left and sum(isinstance(m, QuantisedCATSMLP) for m in model.modules()) == 30
    own = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    assert sum(own.values()) <= 0.2 * full
    names = GgufFile(file)._names
    seen = 0
    for name, module in model.named_modules():
        if isinstance(module, (QuantisedLinear, QuantisedDown)) and name != "lm_head":
            seen += 1
            weight = exact[f"{name}.weight"]
            assert torch.equal(module.to_dense().weight, weight), name
            blocks = tensors[names.get_name(f"{name}.weight", try_suffixes=(".weight",))].data
            heads = next((n for part, n in (("q_proj", 9), ("k_proj", 3)) if part in name), 0)
            assert blocks_of(module, heads).numpy().tobytes() == blocks.tobytes(), name
    assert seen == 210
    torch.testing.assert_close(model(ids, labels=ids).loss, want, rtol=1e-5, atol=0)
