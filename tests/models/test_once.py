"""What a model call tells its layers is read once, by the first of them; never another call's."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import subquad
from subquad.integrations.transformers import LawcatConfig, SinkConfig, SuperlinearConfig, convert
from subquad.nn import _sequences, _tokens
from subquad.ops import _spans

from .matrix.kinds import Kind
from .test_sink_generate import on, prompt

transformers = pytest.importorskip("transformers", minversion="4.57")
LAYERS, LENGTH = 3, 40
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-5}  # cosines in float32, at other positions where there is padding
CONFIGS = {
    "superlinear": SuperlinearConfig(sw_index=1, num_spans=2, backward_factor=1.0, forward_factor=0.5),
    "sink": SinkConfig(sink_tokens=2, window=9),
    "lawcat": LawcatConfig(window_size=4),
}
# Functions that make what can be shared, and what each kind of layer asks for where there is padding.
MADE = {"read": (_tokens, "_read"), "reach": (_spans, "reach"), "window": (_spans, "window_mask")}
MADE |= {"sequences": (_sequences.Sequences, "_of")}
WANT = {"superlinear": {"read", "reach", "window"}, "sink": {"read", "sequences"}, "lawcat": {"read", "sequences"}}
pytestmark = pytest.mark.filterwarnings("ignore:subquad. SuperlinearConfig")


@pytest.fixture(autouse=True)
def _reference() -> Iterator[None]:
    with subquad.use_backend("reference"):
        yield


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each of `MADE` has run."""
    count: Counter[str] = Counter()

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            count[name] += 1
            return function(*args, **options)

        return call

    for name, (owner, attribute) in MADE.items():
        monkeypatch.setattr(owner, attribute, counted(name, getattr(owner, attribute)))
    return count


def converted(kind: str, seed: int = 1, **options: Any) -> Any:
    model = Kind("llama", "Llama", (None,) * LAYERS).model().double()
    torch.manual_seed(seed)
    convert(model, attention=CONFIGS[kind], **options)
    model.set_attn_implementation("sdpa")
    return model


