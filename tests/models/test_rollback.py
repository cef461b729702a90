"""Taking tokens back: a LAWCAT state after a rollback is the state that never saw them; drafts change no greedy output."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from subquad.cache import LawcatState, State
from subquad.demo.model import DemoError, cache_name, chat_prompt, load
from subquad.integrations.transformers import LawcatConfig, convert, revert
from subquad.nn import LawcatAttention, LawcatCache

KEEP = 6
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "shared": {"share_kv_features": True, "gate": "scalar"},
    "plain": {"normalize": False, "gate": "none", "conv_size": 1},
    "values": {"conv_on_v": True, "conv_bias": True, "use_output_gate": True},
    "window": {"window_size": 5},
    "before": {"window_size": 5, "linear_covers_window": False, "conv_on_v": True},
    "lolcats": {
        "window_size": 4, "linear_covers_window": False, "linear_scale": 1.0, "rope": "linear", "gate": "none",
        "tie_qk_feature_map": False, "conv_size": 1,
    },
}  # fmt: skip
# Lengths of calls, and how many tokens are then taken back.
CALLS = {
    "one-call": ((9,), 4),
    "the-whole-first-call": ((5,), 5),
    "steps": ((9, 1, 1, 1, 1), 3),
    "over-calls": ((20, 3, 2), 4),
    "past-the-border": ((4, 5, 5, 5), 5),  # 19 rows are more than two times six: what they start from has moved on
    "all-that-is-kept": ((4, 5, 5, 5), 6),
    "of-a-long-call": ((40,), 6),
    "one-left": ((3, 4), 6),
}
each_option = pytest.mark.parametrize("name", OPTIONS)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def layer_of(name: str, **more: Any) -> LawcatAttention:
    torch.manual_seed(0)
    layer = LawcatAttention(32, 4, **{"num_kv_heads": 2, "layer_idx": 0, **OPTIONS[name], **more})
    for parameter in layer.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def run(layer: LawcatAttention, x: torch.Tensor, cache: LawcatCache, lengths: tuple[int, ...], mask: Any = None) -> Any:
    """Calls of these lengths on the columns that the cache has not seen; the last output."""
    out = None
    for length in lengths:
        start = cache.states[0].seen if cache.states else 0
        columns = slice(start, start + length)
        angle = torch.outer(torch.arange(start, start + length).float(), 0.5 ** torch.arange(4)).repeat(1, 2)[None]
        tokens = None if mask is None else mask[:, : start + length]
        out = layer.mix(x[:, columns], (angle.cos(), angle.sin()), tokens, cache)
    return out


def fit(lengths: tuple[int, ...], total: int) -> tuple[int, ...]:
    """The calls up to `total` tokens, the last one cut."""
    found: list[int] = []
    for length in lengths:
        found.append(min(length, total - sum(found)))
    return tuple(n for n in found if n > 0)


def assert_same(found: LawcatCache, want: LawcatCache, exact: bool = False) -> None:
    one, two = found.states[0], want.states[0]
    assert one.seen == two.seen and set(one.current()) == set(two.current())
    tolerance = 0.0 if exact else 2e-6
    for name, value in two.current().items():
        torch.testing.assert_close(one.current()[name], value, rtol=tolerance, atol=tolerance)


@each_option
@pytest.mark.parametrize("calls", CALLS)
def test_state_after_a_rollback_never_saw_the_tokens(name: str, calls: str) -> None:
    lengths, back = CALLS[calls]
    layer, x = layer_of(name), torch.randn(2, sum(lengths) + 7, 32)
    cache, other = LawcatCache(keep=KEEP), LawcatCache()
    run(layer, x, cache, lengths)
    cache.rollback(back)
    rest = fit(lengths, sum(lengths) - back)
    if not rest:
        assert not cache.states[0].current() and cache.states[0].seen == 0
        return
    run(layer, x, other, rest)
    assert_same(cache, other)
    torch.testing.assert_close(run(layer, x, cache, (3, 1)), run(layer, x, other, (3, 1)), rtol=1e-5, atol=2e-6)
    cache.rollback(2)
    run(layer, x, other := LawcatCache(), (*rest, 2))
    assert_same(cache, other)


@each_option
def test_the_same_chunks_give_the_same_bits(name: str) -> None:
    """What is computed again after a rollback is what a first computation of those tokens gives."""
    layer, x = layer_of(name), torch.randn(2, 30, 32)
    cache, other = LawcatCache(keep=8), LawcatCache()
    run(layer, x, cache, (12,))
    cache.states[0].keep(8)
    run(layer, x, cache, (7,))
    cache.rollback(3)
    run(layer, x, other, (4, 8, 4))  # 12 as 4 and the 8 that are kept
    assert_same(cache, other, exact=True)


@each_option
@pytest.mark.parametrize("where", ["left", "inside"])
def test_rollback_of_rows_with_padding(name: str, where: str) -> None:
    layer, x, mask = layer_of(name), torch.randn(3, 14, 32), torch.ones(3, 14)
    mask[0, :5], mask[2, :9] = 0, 0
    if where == "inside":
        mask[1, 6], mask[1, 8], mask[0, 8:10] = 0, 0, 0
    for lengths, back in (((10,), 3), ((5, 3, 1, 1), 4), ((10,), 6)):
        cache, other = LawcatCache(keep=KEEP), LawcatCache()
        run(layer, x, cache, lengths, mask)
        cache.rollback(back)
        run(layer, x, other, fit(lengths, 10 - back), mask)
        assert_same(cache, other)
        torch.testing.assert_close(
            run(layer, x, cache, (4,), mask), run(layer, x, other, (4,), mask), rtol=1e-5, atol=2e-6
        )


@pytest.mark.parametrize("name", ["default", "before"])
def test_too_long_a_rollback_is_refused_and_changes_nothing(name: str) -> None:
    layer, x = layer_of(name), torch.randn(2, 30, 32)
    cache, twin = LawcatCache(keep=KEEP), LawcatCache(keep=KEEP)
    for c in (cache, twin):
        run(layer, x, c, (20, 2))
    for tokens, error in ((9, ValueError), (-1, ValueError), (1.0, TypeError)):
        with pytest.raises(error, match="tokens: expected"):
            cache.rollback(tokens)  # type: ignore[arg-type]
    cache.rollback(0)
    assert_same(cache, twin, exact=True)
    assert cache.states[0].kept == twin.states[0].kept == 8
    cache.rollback(8)
    assert cache.states[0].kept == 0
    with pytest.raises(ValueError, match="at most the 0 that are kept"):
        cache.rollback(1)
    with pytest.raises(ValueError, match="at most the 0 that are kept"):
        run(layer, x, plain := LawcatCache(), (5,))
        plain.rollback(1)


@each_option
def test_memory_is_constant(name: str) -> None:
    """Also what is kept, and after a long prompt: nothing holds on to the prompt's storage."""
    layer, x, sizes, kept = layer_of(name), torch.randn(1, 600, 32), set(), set()
    cache, plain = LawcatCache(keep=KEEP), LawcatCache()
    for c in (cache, plain):
        run(layer, x, c, (500,))
    for _ in range(40):
        run(layer, x, plain, (1,))
        sizes.add(plain.nbytes)
        run(layer, x, cache, (1,))
        kept.add(cache.states[0].kept)
    assert len(sizes) == 1 and kept == set(range(KEEP, 2 * KEEP + 1))
    run(layer, x, fresh := LawcatCache(), (500,))
    assert fresh.nbytes == sizes.pop()
    row = sum(x[0, 0].numel() * x.element_size() for x in cache.states[0].rows.values())
    assert cache.nbytes <= 2 * fresh.nbytes + 3 * KEEP * row


