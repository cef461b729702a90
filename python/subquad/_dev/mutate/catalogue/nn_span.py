"""Faults of the layer of Superlinear attention."""

from __future__ import annotations

import dataclasses

from ..fault import Fault, Where

_LAYER = Where(
    "python/subquad/nn/superlinear_attention.py",
    ("tests/models/test_superlinear.py", "tests/models/test_needle.py"),
    "not triton and not simt",
    (),
)

FAULTS = (
    Fault("nn-spans-place", "formula", _LAYER, "return place if seen is None else place + seen", "return place"),
    Fault("nn-spans-search-norm", "formula", _LAYER, "normed(self.q_norm, search)", "search"),
    Fault("nn-spans-rope-factor", "formula", _LAYER, "factor = self.rope.attention_scaling**2", "factor = 1.0"),
    Fault(
        "nn-spans-rope-chunk",
        "formula",
        _LAYER,
        "k = self.rope.rotate(k, place[:, None])",
        "k = self.rope.rotate(k, place[:, None] - place[0])",
    ),
    Fault(
        "nn-spans-search-rotated",
        "formula",
        _LAYER,
        "q, k, search = (self.scores.rotate(x, given) for x in (q, k, search))",
        "q, k = (self.scores.rotate(x, given) for x in (q, k))",
    ),
    Fault("nn-spans-packed", "mask", _LAYER, "first = firsts_of(tokens, t)", "first = None"),
    Fault(
        "nn-spans-padding",
        "mask",
        _LAYER,
        "shown = None if shown is None else shown.to(q.device).expand(b, -1)",
        "shown = None",
    ),
    Fault("nn-spans-cached-packs", "guard", _LAYER, "lambda: refuse_packed(tokens)", "lambda: None"),
    Fault(
        "nn-spans-cached-begins",
        "guard",
        dataclasses.replace(_LAYER, file="python/subquad/nn/_tokens.py"),
        "first = real.cumsum(1) == 1",
        "first = real.cumsum(1) >= 1",
    ),
    Fault(
        "nn-spans-sliding-cache",
        "guard",
        _LAYER,
        'getattr(layer, "is_sliding", False) or hasattr(layer, "state")',
        'hasattr(layer, "state")',
    ),
    Fault(
        "nn-spans-other-state",
        "guard",
        _LAYER,
        'getattr(layer, "is_sliding", False) or hasattr(layer, "state")',
        'getattr(layer, "is_sliding", False)',
    ),
    Fault(
        "nn-spans-scale",
        "formula",
        _LAYER,
        "layer._used = dataclasses.replace(config, sm_scale=scores.scaling)",
        "pass",
    ),
    Fault("nn-spans-softcap", "guard", _LAYER, "if scores.softcap is not None:", "if scores.softcap == 0:"),
    Fault("nn-spans-dtype", "dispatch", _LAYER, "k, v = k.to(q.dtype), v.to(q.dtype)", "pass"),
    Fault("nn-spans-copied-bias", "state", _LAYER, "search.bias.copy_(bias)", "search.bias.zero_()"),
    Fault("nn-spans-asked-dropout", "state", _LAYER, "part.training = False", "pass"),
    Fault("nn-spans-asked-mode", "state", _LAYER, "part.training = mode", "pass"),
    Fault("nn-spans-asked-bias", "formula", _LAYER, "(answers[1:] - answers[0]).T", "answers[1:].T"),
)
