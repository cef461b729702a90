"""attn_implementation="subquad": every model, mask and cache gives what the eager implementation gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from subquad import IntervalMask
from subquad.integrations.transformers import attention_forward, attention_mask, register
from subquad.nn import LawcatAttention
from subquad.testing import backend_params

transformers = pytest.importorskip("transformers", minversion="4.57")

TINY = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {}),
    "gemma3": ("Gemma3", {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
    "gemma2": ("Gemma2", {"sliding_window": 4, "attn_logit_softcapping": 2.0}),
    "gpt-oss": ("GptOss", {"sliding_window": 6, "num_local_experts": 2, "num_experts_per_tok": 1}),
}


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


def models(name: str) -> tuple[Any, Any]:
    """The same random weights under both implementations."""
    torch.manual_seed(0)
    family, more = MODELS[name]
    configs = [getattr(transformers, f"{family}{kind}", None) for kind in ("TextConfig", "Config")]
    config = next(c for c in configs if c is not None)(**TINY, **more)
    config._attn_implementation = "eager"
    eager = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    if name == "gpt-oss":
        for layer in eager.model.layers:
            torch.nn.init.normal_(layer.self_attn.sinks)
    ours = getattr(transformers, f"{family}ForCausalLM")(copy.deepcopy(config)).eval()  # models share the object
    ours.load_state_dict(eager.state_dict())
    ours.set_attn_implementation("subquad")
    assert (eager.config._attn_implementation, ours.config._attn_implementation) == ("eager", "subquad")
    return eager, ours


def tokens(batch: int = 2, length: int = 17) -> torch.Tensor:
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(1))


@backend_params("interval_attention", "native", "reference")
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(name: str, backend: str) -> None:
    from subquad import use_backend

    eager, ours = models(name)
    ids = tokens()
    results = []
    for model in (eager, ours):
        with use_backend(backend):
            output = model(input_ids=ids, labels=ids)
            output.loss.backward()
        results.append((output.logits, {n: p.grad for n, p in model.named_parameters()}))
    torch.testing.assert_close(results[1][0], results[0][0], atol=2e-5, rtol=1e-4)
    for parameter, grad in results[0][1].items():
        other = results[1][1][parameter]
        assert (grad is None) == (other is None), parameter
        if grad is not None:
            torch.testing.assert_close(other, grad, atol=2e-5, rtol=1e-3, msg=lambda m, p=parameter: f"{p}: {m}")
    if name == "gpt-oss":
        assert results[1][1]["model.layers.0.self_attn.sinks"].abs().max() > 1e-6


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_padding(name: str, side: str) -> None:
    eager, ours = models(name)
    ids, mask = tokens(), torch.ones(2, 17, dtype=torch.long)
    mask[1, slice(0, 6) if side == "left" else slice(11, None)] = 0
    with torch.no_grad():
        a, b = (model(input_ids=ids, attention_mask=mask).logits for model in (eager, ours))
    torch.testing.assert_close(b[mask.bool()], a[mask.bool()], atol=2e-5, rtol=1e-4)
    assert b.isfinite().all()


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packed_sequences(name: str) -> None:
    """Position ids that begin anew: sequences of one row that do not see each other."""
    eager, ours = models(name)
    ids = tokens(1, 20)
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    with torch.no_grad():
        a, b = (model(input_ids=ids, position_ids=positions, use_cache=False).logits for model in (eager, ours))
        alone = ours(input_ids=ids[:, 8:], use_cache=False).logits
    torch.testing.assert_close(b, a, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(b[:, 8:], alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", MODELS)
def test_generation(name: str, cache: str | None) -> None:
    """Greedy text with a growing and with a preallocated cache, one prompt padded on the left."""
    eager, ours = models(name)
    ids, mask = tokens(), torch.ones(2, 17, dtype=torch.long)
    mask[0, :5] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    a, b = (model.generate(input_ids=ids, attention_mask=mask, **options) for model in (eager, ours))
    assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_in_four_dimensions(kind: str) -> None:
    """A prefix mask that the user made."""
    eager, ours = models("llama")
    visible = torch.ones(17, 17, dtype=torch.bool).tril()
    visible[:, :5] = True
    mask = visible.expand(2, 1, 17, 17)
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    with torch.no_grad():
        a = eager(input_ids=tokens(), attention_mask=additive).logits
        b = ours(input_ids=tokens(), attention_mask=mask if kind == "bool" else additive).logits
    torch.testing.assert_close(b, a, atol=2e-5, rtol=1e-4)


@backend_params("interval_attention", "native", "reference")
@pytest.mark.parametrize("draw", ["normal", "tens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinks_of_full_and_sliding_layers(draw: str, dtype: torch.dtype, backend: str) -> None:
    """gpt-oss: its logits and every gradient, where a sink that is dropped or counted twice would show."""
    from subquad import use_backend

    eager, ours = models("gpt-oss")
    assert eager.config.layer_types == ["sliding_attention", "full_attention"]
    sinks = torch.randn(2, 6) if draw == "normal" else torch.tensor([-10.0, 10.0]).repeat(2, 3)
    x, weight = torch.randn(2, 17, 48), torch.randn(2, 17, 48)
    for number, parameter in enumerate(sinks):
        results = []
        for model in (eager, ours):
            layer = copy.deepcopy(model.model.layers[number].self_attn).to(torch.float64 if model is eager else dtype)
            layer.sinks.data.copy_(parameter)
            positions = tuple(y.to(layer.sinks.dtype) for y in model.model.rotary_emb(x, torch.arange(17)[None]))
            mask = None
            if model is eager:
                place = torch.arange(17)
                seen = (place <= place[:, None]) & (place[:, None] - place < (layer.sliding_window or 17))
                mask = torch.zeros(1, 1, 17, 17, dtype=torch.float64).masked_fill(~seen, -torch.inf)
            with use_backend(backend):
                out, _ = layer(x.to(layer.sinks.dtype), positions, mask)
                (out * weight.to(out.dtype)).sum().backward()
            results.append([out.double(), *(p.grad.double() for p in layer.parameters() if p.grad is not None)])
        assert len(results[0]) == len(results[1]) > 5
        for found, want in zip(results[1], results[0], strict=True):
            assert (found - want).norm() <= (2e-5 if dtype is torch.float32 else 3e-2) * want.norm()


@pytest.mark.parametrize("keys", [17, 30])
def test_images_in_a_sliding_layer(keys: int) -> None:
    """Gemma 3: image tokens see their image both ways, farther than the window that the layer names; also before a
    preallocated cache is full."""
    image = torch.zeros(keys, dtype=torch.bool)
    image[5:14] = True
    sliding = transformers.masking_utils.sliding_window_causal_mask_function(4)

    def function(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return sliding(b, h, q, kv) | (image[q] & image[kv])

    t, j = torch.arange(17)[:, None], torch.arange(keys)
    dense = ((j <= t) & (t - j < 4)) | (image[:17, None] & image)
    mask = attention_mask(
        batch_size=1, q_length=17, kv_length=keys, q_offset=0, kv_offset=0, mask_function=function, use_vmap=True
    )
    assert torch.equal(mask.to_dense()[0, 0], dense)
    check_window(mask, dense, 17, keys)


@pytest.mark.parametrize("first_row", [0, 9, 27])
def test_a_window_that_only_the_layer_names(first_row: int) -> None:
    """The keys up to the row's own are counted from where the queries stand, in a preallocated cache too."""
    function = transformers.masking_utils.causal_mask_function
    mask = attention_mask(
        batch_size=1, q_length=3, kv_length=30, q_offset=first_row, kv_offset=0, mask_function=function
    )
    t, j = torch.arange(3)[:, None] + first_row, torch.arange(30)
    check_window(mask, (j <= t) & (t - j < 4), 3, 30)


