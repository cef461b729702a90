"""Caches of LAWCAT layers, whatever a user does with them: other modes, copies, other processes, rows, compiled steps."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from subquad.demo.model import cache_name
from subquad.integrations.transformers import LawcatConfig, convert, register
from subquad.nn import LawcatAttention, LawcatCache

from .test_tokens import OPTIONS, layer_of, rotations

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.cache_utils").__dict__.get("LinearAttentionLayer") or pytest.skip(
    "needs transformers >= 5", allow_module_level=True
)

# --- modes ----------------------------------------

MODES: dict[str, list[Any]] = {
    "plain": [torch.no_grad],
    "bf16": [torch.no_grad, lambda: torch.autocast("cpu", dtype=torch.bfloat16)],
    "fp16": [torch.no_grad, lambda: torch.autocast("cpu", dtype=torch.float16)],
    "inference": [torch.inference_mode],
    "inference-bf16": [torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)],
    "grad": [torch.enable_grad],
    "grad-bf16": [torch.enable_grad, lambda: torch.autocast("cpu", dtype=torch.bfloat16)],
}


def within(mode: str) -> ExitStack:
    stack = ExitStack()
    for enter in MODES[mode]:
        stack.enter_context(enter())
    return stack


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("keep", [0, 3])
def test_a_cache_goes_from_mode_to_mode(name: str, keep: int) -> None:
    """The prompt in one mode, steps in another, a chunk in the first again; then tokens are taken back."""
    layer, x, mask = layer_of(name), torch.randn(2, 8, 32), torch.ones(2, 8)
    mask[0, :2], mask[1, 3], mask[1, 6] = 0, 0, 0
    cos, sin = rotations(torch.arange(8)[None])
    want = layer.mix(x, (cos, sin), mask).detach()
    for one, other in itertools.product(MODES, MODES):
        cache, parts = LawcatCache(keep=keep), []
        for (start, stop), mode in zip(((0, 4), (4, 5), (5, 6), (6, 8)), (one, other, other, one), strict=True):
            with within(mode):
                columns = slice(start, stop)
                parts.append(layer.mix(x[:, columns], (cos[:, columns], sin[:, columns]), mask[:, :stop], cache))
        if keep:
            cache.rollback(3)
            with within(other):
                parts[2:] = [layer.mix(x[:, 5:], (cos[:, 5:], sin[:, 5:]), mask, cache)]
        error = (torch.cat([p.detach().float() for p in parts], 1) - want).abs().max() / want.abs().max()
        assert error < (5e-2 if "16" in one + other else 1e-5), (one, other)


def test_gates_under_autocast() -> None:
    """Logits of 16 bits beside a state of other bits, with and without the one operator."""
    layer, x = layer_of("default"), torch.randn(2, 3, 32)
    with torch.no_grad():
        want = layer.mix(x)
        for dtype, apart in itertools.product((torch.bfloat16, torch.float16), (False, True)):
            if apart:
                layer._fuses = lambda: False  # type: ignore[method-assign]
            layer.mix(x[:, :1], past_key_values=(cache := LawcatCache()))
            with torch.autocast("cpu", dtype=dtype):
                found = [layer.mix(part, past_key_values=cache).float() for part in x[:, 1:].split(1, 1)]
            torch.testing.assert_close(torch.cat(found, 1), want[:, 1:], rtol=3e-2, atol=3e-2)


# --- models ----------------------------------------

CONVERSIONS: dict[str, dict[str, Any]] = {
    "linear": {"attention": "lawcat"},
    "first": {"attention": "lawcat", "layers": [0]},
    "last": {"attention": "lawcat", "layers": [-1]},
    "window": {"attention": LawcatConfig(window_size=3)},
    "before": {"attention": LawcatConfig(window_size=3, linear_covers_window=False), "layers": [0]},
}


def model_of(conversion: str | dict[str, Any], implementation: str = "sdpa", family: str = "Llama", **more: Any) -> Any:
    register()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 61, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": None}
    config = getattr(transformers, f"{family}Config")(**(sizes | {"initializer_range": 0.3} | more))
    config._attn_implementation = implementation
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().requires_grad_(False)
    convert(model, **(CONVERSIONS[conversion] if isinstance(conversion, str) else conversion))
    for module in model.modules():
        if isinstance(module, LawcatAttention):
            for parameter in module.requires_grad_(False).new_parameters().values():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def ids(b: int = 2, t: int = 12) -> torch.Tensor:
    return torch.randint(3, 61, (b, t), generator=torch.Generator().manual_seed(5))


def cache_of(kind: str, model: Any) -> Any:
    if kind == "dynamic":
        return transformers.DynamicCache(config=model.config)
    cache = transformers.StaticCache(config=model.config, max_cache_len=20)
    if kind == "early":
        cache.early_initialization(2, 2, 8, torch.float32, torch.device("cpu"))
    return cache


PADDING = {
    "no": [[1] * 12, [1] * 12],
    "left": [[0] * 5 + [1] * 7, [1] * 12],
    "right": [[1] * 7 + [0] * 5, [1] * 12],
    "inside": [[1, 1, 1, 0, 0, 1, 0, 1, 1, 1, 0, 1], [0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1]],
}


@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "subquad"])
@pytest.mark.parametrize("padding", PADDING)
def test_any_split_of_a_prompt(conversion: str, implementation: str, padding: str) -> None:
    """With every cache the logits of the model without one."""
    model, mask = model_of(conversion, implementation), torch.tensor(PADDING[padding])
    want = model(ids(), attention_mask=mask, use_cache=False).logits
    for kind in ("dynamic", "static", "early"):
        for lengths in ([12], [7, 1, 4], [5, 3, 1, 1, 1, 1], [1] * 12):
            cache, stop, parts = cache_of(kind, model), 0, []
            for part in ids().split(lengths, 1):
                stop += part.shape[1]
                parts.append(model(part, attention_mask=mask[:, :stop], **{cache_name(model): cache}).logits)
            found = torch.cat(parts, 1)
            torch.testing.assert_close(found[mask.bool()], want[mask.bool()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "subquad"])
@pytest.mark.parametrize("layers", [[0], [1], [2], [0, 1], [1, 2], None])
def test_a_preallocated_cache_of_one_sliding_layer(implementation: str, layers: list[int] | None) -> None:
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    more = {"num_hidden_layers": 3, "layer_types": kinds, "use_sliding_window": True, "sliding_window": 4}
    model = model_of({"attention": "lawcat", "layers": layers}, implementation, "Qwen2", **more)
    mask = torch.tensor(PADDING["left"])
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "disable_compile": True}
    want = model.generate(ids(), **options)
    assert torch.equal(model.generate(ids(), cache_implementation="static", **options), want)


@pytest.mark.parametrize("how", ["keep", "announced"])
def test_a_preallocated_cache_that_keeps_tokens_and_no_mask(how: str) -> None:
    """transformers leaves a step without a mask where the cache says that it is not compiled: softmax would see empty columns."""
    model = model_of({"attention": LawcatConfig(keep=3 if how == "keep" else 0), "layers": [1]})
    tokens, cache = ids(), cache_of("static", model)
    with torch.no_grad():
        want = model(tokens, use_cache=False).logits
        parts = []
        for part in tokens.split([5, 1, 6], 1):
            if how == "announced":
                cache.activate_past_recording()
            parts.append(model(part, **{cache_name(model): cache}).logits)
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-4, atol=1e-4)


def test_an_early_cache_that_was_used_is_refused() -> None:
    model = model_of("linear")
    softmax = transformers.LlamaForCausalLM(model.config).eval()
    cache = cache_of("early", model)
    softmax(ids(), **{cache_name(model): cache})
    with pytest.raises(ValueError, match="past_key_values: expected an unused layer 0"):
        model(ids(2, 1), **{cache_name(model): cache})


def saved(cache: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda cache: pickle.loads(pickle.dumps(cache)), "save": saved}


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_copies_and_rows(kind: str, conversion: str) -> None:
    """A copy goes on by itself; rows are chosen, repeated and put in another order."""
    model = model_of(conversion)
    name, first, last = cache_name(model), ids()[:, :7], ids()[:, 7:]
    want = model(ids(), use_cache=False).logits[:, 7:]
    cache = cache_of(kind, model)
    model(first, **{name: cache})
    copies = {how: make(cache) for how, make in COPIES.items()}
    torch.testing.assert_close(model(last, **{name: cache}).logits, want, rtol=1e-4, atol=1e-4)
    for how, other in copies.items():
        assert int(other.get_seq_length()) == 7
        torch.testing.assert_close(model(last, **{name: other}).logits, want, rtol=1e-4, atol=1e-4, msg=how)
    rows = torch.tensor([1, 0])
    changes: dict[str, tuple[Any, torch.Tensor]] = {"reorder": (lambda c: c.reorder_cache(rows), rows)}
    if kind == "dynamic":
        changes["select"] = (lambda c: c.batch_select_indices(torch.tensor([1])), torch.tensor([1]))
        changes["repeat"] = (lambda c: c.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1]))
    for how, (change, chosen) in changes.items():
        model(first, **{name: (other := cache_of(kind, model))})
        change(other)
        torch.testing.assert_close(
            model(last[chosen], **{name: other}).logits, want[chosen], rtol=1e-4, atol=1e-4, msg=how
        )
    other.reset()
    again = model(ids()[chosen], **{name: other}).logits[:, 7:]
    torch.testing.assert_close(again, want[chosen], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_tokens_are_taken_back_over_padding(kind: str) -> None:
    for conversion in CONVERSIONS:
        model, mask = model_of(conversion), torch.tensor(PADDING["inside"])
        want = model(ids(), attention_mask=mask, use_cache=False).logits
        cache = cache_of(kind, model)
        model(ids()[:, :10], attention_mask=mask[:, :10], **{cache_name(model): cache})
        cache.crop(-4)
        found = model(ids()[:, 6:], attention_mask=mask, **{cache_name(model): cache}).logits
        real = mask[:, 6:].bool()
        torch.testing.assert_close(found[real], want[:, 6:][real], rtol=1e-4, atol=1e-4, msg=conversion)


def test_a_class_that_derives_from_a_cache_is_one() -> None:
    class Own(transformers.DynamicCache):
        pass

    model = model_of("linear")
    cache = Own(config=model.config)
    want = model(ids(), use_cache=False).logits
    model(ids()[:, :10], **{cache_name(model): cache})
    found = model(ids()[:, 10:], **{cache_name(model): cache}).logits
    torch.testing.assert_close(found, want[:, 10:], rtol=1e-4, atol=1e-4)


def test_a_preallocated_cache_counts_in_a_tensor() -> None:
    """As its softmax layers do, so that compiled code has one graph for all steps; copies and state dicts keep it."""
    model = model_of("linear")
    cache = cache_of("static", model)
    assert cache.get_seq_length() == 0
    model(ids(), **{cache_name(model): cache})
    state = cache.layers[0].state
    assert isinstance(state.seen, torch.Tensor) and int(state.seen) == 12
    other = type(state)()
    other.load_state_dict(state.state_dict())
    model(ids(2, 1), **{cache_name(model): cache})
    assert int(other.seen) == 12 and int(state.seen) == 13 and int(copy.deepcopy(state).seen) == 13
    assert "seen" not in state.tensors()
    cache.reset()
    assert int(state.seen) == 0 and cache.get_seq_length() == 0


@pytest.mark.heavy
def test_a_cache_in_another_process(tmp_path: Path) -> None:
    model = model_of("before")
    cache = cache_of("dynamic", model)
    model(ids()[:, :7], **{cache_name(model): cache})
    torch.save({"model": model, "cache": cache, "ids": ids()[:, 7:]}, tmp_path / "all.pt")
    text = (
        "import sys, torch\n"
        "x = torch.load(sys.argv[1], weights_only=False)\n"
        "with torch.no_grad(): y = x['model'](x['ids'], past_key_values=x['cache']).logits\n"
        "torch.save(y, sys.argv[2])\n"
    )
    subprocess.run([sys.executable, "-c", text, tmp_path / "all.pt", tmp_path / "y.pt"], check=True)
    want = model(ids(), use_cache=False).logits[:, 7:]
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), want, rtol=1e-4, atol=1e-4)


# --- compiled steps ----------------------------------------


@pytest.fixture(autouse=True)
def _fresh_graphs(request: pytest.FixtureRequest) -> Any:
    if request.node.get_closest_marker("heavy"):
        torch._dynamo.reset()
    yield


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("kind", "options"),
    [("dynamic", {}), pytest.param("static", {}, marks=pytest.mark.full), ("static", {"dynamic": False})],
)
@pytest.mark.parametrize("conversion", ["linear", pytest.param("first", marks=pytest.mark.full)])
def test_steps_of_a_compiled_model_share_graphs(kind: str, options: dict[str, Any], conversion: str) -> None:
    """Two at most without a break, of a preallocated cache one; also where nothing ran before it was compiled."""
    from torch._dynamo.testing import CompileCounter

    model = model_of(conversion)
    # Without dynamic sizes every width of a mask is a graph.
    mask = torch.tensor(PADDING["no" if options else "left"])
    want = model(ids(), attention_mask=mask, use_cache=False).logits
    counter, cache = CompileCounter(), cache_of(kind, model)
    compiled = torch.compile(model, backend=counter, fullgraph=True, **options)
    name = cache_name(model)
    parts = [(model if options else compiled)(ids()[:, :4], attention_mask=mask[:, :4], **{name: cache}).logits]
    before = counter.frame_count
    for t in range(4, 10):
        part = {"input_ids": ids()[:, t : t + 1].clone()}
        part |= {} if options else {"attention_mask": mask[:, : t + 1].clone()}
        parts.append(compiled(**part, **{name: cache}).logits)
    assert counter.frame_count - before <= 2, "a graph for every step"
    found, real = torch.cat(parts, 1), mask[:, :10].bool()
    torch.testing.assert_close(found[real], want[:, :10][real], rtol=1e-4, atol=1e-4)


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["default", "window", "before"])
@pytest.mark.parametrize("keep", [pytest.param(0, marks=pytest.mark.full), 3])
@torch.no_grad()
def test_steps_of_a_compiled_layer_share_graphs(name: str, keep: int) -> None:
    from torch._dynamo.testing import CompileCounter

    layer, x, mask = layer_of(name), torch.randn(2, 14, 32), torch.ones(2, 14)
    mask[0, :2], mask[1, 9] = 0, 0
    cos, sin = rotations(torch.arange(14)[None])
    want, cache, counter = layer.mix(x, (cos, sin), mask), LawcatCache(keep=keep), CompileCounter()
    compiled = torch.compile(layer.mix, backend=counter, fullgraph=True)
    parts = [layer.mix(x[:, :4], (cos[:, :4], sin[:, :4]), mask[:, :4], cache)]
    for t in range(4, 14):
        pair = cos[:, t : t + 1], sin[:, t : t + 1]
        parts.append(compiled(x[:, t : t + 1], pair, mask[:, : t + 1], cache))
    assert counter.frame_count <= (3 if keep else 2), "a graph for every step"
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-5, atol=2e-6)
    if keep:
        cache.rollback(2)
        found = layer.mix(x[:, 12:], (cos[:, 12:], sin[:, 12:]), mask, cache)
        torch.testing.assert_close(found, want[:, 12:], rtol=1e-5, atol=2e-6)


def test_a_window_keeps_the_rows_that_the_next_token_sees() -> None:
    """All but the token's own; not the prompt."""
    layer = LawcatAttention(32, 4, window_size=5, layer_idx=0)
    cache = LawcatCache()
    angle = torch.rand(1, 9, 8)
    layer(torch.randn(2, 9, 32), (angle.cos(), angle.sin()), past_key_values=cache)
    assert cache.state(0).window_k.shape == (2, 4, 4, 8)  # type: ignore[union-attr]


