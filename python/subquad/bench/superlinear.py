"""Superlinear attention as a whole: the search, the window and the spans."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

import subquad

from ..superlinear import SuperlinearConfig
from ..testing.spec import BenchCase, OpSpec, Sample, Sampler, Tolerance

# What the reference package's README shows, and what its published model has.
SETTINGS = {
    "readme": SuperlinearConfig(sw_index=3, backward_factor=3.0, forward_factor=1.0),
    "released": SuperlinearConfig(
        sw_index=65, backward_factor=3.0, forward_factor=1.0, span_power=0.55, search_power=0.55,
        inv_search_power_int=None,
    ),
}  # fmt: skip
_HEADS, _KV_HEADS, _WIDTH = 4, 1, 128
_LONG, _SHARE = 16384, 64  # of longer sequences a quadratic peer computes a share of the rows


def _cases() -> Iterator[BenchCase]:
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        for setting in SETTINGS:
            for t in (4096, 16384, 65536, 262144):
                if t < 65536 or name == "fp32":
                    yield BenchCase(f"{setting}-{t}-{name}", {"setting": setting, "t": t, "keys": t, "dtype": dtype})
            yield BenchCase(
                f"{setting}-decode-1m-{name}", {"setting": setting, "t": 1, "keys": 1 << 20, "dtype": dtype}
            )
        params = {"setting": "readme", "t": 16384, "keys": 16384, "dtype": dtype, "backward": True}
        yield BenchCase(f"readme-16384-{name}-backward", params)
    for setting in SETTINGS:
        params = {"setting": setting, "t": 512, "keys": 512, "dtype": torch.float32}
        yield BenchCase(f"quick-{setting}-512", params, quick=True)


def _sample(case: BenchCase, device: str) -> Sample:
    """Numbers whose products are exact, so that all backends choose the same stripes."""
    p = case.params
    draw = Sampler(p["dtype"], device)
    quarters = lambda *shape: (draw.normal(*shape) * 4).round().clamp(-16, 16) / 4  # noqa: E731
    args: dict[str, torch.Tensor | None] = {
        "q_search": quarters(1, p["t"], _HEADS, _WIDTH),
        "q": draw.normal(1, p["t"], _HEADS, _WIDTH),
        "k": quarters(1, p["keys"], _KV_HEADS, _WIDTH),
        "v": draw.normal(1, p["keys"], _KV_HEADS, _WIDTH),
    }
    return Sample(case.id, args, {"config": SETTINGS[p["setting"]]}, rounded_once=False)


def _oracle(sample: Sample, result: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A few rows, against the dense definition of those rows."""
    tokens, keys = sample["q"].shape[1], sample["k"].shape[1]
    rows = torch.linspace(0, tokens - 1, min(tokens, 8)).long()
    few = sample.replace(q_search=sample["q_search"][:, rows], q=sample["q"][:, rows])
    return result[:, rows], _definition(**few.args, **few.kwargs, cache_position=keys - tokens + rows)  # type: ignore[arg-type]


def _definition(*args: torch.Tensor, **options: Any) -> torch.Tensor:
    result = subquad.superlinear_attention(*args, **options, backend="reference")
    assert isinstance(result, torch.Tensor)
    return result


def _sdpa(sample: Sample) -> Callable[[], torch.Tensor] | None:
    """Dense causal attention of the same heads."""
    tokens = sample["q"].shape[1]
    if tokens > _LONG:
        return None

    def run() -> torch.Tensor:
        q, k, v = (sample[n].transpose(1, 2) for n in ("q", "k", "v"))
        return F.scaled_dot_product_attention(q, k, v, is_causal=tokens > 1, enable_gqa=True).transpose(1, 2)

    return run


def _sdpa_share(sample: Sample) -> Callable[[], torch.Tensor] | None:
    """The same for one row in 64 of a long sequence, in 16 blocks, each over the keys before it."""
    q, k, v = (sample[n].transpose(1, 2) for n in ("q", "k", "v"))
    tokens, keys = q.shape[2], k.shape[2]
    if tokens <= _LONG:
        return None
    block = tokens // _SHARE // 16
    starts = [i * (tokens // 16) + (tokens // 16 - block) // 2 for i in range(16)]

    def run() -> torch.Tensor:
        parts = [
            F.scaled_dot_product_attention(
                q[:, :, s : s + block], k[:, :, : keys - tokens + s + block], v[:, :, : keys - tokens + s + block],
                enable_gqa=True,
            )
            for s in starts
        ]  # fmt: skip
        return torch.cat(parts, 2)

    return run


def _keys_seen(case: BenchCase) -> float:
    """Of all rows of a head, without those that spans lose at their ends."""
    p = case.params
    config = SETTINGS[p["setting"]]
    step = max(1, p["t"] // 1024)
    return sum(config.max_keys(t + 1) for t in range(p["keys"] - p["t"], p["keys"], step)) * step


SUPERLINEAR = OpSpec(
    name="superlinear_attention",
    stem="span_attention",
    fn=subquad.superlinear_attention,
    reference=_definition,
    samples=lambda sampler: (),
    grad_args=("q_search", "q", "k", "v"),
    rows=(),
    # The window's result is rounded to the dtype before it is mixed.
    tol=Tolerance(forward={torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}),
    bench=tuple(_cases()),
    bench_sample=_sample,
    bench_oracle=_oracle,
    flops=lambda case: (14.0 if case.params.get("backward") else 4.0) * _HEADS * _WIDTH * _keys_seen(case),
    peers={"sdpa": _sdpa, "sdpa/64": _sdpa_share},
)
