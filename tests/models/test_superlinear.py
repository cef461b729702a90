"""Models with Superlinear layers: the model itself in a wide window, the attention by hand in a narrow one, in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import subquad
from subquad.integrations.transformers import CatsConfig, SuperlinearConfig, convert, load_converted, revert
from subquad.nn import SuperlinearAttention
from subquad.testing import backend_params

from .matrix.kinds import KINDS, Kind, adapt
from .spans import ByHand
from .test_sink import gradients, told
from .test_sink_generate import CACHE, LOOKUP, OLD, greedy, on, prompt

transformers = pytest.importorskip("transformers", minversion="4.57")
CLOSE: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6}  # eager softmax is in float32
MODELS = {
    **{name: KINDS[name] for name in ("llama", "qwen3", "olmo2", "smollm3", "granite")},
    "mistral": Kind("mistral", "Mistral", more={"sliding_window": None}),
    "qwen2": Kind("qwen2", "Qwen2"),  # which has biases
}
MODES: list[Any] = [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
NARROW = {"sw_index": 1, "num_spans": 2, "backward_factor": 1.0, "forward_factor": 0.5}
OPTIONS: dict[str, dict[str, Any]] = {
    "narrow": NARROW,
    "no-window": {"sw_index": 0},
    "one-span": {"sw_index": 2, "num_spans": 1, "backward_factor": 0.4},
    "eight": {"sw_index": 1, "num_spans": 8, "span_power": 0.3},
    "group": NARROW | {"route_per": "group", "search_scale": 0.3},
    "power": {
        "search_power": 0.6, "inv_search_power_int": None, "sw_index": 1, "span_power": 0.4, "forward_factor": 1.0,
    },
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:subquad. SuperlinearConfig")  # keys that are never reached, on purpose


@pytest.fixture(autouse=True)
def _reference() -> Iterator[None]:
    with subquad.use_backend("reference"):
        yield


def plain(name: str) -> Any:
    model = MODELS[name].model().double()
    model.generation_config.eos_token_id = None
    return model


def converted(name: str, seed: int | None = 1, **options: Any) -> Any:
    """With a search that is not attention's own, unless there is no seed."""
    model = plain(name)
    convert(model, attention=SuperlinearConfig(**(options or NARROW)))
    generator = torch.Generator().manual_seed(seed or 0)
    for layer in model.model.layers if seed is not None else ():
        for parameter in layer.self_attn.q_search_proj.parameters():
            value = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.data = 0.3 * value
    return model


def by_hand(model: Any) -> Any:
    """A converted model with the same weights and attention by hand. Rows alone, without padding or a cache."""
    hand = copy.deepcopy(model)
    originals = [layer.self_attn.original for layer in model.model.layers]
    for layer, original in zip(hand.model.layers, originals, strict=True):
        ours = layer.self_attn
        config = ours.config
        options = {
            name: getattr(config, name) for name in ("sw_index", "num_spans", "backward_factor", "forward_factor")
        }
        options |= {"span_power": config.span_power, "search_scale": config.search_scale}
        options |= {
            "exponent": config.inv_search_power_int or 1 / config.search_power,
            "group": config.route_per == "group",
        }
        search = (ours.q_search_proj.weight, ours.q_search_proj.bias)
        layer.self_attn = ByHand(original, search, options)
    return hand


def logits_by_hand(hand: Any, row: torch.Tensor, places: torch.Tensor | None = None) -> torch.Tensor:
    """[T, V] of one row [T], whose tokens stand in these columns."""
    for layer in hand.model.layers:
        layer.self_attn.columns = {} if places is None else {"columns": places}
    found: torch.Tensor = hand(row[None], use_cache=False).logits[0]
    return found