@pytest.mark.parametrize("keys", [17, 30])
def test_a_mask_says_what_is_in_it(keys: int) -> None:
    """By attributes of its own: a growing cache has the plain form of a window, a preallocated one has intervals."""
    utils = transformers.masking_utils
    functions = {
        "sliding": utils.sliding_window_causal_mask_function(4),
        "causal": utils.causal_mask_function,
        "full": utils.bidirectional_mask_function,
        "other": lambda b, h, q, kv: kv <= q + 1,
    }
    padding = torch.ones(1, keys, dtype=torch.bool)
    padding[:, :3] = False
    made = {
        name: attention_mask(
            batch_size=1, q_length=17, kv_length=keys, q_offset=0, kv_offset=0, mask_function=function,
            attention_mask=padding, use_vmap=True,
        )
        for name, function in functions.items()
    }  # fmt: skip
    assert {name: mask.sliding_window for name, mask in made.items()} == {
        "sliding": 4, "causal": -1, "full": -1, "other": -1,
    }  # fmt: skip
    assert {name: mask.window for name, mask in made.items() if mask.starts is not None and mask.window != -1} == {}
    assert [name for name, mask in made.items() if mask.padded_causal] == ["sliding", "causal"]
    assert all((mask.padding is not None) == (mask.first_row is not None) for mask in made.values())
    assert [name for name, mask in made.items() if mask.autoregressive] == ["sliding", "causal"]
    assert [mask.first_row for mask in made.values()] == [0, 0, 0, None]
    layer = LawcatAttention(8, 2)
    for name in ("sliding", "causal"):
        tokens = layer(torch.randn(1, 17, 8), attention_mask=made[name])[0]
        assert tokens.shape == (1, 17, 8)
    lookalike = IntervalMask.causal(17, keys)
    lookalike.padding = None
    for mask in (made["full"], made["other"], lookalike):
        with pytest.raises(ValueError, match="attention_mask: expected a causal mask"):
            layer(torch.randn(1, 17, 8), attention_mask=mask)