def test_rows_and_copies_of_what_is_kept() -> None:
    """Beams, a row that starts anew, copies, pickles and state dicts: what is kept goes along."""
    layer, x = layer_of("before"), torch.randn(3, 20, 32)
    cache = LawcatCache(keep=KEEP)
    run(layer, x, cache, (9, 3))
    assert isinstance(cache.states[0], State)
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    loaded = LawcatCache(keep=KEEP)
    loaded.state(0).load_state_dict(cache.states[0].state_dict())
    given = {value.data_ptr() for value in cache.states[0].state_dict().values() if isinstance(value, torch.Tensor)}
    assert given and given.isdisjoint(value.data_ptr() for value in loaded.states[0].tensors().values())  # copies
    copies = (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), torch.load(buffer, weights_only=False), loaded)
    cache.rollback(5)
    for other in copies:
        other.rollback(5)
        assert_same(other, cache, exact=True)
    with pytest.raises(ValueError, match="state: expected names of a LawcatState, got 'ring_k'"):
        loaded.states[0].load_state_dict({"seen": 99, "ring_k": torch.zeros(1)})
    assert loaded.states[0].seen != 99
    rows = torch.tensor([2, 0])
    run(layer, x, cache, (4,))
    cache.reorder_cache(rows)
    cache.rollback(2)
    run(layer, x[rows], other := LawcatCache(), (7, 2))
    assert_same(cache, other)
    before = {n: t.data_ptr() for n, t in cache.states[0].tensors().items()}
    cache.states[0].reorder(torch.tensor([1, 0]))
    assert before == {n: t.data_ptr() for n, t in cache.states[0].tensors().items()}
    with pytest.raises(ValueError, match="rows: expected the 2 sequences"):
        cache.states[0].reorder(torch.tensor([1]))