# --- what it computes ----------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_a_window_that_holds_all_is_the_model(name: str) -> None:
    """Logits, greedy text, beams and rows with padding; the search may be anything."""
    model, stock, ids = converted(name, sw_index=9), plain(name), prompt(20, 2)
    for one in (model, stock):
        one.set_attn_implementation("sdpa")  # eager attention has NaN in rows of padding, in float64
    torch.testing.assert_close(model(ids).logits, stock(ids).logits, rtol=1e-5, atol=1e-5)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    for options in ({}, {"attention_mask": mask}, {"num_beams": 3}):
        assert torch.equal(greedy(model, ids, 60, **options), greedy(stock, ids, 60, **options)), options


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(40,), (1,) * 40, (17, 1, 1, 12, 2, 7)])
@pytest.mark.parametrize("name", MODELS)
def test_spans_by_hand(name: str, sizes: tuple[int, ...]) -> None:
    """Prompts, single tokens and chunks; the calls of a cache change nothing."""
    model, ids = converted(name), prompt(40, 2)
    hand, cache, parts = by_hand(model), transformers.DynamicCache(config=model.config), []
    for part in ids.split(sizes, 1):
        parts.append(model(part, **on(cache)).logits)
    for row, tokens in enumerate(ids):
        torch.testing.assert_close(torch.cat(parts, 1)[row], logits_by_hand(hand, tokens), **CLOSE)
    assert type(cache.layers[0]) is transformers.cache_utils.DynamicLayer  # as for the model's own attention


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS)
def test_options_by_hand(options: str) -> None:
    model, ids = converted("llama", **OPTIONS[options]), prompt(60)
    torch.testing.assert_close(model(ids).logits[0], logits_by_hand(by_hand(model), ids[0]), **CLOSE)
    cache = transformers.DynamicCache(config=model.config)
    parts = [model(part, **on(cache)).logits for part in ids.split((50, *(1,) * 10), 1)]
    torch.testing.assert_close(torch.cat(parts, 1)[0], logits_by_hand(by_hand(model), ids[0]), **CLOSE)


@torch.no_grad()
@backend_params("span_search", "native", "reference")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends(dtype: torch.dtype, backend: str) -> None:
    """In the model's dtype. 16 bits choose other spans now and then, so there the search is left out."""
    options = {"sw_index": 2} if dtype is torch.float32 else {"sw_index": 6}
    ids, model = prompt(48), converted("llama", **options)
    want = logits_by_hand(by_hand(model), ids[0])
    model, parts, cache = model.to(dtype), [], transformers.DynamicCache(config=model.config)
    with subquad.use_backend(backend):
        for part in ids.split((30, 1, 1, 9, *(1,) * 7), 1):
            parts.append(model(part, **on(cache)).logits[0])
    error = (torch.cat(parts).double() - want).norm() / want.norm()
    assert error < (1e-4 if dtype is torch.float32 else 6e-2)


# --- padding and sequences ----------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("way", ["2d", "bool", "additive"])
@pytest.mark.parametrize("where", ["left", "right", "inside"])
def test_padding(where: str, way: str, cached: bool) -> None:
    """Before a row it changes nothing. Behind its first token its columns count, as keys that nobody sees."""
    model, ids, mask = converted("llama"), prompt(24, 2), torch.ones(2, 24, dtype=torch.long)
    hand = by_hand(model)
    columns = {"left": (0, 1, 2, 3, 4), "right": (20, 21, 22, 23), "inside": (0, 1, 9, 15, 16)}[where]
    mask[0, list(columns)] = 0
    model.set_attn_implementation("sdpa")
    found = model(ids, attention_mask=told(model, way, mask), use_cache=cached)
    logits, ids, whole = found.logits, [ids], [mask]
    for step in range(2 if cached else 0):
        ids.append(prompt(2, 2, seed=step))
        whole.append(torch.ones(2, 2, dtype=torch.long))
        more = model(ids[-1], attention_mask=torch.cat(whole, 1), **on(found[CACHE])).logits
        logits = torch.cat([logits, more], 1)
    for row, real in enumerate(torch.cat(whole, 1).bool()):
        tokens, places = torch.cat(ids, 1)[row, real], real.nonzero()[:, 0]
        torch.testing.assert_close(logits[row, real], _placed(hand, tokens, places), **CLOSE)


