"""Models with sinks and a window: what they generate is what StreamingLLM by hand does, token by token, in float64."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import subquad
from subquad.demo.model import DemoError, cache_name, chat_prompt, load
from subquad.integrations.transformers import SinkConfig, convert
from subquad.testing import backend_params

from .matrix.kinds import KINDS, VOCABULARY, Kind
from .streaming import Span, Stream

transformers = pytest.importorskip("transformers", minversion="4.57")

SINKS, WINDOW = 2, 9
CACHE, OLD = cache_name(transformers.LlamaForCausalLM), transformers.__version__.startswith("4.")
MORE = {  # rotations that the kinds of the matrix have not
    "gemma": Kind("gemma", "Gemma"),
    "cohere": Kind("cohere", "Cohere", more={"use_qk_norm": False}),
    "glm": Kind("glm", "Glm", more={"partial_rotary_factor": 0.5}),
    "stablelm": Kind("stablelm", "StableLm", more={"partial_rotary_factor": 0.5, "head_dim": None}),
    "yarn": Kind("yarn", "Llama", more={"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
    }}),
}  # fmt: skip
UNFIT = ["phi3", "gemma2", "starcoder2", *(["stablelm"] if OLD else [])]  # StableLM had a module for its dropout
FITTING = [name for name in KINDS | MORE if name not in UNFIT]
SILENT = {"smollm3", "gpt-oss"} if OLD else set()  # models that do not tell a cache where its tokens stand

# Transformers 4.57 needs an end of text; this one never comes.
LOOKUP = {"prompt_lookup_num_tokens": 3, "eos_token_id": VOCABULARY}


@pytest.fixture(autouse=True)
def _reference() -> Iterator[None]:
    """float64, for equal tokens: no two of them are as good as each other then."""
    with torch.no_grad(), subquad.use_backend("reference"):
        yield


@functools.cache
def plain(name: str) -> Any:
    model = (KINDS | MORE)[name].model().double()
    model.generation_config.eos_token_id = None
    return model


def converted(name: str, **options: Any) -> Any:
    model = copy.deepcopy(plain(name))
    convert(model, attention=SinkConfig(**({"sink_tokens": SINKS, "window": WINDOW} | options)))
    return model


def on(cache: Any) -> dict[str, Any]:
    """The argument that is a model's cache."""
    return {CACHE: cache}


def spans(name: str) -> list[Span]:
    return [(SINKS, WINDOW) if own is None else (0, own) for own in (KINDS | MORE)[name].windows]


def prompt(length: int, batch: int = 1, seed: int = 5) -> torch.Tensor:
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


def greedy(model: Any, ids: torch.Tensor, new: int = 30, **options: Any) -> torch.Tensor:
    """The tokens after the prompt."""
    out: torch.Tensor = model.generate(ids, max_new_tokens=new, do_sample=False, **options)
    return out[:, ids.shape[1] :]


@pytest.mark.parametrize("length", [5, 26])
@pytest.mark.parametrize("name", FITTING)
def test_greedy_text_is_that_of_a_stream_by_hand(name: str, length: int) -> None:
    """Prompts that fit, and longer ones than sinks and window; layers that slide keep their window."""
    ids = prompt(length)
    want = Stream(plain(name), spans(name)).greedy(ids[0].tolist(), 30)
    assert greedy(converted(name), ids)[0].tolist() == want