@each_option
def test_a_state_dict_of_what_is_kept_from_the_first_token(name: str) -> None:
    layer, x = layer_of(name), torch.randn(2, 20, 32)
    cache, loaded = LawcatCache(keep=KEEP), LawcatCache(keep=KEEP)
    run(layer, x, cache, (4,))
    loaded.state(0).load_state_dict(cache.states[0].state_dict())
    for other in (cache, loaded):
        other.rollback(2)
    assert_same(loaded, cache, exact=True)
    for other in (cache, loaded):
        run(layer, x, other, (3,))
        other.rollback(5)
    assert cache.states[0].seen == loaded.states[0].seen == 0 and not loaded.states[0].current()


@pytest.mark.parametrize("name", ["default", "before", "window"])
def test_reset_of_some_rows(name: str) -> None:
    """A row that was reset goes on as a new sequence; the other one as if nothing had happened."""
    layer, x = layer_of(name), torch.randn(2, 16, 32)
    cache, other = LawcatCache(keep=KEEP), LawcatCache()
    for c in (cache, other):
        run(layer, x, c, (9,))
    cache.reset(torch.tensor([True, False]))
    assert cache.states[0].kept == 0 and cache.states[0].seen == 9
    mask = torch.ones(2, 16)
    mask[0, :9] = 0
    found = run(layer, x, cache, (5, 1))
    torch.testing.assert_close(found[1], run(layer, x, other, (5, 1))[1], rtol=1e-5, atol=2e-6)
    run(layer, x, fresh := LawcatCache(), (9,), mask)
    torch.testing.assert_close(found[0], run(layer, x, fresh, (5, 1), mask)[0], rtol=1e-5, atol=2e-6)
    cache.reset()
    assert not cache.states[0].tensors() and cache.states[0].seen == 0


# --- generate() of transformers ----------------------------------------

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.cache_utils", reason="needs linear attention layers").__dict__.get(
    "LinearAttentionLayer"
) or pytest.skip("needs transformers >= 5", allow_module_level=True)

CONVERSIONS: dict[str, dict[str, Any]] = {
    "linear": {"attention": "lawcat"},
    "hybrid": {"attention": "lawcat", "layers": [0, 2]},
    "softmax-first": {"attention": "lawcat", "layers": [1]},
    "window": {"attention": LawcatConfig(window_size=4)},
    "before": {"attention": LawcatConfig(window_size=5, linear_covers_window=False, conv_on_v=True), "layers": [0, 2]},
}


def model_of(conversion: str | None, seed: int = 0, layers: int = 3, family: str = "Llama", **more: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "vocab_size": 19, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1}
    sizes |= {"eos_token_id": None, "max_position_embeddings": 512, "initializer_range": 0.3}
    config = getattr(transformers, f"{family}Config")(**(sizes | more))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().requires_grad_(False)
    if conversion is not None:
        convert(model, **CONVERSIONS[conversion])
        for module in model.modules():
            if isinstance(module, LawcatAttention):
                for parameter in module.requires_grad_(False).new_parameters().values():
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def greedy(model: Any, tokens: torch.Tensor, new: int, **options: Any) -> torch.Tensor:
    return model.generate(tokens, max_new_tokens=new, do_sample=False, **options)


def prompt(t: int = 14) -> torch.Tensor:
    return torch.randint(3, 19, (1, t), generator=torch.Generator().manual_seed(7))


