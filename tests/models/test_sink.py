"""Layers with sinks and a window in models: what they take over and refuse, masks, training, saving, states, compiled steps."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import subquad
from subquad.cache import State
from subquad.cache.sink_state import SinkState
from subquad.integrations.transformers import CatsConfig, SinkConfig, convert, load_converted, revert
from subquad.nn import SinkAttention

from .compiled import Graphs
from .matrix.kinds import KINDS, Kind
from .test_sink_generate import CACHE, OLD, SINKS, WINDOW, converted, greedy, on, plain, prompt

transformers = pytest.importorskip("transformers", minversion="4.57")
CLOSE: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6}


@pytest.fixture(autouse=True)
def _reference() -> Any:
    with subquad.use_backend("reference"):
        yield


def dynamic(model: Any) -> Any:
    return transformers.DynamicCache(config=model.config)


# --- converting ----------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt-oss"])
def test_everything_is_shared_and_given_back(name: str) -> None:
    model = copy.deepcopy(plain(name))
    before = {n: id(p) for n, p in model.named_parameters()}
    originals = [layer.self_attn for layer in model.model.layers]
    report = convert(model, attention="sink", sink_tokens=SINKS, window=WINDOW)
    assert len(report) == len(originals) and report.new_parameters == 0 < report.shared_parameters
    assert {n: id(p) for n, p in model.named_parameters()} == before
    layer = model.model.layers[-1].self_attn
    assert isinstance(layer, SinkAttention) and (layer.sinks is None) == (name != "gpt-oss")
    layer.q_proj = torch.nn.Linear(32, 32, bias=False)
    assert revert(model) == report
    assert [layer.self_attn for layer in model.model.layers] == originals
    assert originals[-1].q_proj is layer.q_proj


@torch.no_grad()
def test_what_fits_is_the_model_itself() -> None:
    for name in ("llama", "gemma3", "gpt-oss", "smollm3"):
        ids = prompt(12, 2)
        model = converted(name, sink_tokens=4, window=60)
        torch.testing.assert_close(model(ids).logits, plain(name)(ids).logits, rtol=1e-4, atol=1e-4)


def test_refusals_name_the_layer_and_change_nothing() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    dynamic_rope = Kind("llama", "Llama", more={"rope_parameters": rope, "max_position_embeddings": 16})
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (KINDS["gemma2"].model(), {}, "expected none with attn_logit_softcapping"),
        (KINDS["phi3"].model(), {}, "expected q_proj, k_proj, v_proj, o_proj and head_dim, got a Phi3Attention"),
        (Kind("llama", "Llama", more={"attention_dropout": 0.1}).model(), {}, "expected none with attention_dropout"),
        (
            dynamic_rope.model(),
            {"window": 100},
            "depend on the length, got 'dynamic'; they do not up to max_positions=16",
        ),
        (dynamic_rope.model(), {"window": 10, "positions": "absolute"}, "depend on the length, got 'dynamic'"),
    ]
    for model, options, message in cases:
        with pytest.raises(ValueError, match=rf"layers\.0\.self_attn: attention: .*{message}"):
            convert(model, attention="sink", **options)
        assert not any(isinstance(module, SinkAttention) for module in model.modules())
    model = dynamic_rope.model()
    assert convert(model, attention="sink", sink_tokens=2, window=14)
    for options, error, message in (
        ({"window": -1}, ValueError, "window: expected at least 0, got -1"),
        ({"sink_tokens": 1.5}, TypeError, "sink_tokens: expected an int"),
        ({"positions": "here"}, ValueError, "positions: expected one of 'cache', 'absolute', got 'here'"),
        ({"kv_dtype": "int4"}, ValueError, "kv_dtype: expected None, 'int8' or 'float8_e4m3fn', got 'int4'"),
        ({"learned_sink": 1}, TypeError, "learned_sink: expected a bool"),
    ):
        with pytest.raises(error, match=message):
            convert(copy.deepcopy(plain("llama")), attention="sink", **options)
    with pytest.raises(TypeError, match="keep: unknown option; expected some of sink_tokens, window"):
        convert(copy.deepcopy(plain("llama")), attention="sink", keep=3)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_positions_of_the_model_are_compared_once(dtype: torch.dtype) -> None:
    """A rotation that is not what the config says is named; rounding, and any place of the stream, is no difference."""
    for name in ("llama", "gpt-oss", "gemma3"):
        model = converted(name).to(dtype)
        far = torch.arange(12)[None] + 100_000
        model(prompt(12), position_ids=far, use_cache=False)
    model = converted("llama").to(dtype)
    model.model.rotary_emb.inv_freq.mul_(1.05)
    with pytest.raises(ValueError, match=r"position_embeddings: expected the rotation of the config, got one that"):
        model(prompt(12))
    model.model.rotary_emb.inv_freq.div_(1.05)
    model(prompt(12))
    model.model.rotary_emb.inv_freq.mul_(1.05)
    model(prompt(12))  # it was right at the first call


@torch.no_grad()
def test_beside_other_conversions(tmp_path: Path) -> None:
    """Some layers, gated MLPs, options of all kinds; saved and loaded again with what was trained."""
    options = SinkConfig(SINKS, WINDOW, "absolute", torch.int8, 7, "post", learned_sink=True)
    model, ids = Kind("llama", "Llama", (None,) * 3).model(), prompt(30, 2)
    convert(model, attention=options, mlp=CatsConfig(threshold=0.05), layers=[0, 2])
    learned = {n: p for n, p in model.named_parameters() if n.endswith("sinks")}
    assert len(learned) == 2
    for p in learned.values():
        p.normal_()
    model.save_pretrained(tmp_path)
    again = load_converted(tmp_path)
    assert convert(again, attention=options, layers=[0, 2]) == []
    for other, message in (
        (replace(options, window=WINDOW + 1), "window: expected 9, as it was converted with, got 10"),
        (replace(options, kv_dtype=None), "kv_dtype: expected 'int8', as it was converted with, got None"),
    ):
        with pytest.raises(ValueError, match=r"^model\.layers\.0\.self_attn: " + message):
            convert(again, attention=other)
    again.set_attn_implementation("eager")
    layers = [layer.self_attn for layer in again.model.layers]
    assert [isinstance(layer, SinkAttention) for layer in layers] == [True, False, True]
    assert layers[0].config == SinkConfig(SINKS, WINDOW, "absolute", "int8", 7, "post", learned_sink=True)
    assert layers[0].config.ring_dtype() is torch.int8
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert torch.equal(greedy(again, ids), greedy(model, ids))
    assert len(revert(again)) == 4 and "subquad" not in again.config.to_dict()


# --- masks and sequences ----------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("sinks_in_sliding", [False, True])
@pytest.mark.parametrize("layers", [None, [0], []], ids=["all", "one", "none"])
def test_padding_inside_a_sequence(layers: list[int] | None, sinks_in_sliding: bool) -> None:
    """Converted layers count tokens. Those of transformers slide over columns, converted neighbours or not."""
    model, ids = copy.deepcopy(plain("mistral")), prompt(21)
    options = SinkConfig(SINKS, WINDOW, sinks_in_sliding=sinks_in_sliding)
    if layers != []:
        convert(model, attention=options, layers=layers)
    mask = torch.ones_like(ids)
    mask[0, 6:9] = 0
    real, positions = mask[0].bool(), (mask.cumsum(1) - 1).clamp_min(0)
    found = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[0, real]
    alone = model(ids[:, real], use_cache=False).logits[0]
    if layers is None:
        torch.testing.assert_close(found, alone, **CLOSE)
    else:
        off = (found - alone).abs().amax(1) > 0.1
        assert not off[:6].any() and off[6:10].all()  # tokens whose window of 5 columns has padding in it


def told(model: Any, way: str, mask: torch.Tensor) -> Any:
    """A padding mask [B, T] as a model may be given it."""
    if way == "2d":
        return mask
    seen = mask[:, None, None].bool() & torch.ones(mask.shape[1], mask.shape[1]).tril().bool()
    return (
        seen if way == "bool" else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min).double()
    )


@torch.no_grad()
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("way", ["2d", "bool", "additive"])
@pytest.mark.parametrize("where", ["left", "right", "inside", "everywhere"])
def test_padding_changes_nothing(where: str, way: str, cached: bool) -> None:
    model, ids, mask = converted("llama"), prompt(24, 3), torch.ones(3, 24, dtype=torch.long)
    model.set_attn_implementation("sdpa")
    if where in ("left", "everywhere"):
        mask[0, :5], mask[2, :21] = 0, 0
    if where in ("right", "everywhere"):
        mask[1, 9:], mask[2, 23:] = 0, 0
    if where in ("inside", "everywhere"):
        mask[0, 7:9], mask[1, 3], mask[1, 5] = 0, 0, 0
    found = model(ids, attention_mask=told(model, way, mask), use_cache=cached)
    for row, real in enumerate(mask.bool()):
        alone = model(ids[row : row + 1, real], use_cache=False).logits[0]
        torch.testing.assert_close(found.logits[row, real], alone, **CLOSE)
    if not cached:
        return
    more, after = prompt(3, 3, seed=9), torch.cat([mask, torch.ones(3, 3, dtype=torch.long)], 1)
    found = model(more, attention_mask=after, **on(found[CACHE])).logits
    for row, real in enumerate(mask.bool()):
        alone = model(torch.cat([ids[row, real], more[row]])[None], use_cache=False).logits[0, -3:]
        torch.testing.assert_close(found[row], alone, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("way", ["positions", "cu_seqlens", "cu_seq_lens_q", "seq_idx"])
def test_packed_sequences_are_each_alone(way: str) -> None:
    lengths = (3, 20, 1, 16)
    model, ids = converted("mistral", sinks_in_sliding=True), prompt(sum(lengths))
    bounds = torch.tensor([0, 3, 23, 24, 40])
    given: dict[str, Any] = {
        "positions": {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]},
        "cu_seqlens": {"cu_seqlens": bounds}, "cu_seq_lens_q": {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds},
        "seq_idx": {"seq_idx": torch.arange(4).repeat_interleave(torch.tensor(lengths))[None]},
    }[way]  # fmt: skip
    found = model(ids, use_cache=False, **given).logits[0]
    want = [model(part, use_cache=False).logits[0] for part in ids.split(lengths, 1)]
    torch.testing.assert_close(found, torch.cat(want), **CLOSE)
    with pytest.raises(ValueError, match="past_key_values: expected None with packed sequences"):
        model(ids, use_cache=True, **given)


def test_other_calls_that_are_refused() -> None:
    layer, x = converted("llama").model.layers[0].self_attn, torch.randn(2, 6, 32, dtype=torch.float64)
    for arguments, error, message in (
        ({"output_attentions": True}, ValueError, "output_attentions: there is no matrix of weights"),
        ({"attention_mask": torch.rand(2, 1, 6, 6) < 0.5}, ValueError, "attention_mask: expected a causal mask"),
        ({"attention_mask": "causal"}, TypeError, "attention_mask: expected a tensor"),
        ({"cache": subquad.nn.LawcatCache()}, ValueError, "past_key_values: expected a SinkKVCache or a Cache"),
        ({"pad": torch.tensor([0, 7])}, ValueError, r"pad: expected numbers in 0\.\.6"),
        ({"pad": torch.tensor([0, 1]), "attention_mask": torch.ones(2, 6)}, ValueError, "pad: expected None beside"),
        ({"cache": layer.new_cache(3)}, ValueError, "sink_k: expected shape"),
    ):
        with pytest.raises(error, match=message):
            layer(x.detach(), **arguments)
    both = transformers.DynamicCache()
    plain("llama").model(prompt(3), **on(both))
    with pytest.raises(ValueError, match="past_key_values: expected an unused layer 0, got one that holds keys"):
        converted("llama")(prompt(3), **on(both))


# --- training ----------------------------------------


def gradients(model: Any, ids: torch.Tensor, **options: Any) -> dict[str, torch.Tensor]:
    model.requires_grad_(True).zero_grad()
    model(ids, labels=ids, **options).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["llama", "gpt-oss"])
def test_training(name: str) -> None:
    """As the model's own while nothing is forgotten; as without a cache where transformers makes one nobody asked for."""
    ids = prompt(12, 2)
    want = gradients(copy.deepcopy(plain(name)), ids, use_cache=False)
    for use_cache in (False, True):
        found = gradients(converted(name, sink_tokens=4, window=40), ids, use_cache=use_cache)
        assert found.keys() == want.keys() and (
            name != "gpt-oss" or found["model.layers.0.self_attn.sinks"].abs().max()
        )
        for parameter, gradient in want.items():
            torch.testing.assert_close(found[parameter], gradient, rtol=1e-4, atol=1e-5, msg=parameter)
    model, ids = converted(name), prompt(30, 2)
    want, found = gradients(model, ids, use_cache=False), gradients(model, ids, use_cache=True)
    for parameter, gradient in want.items():
        torch.testing.assert_close(found[parameter], gradient, **CLOSE, msg=parameter)
    cache = dynamic(model)
    model(ids, **on(cache))
    with torch.no_grad():
        want_next = converted(name)(torch.cat([ids, ids[:, :1]], 1), use_cache=False).logits[:, -1:]
        torch.testing.assert_close(model(ids[:, :1], **on(copy.deepcopy(cache))).logits, want_next, **CLOSE)
    with pytest.raises(ValueError, match="past_key_values: expected a new cache where gradients are computed"):
        model(ids[:, :1], **on(cache))


