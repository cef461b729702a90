"""Embeddings that scale their rows, as Gemma's, in few bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from subquad.integrations.transformers import convert, load_converted, to_dense
from subquad.nn import QuantisedEmbedding

from .tiny import build

pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = [
    pytest.mark.usefixtures("no_gradients"),
    pytest.mark.filterwarnings("ignore:.*native kernels are not in use"),  # any backend will do
]
SIZES = {"num_hidden_layers": 1, "head_dim": 16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["Gemma", "Gemma3Text"])
def test_an_embedding_that_scales_its_rows(family: str, dtype: torch.dtype, ids: torch.Tensor, tmp_path: Path) -> None:
    """To the bit: the scale is rounded to the dtype of the rows; saved, loaded, made dense and converted again."""
    model = build(family, **SIZES, hidden_size=96).to(dtype)  # the root of 96 is no number of any dtype
    convert(model, weights="int8")
    embedding, own = model.model.embed_tokens, type(build(family, **SIZES).model.embed_tokens)
    assert isinstance(embedding, QuantisedEmbedding)
    rows = embedding(ids)
    model.save_pretrained(tmp_path)
    assert torch.equal(load_converted(tmp_path).model.embed_tokens(ids), rows)
    to_dense(model, dtype)
    theirs = model.model.embed_tokens
    if own is not nn.Embedding:  # before transformers 5 Gemma scaled elsewhere
        theirs = own(160, 96, 0, 96**0.5).to(dtype)
        theirs.weight = model.model.embed_tokens.weight
        assert not torch.equal(theirs(ids), theirs.weight[ids])
    assert torch.equal(rows, theirs(ids)) and torch.equal(rows, model.model.embed_tokens(ids))
    assert not convert(model, weights="int8").left
    torch.testing.assert_close(model.model.embed_tokens(ids), rows, rtol=0.01, atol=0.01)


def test_an_embedding_that_does_more_stays(ids: torch.Tensor) -> None:
    class ShiftedScaledWordEmbedding(nn.Embedding):
        embed_scale = torch.tensor(3.0)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * 3.0 + 1.0

    model = build(**SIZES)
    shifted = ShiftedScaledWordEmbedding(160, 64, 0)
    shifted.weight = model.model.embed_tokens.weight
    model.model.embed_tokens = shifted
    report = convert(model, weights="int8")
    assert set(report.left) == {"lm_head", "model.embed_tokens"} and "ShiftedScaled" in report.left["lm_head"]
