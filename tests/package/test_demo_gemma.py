"""Gemma's file for the demo: joined from packages, checked, kept; and what is said where a package is missing or broken."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
import torch

from subquad import demo
from subquad.convert import GgufFile
from subquad.demo import gemma
from subquad.demo.model import DemoError
from subquad.integrations.transformers import convert

WHOLE = b"GGUF" + bytes(range(256)) * 5


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small ones in the place of the real ones; the folder that they are in."""
    folder = tmp_path / "site"
    for number, package in enumerate(gemma.PARTS):
        (folder / package / "data").mkdir(parents=True)
        (folder / package / "__init__.py").write_text("raise RuntimeError('imported')")
        part = WHOLE[number * 400 : (number + 1) * 400]
        (folder / package / "data" / f"{gemma.FILE}.part{number:02}").write_bytes(part)
    (folder / gemma.PACKAGE).mkdir()
    (folder / gemma.PACKAGE / "__init__.py").write_text("")
    find_spec = importlib.util.find_spec

    def find(name: str) -> object:
        return PathFinder.find_spec(name, [str(folder)]) if name.startswith(gemma.PACKAGE) else find_spec(name)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    monkeypatch.setattr(gemma, "SIZE", len(WHOLE))
    monkeypatch.setattr(gemma, "SHA256", hashlib.sha256(WHOLE).hexdigest())
    monkeypatch.setenv("SUBQUAD_CACHE_DIR", str(tmp_path / "cache"))
    return folder


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "models").glob("*"))


def test_parts_are_joined_once(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = gemma.weights_file()
    assert file.read_bytes() == WHOLE and kept(tmp_path) == [file]
    monkeypatch.setattr(gemma, "_part", None)  # not read again
    assert gemma.weights_file() == file


@pytest.mark.parametrize("change", [lambda x: x[:-1], lambda x: x[:-1] + b"!", lambda x: x + b"!"])
def test_a_damaged_copy_is_joined_again(packages: Path, tmp_path: Path, change) -> None:  # type: ignore[no-untyped-def]
    file = gemma.weights_file()
    file.write_bytes(change(WHOLE))
    assert gemma.weights_file().read_bytes() == WHOLE and kept(tmp_path) == [file]


@pytest.mark.parametrize("package", [gemma.PACKAGE, *gemma.PARTS])
def test_a_missing_package_is_named(packages: Path, tmp_path: Path, package: str) -> None:
    (packages / package).rename(tmp_path / "elsewhere")
    with pytest.raises(DemoError) as error:
        gemma.weights_file()
    assert str(error.value) == f"the Python package {package!r} is missing; install it with: {gemma.INSTALL}"


def test_a_missing_part_is_named(packages: Path, tmp_path: Path) -> None:
    (packages / gemma.PARTS[2] / "data" / f"{gemma.FILE}.part02").unlink()
    with pytest.raises(DemoError, match=rf"{gemma.PARTS[2]}' holds no data/{gemma.FILE}.part02; install it again with"):
        gemma.weights_file()
    assert not kept(tmp_path)


@pytest.mark.parametrize("content", [b"", WHOLE[400:799], WHOLE[400:799] + b"!", WHOLE[400:801]])
def test_parts_that_make_another_file_are_refused(packages: Path, tmp_path: Path, content: bytes) -> None:
    (packages / gemma.PARTS[1] / "data" / f"{gemma.FILE}.part01").write_bytes(content)
    with pytest.raises(
        DemoError, match=f"another file than expected: {len(WHOLE) - 400 + len(content)} bytes with SHA"
    ):
        gemma.weights_file()
    assert not kept(tmp_path)


def test_the_command_tells_what_to_install(packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for package in ("transformers", "accelerate", "gguf", "matplotlib"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    gone = gemma.PARTS[3]
    (packages / gone).rename(tmp_path / "elsewhere")
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    arguments = ["--model", "gemma3-270m", "--quick", "--output", str(tmp_path / "out")]
    assert demo.run_from_args(parser.parse_args(arguments)) == 2
    error = capsys.readouterr().err.strip()
    assert error == f"subquad demo: the Python package {gone!r} is missing; install it with: {gemma.INSTALL}"
    assert not (tmp_path / "out").exists()


def test_the_model_of_a_file(tmp_path: Path) -> None:
    """A small one, written with norms as files have them: the same logits, and blocks that `convert` takes byte by byte."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.Gemma3TextConfig(
        hidden_size=64, num_hidden_layers=7, intermediate_size=96, num_attention_heads=4, num_key_value_heads=1, head_dim=32,
        sliding_window=5, max_position_embeddings=128, vocab_size=50, query_pre_attn_scalar=256, initializer_range=0.3,
    )  # fmt: skip
    model = transformers.Gemma3ForCausalLM(config).eval().requires_grad_(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, 7)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "gemma3")
    for field, name in gemma._FIELDS.items():
        writer.add_uint32(f"gemma3.{field}", getattr(config, name))
    writer.add_token_list([str(i) for i in range(50)])
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.uniform_(-0.5, 0.5)
        kind = gguf.GGMLQuantizationType.Q8_0 if parameter.dim() == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quantize((parameter + 1 if "norm" in name else parameter).numpy(), kind)
        numbers = torch.tensor(gguf.dequantize(data, kind))
        parameter.copy_(numbers - 1 if "norm" in name else numbers)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ids = torch.arange(3, 40)[None]
    want = model(ids).logits
    found = gemma.build(GgufFile(tmp_path / "x.gguf"), torch.float32)
    assert found.lm_head.weight is found.model.embed_tokens.weight
    torch.testing.assert_close(found(ids).logits, want, rtol=1e-5, atol=1e-5)
    assert not convert(found, mlp="cats", weights="gguf", gguf_file=tmp_path / "x.gguf").left
    torch.testing.assert_close(found(ids).logits, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_another_model_is_no_choice(capsys: pytest.CaptureFixture) -> None:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--model", "gemma"])
    error = capsys.readouterr().err
    assert "invalid choice: 'gemma'" in error and "gemma3-270m" in error and "smollm2-135m" in error