def check_window(mask: Any, dense: torch.Tensor, tq: int, tk: int) -> None:
    q, k, v = (torch.randn(1, 2, n, 8) for n in (tq, tk, tk))
    module = torch.nn.Module().eval()
    out, _ = attention_forward(module, q, k, v, mask, sliding_window=4)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense)
    torch.testing.assert_close(out.transpose(1, 2), expected, atol=1e-5, rtol=1e-5)


def test_an_encoder_sees_both_ways() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = transformers.BertModel(config).eval()
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[1, 12:] = 0
    with torch.no_grad():
        a = model(input_ids=tokens(), attention_mask=mask).last_hidden_state
        model.set_attn_implementation("subquad")
        b = model(input_ids=tokens(), attention_mask=mask).last_hidden_state
    torch.testing.assert_close(b[mask.bool()], a[mask.bool()], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["Llama", "Bert", "ViT"])
def test_probabilities_are_refused(family: str) -> None:
    """Of whole models too, of which transformers' own "sdpa" returns none and says nothing."""
    config = getattr(transformers, f"{family}Config")(
        hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6, attn_implementation="subquad",
        image_size=8, patch_size=4,
    )  # fmt: skip
    model = getattr(transformers, f"{family}Model")(config).eval()
    inputs = {"pixel_values": torch.zeros(1, 3, 8, 8)} if family == "ViT" else {"input_ids": tokens()}
    with pytest.raises(ValueError, match=r"^output_attentions: "):
        model(**inputs, output_attentions=True)


def test_alibi() -> None:
    """What a layer of a user's may give; the reference has the formula."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, n, 8, generator=generator) for n in (5, 12, 12))
    slopes = torch.tensor([0.5, 0.25, 0.125, 2.0])
    out, _ = attention_forward(torch.nn.Module().eval(), q, k, v, None, alibi_slopes=slopes)
    away = torch.arange(7, 12)[:, None] - torch.arange(12)
    bias = (-slopes[:, None, None] * away.abs()).masked_fill(away < 0, -torch.inf)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    torch.testing.assert_close(out.transpose(1, 2), expected, atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing() -> None:
    _, model = models("mistral")
    model.train()
    grads = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(b, a)


def test_no_quadratic_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Causal, sliding and padded masks are never dense."""
    _, model = models("mistral")
    monkeypatch.setattr(transformers.masking_utils, "sdpa_mask", None)
    seen: list[Any] = []
    original = attention_forward

    def spy(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        seen.append(attention_mask)
        return original(module, query, key, value, attention_mask, **kwargs)

    transformers.AttentionInterface.register("subquad", spy)
    mask = torch.ones(2, 17, dtype=torch.long)
    for padded in (False, True):
        mask[1, :4] = 0 if padded else 1
        model(input_ids=tokens(), attention_mask=mask)
    assert all(isinstance(m, IntervalMask) for m in seen) and seen[0].starts is None and seen[2].num_intervals == 1
    assert seen[0] is seen[1] and seen[2] is seen[3]  # one mask for all layers


def refused(**options: Any) -> None:
    module = torch.nn.Module().train()
    x = torch.zeros(1, 2, 4, 8)
    attention_forward(module, x, x, x, options.pop("attention_mask", None), **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dropout", {"dropout": 0.1}),
        ("softcap", {"softcap": -30.0}),
        ("output_attentions", {"output_attentions": True}),
        ("sinks", {"sinks": torch.zeros(1, 2, 4, 1)}),
        ("indices", {"indices": torch.zeros(1, 4, 2)}),
        ("block_indices", {"block_indices": torch.zeros(1, 1, 4, 2)}),
        ("position_bias", {"position_bias": torch.zeros(1)}),
        ("head_mask", {"head_mask": torch.ones(2)}),
        ("cache", {"cache": object()}),
        ("alibi_slopes", {"alibi_slopes": torch.zeros(3)}),
        ("attention_mask", {"attention_mask": torch.full((1, 1, 4, 4), -1.5)}),
        ("attention_mask", {"attention_mask": torch.zeros(1, 4)}),
    ],
)
def test_what_would_be_ignored_is_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        refused(**options)
