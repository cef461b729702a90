"""Contract of the step of a streaming cache: new tokens attend to it and enter it."""

from __future__ import annotations

from typing import Any

import torch

from ._contract import Contract, Operator

MAX_HEAD_DIM = 256
RING_DTYPES = (torch.int8, torch.float8_e4m3fn)  # beside that of the tokens; these have scales


def _fake(k: torch.Tensor, v: torch.Tensor, q: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    b, t, heads = k.shape[0], k.shape[1], 0 if q is None else q.shape[2]
    return v.new_empty((b, t, heads, v.shape[3])), k.new_empty((b, t, heads), dtype=torch.float32)


CONTRACT = Contract(
    {
        "sink_attention_step_": Operator(
            "(Tensor k, Tensor v, Tensor? q, Tensor(a!) sink_k, Tensor(b!) sink_v, Tensor(c!) ring_k, Tensor(d!) ring_v, "
            "Tensor(e!)? k_scale, Tensor(f!)? v_scale, Tensor(g!) seen, Tensor(h!) written, Tensor first, Tensor? tokens, "
            "Tensor? sink_logits, Tensor? turns, int window, float scale, float rotary_scale, bool interleaved, "
            "bool rotated, bool absolute, bool together, bool advance) -> (Tensor, Tensor)",
            _fake,
            outputs=("out", "lse"),
            strided=("k", "v", "q"),
        ),
    },
    cuda=("native", "triton", "reference"),  # a step moves the cache's memory once, and multiplies little
    family="sink",
)
