"""How a case of the matrix runs: a model is built, converted and called as its axes say, beside the truth of its rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from subquad.demo.model import cache_name
from subquad.integrations.transformers import CatsConfig, LawcatConfig, SuperlinearConfig, convert, register, revert
from subquad.nn import CATSMLP, LawcatAttention, SuperlinearAttention

from . import kinds, oracle
from .axes import CONVERSIONS, Case
from .kinds import KINDS, VOCABULARY

PROMPT, COLUMNS, ROOM = 13, 16, 20  # columns of the prompt, of all calls together, of a preallocated cache
CALLS = {
    "none": (16,),
    "dynamic": (13, 1, 1, 1),
    "static": (13, 1, 1, 1),
    "dynamic_chunks": (5, 1, 7, 1, 2),
    "static_chunks": (5, 1, 7, 1, 2),
}
STRAY = 7  # the token that padding has: one that would show
# Columns of padding, by row. Inside: a turn of a talk that is shorter than the batch's, and a row that skips a single step.
PADDING: dict[str, tuple[tuple[int, ...], ...]] = {
    "none": ((), ()),
    "ones": ((), ()),
    "left": ((), (0, 1, 2, 3, 4)),
    "right": ((), (9, 10, 11, 12)),
    "inside": ((4,), (3, 4, 5, 8, 14)),
}


@dataclass(frozen=True)
class Batch:
    """Two sequences in a grid: tokens [2, 16], real bool [2, 16], and of each its tokens and columns."""

    tokens: torch.Tensor
    real: torch.Tensor
    rows: list[torch.Tensor]
    columns: list[torch.Tensor]


def batch_of(padding: str) -> Batch:
    """The sequences, with the padding that has this name."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(8, VOCABULARY, (2, COLUMNS), generator=generator)
    real = torch.ones(2, COLUMNS, dtype=torch.bool)
    for row, columns in enumerate(PADDING[padding]):
        real[row, list(columns)] = False
    tokens = tokens.masked_fill(~real, STRAY)
    columns = [row.nonzero()[:, 0] for row in real]
    return Batch(tokens, real, [t[c] for t, c in zip(tokens, columns, strict=True)], columns)


@functools.cache
def truth_of(kind: str, conversion: str, adapted: bool, padding: str) -> oracle.Truth:
    """The truth that cases share which differ in implementation, cache and variant only."""
    batch = batch_of(padding)
    return oracle.truth(KINDS[kind], CONVERSIONS[conversion], adapted, batch.rows, batch.columns)


def model_of(case: Case, adapt: Callable[[Any], None]) -> Any:
    """The converted model, not yet with the values that the truth has."""
    register()
    model, conversion = KINDS[case.kind].model(), CONVERSIONS[case.conversion]
    model.set_attn_implementation(case.implementation)
    if case.variant == "lora_before":
        adapt(model)
    if conversion.cats:
        convert(model, mlp=CatsConfig())
    if conversion.lawcat is not None:
        convert(model, attention=LawcatConfig(**conversion.lawcat), layers=conversion.layers)
    if conversion.superlinear is not None:
        convert(model, attention=SuperlinearConfig(**conversion.superlinear), layers=conversion.layers)
    if case.variant == "lora_after":
        adapt(model)
    return model


def align(model: Any, case: Case, thresholds: list[float]) -> None:
    """Thresholds and new parameters as the truth has them; what is converted is what should be."""
    conversion, count = CONVERSIONS[case.conversion], len(model.model.layers)
    for number, layer in enumerate(model.model.layers):
        assert isinstance(layer.mlp, CATSMLP) == conversion.cats, number
        converted = isinstance(layer.self_attn, SuperlinearAttention if case.superlinear else LawcatAttention)
        assert converted == conversion.converts(number, count), number
        if conversion.cats:
            layer.mlp.set_threshold(thresholds[number])
        if conversion.converts(number, count):
            values = conversion.new_parameters(number)
            found = {n: p for n, p in layer.self_attn.new_parameters().items() if "lora_" not in n}
            assert {n: p.shape for n, p in found.items()} == {n: v.shape for n, v in values.items()}
            with torch.no_grad():
                for name, parameter in found.items():
                    parameter.copy_(values[name])


def logits_of(model: Any, case: Case, batch: Batch) -> torch.Tensor:
    """Logits [2, 16, vocabulary] of the calls that the case's cache makes."""
    call, found, past, lengths = model, [], 0, CALLS[case.cache]
    graphs: list[Any] = []
    if case.compiled:
        call = _compiled(model, graphs, whole=case.cache == "none")
    options: dict[str, Any] = {"use_cache": False}
    if case.cache != "none":
        options = {"use_cache": True, cache_name(model): _cache(model, case.cache)}
    masked = case.padding != "none"
    positions = (batch.real.cumsum(1) - 1).clamp_min(0)
    for tokens in batch.tokens.split(lengths, 1):
        first, past = past, past + tokens.shape[1]
        if masked:
            options |= {"attention_mask": batch.real[:, :past].long(), "position_ids": positions[:, first:past]}
        found.append(call(tokens, **options).logits)
    # One for each length; a second length makes one of any length, and a second step may.
    assert len(graphs) <= len(set(lengths)) + (len(lengths) > 1), f"{len(graphs)} graphs"
    return torch.cat(found, 1)


def _compiled(model: Any, graphs: list[Any], whole: bool) -> Any:
    """The model in one graph, which joins `graphs`. Tracing is what differs; `whole` asks for gradients and aliases too."""
    torch._dynamo.reset()

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs) if whole else graph.forward

    return torch.compile(model, backend=backend, fullgraph=True)


def _cache(model: Any, name: str) -> Any:
    import transformers

    if name.startswith("static"):
        return transformers.StaticCache(config=model.config, max_cache_len=ROOM)
    return transformers.DynamicCache(config=model.config)


def errors(case: Case, adapt: Callable[[Any], None] = kinds.adapt) -> dict[str, float]:
    """How far the case is from the truth, relative to its largest value. `adapt` puts adapters on a model.

    Logits of real tokens; gradients of adapters, without a cache; logits of the model that `revert` gives back.
    """
    adapted = case.variant.startswith("lora")
    model = model_of(case, adapt)
    batch, true = batch_of(case.padding), truth_of(case.kind, case.conversion, adapted, case.padding)
    align(model, case, true.thresholds)
    learns = adapted and case.cache == "none"
    model.requires_grad_(False)
    for parameter in kinds.adapters(model).values():
        parameter.requires_grad_(learns)
    with torch.set_grad_enabled(learns):
        logits = logits_of(model, case, batch).double()
    got = [logits[row, columns] for row, columns in enumerate(batch.columns)]
    found = {"logits": _distance(got, true.logits)}
    if learns:
        sum((oracle.probe(y) * y).sum() for y in got).backward()
        trained = kinds.adapters(model)
        assert trained.keys() == true.gradients.keys()
        zero = torch.zeros(())
        gradients = [zero if p.grad is None else p.grad for p in trained.values()]
        found["gradients"] = _distance(gradients, list(true.gradients.values()))
    if case.conversion != "none":
        revert(model)
        model.set_attn_implementation("eager")
        with torch.no_grad():
            softmax = model(batch_of("none").tokens, use_cache=False).logits
        found["reverted"] = _distance(list(softmax), truth_of(case.kind, "none", adapted, "none").logits)
    return found


def _distance(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    largest = max(float(y.abs().max()) for y in want)
    worst = torch.stack([(x.detach() - y).abs().max() for x, y in zip(got, want, strict=True)])
    return float(worst.max()) / largest  # NaN stays NaN