@pytest.mark.parametrize("first", [None, "mask"])
@pytest.mark.parametrize("name", OPTIONS)
def test_taking_back_calls_with_and_without_a_mask(name: str, first: str | None) -> None:
    """A call without a mask has no padding, whatever the calls beside it had."""
    layer, x, mask = layer_of(name), torch.randn(2, 8, 32), torch.ones(2, 8)
    mask[1, 1 if first else 5] = 0
    cos, sin = rotations(torch.arange(8)[None])
    want, cache = layer.mix(x, (cos, sin), mask), LawcatCache(keep=8)

    def call(start: int, stop: int, given: torch.Tensor | None) -> torch.Tensor:
        columns = slice(start, stop)
        return layer.mix(x[:, columns], (cos[:, columns], sin[:, columns]), given, cache)

    with torch.no_grad():
        call(0, 4, mask[:, :4] if first else None)
        call(4, 7, None if first else mask[:, :7])
        cache.rollback(1)
        torch.testing.assert_close(call(6, 8, mask), want[:, 6:], rtol=1e-5, atol=2e-6)


def test_a_cache_of_a_users_own_class() -> None:
    """Whose library is found by what it derives from."""
    layer, x = LawcatAttention(32, 4, layer_idx=0), torch.randn(1, 6, 32)
    angle = torch.rand(1, 6, 8)
    parts = [(x[:, t : t + 1], (angle[:, t : t + 1].cos(), angle[:, t : t + 1].sin())) for t in range(6)]

    class Mine(transformers.DynamicCache):
        pass

    found = []
    for kind in (transformers.DynamicCache, Mine):
        cache = kind()
        with torch.no_grad():
            found.append(torch.cat([layer(*part, past_key_values=cache)[0] for part in parts], 1))
    assert torch.equal(*found)