class Watch:
    """Counts the tokens that the caches of LAWCAT layers take back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from subquad.cache.lawcat import LawcatState

        self.removed: list[int] = []
        rollback = LawcatState.rollback
        monkeypatch.setattr(LawcatState, "rollback", lambda state, n: (self.removed.append(n), rollback(state, n))[1])


@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_drafts_change_no_greedy_output(conversion: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt lookup, a softmax model and a LAWCAT model as draft: accepted, rejected and partly accepted drafts."""
    more = {"sliding_window": 6} if family == "Mistral" else {}
    model = model_of(conversion, family=family, **more)
    want = greedy(model, prompt(), 50)
    softmax, lawcat = model_of(None, seed=1, layers=1), model_of("softmax-first", family=family, **more)
    lawcat.lm_head.weight.add_(0.1 * torch.randn_like(lawcat.lm_head.weight))
    for layer in lawcat.modules():
        if isinstance(layer, LawcatAttention):
            layer.keep = 64
    for options in (
        {"prompt_lookup_num_tokens": 3},
        {"prompt_lookup_num_tokens": 10, "max_matching_ngram_size": 1},
        {"assistant_model": softmax},
        {"assistant_model": lawcat},
    ):
        watch = Watch(monkeypatch)
        assert torch.equal(greedy(model, prompt(), 50, **options), want), options
        assert any(watch.removed), "no draft was taken back"
        monkeypatch.undo()


def test_a_draft_model_is_told_what_to_keep() -> None:
    """A LAWCAT model drafts once its layers keep tokens; one that does not says how it would."""
    model, draft = model_of("hybrid"), model_of(None, seed=1)
    draft.generation_config.assistant_confidence_threshold = 0  # it drafts several tokens, in as many calls
    convert(draft, attention="lawcat")
    with pytest.raises(
        ValueError, match=r"LawcatConfig\(keep=\.\.\.\), or LawcatAttention.keep, .* 64 for a model that drafts"
    ):
        greedy(model, prompt(), 30, assistant_model=draft)
    revert(draft)
    convert(draft, attention=LawcatConfig(keep=64))
    assert torch.equal(greedy(model, prompt(), 30, assistant_model=draft), greedy(model, prompt(), 30))


def test_drafts_longer_than_64_tokens() -> None:
    model, tokens = model_of("hybrid"), prompt(90).repeat(1, 2)
    want = greedy(model, tokens, 80)
    for layer in model.modules():
        if isinstance(layer, LawcatAttention):
            layer.keep = 128
    assert torch.equal(greedy(model, tokens, 80, prompt_lookup_num_tokens=100), want)


def test_prompts_longer_than_what_is_kept() -> None:
    model, tokens = model_of("hybrid"), prompt(150)
    want = greedy(model, tokens, 24)
    for _ in range(2):  # the second time through the same model
        assert torch.equal(greedy(model, tokens, 24, prompt_lookup_num_tokens=4), want)


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_crop_of_a_padded_batch(conversion: str) -> None:
    model, name = model_of(conversion), cache_name(model_of(None))
    tokens = torch.randint(3, 19, (3, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(tokens)
    mask[0, :4], mask[2, :7] = 0, 0
    out = model(tokens, attention_mask=mask, use_cache=True)
    out[name].crop(-3)
    assert out[name].get_seq_length() == 9
    more = torch.cat([mask[:, :9], torch.ones(3, 3, dtype=torch.long)], 1)
    found = model(tokens[:, 9:], attention_mask=more, use_cache=True, **{name: out[name]}).logits
    torch.testing.assert_close(found, out.logits[:, 9:], rtol=1e-4, atol=1e-4)
    for count in (-2, 0):
        out[name].crop(count)
    assert out[name].get_seq_length() == 10


def test_repeated_rows_of_a_cache_stand_side_by_side() -> None:
    """As `generate` expands a batch for several continuations: row 0 twice, then row 1 twice."""
    model, name = model_of("hybrid"), cache_name(model_of(None))
    tokens = torch.randint(3, 19, (2, 8), generator=torch.Generator().manual_seed(5))
    repeated = tokens.repeat_interleave(2, 0)
    cache = model(tokens[:, :-1], use_cache=True)[name]
    cache.batch_repeat_interleave(2)
    found = model(repeated[:, -1:], **{name: cache}).logits
    torch.testing.assert_close(found, model(repeated).logits[:, -1:], rtol=1e-4, atol=1e-4)


def test_caches_of_transformers_survive_copies() -> None:
    model, name = model_of("hybrid"), cache_name(model_of(None))
    cache = model(prompt(), use_cache=True)[name]
    cache.activate_past_recording()
    model(prompt(3), **{name: cache})
    assert cache.is_croppable
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), torch.load(buffer, weights_only=False)]
    cache.crop(-2)
    want = model(prompt(2), **{name: cache}).logits
    for other in copies:
        other.crop(-2)
        assert torch.equal(model(prompt(2), **{name: other}).logits, want)