# --- states ----------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("where", ["none", "left", "inside"])
def test_crop(where: str) -> None:
    """Columns are taken back, of which some may be padding, and the rows go on as if they had not been."""
    model, ids, mask = converted("llama"), prompt(40, 3), torch.ones(3, 40, dtype=torch.long)
    if where != "none":
        mask[0, :4], mask[2, :33] = 0, 0
    if where == "inside":
        mask[1, 30:33], mask[0, 36] = 0, 0
    want = model(ids, attention_mask=mask, use_cache=False).logits
    cache = dynamic(model)
    for first, last in ((0, 32), (32, 36), (36, 37)):
        model(ids[:, first:last], attention_mask=mask[:, :last], **on(cache))
    cache.crop(31 if OLD else -6)  # transformers 4.57 says how many stay, too
    assert cache.get_seq_length() == 31 and all(layer.is_croppable for layer in cache.layers)
    found = model(ids[:, 31:], attention_mask=mask, **on(cache)).logits
    real = mask[:, 31:].bool()
    torch.testing.assert_close(found[real], want[:, 31:][real], **CLOSE)
    with pytest.raises(
        ValueError, match=r"tokens_to_remove: expected at most .* SinkConfig\(slack=\.\.\.\) says how many"
    ):
        cache.crop(-400)
    assert cache.get_seq_length() == 40