def alone(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """Logits of the tokens of every row without its padding: what no mask can spoil."""
    return [model(row[None, real], use_cache=False).logits[0] for row, real in zip(ids, mask.bool(), strict=True)]


def padded(*firsts: int) -> torch.Tensor:
    return (torch.arange(LENGTH) >= torch.tensor(firsts)[:, None]).long()


def check(found: torch.Tensor, mask: torch.Tensor, want: list[torch.Tensor]) -> None:
    for row, real, expected in zip(found, mask.bool(), want, strict=True):
        torch.testing.assert_close(row[real], expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "subquad"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_layers_share_what_the_first_has_made(kind: str, implementation: str, made: Counter[str]) -> None:
    """Prompts, chunks and steps, growing and preallocated; the next call makes its own."""
    subquad.integrations.transformers.register()
    model, ids, mask = converted(kind), prompt(LENGTH, 2), padded(7, 0)
    model.set_attn_implementation(implementation)
    want = alone(model, ids, mask)
    cache = transformers.StaticCache(model.config, max_cache_len=LENGTH) if kind == "superlinear" else None
    for held in (transformers.DynamicCache(config=model.config), cache):
        parts, end = [], 0
        for tokens in ids.split((20, 17, 1, 2), 1) if held is not None else [ids]:
            made.clear()
            end += tokens.shape[1]
            given = on(held) if held is not None else {"use_cache": False}
            parts.append(model(tokens, attention_mask=mask[:, :end], **given).logits)
            assert all(count == 1 for count in made.values()), made
            assert set(made) >= {name for name in WANT[kind] if name != "sequences" or tokens.shape[1] == LENGTH}
        check(torch.cat(parts, 1), mask, want)


@torch.no_grad()
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_mask_has_its_own(kind: str, made: Counter[str]) -> None:
    """Layers with one rotation for all calls: masks in turn, one that is written to, and another in its memory."""
    model, ids = converted(kind), prompt(LENGTH, 2)
    masks = [padded(*firsts) for firsts in ((7, 0), (0, 12), (0, 0))]
    wants = [alone(model, ids, mask) for mask in masks]
    rotary, kept = model.model.rotary_emb.forward, {}
    model.model.rotary_emb.forward = lambda x, position_ids: kept.setdefault(x.shape[1], rotary(x, position_ids))

    def call(mask: torch.Tensor) -> torch.Tensor:
        hidden = model.model.embed_tokens(ids)
        given = model.model.rotary_emb(hidden, torch.arange(LENGTH)[None])
        for layer in model.model.layers:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=given)
        logits: torch.Tensor = model.lm_head(model.model.norm(hidden))
        return logits

    for mask, want in (*zip(masks, wants, strict=True), *zip(masks, wants, strict=True)):
        check(call(mask), mask, want)
    made.clear()
    check(call(masks[0]), masks[0], wants[0])
    assert not made  # the mask and the rotation of before
    for other, want in ((1, wants[1]), (0, wants[0])):
        masks[0].copy_(padded(*((7, 0), (0, 12))[other]))
        check(call(masks[0]), masks[0], want)
    memory = torch.empty(2, LENGTH, dtype=torch.long)
    for firsts, want in (((7, 0), wants[0]), ((0, 12), wants[1])):
        view = memory[:]
        memory.copy_(padded(*firsts))
        check(call(view), view, want)
        del view


@torch.no_grad()
@pytest.mark.parametrize("kind", CONFIGS)
def test_one_rotation_for_two_chunks(kind: str) -> None:
    """Of equal length, with one mask for all columns: what tells them apart is what the cache has seen."""
    model, half, mask = converted(kind), LENGTH // 2, padded(7, LENGTH // 2 - 1)
    hidden = model.model.embed_tokens(prompt(LENGTH, 2)).split(half, 1)
    rotation = model.model.rotary_emb(hidden[0], torch.arange(half)[None])
    found = []
    for given in ([rotation, rotation], [rotation, tuple(x.clone() for x in rotation)]):
        layer, cache = model.model.layers[0].self_attn, transformers.DynamicCache(config=model.config)
        calls = zip(hidden, given, strict=True)
        found.append([layer(x, position_embeddings=r, attention_mask=mask, past_key_values=cache)[0] for x, r in calls])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
@pytest.mark.parametrize("kind", CONFIGS)
def test_models_in_turn(kind: str, made: Counter[str]) -> None:
    """Two models, layer by layer, one of them with chosen layers of another kind beside its own."""
    ids, mask = prompt(LENGTH, 2), padded(7, 0)
    models = [converted(kind), converted(kind, seed=2, layers=[0, 2])]
    models[1].model.embed_tokens.weight.mul_(0.5)
    wants = [alone(model, ids, mask) for model in models]
    streams = []
    made.clear()
    for model in models:
        hidden = model.model.embed_tokens(ids)
        streams.append([hidden, model.model.rotary_emb(hidden, torch.arange(LENGTH)[None])])
    visible = mask.bool()[:, None, None] & torch.ones(LENGTH, LENGTH).tril().bool()
    visible = visible | torch.eye(LENGTH).bool()  # so that softmax has no empty rows
    for index in range(LAYERS):
        for model, stream in zip(models, streams, strict=True):
            layer = model.model.layers[index]
            ours = hasattr(layer.self_attn, "original")
            given = {"attention_mask": mask if ours else visible, "position_embeddings": stream[1]}
            stream[0] = layer(stream[0], **given)
    for model, stream, want in zip(models, streams, wants, strict=True):
        check(model.lm_head(model.model.norm(stream[0])), mask, want)
    assert set(made) == WANT[kind] and set(made.values()) == {2}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_gradient_checkpointing(kind: str, reentrant: bool, made: Counter[str]) -> None:
    """What is computed again finds what was made the first time."""
    model, ids, mask = converted(kind), prompt(LENGTH, 2), padded(7, 0)
    model.requires_grad_(True).train()
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        made.clear()
        model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()].square().sum().backward()
        assert set(made) == WANT[kind] and set(made.values()) == {1}
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("kind", CONFIGS)
def test_nothing_outlives_the_call(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, mask, seen = converted(kind), prompt(LENGTH, 2), padded(7, 0), []
    read = _tokens._read
    monkeypatch.setattr(_tokens, "_read", lambda *args: seen.append(weakref.ref(found := read(*args))) or found)
    model(ids, attention_mask=mask, use_cache=False)
    gc.collect()
    assert len(seen) == 1 and seen[0]() is None


@torch.inference_mode()
def test_tensors_that_do_not_tell_of_writes_are_read_every_time(made: Counter[str]) -> None:
    model, ids, mask = converted("superlinear"), prompt(LENGTH, 2), padded(7, 0)
    want = alone(model, ids, mask)
    made.clear()
    check(model(ids, attention_mask=mask, use_cache=False).logits, mask, want)
    assert set(made.values()) == {LAYERS}