@pytest.mark.heavy
def test_compiled_steps_find_their_state_in_a_cache_of_transformers() -> None:
    model, name = model_of("linear"), cache_name(model_of(None))
    cache = model(prompt(), use_cache=True)[name]
    model(prompt(1), **{name: cache})
    other, x, layer = copy.deepcopy(cache), torch.randn(1, 1, 32), model.model.layers[0].self_attn
    compiled = torch.compile(lambda x: layer.mix(x, past_key_values=cache), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer.mix(x, past_key_values=other))
    assert_same(LawcatCacheOf(cache), LawcatCacheOf(other))
    torch._dynamo.reset()


class LawcatCacheOf(LawcatCache):
    """The first layer's state of a cache of transformers."""

    def __init__(self, cache: Any) -> None:
        super().__init__()
        self.states = {0: cache.layers[0].state}


def test_old_names() -> None:
    from subquad.nn import lawcat_cache

    assert lawcat_cache.LawcatCache is LawcatCache and lawcat_cache.LawcatState is LawcatState
    assert lawcat_cache.state_of(cache := LawcatCache(), 3) is cache.states[3]
    with pytest.raises(AttributeError, match=r"expected subquad\.integrations\.transformers\.cache\.StateLayer"):
        _ = lawcat_cache.cache_layer_class
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lawcat_cache.nothing


def test_rollbacks_that_nothing_was_kept_for() -> None:
    model, name = model_of("linear"), cache_name(model_of(None))
    cache = model(prompt(), use_cache=True)[name]
    model(prompt(2), **{name: cache})
    assert not cache.is_croppable and not any(layer.state.kept for layer in cache.layers)
    with pytest.raises(ValueError, match="tokens_to_remove: expected at most the 0 tokens"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="tokens_to_remove: expected minus the number"):
        cache.crop(3)
    assert cache.get_seq_length() == 16
    for layer in cache.layers:
        layer.activate_past_recording(2)
    model(prompt(9), **{name: cache})
    assert [layer.state.kept for layer in cache.layers] == [2, 2, 2]
    with pytest.raises(ValueError, match="expected at most the 2 tokens"):
        cache.crop(-3)
    cache.crop(-2)
    assert cache.get_seq_length() == 23


def test_too_long_a_crop_says_that_other_layers_are_cut() -> None:
    """transformers goes from layer to layer, so softmax before a LAWCAT layer is cut when that refuses."""
    model, name = model_of("softmax-first"), cache_name(model_of(None))
    cache = model(prompt(), use_cache=True)[name]
    model(prompt(2), **{name: cache})
    with pytest.raises(ValueError, match="Layers before this one have been cut already: do not use the cache again"):
        cache.crop(-1)
    assert [layer.get_seq_length() for layer in cache.layers[:2]] == [15, 16]


@pytest.mark.slow
def test_smollm2_drafts() -> None:
    """The real model with LAWCAT in three layers, which are untrained but near the identity: prompt lookup and a draft."""
    try:
        subject = load("cpu", "float32")
    except DemoError as reason:
        pytest.skip(str(reason))
    model = subject.model
    convert(model, attention="lawcat", layers=[6, 15, 24])
    tokens = chat_prompt(subject.tokenizer, "Repeat: the cat sat on the mat. The cat sat on the mat.", "cpu")
    want = greedy(model, tokens, 24)
    for options in ({"prompt_lookup_num_tokens": 5}, {"assistant_model": draft_of(model)}):
        assert torch.equal(greedy(model, tokens, 24, **options), want), options


def draft_of(model: Any) -> Any:
    """The model's first layers as a model: it drafts badly, and some tokens rightly."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 2
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    draft = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    draft.load_state_dict(
        {n: x for n, x in model.state_dict().items() if "layers." not in n or ".layers.0." in n or ".layers.1." in n}
    )
    draft.generation_config = copy.deepcopy(model.generation_config)
    return draft