@torch.no_grad()
@pytest.mark.parametrize("keep", [0, 9])
def test_columns_that_nobody_remembers_stay(keep: int) -> None:
    """Which of them were padding is known of the last slack + 1 alone: no crop after a crop, nor a longer one, guesses."""
    model, ids, mask = converted("llama", slack=2), prompt(24, 2), torch.ones(2, 24, dtype=torch.long)
    mask[0, 6:20] = 0
    want, cache = model(ids, attention_mask=mask, use_cache=False).logits, dynamic(model)
    model(ids[:, :20], attention_mask=mask[:, :20], cache=cache)
    for layer in cache.layers:
        layer.state.keep(keep)
    assert cache.layers[0].state.kept == 3
    cache.crop(-2)
    assert cache.layers[0].state.kept == 1
    with pytest.raises(ValueError, match="tokens_to_remove: expected at most the 1 tokens"):
        cache.crop(-2)
    model(ids[:, 18:22], attention_mask=mask[:, :22], cache=cache)
    cache.crop(-3)
    found = model(ids[:, 19:], attention_mask=mask, cache=cache).logits
    real = mask[:, 19:].bool()
    torch.testing.assert_close(found[real], want[:, 19:][real], **CLOSE)


@torch.no_grad()
def test_copies_rows_and_resets() -> None:
    model, ids, mask = converted("llama"), prompt(30, 3), torch.ones(3, 30, dtype=torch.long)
    mask[0, :9] = 0
    cache = dynamic(model)
    model(ids[:, :20], attention_mask=mask[:, :20], **on(cache))
    assert isinstance(cache.layers[0].state, State)
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    fresh = dynamic(model)
    model(ids[:1, :1], **on(fresh))
    for layer, other in zip(fresh.layers, cache.layers, strict=True):
        layer.state.load_state_dict(other.state.state_dict())
    copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), torch.load(buffer, weights_only=False), fresh]
    rows = torch.tensor([2, 0, 0, 1])
    want = model(ids[:, 20:], attention_mask=mask, **on(cache)).logits
    for other in copies:
        other.reorder_cache(rows)
        other.batch_select_indices(torch.tensor([1, 2, 3, 0]))
        other.batch_repeat_interleave(2)
        again = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
        torch.testing.assert_close(
            model(ids[again, 20:], attention_mask=mask[again], **on(other)).logits, want[again], **CLOSE
        )
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    addresses = {n: x.data_ptr() for n, x in cache.layers[0].state.tensors().items() if n != "late"}
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(model(ids, attention_mask=mask, **on(cache)).logits[:, 20:], want, **CLOSE)
    assert addresses == {n: x.data_ptr() for n, x in cache.layers[0].state.tensors().items() if n != "late"}
    cache.reset()
    model(ids[:2], **on(cache))  # another batch
    with pytest.raises(ValueError, match="past_key_values: expected 2 sequences as before, got 3"):
        model(ids, **on(cache))
    with pytest.raises(ValueError, match="state: expected names of a SinkState, got 'rows'"):
        cache.layers[0].state.load_state_dict({"seen": 3, "rows": torch.zeros(2)})