OTHERWISE: dict[str, tuple[str, dict[str, Any], list[Span]]] = {
    "absolute": ("llama", {"positions": "absolute"}, [(SINKS, WINDOW)] * 2),
    "post": ("llama", {"key_rope": "post", "slack": 0}, [(SINKS, WINDOW)] * 2),
    "no-sinks": ("qwen3", {"sink_tokens": 0}, [(0, WINDOW)] * 2),
    "sinks-alone": ("llama", {"window": 1}, [(SINKS, 1)] * 2),
    "sliding": ("mistral", {"sinks_in_sliding": True}, [(SINKS, 5)] * 2),
    "narrower": ("mistral", {"sinks_in_sliding": True, "window": 3}, [(SINKS, 3)] * 2),
    "some-sliding": ("gpt-oss", {"sinks_in_sliding": True}, [(SINKS, 6), (SINKS, WINDOW)]),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_other_options(case: str) -> None:
    name, options, by_hand = OTHERWISE[case]
    ids, positions = prompt(14), options.get("positions", "cache")
    want = Stream(plain(name), by_hand, positions).greedy(ids[0].tolist(), 24)
    assert greedy(converted(name, **options), ids, 24)[0].tolist() == want


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt-oss"])
@pytest.mark.parametrize("sizes", [(1,) * 30, (7, 1, 1, 12, 2, 7), (30,), (3, 27), (13, 13, 4)])
def test_chunks_of_any_size_give_the_numbers_of_a_stream(name: str, sizes: tuple[int, ...]) -> None:
    ids, model, parts = prompt(30), converted(name), []
    cache = transformers.DynamicCache(config=model.config)
    for part in ids.split(sizes, 1):
        parts.append(model(part, **on(cache)).logits[0])
    want = Stream(plain(name), spans(name)).logits(ids[0].tolist())
    torch.testing.assert_close(torch.cat(parts), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model(ids, use_cache=False).logits[0], want, rtol=1e-6, atol=1e-6)
    assert cache.get_seq_length() == 30


@backend_params("sink_attention_step", "native", "reference")
@pytest.mark.parametrize(
    ("name", "dtype"),  # in 16 bits, experts are chosen otherwise
    [("llama", torch.float32), ("gpt-oss", torch.float32), ("llama", torch.bfloat16), ("qwen3", torch.bfloat16)],
)
def test_backends(name: str, dtype: torch.dtype, backend: str) -> None:
    """In the model's dtype, by the kernels that it will have: prompt, steps, a chunk."""
    ids, model = prompt(40), converted(name).to(dtype)
    want = Stream(plain(name), spans(name)).logits(ids[0].tolist())
    cache, parts = transformers.DynamicCache(config=model.config), []
    with subquad.use_backend(backend):
        for part in ids.split((17, *(1,) * 14, 5, *(1,) * 4), 1):
            parts.append(model(part, **on(cache)).logits[0])
    error = (torch.cat(parts).double() - want).norm() / want.norm()
    assert error < (1e-4 if dtype is torch.float32 else 6e-2)


@pytest.mark.parametrize("cache", ["dynamic", "sink"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_several_turns(name: str, cache: str) -> None:
    """A chat over one cache: every prompt continues what was said before, answers included."""
    model, stream, said, want = converted(name), Stream(plain(name), spans(name)), prompt(0), []
    config = model.config
    held = transformers.DynamicCache(config=config) if cache == "dynamic" else subquad.SinkCache(config, SINKS, WINDOW)
    for turn, length in enumerate((6, 17, 3, 1)):
        said = torch.cat([said, prompt(length, seed=turn)], 1)
        fed = said[0, stream.seen :].tolist()
        want = stream.greedy(fed, 12)
        found = greedy(model, said, 12, **on(held))
        assert found[0].tolist() == want, turn
        said = torch.cat([said, found], 1)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "subquad"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_rows_with_padding_are_each_alone(name: str, implementation: str) -> None:
    """Sinks are tokens, not columns: whatever padding stands before a prompt."""
    subquad.integrations.transformers.register()
    model, ids = converted(name), prompt(21, 3)
    model.set_attn_implementation(implementation)
    mask = torch.ones_like(ids)
    mask[0, :16], mask[1, :4] = 0, 0
    found = greedy(model, ids, 20, attention_mask=mask)
    for row, first in enumerate((16, 4, 0)):
        want = Stream(plain(name), spans(name)).greedy(ids[row, first:].tolist(), 20)
        assert found[row].tolist() == want, row


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("way", ["static", "chunks", "static-chunks", "no-cache", "first-layer"])
def test_ways_to_generate(name: str, way: str) -> None:
    """Preallocated caches, prompts in chunks, no cache at all; and a model of which only some layers are converted."""
    ids, mask = prompt(15, 2), torch.ones(2, 15, dtype=torch.long)
    mask[1, :4] = 0
    options: dict[str, Any] = {"attention_mask": mask}
    options |= {"cache_implementation": "static", "disable_compile": True} if "static" in way else {}
    options |= {"prefill_chunk_size": 4} if "chunks" in way else {}
    if way != "first-layer":
        model = converted(name)
        want = greedy(model, ids, 20, attention_mask=mask)
        assert torch.equal(greedy(model, ids, 20, **options, use_cache=way != "no-cache"), want)
        return
    subquad.integrations.transformers.register()
    model = copy.deepcopy(plain(name))
    model.set_attn_implementation("subquad")  # findings/transformers_eager_float64_padding.sh
    convert(model, attention="sink", sink_tokens=SINKS, window=WINDOW, layers=[0])
    by_hand = [spans(name)[0], *((0, own or 10**6) for own in KINDS[name].windows[1:])]
    found = greedy(model, ids, 20, **options)
    for row, first in enumerate((0, 4)):
        assert found[row].tolist() == Stream(plain(name), by_hand).greedy(ids[row, first:].tolist(), 20)


def test_beams() -> None:
    model, ids = converted("llama"), prompt(9, 2)
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "max_new_tokens": 24}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_drafts_change_no_greedy_output(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt lookup and draft models, softmax or converted: tokens are taken back, also across the end of a ring of 64."""
    from subquad.cache.sink_state import SinkState

    removed, rollback = [], SinkState.rollback
    monkeypatch.setattr(SinkState, "rollback", lambda state, n: (removed.append(n), rollback(state, n))[1])
    model, ids = converted(name, slack=40), prompt(14).repeat(1, 2)
    want = greedy(model, ids, 60)
    draft = copy.deepcopy(plain(name))
    draft.lm_head.weight.add_(0.1 * torch.randn_like(draft.lm_head.weight))
    also = copy.deepcopy(draft)
    convert(also, attention=SinkConfig(SINKS, WINDOW, slack=40))
    for options in (
        LOOKUP,
        LOOKUP | {"prompt_lookup_num_tokens": 10, "max_matching_ngram_size": 1},
        {"assistant_model": draft},
        {"assistant_model": also},
        LOOKUP | on(subquad.SinkCache(model.config, SINKS, WINDOW, slack=40)),
    ):
        removed.clear()
        found = greedy(model, ids, 60, **options)[:, :60]  # transformers 4.57 looks up some tokens too many
        assert torch.equal(found, want), options
        assert any(removed), "no draft was taken back"


@pytest.mark.skipif(not OLD, reason="transformers 5.24 looks up wrongly in a second turn, whatever the model")
@pytest.mark.parametrize("attention", ["sink", "lawcat"])
def test_drafts_in_a_second_turn(attention: str) -> None:
    """With a cache that nobody has told that tokens will be taken back: LAWCAT has to be."""
    model, ids, texts = copy.deepcopy(plain("llama")), prompt(14).repeat(1, 2), []
    convert(model, attention=attention)
    for told, options in ((True, {}), (True, LOOKUP), (False, LOOKUP)):
        cache = transformers.DynamicCache(config=model.config)
        said = torch.cat([ids, greedy(model, ids, 20, **on(cache)), ids], 1)
        for layer in cache.layers if told else ():
            layer.activate_past_recording()
        fails = pytest.raises(ValueError, match="tokens_to_remove: expected at most the 0")
        with fails if attention == "lawcat" and not told else nullcontext():
            texts.append(greedy(model, said, 30, **on(cache), **options)[:, :30])
    assert all(torch.equal(text, texts[0]) for text in texts)


@pytest.mark.slow
@backend_params("sink_attention_step", "native")
def test_smollm2_is_a_stream(backend: str) -> None:
    """The real model in float32, token by token, far beyond sinks and window: its text is that of the loop by hand."""
    try:
        subject = load("cpu", "float32")
    except DemoError as reason:
        pytest.skip(str(reason))
    model, tokens = subject.model, chat_prompt(subject.tokenizer, "Why is the sky blue?", "cpu")[:, -20:]
    model.generation_config.eos_token_id = None
    want = Stream(model, [(4, 32)] * len(model.model.layers)).greedy(tokens[0].tolist(), 80)
    assert len(set(want)) > 20  # text, no loop
    every = {"attention_mask": torch.ones_like(tokens)}  # of which some look like padding
    with subquad.use_backend(backend):
        alone = subquad.SinkCache(model.config, 4, 32)
        assert greedy(model, tokens, 80, **every, **on(alone))[0].tolist() == want
        convert(model, attention="sink", sink_tokens=4, window=32)
        assert greedy(model, tokens, 80, **every)[0].tolist() == want


# --- constant memory ----------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "subquad"])
def test_memory_is_constant(implementation: str, padded: bool) -> None:
    """States to the byte and in place, and the masks of all layers, over five windows."""
    subquad.integrations.transformers.register()
    model, seen = converted("llama"), []
    model.set_attn_implementation(implementation)
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(_size(kwargs["attention_mask"])), with_kwargs=True
        )
    cache, ids = transformers.DynamicCache(config=model.config), prompt(8, 2)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0 if padded else 1
    states, column = set(), mask[:, -1:]
    for step in range(5 * (SINKS + WINDOW)):
        model(ids if step == 0 else ids[:, -1:], attention_mask=mask, **on(cache))
        mask = torch.cat([mask, column], 1)
        states.add(tuple((n, x.data_ptr(), x.untyped_storage().nbytes()) for n, x in _held(cache).items()))
    assert len(states) == 1 and len(set(seen[2:])) == 1
    assert cache.layers[0].state.nbytes == cache.layers[1].state.nbytes > 0


def _size(mask: Any) -> Any:
    if mask is None or isinstance(mask, torch.Tensor):
        return None if mask is None else mask.shape
    return tuple(None if x is None else x.shape for x in (mask.starts, mask.ends, mask.padding)), mask.tk


def _held(cache: Any) -> dict[str, torch.Tensor]:
    named = ((i, name, x) for i, layer in enumerate(cache.layers) for name, x in layer.state.tensors().items())
    return {f"{i}.{name}": x for i, name, x in named if name != "late"}  # one bit per column that can be taken back


def test_acceptance() -> None:
    """The script that must work: convert, a cache, turns far beyond sinks and window."""
    model = copy.deepcopy(plain("llama"))
    subquad.integrations.transformers.convert(model, attention="sink", sink_tokens=4, window=28)
    cache, said, sizes = subquad.SinkCache(model.config, sink_tokens=4, window=28), prompt(0, 2), set()
    for turn in range(4):
        said = torch.cat([said, prompt(11, 2, seed=turn)], 1)
        said = model.generate(said, past_key_values=cache, max_new_tokens=40, do_sample=False)
        sizes.add(sum(layer.state.nbytes for layer in cache.layers))
    assert len(sizes) == 1 and cache.get_seq_length() == said.shape[1] - 1 == 203
    want = Stream(plain("llama"), [(4, 28)] * 2).logits(said[0].tolist()).argmax(-1)
    assert said[0, -40:].tolist() == want[-41:-1].tolist()


# --- models as they are ----------------------------------------


@pytest.mark.parametrize(("source", "implementation"), [("config", "sdpa"), ("config", "subquad"), ("model", "eager")])
@pytest.mark.parametrize("name", [name for name in FITTING if name not in SILENT])
def test_a_cache_alone_is_a_stream(name: str, source: str, implementation: str) -> None:
    """One token at a time, after a prompt that fits."""
    if name == "gpt-oss" and implementation == "sdpa":
        implementation = "eager"  # transformers has no sdpa for models with sinks
    subquad.integrations.transformers.register()
    model, ids = copy.deepcopy(plain(name)), prompt(SINKS + WINDOW - 2)
    model.set_attn_implementation(implementation)
    cache = subquad.SinkCache(model.config if source == "config" else model, SINKS, WINDOW)
    want = Stream(plain(name), spans(name)).greedy(ids[0].tolist(), 24)
    for _ in range(2):
        assert greedy(model, ids, 24, **on(cache))[0].tolist() == want
        cache.reset()


@pytest.mark.parametrize("positions", ["cache", "absolute"])
def test_logits_and_turns_of_a_cache_alone(positions: str) -> None:
    """Short turns in one call, while they fit; then tokens, which are taken back, and rows that are exchanged."""
    ids, name = prompt(40, 2), "llama"
    model, cache = plain(name), subquad.SinkCache(plain(name).config, SINKS, WINDOW, positions=positions)
    want = torch.stack([Stream(model, spans(name), positions).logits(row.tolist()) for row in ids])
    found = [model(part, **on(cache)).logits for part in ids[:, : SINKS + WINDOW].split((4, 5, 2), 1)]
    found += [model(token, **on(cache)).logits for token in ids[:, SINKS + WINDOW : 30].split(1, 1)]
    torch.testing.assert_close(torch.cat(found, 1), want[:, :30], rtol=1e-5, atol=1e-5)
    cache.crop(-6)
    cache.reorder_cache(torch.tensor([1, 0]))
    found = [model(token, **on(cache)).logits for token in ids.flip(0)[:, 24:].split(1, 1)]
    torch.testing.assert_close(torch.cat(found, 1), want.flip(0)[:, 24:], rtol=1e-5, atol=1e-5)
    cache.reset()
    torch.testing.assert_close(model(ids[:, :5], **on(cache)).logits, want[:, :5], rtol=1e-5, atol=1e-5)
    assert len({layer.state.nbytes for layer in cache.layers}) == 1 and not cache.is_compileable


def test_a_longer_first_prompt_is_dense_within() -> None:
    ids, model = prompt(30), plain("llama")
    cache = subquad.SinkCache(model.config, SINKS, WINDOW)
    with pytest.warns(subquad.SubquadWarning, match="a prompt of 30 tokens is more than the 11 of this SinkCache"):
        found = model(ids, **on(cache)).logits
    torch.testing.assert_close(found, model(ids, use_cache=False).logits)
    assert cache.get_mask_sizes(1, 0) == (SINKS + WINDOW, 20) and cache.get_seq_length() == 30
    keys, _, tokens, _ = cache.layers[0].state.cache.gather()
    assert tokens[0].tolist() == [0, 1, *range(21, 30)] and keys.abs().amin() >= 0


def test_what_a_cache_alone_refuses() -> None:
    model, ids = plain("llama"), prompt(12, 2)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0

    def fresh(**options: Any) -> Any:
        return subquad.SinkCache(model.config, SINKS, WINDOW + 5, **options)

    with pytest.raises(ValueError, match=r"position_ids: expected 0, 1, \.\.\. in every row, without padding"):
        greedy(model, ids, attention_mask=mask, **on(fresh()))
    cache = fresh()
    model(ids, **on(cache))
    with pytest.raises(
        ValueError, match=r"past_key_values: expected one token at a time beyond 16 tokens, .* got 6 after 12"
    ):
        model(ids[:, :6], **on(cache))
    assert cache.get_seq_length() == 12 and cache.layers[0].state.cache.seen.tolist() == [12, 12]
    assert greedy(model, ids, attention_mask=mask, **on(fresh(allow_approx=True))).shape == (2, 30)
    cache = fresh(allow_approx=True)
    for part in (ids, ids, ids[:, :1]):
        assert model(part, **on(cache)).logits.isfinite().all()
    with pytest.raises(
        ValueError, match="expected a SinkCache with sink_tokens=2, window=9 as layer 0 was converted with"
    ):
        converted("llama")(ids, **on(fresh()))
    for arguments, error, message in (
        (("llama",), TypeError, "config: expected a config or a model of transformers, got str"),
        ((model.config, -1), ValueError, "sink_tokens: expected at least 0"),
        ((model.config, 0, 0), ValueError, "window: expected at least 1 without sinks"),
    ):
        with pytest.raises(error, match=message):
            subquad.SinkCache(*arguments)
    with pytest.raises(TypeError, match=r"rope: expected a subquad\.RopeSpec or None"):
        fresh(rope=1e4)


@pytest.mark.parametrize("name", sorted(SILENT))
def test_a_cache_that_is_not_told_where_tokens_stand(name: str) -> None:
    model, ids = plain(name), prompt(8)
    with pytest.raises(ValueError, match="past_key_values: expected a model that tells its cache how it rotates"):
        greedy(model, ids, **on(subquad.SinkCache(model.config, SINKS, WINDOW)))
    found = greedy(model, ids, 24, **on(subquad.SinkCache(model.config, SINKS, WINDOW, allow_approx=True)))
    assert found[0].tolist() == Stream(model, spans(name)).greedy(ids[0].tolist(), 24)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("first", "hidden"), [(12, None), (12, 0), (12, 1), (12, 7), (12, 11), (2, 0), (12, 12), (12, 13)]
)
def test_a_cache_alone_sees_padding(first: int, hidden: int | None, dtype: torch.dtype) -> None:
    """Before, in and behind a first prompt, and in a second turn; not where there is none."""
    model, ids = copy.deepcopy(plain("llama")).to(dtype), prompt(14)
    mask, cache = torch.ones_like(ids), subquad.SinkCache(plain("llama").config, SINKS, 30)
    if hidden is not None:
        mask[:, hidden] = 0
    for columns in (first, 14):
        arguments = {"attention_mask": mask[:, :columns]} | on(cache)
        if hidden is not None and hidden < columns:
            with pytest.raises(ValueError, match=r"position_ids: expected .*, without padding, for a SinkCache"):
                greedy(model, ids[:, :columns], 1, **arguments)
            return
        greedy(model, ids[:, :columns], 1, **arguments)


def test_models_whose_rotation_cannot_be_found() -> None:
    """Phi-3 has one projection of all: the rotation must be given, or no position may move."""
    model, ids = KINDS["phi3"].model().double(), prompt(8)
    with pytest.raises(
        ValueError, match=r"config: expected one that tells how layers rotate, or rope=, got .*self_attn: att"
    ):
        model(ids, **on(subquad.SinkCache(model.config, SINKS, WINDOW)))
    rope = subquad.RopeSpec.from_hf(model.config)
    cache = subquad.SinkCache(model.config, SINKS, WINDOW, rope=rope)
    whole = subquad.SinkCache(model.config, SINKS, 100, positions="absolute")
    for token in prompt(40).split(1, 1):
        found, want = (model(token, **on(c)).logits for c in (cache, whole))
    assert not torch.allclose(found, want) and found.isfinite().all()


def test_a_cache_alone_drops_no_gradient() -> None:
    """They flow through a first prompt; what the cache holds is cut off from its keys, and says so."""
    model, ids = copy.deepcopy(plain("llama")).requires_grad_(True), prompt(8)
    with torch.enable_grad():
        cache = subquad.SinkCache(model.config, SINKS, WINDOW)
        weight = model.model.layers[0].self_attn.k_proj.weight
        found, want = (
            torch.autograd.grad(model(ids[:, :5], **kwargs).logits.square().sum(), weight)[0]
            for kwargs in ({"cache": cache}, {"use_cache": False})
        )
        torch.testing.assert_close(found, want)
        with pytest.raises(ValueError, match="key_states: expected a tensor without requires_grad"):
            model(ids[:, 5:], cache=cache)
        assert cache.get_seq_length() == 5 and cache.layers[0].state.cache.seen.tolist() == [5]
        model.requires_grad_(False)
        model(ids[:, 5:], cache=cache)
