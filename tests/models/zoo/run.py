"""How an entry of the zoo runs: the same weights under "eager" in float64, and under "subquad" in float64 and float32."""

from __future__ import annotations

import copy
import functools
import statistics
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from subquad import use_backend
from subquad.integrations.transformers import register

from .entry import Entry

NEW = 4  # tokens that are generated
PADDED = {"left": slice(0, 4), "right": slice(8, None)}  # columns of the second row that are padding
Tensors = dict[str, torch.Tensor]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
GRADIENTS = {torch.float64: 1e-12, torch.float32: 1e-4}  # each parameter's, some of them sums that nearly cancel


@functools.cache
def model_of(entry: Entry) -> Any:
    """The float64 model under "eager", with nothing left at the value that its initialisation gave it."""
    import transformers

    torch.manual_seed(zlib.crc32(entry.name.encode()))
    config = entry.config()
    config._attn_implementation = "eager"
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "batched_mm"
    model = getattr(transformers, entry.model)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2 or not parameter.any():  # norms, biases and sinks start as ones and zeros
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double()


def ours_of(entry: Entry, dtype: torch.dtype) -> Any:
    """The same model under "subquad", made so: not all models can be told later."""
    import transformers

    register()
    model = model_of(entry)
    config = copy.deepcopy(model.config)
    config._attn_implementation = "subquad"
    ours = getattr(transformers, entry.model)(config).eval().to(dtype)
    ours.load_state_dict(model.state_dict())
    if entry.generations:
        ours.generation_config = model.generation_config
    return ours


@contextmanager
def wide_softmax() -> Iterator[None]:
    """Eager attention asks for a softmax in float32, where what it adds to scores of padding overflows in a float64 model.

    See `findings/transformers_eager_float64_padding.sh`.
    """
    softmax = F.softmax

    def wide(x: torch.Tensor, dim: int | None = None, dtype: torch.dtype | None = None, **more: Any) -> torch.Tensor:
        return softmax(x, dim, dtype=None if x.dtype is torch.float64 else dtype, **more)

    F.softmax = wide  # type: ignore[assignment]
    try:
        yield
    finally:
        F.softmax = softmax


@contextmanager
def backend(dtype: torch.dtype) -> Iterator[None]:
    """The reference for float64, what is chosen by itself for float32."""
    with use_backend("reference" if dtype is torch.float64 else None):
        yield


def inputs_of(
    entry: Entry, side: str | None = None, dtype: torch.dtype = torch.float64
) -> tuple[Tensors, torch.Tensor | None]:
    """(arguments of a call, which of its results are those of tokens, bool [2, T]; None: all)."""
    generator = torch.Generator().manual_seed(3)
    arguments = entry.inputs(generator)
    arguments = {name: x.to(dtype) if x.is_floating_point() else x for name, x in arguments.items()}
    if side is None:
        return arguments, None
    real = torch.ones(2, arguments["input_ids"].shape[1], dtype=torch.long)
    real[1, PADDED[side]] = 0
    return arguments | {"attention_mask": real}, real.bool() if entry.by_token else None


def result(output: Any) -> torch.Tensor:
    """What a model says: logits, hidden states or embeddings."""
    names = ("logits", "logits_per_image", "last_hidden_state")
    found = next(x for name in names if (x := getattr(output, name, None)) is not None)
    assert isinstance(found, torch.Tensor)
    return found


def logits_and_gradients(entry: Entry, model: Any, dtype: torch.dtype) -> tuple[torch.Tensor, Tensors]:
    """Of a call without padding; gradients of all parameters for a loss that any of them shows in."""
    arguments, _ = inputs_of(entry, dtype=dtype)
    model.zero_grad(set_to_none=True)
    found = result(model(**arguments))
    probe = torch.arange(found.numel(), dtype=found.dtype).cos().view(found.shape)
    (probe * found).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found.detach(), gradients


@torch.no_grad()
def padded(entry: Entry, model: Any, dtype: torch.dtype, side: str) -> torch.Tensor:
    """Results [n, ...] of tokens beside padding."""
    arguments, real = inputs_of(entry, side, dtype)
    found = result(model(**arguments))
    return found if real is None else found[real]


@torch.no_grad()
def generated(entry: Entry, model: Any, dtype: torch.dtype, **options: Any) -> torch.Tensor:
    """Token ids, the second row's prompt padded on the left where there is a prompt of tokens."""
    arguments, _ = inputs_of(entry, "left" if entry.sides else None, dtype)
    arguments.pop("decoder_input_ids", None)
    model.generation_config.eos_token_id = None
    return model.generate(
        **arguments, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, disable_compile=True, pad_token_id=0, **options
    )  # fmt: skip


GENERATIONS: dict[str, dict[str, Any]] = {
    "generation": {},
    "static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 2},
}


def distance(found: torch.Tensor, want: torch.Tensor, floor: float = 1e-30) -> float:
    """Largest difference, relative to the largest value."""
    return float((found.double() - want.double()).abs().max()) / max(float(want.abs().max()), floor)


def _gradient_distance(found: Tensors, want: Tensors) -> float:
    """Of each parameter. Some are 0 but for roundings, as of a bias of keys: those are measured by what others are."""
    largest = {name: float(x.abs().max()) for name, x in want.items() if x.numel()}
    floor = 0.1 * statistics.median(largest.values())
    return float(torch.tensor([distance(found[name], want[name], floor) for name in largest]).max())  # NaN stays NaN


def within(found: dict[str, float], dtype: torch.dtype) -> bool:
    """Whether no error of `errors` is too large; NaN is."""
    return all(error <= (GRADIENTS if name == "gradients" else TOLERANCE)[dtype] for name, error in found.items())


def errors(entry: Entry, dtype: torch.dtype) -> dict[str, float]:
    """How far each check is from "eager" in float64, relative to the largest value; of token ids, how many differ."""
    found: dict[str, float] = {}
    eager, ours = model_of(entry), ours_of(entry, dtype)
    with backend(dtype), wide_softmax():
        want, got = logits_and_gradients(entry, eager, torch.float64), logits_and_gradients(entry, ours, dtype)
        found["logits"] = distance(got[0], want[0])
        assert got[1].keys() == want[1].keys()
        found["gradients"] = _gradient_distance(got[1], want[1])
        for side in entry.sides:
            found[f"padding, {side}"] = distance(
                padded(entry, ours, dtype, side), padded(entry, eager, torch.float64, side)
            )
        for name in entry.generations if dtype is torch.float64 else ():
            a, b = (generated(entry, model, torch.float64, **GENERATIONS[name]) for model in (eager, ours))
            found[name] = float((a != b).sum()) if a.shape == b.shape else torch.inf
    return found