@torch.no_grad()
def test_a_row_that_starts_anew() -> None:
    state, x = SinkState(3, num_kv_heads=2, head_dim=4, sink_tokens=1, window=5), torch.randn(2, 9, 2, 4)
    cache = state.of(x)
    cache.step(x, x, x)
    state.advance(9, None)
    state.reset(torch.tensor([True, False]))
    assert cache.seen.tolist() == [0, 9] and state.seen == 9 and state.kept == 4
    state.rollback(2)
    assert cache.seen.tolist() == [0, 7] and state.seen == 7


@pytest.mark.parametrize("late", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
@pytest.mark.parametrize("early", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_a_cache_goes_from_mode_to_mode(early: Any, late: Any) -> None:
    model, ids = converted("llama").float().requires_grad_(False), prompt(20)
    cache = dynamic(model)
    want = model(ids, use_cache=False).logits
    with early():
        model(ids[:, :15], **on(cache))
    with late():
        found = torch.cat([model(part, **on(cache)).logits.float() for part in ids[:, 15:].split(1, 1)], 1)
    assert (found - want[:, 15:]).abs().max() / want.abs().max() < 5e-2


@torch.no_grad()
def test_int8_rings() -> None:
    """A fifth of a float64 cache and more, and nearly the same numbers; sinks are kept whole."""
    ids, caches = prompt(60), []
    for kv_dtype in (None, "int8"):
        model = converted("llama", kv_dtype=kv_dtype, window=300).float()
        model(ids, **on(cache := dynamic(model)))
        caches.append(cache)
    whole, small = (sum(layer.state.nbytes for layer in cache.layers) for cache in caches)
    assert small < 0.4 * whole  # heads of 8 with a scale each: wider ones are nearer to a quarter
    one, other = (model(ids[:, :1], **on(cache)).logits for cache in caches)
    assert 0 < (one - other).abs().max() / one.abs().max() < 0.05


# --- compiled ----------------------------------------


@pytest.fixture
def graphs() -> Any:
    torch._dynamo.reset()
    yield Graphs()
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.heavy
@pytest.mark.parametrize("name", ["llama", "gpt-oss"])
def test_300_compiled_steps_of_a_layer(name: str, graphs: Graphs) -> None:
    """One graph, rings in place, the numbers of eager steps; past the end of the ring several times."""
    layer = converted(name).model.layers[-1].self_attn
    x, cache, other = torch.randn(2, 300, 32, dtype=torch.float64), layer.new_cache(2), layer.new_cache(2)
    compiled = torch.compile(layer, fullgraph=True, backend=graphs)
    addresses = {n: t.data_ptr() for n, t in cache.tensors().items()}
    for token in x.split(1, 1):
        found, want = (call(token, cache=c)[0] for call, c in ((compiled, cache), (layer, other)))
        torch.testing.assert_close(found, want)
    assert graphs.count == 1 and addresses == {n: t.data_ptr() for n, t in cache.tensors().items()}


@torch.no_grad()
@pytest.mark.heavy
def test_compiled_steps_of_a_model_with_its_sink_cache(graphs: Graphs) -> None:
    """The first step, then one graph for all others; rings and counters stay where they are."""
    model, ids = converted("llama"), prompt(40)
    cache, other = (subquad.SinkCache(model.config, SINKS, WINDOW) for _ in range(2))
    for held in (cache, other):
        model(ids[:, :5], **on(held))
    compiled = torch.compile(model, backend=graphs)
    kept = [layer.state.cache for layer in cache.layers]
    addresses = [{n: x.data_ptr() for n, x in state.tensors().items()} for state in kept]
    for token in ids[:, 5:].split(1, 1):
        torch.testing.assert_close(compiled(token, **on(cache)).logits, model(token, **on(other)).logits, **CLOSE)
    assert graphs.count <= 2
    for layer, state, places in zip(cache.layers, kept, addresses, strict=True):
        assert layer.state.cache is state and places == {n: x.data_ptr() for n, x in state.tensors().items()}
