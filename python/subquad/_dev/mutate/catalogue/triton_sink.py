"""Faults of the Triton kernels of the streaming cache's step."""

from __future__ import annotations

from ..fault import Fault, Where


def _of(file: str, first: tuple[str, ...] = ("test_triton", "forward")) -> Where:
    return Where(f"kernels/triton_ops/sink_attention_step/{file}", ("tests/ops/sink_attention_step",), "triton", first)


_ATTEND = _of("attend.py")
_ENTER = _of("enter.py")
_HEADS = _of("heads.py")

FAULTS = (
    Fault(
        "triton-sink-logit-per-split",
        "sink",
        _ATTEND,
        '    top = tl.full([BM], float("-inf"), tl.float32)\n    total = tl.zeros([BM], tl.float32)\n',
        '    top = tl.full([BM], float("-inf"), tl.float32)\n    total = tl.zeros([BM], tl.float32)\n'
        "    if results.sink_logits is not None and FLAGS.SPLIT:\n"
        "        top = tl.load(results.sink_logits + h)\n"
        "        total = tl.full([BM], 1.0, tl.float32)\n",
    ),
    Fault("triton-sink-ring-unwrapped", "bounds", _ATTEND, "tl.where(place < 0, place + sizes.ring, place)", "place"),
    Fault(
        "triton-sink-window-of-the-tile",
        "mask",
        _ATTEND,
        "(token[None, :] >= view.lowest[:, None]) & (token[None, :] < view.stop[:, None])",
        "(token[None, :] < view.stop[:, None])",
    ),
    Fault(
        "triton-sink-far-as-near",
        "formula",
        _ATTEND,
        "            at -= tl.maximum(gone, 0)\n",
        "            at -= tl.maximum(gone, 0) * 0\n",
    ),
    Fault("triton-sink-hidden-values", "nan", _ATTEND, "finite_part(v, 0, MASKED)", "finite_part(v, 0, False)"),
    Fault(
        "triton-sink-phase-32-bits",
        "index width",
        _HEADS,
        "phase = tokens.to(tl.int64)[:, None] * turns[None, :]",
        "phase = tokens.to(tl.int32).to(tl.int64)[:, None] * turns[None, :]",
    ),
    Fault("triton-sink-float8-ties", "rounding", _HEADS, "bits + 0x7FFFF + ((bits >> 20) & 1)", "bits + 0x80000"),
    Fault("triton-sink-overtaken", "bounds", _ENTER, "(t >= count - sizes.ring)", "(t > count - sizes.ring)"),
    Fault(
        "triton-sink-entered-unturned",
        "state",
        _ENTER,
        "wide = rotate(wide, token, turns)",
        "wide = rotate(wide, token * 0, turns)",
    ),
)
