"""Bad input: an error of the right kind that starts with the argument's name and says what was expected."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import subquad
from subquad.contract import HANDLES
from subquad.testing import Sampler, backend_params
from subquad.testing.specs.cats_mlp import draw

ROOT = Path(__file__).resolve().parents[3]
H, I = 8, 12  # noqa: E741


def mlp_args(**changes: Any) -> dict[str, Any]:
    """A valid call of cats_mlp, with changes."""
    sample = draw(Sampler(), "errors", 2, H, I, threshold=0.1, bias=True)
    return {**sample.args, **sample.kwargs, **changes}


def ones(*shape: int, **options: Any) -> torch.Tensor:
    return torch.ones(shape, **options)


MLP = {
    "x list": ("x", [[1.0] * H], TypeError, r"x: expected a torch.Tensor, got list"),
    "x dtype": ("x", ones(2, H, dtype=torch.int64), TypeError, r"x: expected float32, .*got torch.int64"),
    "x width": ("x", ones(2, H + 1), ValueError, rf"x: expected shape \[..., {H}\].*got \[2, {H + 1}\]"),
    "x scalar": ("x", torch.tensor(1.0), ValueError, r"x: expected shape .*got \[\]"),
    "x mixed": ("x", ones(2, H, dtype=torch.bfloat16), TypeError, r"w_gate: expected torch.bfloat16 as x has"),
    "w_gate none": ("w_gate", None, TypeError, r"w_gate: expected a torch.Tensor, got NoneType"),
    "w_gate dims": ("w_gate", ones(H), ValueError, r"w_gate: expected shape \[I, H\]"),
    "w_gate strides": ("w_gate", ones(H, I).t(), ValueError, r"w_gate: expected a contiguous last dimension"),
    "w_gate dtype": (
        "w_gate",
        ones(I, H, dtype=torch.float16),
        TypeError,
        r"w_gate: expected torch.float32 as x has, got torch.float16",
    ),
    "w_up shape": ("w_up", ones(I + 1, H), ValueError, rf"w_up: expected shape \[{I}, {H}\], got \[{I + 1}, {H}\]"),
    "w_up swapped": ("w_up", ones(H, I), ValueError, r"w_up: expected shape"),
    "w_up device": ("w_up", ones(I, H, device="meta"), ValueError, r"w_up: expected device cpu as x has, got meta"),
    "w_up strides": ("w_up", ones(I, 2 * H)[:, ::2], ValueError, r"w_up: expected a contiguous last dimension"),
    "w_down shape": ("w_down", ones(I, H), ValueError, rf"w_down: expected shape \[{H}, {I}\], got \[{I}, {H}\]"),
    "w_down strides": ("w_down", ones(H, 2 * I)[:, ::2], ValueError, r"w_down: expected strides"),
    "w_down int8": (
        "w_down",
        ones(H, I, dtype=torch.int8),
        TypeError,
        r"w_down: expected torch.float32 as x has, got torch.int8",
    ),
    "b_gate shape": ("b_gate", ones(H), ValueError, rf"b_gate: expected shape \[{I}\], got \[{H}\]"),
    "b_up dtype": ("b_up", ones(I, dtype=torch.float16), TypeError, r"b_up: expected torch.float32"),
    "b_down scalar": ("b_down", 0.5, TypeError, r"b_down: expected a torch.Tensor, got float"),
    "threshold nan": ("threshold", math.nan, ValueError, r"threshold: expected a number, got NaN"),
    "threshold nan tensor": (
        "threshold",
        torch.full((I,), math.nan),
        ValueError,
        r"threshold: expected numbers, got NaN",
    ),
    "threshold shape": (
        "threshold",
        ones(I - 1),
        ValueError,
        rf"threshold: expected shape \[\], \[1\] or \[{I}\], got \[{I - 1}\]",
    ),
    "threshold dims": ("threshold", ones(1, I), ValueError, r"threshold: expected shape"),
    "threshold dtype": (
        "threshold",
        ones(I, dtype=torch.float64),
        TypeError,
        r"threshold: expected float32, got torch.float64",
    ),
    "threshold device": ("threshold", ones(I, device="meta"), ValueError, r"threshold: expected device cpu"),
    "threshold string": ("threshold", "0.1", TypeError, r"threshold: expected a float or a float32 tensor, got str"),
    "threshold bool": ("threshold", True, TypeError, r"threshold: expected a float"),
    "activation": ("activation", "swish", ValueError, r"activation: expected one of 'silu', .*got 'swish'"),
    "mask_mode": ("mask_mode", "any", ValueError, r"mask_mode: expected one of 'token', 'union', got 'any'"),
    "prefill": ("prefill", None, ValueError, r"prefill: expected one of"),
    "grad": ("grad", "straight", ValueError, r"grad: expected one of 'masked', 'ste', got 'straight'"),
    "sparse limit": ("max_sparse_tokens", 17, ValueError, r"max_sparse_tokens: expected 0 to 16, got 17"),
    "negative limit": ("max_sparse_tokens", -1, ValueError, r"max_sparse_tokens: expected 0 to 16, got -1"),
    "fractional limit": ("max_sparse_tokens", 2.5, TypeError, r"max_sparse_tokens: expected an int, got float"),
    "inclusive": ("inclusive", "no", TypeError, r"inclusive: expected a bool, got str"),
    "backend": ("backend", "cutlass", ValueError, r"backend: expected one of native, .*got 'cutlass'"),
}


@pytest.mark.parametrize(("name", "value", "kind", "message"), MLP.values(), ids=MLP)
def test_cats_mlp(name: str, value: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{message}"):
        subquad.cats_mlp(**{**mlp_args(backend="reference"), name: value})


ACTIVATION = {
    "z list": ("z", [1.0], TypeError, r"z: expected a torch.Tensor, got list"),
    "z dtype": ("z", ones(2, dtype=torch.int32), TypeError, r"z: expected float32, .*got torch.int32"),
    "z scalar": ("z", torch.tensor(1.0), ValueError, r"z: expected at least one dimension"),
    "threshold nan": ("threshold", math.nan, ValueError, r"threshold: expected a number, got NaN"),
    "threshold shape": ("threshold", ones(3), ValueError, r"threshold: expected shape \[\], \[1\] or \[4\], got \[3\]"),
    "activation": ("activation", "tanh", ValueError, r"activation: expected one of"),
    "grad": ("grad", True, ValueError, r"grad: expected one of"),
    "inclusive": ("inclusive", 2, TypeError, r"inclusive: expected a bool, got int"),
    "backend": ("backend", "cuda", ValueError, r"backend: expected one of"),
}


@pytest.mark.parametrize(("name", "value", "kind", "message"), ACTIVATION.values(), ids=ACTIVATION)
def test_cats_activation(name: str, value: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{message}"):
        subquad.cats_activation(**{"z": ones(2, 4), "threshold": 0.1, "backend": "reference", name: value})


@backend_params("cats_mlp", "native", "triton", "simt")
def test_float64_is_for_the_reference(backend: str) -> None:
    args = mlp_args()
    wide = {n: a.double() for n, a in args.items() if isinstance(a, torch.Tensor)}
    with pytest.raises(TypeError, match=f"^x: backend {backend!r} expected float32, bfloat16 or float16, got float64"):
        subquad.cats_mlp(**{**args, **wide}, backend=backend)
    with pytest.raises(TypeError, match=f"^z: backend {backend!r} expected"):
        subquad.cats_activation(ones(2, dtype=torch.float64), 0.1, backend=backend)


def raw_args(**changes: Any) -> list[Any]:
    """A valid call of the raw operator, with changes."""
    args = {
        **{"x": ones(2, H), "w_gate": ones(I, H), "w_up": ones(I, H), "w_down": ones(H, I), "threshold": ones(1)},
        **{"b_gate": None, "b_up": None, "b_down": None, "activation": 0, "inclusive": False, "union_mask": False},
    }
    return list({**args, **changes}.values())


RAW = {
    "x dims": ("x", ones(H)),
    "x width": ("x", ones(2, H - 1)),
    "x strides": ("x", ones(H, 2).t()),
    "w_gate dims": ("w_gate", ones(I, H, 1)),
    "w_gate strides": ("w_gate", ones(H, I).t()),
    "w_up rows": ("w_up", ones(I - 1, H)),
    "w_up dtype": ("w_up", ones(I, H, dtype=torch.bfloat16)),
    "w_down shape": ("w_down", ones(I, H)),
    "w_down strides": ("w_down", ones(H, 2 * I)[:, ::2]),
    "threshold dtype": ("threshold", ones(1, dtype=torch.float64)),
    "threshold size": ("threshold", ones(I - 1)),
    "b_gate size": ("b_gate", ones(I - 1)),
    "b_up dtype": ("b_up", ones(I, dtype=torch.float16)),
    "b_down size": ("b_down", ones(I)),
    "activation low": ("activation", -1),
    "activation high": ("activation", 4),
}


@backend_params("cats_mlp", "native", "triton", "simt")
@pytest.mark.parametrize(("name", "value"), RAW.values(), ids=RAW)
def test_raw_operator_never_touches_foreign_memory(backend: str, name: str, value: Any) -> None:
    """Whoever calls the operator past the public function gets an error, not a crash."""
    operator = HANDLES[backend]["cats_mlp_fwd"]
    operator(*raw_args())
    with pytest.raises((RuntimeError, ValueError, TypeError, AssertionError)) as caught:
        operator(*raw_args(**{name: value}))
    assert name in str(caught.value), f"the message does not name {name}: {caught.value}"
    assert str(ROOT) not in str(caught.value)


RAW_ACTIVATION = {
    "z strides": ("cats_activation_fwd", (ones(4, 3).t(), ones(1), 0, False), "z"),
    "threshold size": ("cats_activation_fwd", (ones(3, 4), ones(3), 0, False), "threshold"),
    "threshold dtype": ("cats_activation_fwd", (ones(3, 4), ones(1).half(), 0, False), "threshold"),
    "activation": ("cats_activation_fwd", (ones(3, 4), ones(1), 7, False), "activation"),
    "grad_a shape": ("cats_activation_bwd", (ones(3, 3), ones(3, 4), ones(1), 0, False, False), "grad_a"),
    "u shape": ("cats_glu_fwd", (ones(3, 4), ones(4, 3), ones(1), 0, False), "u"),
    "grad_h shape": ("cats_glu_bwd", (ones(1, 4), ones(3, 4), ones(3, 4), ones(1), 0, False, False), "grad_h"),
}


@backend_params("cats_activation", "native", "triton", "simt")
@pytest.mark.parametrize(("op", "args", "name"), RAW_ACTIVATION.values(), ids=RAW_ACTIVATION)
def test_raw_activation_never_touches_foreign_memory(backend: str, op: str, args: tuple[Any, ...], name: str) -> None:
    with pytest.raises((RuntimeError, ValueError, TypeError, AssertionError)) as caught:
        HANDLES[backend][op](*args)
    assert name in str(caught.value)


@backend_params("cats_mlp", "native")
def test_operator_refuses_a_union_beyond_a_panel(backend: str) -> None:
    """What one token wakes all use, and panels are computed one after the other: the public function never asks for it."""
    x, w, t = torch.randn(300, 8), torch.randn(20, 8), torch.zeros(1)
    with pytest.raises(RuntimeError, match="union_mask: expected at most 256 rows of x, got 300"):
        HANDLES[backend]["cats_mlp_fwd"](x, w, w, w.t(), t, None, None, None, 0, False, True)