def _placed(hand: Any, tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """By hand, in columns, rotated by them."""
    for layer in hand.model.layers:
        layer.self_attn.columns = {"columns": places}
    found: torch.Tensor = hand(tokens[None], position_ids=places[None], use_cache=False).logits[0]
    return found


@torch.no_grad()
@pytest.mark.parametrize("way", ["positions", "cu_seqlens", "cu_seq_lens_q", "seq_idx"])
def test_packed_sequences_are_each_alone(way: str) -> None:
    lengths = (3, 20, 1, 16)
    model, ids = converted("qwen2"), prompt(sum(lengths))
    bounds = torch.tensor([0, 3, 23, 24, 40])
    given: dict[str, Any] = {
        "positions": {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]},
        "cu_seqlens": {"cu_seqlens": bounds}, "cu_seq_lens_q": {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds},
        "seq_idx": {"seq_idx": torch.arange(4).repeat_interleave(torch.tensor(lengths))[None]},
    }[way]  # fmt: skip
    found = model(ids, use_cache=False, **given).logits[0]
    want = [logits_by_hand(by_hand(model), part[0]) for part in ids.split(lengths, 1)]
    torch.testing.assert_close(found, torch.cat(want), **CLOSE)
    with pytest.raises(ValueError, match="past_key_values: expected None with packed sequences"):
        model(ids, use_cache=True, **given)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "subquad"])
def test_several_packed_rows(implementation: str) -> None:
    """Sequences in rows of a batch that also has padding, told by positions, or by the mask that transformers makes of them."""
    subquad.integrations.transformers.register()
    model, ids = converted("llama"), prompt(30, 2)
    model.set_attn_implementation(implementation)
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in ((11, 19), (30,))])
    found = model(ids, position_ids=positions, use_cache=False).logits
    hand = by_hand(model)
    for row, first, last in ((0, 0, 11), (0, 11, 30), (1, 0, 30)):
        torch.testing.assert_close(found[row, first:last], logits_by_hand(hand, ids[row, first:last]), **CLOSE)


# --- generation ----------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "subquad"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_rows_with_padding_generate_what_they_do_alone(name: str, implementation: str) -> None:
    subquad.integrations.transformers.register()
    model, ids = converted(name), prompt(21, 3)
    model.set_attn_implementation(implementation)
    mask = torch.ones_like(ids)
    mask[0, :16], mask[1, :4] = 0, 0
    found = greedy(model, ids, 20, attention_mask=mask)
    for row, first in enumerate((16, 4, 0)):
        assert torch.equal(found[row : row + 1], greedy(model, ids[row : row + 1, first:], 20, use_cache=False)), row


@torch.no_grad()
@pytest.mark.parametrize("way", ["static", "chunks", "static-chunks", "no-cache"])
def test_ways_to_generate(way: str) -> None:
    if OLD and "chunks" in way:
        pytest.skip("transformers 4.57 gives other text for padded rows in chunks, whatever the model")
    model, ids, mask = converted("llama"), prompt(15, 2), torch.ones(2, 15, dtype=torch.long)
    mask[1, :4] = 0
    options: dict[str, Any] = {"cache_implementation": "static", "disable_compile": True} if "static" in way else {}
    options |= {"prefill_chunk_size": 4} if "chunks" in way else {}
    want = greedy(model, ids, 20, attention_mask=mask)
    assert torch.equal(greedy(model, ids, 20, attention_mask=mask, **options, use_cache=way != "no-cache"), want)


@torch.no_grad()
def test_beams() -> None:
    model, ids = converted("llama"), prompt(9, 2)
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "max_new_tokens": 24}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


@torch.no_grad()
def test_drafts_change_no_greedy_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt lookup and draft models: what is taken back lowers the position, nothing else."""
    removed, crop = [], transformers.cache_utils.DynamicLayer.crop
    monkeypatch.setattr(
        transformers.cache_utils.DynamicLayer, "crop", lambda layer, n: (removed.append(n), crop(layer, n))[1]
    )
    model, ids = converted("llama"), prompt(14).repeat(1, 2)
    want = greedy(model, ids, 40)
    draft = plain("llama")
    draft.lm_head.weight.add_(0.1 * torch.randn_like(draft.lm_head.weight))
    also = copy.deepcopy(draft)
    convert(also, attention=SuperlinearConfig(**NARROW))
    for options in (LOOKUP, {"assistant_model": draft}, {"assistant_model": also}):
        removed.clear()
        assert torch.equal(greedy(model, ids, 40, **options)[:, :40], want), options
        assert any(removed), "no draft was taken back"


@torch.no_grad()
@pytest.mark.skipif(OLD, reason="transformers 4.57 counts the keys of a preallocated cache that are not 0")
def test_keys_beyond_the_position_of_a_preallocated_cache_are_never_read() -> None:
    model, ids = converted("llama"), prompt(30, 2)
    want = model(ids, use_cache=False).logits
    cache = transformers.StaticCache(config=model.config, max_cache_len=50)
    parts = [model(ids[:, :9], **on(cache)).logits]
    for layer in cache.layers:
        layer.keys[:, :, 9:], layer.values[:, :, 9:] = float("nan"), float("nan")
    parts += [model(part, **on(cache)).logits for part in ids[:, 9:].split((1, 1, 7, 1, 11), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), want, **CLOSE)
    cache.crop(-8)  # what was taken back stands there still
    wrong = model(prompt(5, 2, seed=8), **on(cache))
    cache.crop(-5)
    assert wrong.logits.isfinite().all()
    torch.testing.assert_close(model(ids[:, 22:], **on(cache)).logits, want[:, 22:], **CLOSE)


@torch.no_grad()
def test_rows_of_a_cache_move() -> None:
    model, ids, rows = converted("llama"), prompt(20, 3), torch.tensor([2, 0, 0])
    cache = transformers.DynamicCache(config=model.config)
    model(ids[:, :15], **on(cache))
    cache.reorder_cache(rows)
    want = model(torch.cat([ids[rows, :15], ids[:, 15:]], 1), use_cache=False).logits[:, 15:]
    torch.testing.assert_close(model(ids[:, 15:], **on(cache)).logits, want, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("other", ["lawcat", "sink"])
def test_beside_layers_of_other_kinds(other: str) -> None:
    """One cache for layers with keys of theirs, with states and with those that slide."""
    subquad.integrations.transformers.register()
    kind = Kind("qwen2", "Qwen2", (4, None, None, 4), {
        "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
        "sliding_window": 4, "use_sliding_window": True,
    })  # fmt: skip
    model, ids, mask = kind.model().double(), prompt(12, 2), torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    model.set_attn_implementation("subquad")
    model.generation_config.eos_token_id = None
    convert(model, attention="superlinear", layers=[1], **NARROW)
    convert(model, attention=other, layers=[0, 2])
    want = greedy(model, ids, 12, attention_mask=mask, use_cache=False)
    assert torch.equal(greedy(model, ids, 12, attention_mask=mask), want)
    assert torch.equal(
        greedy(model, ids, 12, attention_mask=mask, cache_implementation="static", disable_compile=True), want
    )


# --- what is refused ----------------------------------------


def test_layers_that_are_refused() -> None:
    for kind, message in (
        (KINDS["mistral"], r"layers\.0\.self_attn: attention: expected one that sees every key before it, got .* of 5"),
        (KINDS["qwen2"], r"layers\.0\.self_attn: attention: expected one that sees every key .*leave this layer out"),
        (KINDS["gpt-oss"], r"layers\.0\.self_attn: attention: expected none with sinks, which Superlinear"),
        (KINDS["phi3"], r"layers\.0\.self_attn: attention: expected q_proj, k_proj"),
        (Kind("llama", "Llama", more={"attention_dropout": 0.1}), "expected none with attention_dropout"),
    ):
        model = kind.model()
        with pytest.raises(ValueError, match=message):
            convert(model, attention="superlinear")
        assert not any(isinstance(module, SuperlinearAttention) for module in model.modules())
    gemma = KINDS["gemma2"].model()
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn: attention: expected none with attn_logit_softcapping"):
        convert(gemma, attention="superlinear", layers=[1])
    assert convert(KINDS["gemma3"].model(), attention="superlinear", layers=[2]) == ["model.layers.2.self_attn"]
    for options, error, message in (
        ({"num_spans": 9}, ValueError, r"num_spans: expected 1\.\.8, got 9"),
        ({"search_power": 0.5}, ValueError, "search_power: expected either it or inv_search_power_int"),
        ({"window": 9}, TypeError, "window: unknown option; expected some of sw_index, num_spans"),
        ({"backward_factor": float("inf")}, ValueError, "backward_factor: expected a finite number"),
    ):
        with pytest.raises(error, match=message):
            convert(plain("llama"), attention="superlinear", **options)


@torch.no_grad()
def test_calls_that_are_refused() -> None:
    model = converted("llama")
    layer, x = model.model.layers[0].self_attn, torch.randn(2, 6, 32, dtype=torch.float64)
    angles = torch.randn(2, 1, 6, 8, dtype=torch.float64).unbind(0)
    slides = transformers.DynamicCache(config=KINDS["mistral"].model().config)
    for arguments, error, message in (
        ({"output_attentions": True}, ValueError, "output_attentions: there is no matrix of weights"),
        ({"attention_mask": torch.rand(2, 1, 6, 6) < 0.5}, ValueError, "attention_mask: expected a causal mask"),
        ({"attention_mask": "causal"}, TypeError, "attention_mask: expected a tensor"),
        ({"position_embeddings": None}, ValueError, r"position_embeddings: expected \(cos, sin\)"),
        (
            {"cache": subquad.nn.LawcatCache()},
            ValueError,
            "past_key_values: expected a Cache of transformers, got LawcatC",
        ),
        (
            {"cache": slides},
            ValueError,
            r"past_key_values: expected a layer 0 that holds every key, .* got a \w*Sliding",
        ),
        ({"cache": subquad.SinkCache(model.config)}, ValueError, "holds every key, .* got a SinkLayer"),
    ):
        with pytest.raises(error, match=message):
            layer(x, **({"position_embeddings": angles} | arguments))
    held = transformers.DynamicCache(config=model.config)
    layer(x, angles, **on(held))
    with pytest.raises(ValueError, match="attention_mask: expected a column for each of 12 keys, got 6"):
        layer(x, angles, torch.ones(2, 6, dtype=torch.long), **on(held))
    layer.layer_idx = None
    with pytest.raises(ValueError, match="layer_idx: expected the layer's number"):
        layer(x, angles, **on(held))


# --- layers alone ----------------------------------------


@torch.no_grad()
def test_a_layer_alone() -> None:
    """Rotated by its own frequencies, with norms and biases; rows and chunks of a cache are those of one call."""
    rope = subquad.RopeSpec(1.0 / 100.0 ** (torch.arange(0, 8, 2) / 8), 8, attention_scaling=1.3)
    layer = SuperlinearAttention(
        32, 4, 2, 8, config=SuperlinearConfig(**NARROW), rope=rope, qk_norm=True, qkv_bias=True, o_bias=True, layer_idx=0,
        dtype=torch.float64,
    )  # fmt: skip
    assert layer.o_proj.bias is not None and layer.q_search_proj.bias is not None and layer.q_norm is not None
    assert "window=3, num_spans=2" in repr(layer)
    x = torch.randn(2, 30, 32, dtype=torch.float64)
    whole, _ = layer(x)
    cache = transformers.DynamicCache()
    parts = [layer(part, **on(cache))[0] for part in x.split((20, 1, 1, 8), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[0, :9] = False
    torch.testing.assert_close(layer(x, attention_mask=mask)[0][0, 9:], layer(x[:1, 9:])[0][0])
    angle = torch.arange(30)[:, None] * rope.inv_freq.double()
    given = tuple(1.3 * turn(torch.cat([angle, angle], -1))[None] for turn in (torch.cos, torch.sin))
    torch.testing.assert_close(layer(x, given)[0], whole)
    layer.rope = None
    assert not torch.allclose(layer(x)[0], whole)


def test_constructors_refuse_by_name() -> None:
    attention = plain("llama").model.layers[0].self_attn
    for make, error, message in (
        (lambda: SuperlinearAttention(32, 4, 3), ValueError, "num_kv_heads: expected a divisor of 4, got 3"),
        (lambda: SuperlinearAttention(32, 0), ValueError, "num_heads: expected at least 1"),
        (lambda: SuperlinearAttention(32, 4, window=3), TypeError, "window: unknown option; expected some of sw_index"),
        (lambda: SuperlinearAttention(32, 4, config="n = 2"), TypeError, "config: expected a subquad.SuperlinearConfig"),
        (lambda: SuperlinearAttention(32, 4, config=SuperlinearConfig(), sw_index=1), ValueError, "sw_index: expected to be"),
        (lambda: SuperlinearAttention(32, 4, rope="llama"), TypeError, "rope: expected a subquad.RopeSpec"),
        (lambda: SuperlinearAttention(32, 4, qkv_bias=1), TypeError, "qkv_bias: expected a bool"),
        (lambda: SuperlinearAttention(32, 4, head_dim=300), ValueError, "head_dim: expected at most 256"),
        (lambda: SuperlinearAttention(32, 4, layer_idx="1"), TypeError, "layer_idx: expected an int"),
        (lambda: SuperlinearAttention(32, 4, device="chip"), ValueError, "device: expected a torch.device"),
        (lambda: SuperlinearAttention(32, 4, parts={"r_proj": torch.nn.Identity()}), ValueError, "parts: expected names of"),
        (lambda: SuperlinearAttention(32, 4)(None), TypeError, "hidden_states: expected a torch.Tensor"),
        (lambda: SuperlinearAttention(32, 4)(torch.ones(2, 5, 31)), ValueError, "hidden_states: expected shape"),
        (
            lambda: SuperlinearAttention.from_attention(attention, init_search="zero"), ValueError,
            "init_search: expected one of 'copy_q', 'random', got 'zero'",
        ),
        (lambda: SuperlinearAttention(32, 4).to_attention(), ValueError, "original: expected a layer made by from_attention"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            make()


@torch.no_grad()
def test_the_search_starts_from_the_queries() -> None:
    """A copy of the projection, bias and all; of what an adapter makes of it, too; or something else."""
    attention = plain("qwen2").model.layers[0].self_attn
    layer = SuperlinearAttention.from_attention(attention)
    assert torch.equal(layer.q_search_proj.weight, attention.q_proj.weight)
    assert torch.equal(layer.q_search_proj.bias, attention.q_proj.bias)
    assert layer.q_search_proj.weight.data_ptr() != attention.q_proj.weight.data_ptr()
    assert set(layer.new_parameters()) == {"q_search_proj.weight", "q_search_proj.bias"}
    other = SuperlinearAttention.from_attention(attention, init_search="random")
    assert other.q_search_proj.weight.shape == attention.q_proj.weight.shape
    assert not torch.allclose(other.q_search_proj.weight, attention.q_proj.weight, atol=0.1)
    adapted = plain("qwen2").train()
    adapt(adapted)
    for layer in adapted.model.layers:  # the dropout of adapters is nothing that a layer computes
        layer.self_attn.q_proj.register_forward_hook(lambda m, _, y: torch.nn.functional.dropout(y, 0.5, m.training))
    convert(adapted, attention="superlinear", **NARROW)
    layer, x = adapted.model.layers[0].self_attn, torch.randn(3, 32, dtype=torch.float64)
    assert type(layer.q_search_proj) is torch.nn.Linear and layer.q_proj.training
    torch.testing.assert_close(layer.q_search_proj(x), layer.q_proj.eval()(x))


# --- converting, saving, training ----------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_everything_is_shared_and_given_back(name: str) -> None:
    model, ids = plain(name), prompt(12, 2)
    before, want = {n: id(p) for n, p in model.named_parameters()}, model(ids).logits
    originals = [layer.self_attn for layer in model.model.layers]
    report = convert(model, attention="superlinear", **NARROW)
    after = {n: id(p) for n, p in model.named_parameters()}
    assert len(report) == len(originals) and before.items() <= after.items()
    assert all(".q_search_proj." in n for n in after.keys() - before.keys())
    assert report.new_parameters == sum(p.numel() for n, p in model.named_parameters() if ".q_search_proj." in n)
    assert not torch.equal(model(ids).logits, want)
    assert convert(model, attention="superlinear", **NARROW) == []
    with pytest.raises(ValueError, match="sw_index: expected"):
        convert(model, attention="superlinear")
    assert revert(model) == report
    assert [layer.self_attn for layer in model.model.layers] == originals and torch.equal(model(ids).logits, want)
    assert {n: id(p) for n, p in model.named_parameters()} == before


@torch.no_grad()
def test_saved_and_loaded(tmp_path: Path) -> None:
    options = SuperlinearConfig(
        sw_index=1, num_spans=2, backward_factor=1.7, search_power=0.55, inv_search_power_int=None, route_per="group"
    )
    model, ids = Kind("qwen2", "Qwen2", (None,) * 3).model(), prompt(40, 2)
    convert(model, attention=options, mlp=CatsConfig(threshold=0.05), layers=[0, 2])
    learned = {n: p for n, p in model.named_parameters() if ".q_search_proj." in n}
    assert len(learned) == 4
    for p in learned.values():
        p.normal_()
    model.save_pretrained(tmp_path)
    again = load_converted(tmp_path)
    again.set_attn_implementation("eager")
    layers = [layer.self_attn for layer in again.model.layers]
    assert [isinstance(layer, SuperlinearAttention) for layer in layers] == [True, False, True]
    assert layers[0].config == options
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert torch.equal(greedy(again, ids), greedy(model, ids))
    assert len(revert(again)) == 4 and "subquad" not in again.config.to_dict()


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_training(name: str) -> None:
    """As attention by hand, search included; as without a cache where transformers makes one nobody asked for."""
    model, ids = converted(name, **NARROW), prompt(30, 2)
    found = gradients(model, ids, use_cache=False)
    routers = {n for n in found if ".q_search_proj.weight" in n}
    assert len(routers) == 2 and all(found[n].abs().max() > 1e-6 for n in routers)
    hand = by_hand(model)
    for p in hand.parameters():
        p.grad = None
    sum(torch.nn.functional.cross_entropy(logits_by_hand(hand, row)[:-1], row[1:], reduction="sum") for row in ids).div(
        ids[:, 1:].numel()
    ).backward()
    want = {n.replace(".self_attn.attention.", ".self_attn."): p.grad for n, p in hand.named_parameters()}
    searches = [layer.self_attn.search for layer in hand.model.layers]
    for index, (weight, bias) in enumerate(searches):
        want |= {f"model.layers.{index}.self_attn.q_search_proj.weight": weight.grad}
        want |= {} if bias is None else {f"model.layers.{index}.self_attn.q_search_proj.bias": bias.grad}
    for parameter, gradient in found.items():
        torch.testing.assert_close(gradient, want[parameter], rtol=1e-4, atol=1e-6, msg=parameter)
    again = gradients(model, ids, use_cache=True)
    for parameter, gradient in found.items():
        torch.testing.assert_close(again[parameter], gradient, **CLOSE, msg=parameter)


def test_the_search_learns_alone() -> None:
    """With all else frozen it has gradients, and with one span none, for a softmax over one score is constant."""
    ids = prompt(30, 2)
    for options in (NARROW, NARROW | {"num_spans": 1}):
        model = converted("llama", **options).requires_grad_(False)
        routers = [layer.self_attn.q_search_proj.weight for layer in model.model.layers]
        for weight in routers:
            weight.requires_grad_(True)
        model(ids, labels=ids).loss.backward()
        largest = max(float(weight.grad.abs().max()) for weight in routers)
        assert (largest > 1e-6) == (options["num_spans"] > 1)
        assert all(p.grad is None for n, p in model.named_parameters() if ".q_search_proj." not in n)


@pytest.mark.parametrize("late", [*MODES, torch.bfloat16])  # which the model has become by then
@pytest.mark.parametrize("early", MODES)
def test_a_cache_goes_from_mode_to_mode(early: Any, late: Any) -> None:
    """A window that holds all, for 16 bits choose other spans."""
    model, ids = converted("llama", sw_index=4).float().requires_grad_(False), prompt(20)
    cache = transformers.DynamicCache(config=model.config)
    want = model(ids, use_cache=False).logits
    with early():
        model(ids[:, :15], **on(cache))
    model.to(late if late is torch.bfloat16 else torch.float32)
    with torch.no_grad() if late is torch.bfloat16 else late():
        found = torch.cat([model(part, **on(cache)).logits.float() for part in ids[:, 15:].split(1, 1)], 1)
    assert (found - want[:, 15:]).abs().max() / want.abs().max() < 5e-2
