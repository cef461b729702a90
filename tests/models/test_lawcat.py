"""LAWCAT in models of transformers: conversion, generation, caches, attention transfer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from subquad import attention_transfer, attention_transfer_loss, trainable_parameters
from subquad.demo.model import cache_name
from subquad.integrations.transformers import LawcatConfig, convert, register, revert
from subquad.nn import LawcatAttention, LawcatCache, ShortConvolution

transformers = pytest.importorskip("transformers")
FAMILIES = ("Llama", "Mistral", "Qwen3")
VOCABULARY = 61


def model_of(family: str = "Llama", implementation: str = "sdpa", **more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": VOCABULARY}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 256, "initializer_range": 0.3}
    if family == "Mistral":
        sizes["sliding_window"] = 6
    names = f"{family}TextConfig", f"{family}Config"
    config = next(getattr(transformers, name) for name in names if hasattr(transformers, name))(**(sizes | more))
    config._attn_implementation = implementation
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def stir(model: Any) -> Any:
    """New parameters away from their tame start."""
    torch.manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LawcatAttention):
                for parameter in module.new_parameters().values():
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def ids(b: int = 2, t: int = 12) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (b, t), generator=torch.Generator().manual_seed(5))


def greedy(model: Any, tokens: torch.Tensor, new: int, **options: Any) -> torch.Tensor:
    return model.generate(tokens, max_new_tokens=new, min_new_tokens=new, do_sample=False, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [None, [1], [0, -1]])
def test_conversion_shares_weights_and_reverts(family: str, layers: list[int] | None) -> None:
    model = model_of(family)
    before = dict(model.named_parameters())
    want = model(ids()).logits
    names = convert(model, attention="lawcat", layers=layers)
    assert len(names) == (3 if layers is None else len(layers))
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, LawcatAttention)
        assert layer.q_proj.weight is before[f"{name}.q_proj.weight"]
    assert convert(model, attention="lawcat") == [
        n for n in (f"model.layers.{i}.self_attn" for i in range(3)) if n not in names
    ]
    assert not torch.equal(model(ids()).logits, want)
    assert len(revert(model)) == 3
    assert torch.equal(model(ids()).logits, want)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [None, [0, 2], [1]])
@pytest.mark.parametrize("window", [0, 4])
def test_generation_with_cache_is_the_full_forward(family: str, layers: list[int] | None, window: int) -> None:
    model = model_of(family)
    convert(model, attention=LawcatConfig(window_size=window), layers=layers)
    stir(model)
    tokens = ids()
    with torch.no_grad():
        for _ in range(8):
            logits = model(tokens, use_cache=False).logits[:, -1:]
            logits[..., 2] = -torch.inf  # the end, which `greedy` does not allow
            tokens = torch.cat([tokens, logits.argmax(-1)], 1)
        with_cache = greedy(model, ids(), 8)
    assert torch.equal(with_cache, tokens)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "subquad"])
@pytest.mark.parametrize("layers", [None, [0, 2]])
def test_batch_of_unequal_prompts(implementation: str, layers: list[int] | None) -> None:
    """Left padding, in every form of mask that transformers makes: each row generates what it generates alone."""
    register()
    model = model_of(implementation=implementation)
    convert(model, attention="lawcat", layers=layers)
    stir(model)
    tokens, mask = ids(3, 9), torch.ones(3, 9, dtype=torch.long)
    for row, padding in enumerate((0, 4, 7)):
        tokens[row, :padding], mask[row, :padding] = 0, 0
    got = greedy(model, tokens, 6, attention_mask=mask)[:, 9:]
    for row, padding in enumerate((0, 4, 7)):
        alone = greedy(model, tokens[row : row + 1, padding:], 6)[:, 9 - padding :]
        assert torch.equal(got[row], alone[0]), row


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [
        {"share_kv_features": True},
        {"window_size": 3, "linear_covers_window": False, "linear_scale": 1.0, "gate": "none", "rope": "linear"},
        {"conv_on_v": True, "use_output_gate": True, "gate": "scalar"},
    ],
    ids="-".join,
)
def test_heads_that_do_not_fill_the_hidden_size(family: str, options: dict[str, Any]) -> None:
    """Four heads of 10 in a model of width 32, one key head; decoding is the full forward."""
    model = model_of(family, num_key_value_heads=1, head_dim=10)
    convert(model, attention=LawcatConfig(**options), layers=[0, 2])
    stir(model)
    with torch.no_grad():
        want = model(ids(), use_cache=False).logits
        out = model(ids()[:, :8], use_cache=True)
        name = cache_name(model)
        for t in range(8, 12):
            out = model(ids()[:, t : t + 1], use_cache=True, **{name: out[name]})
            torch.testing.assert_close(out.logits[:, 0], want[:, t], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "part"),
    [
        ("HunYuanDenseV1", "query_layernorm"),
        ("BitNet", "attn_sub_norm"),
        ("DiffLlama", "lambda_q1"),
        ("Doge", "A"),
        ("Apertus", None),
        ("Olmo2", None),
    ],
)
def test_parts_that_have_no_place(family: str, part: str | None) -> None:
    """What else an attention layer computes with is not left out silently; norms of q and k are kept, of heads or of all."""
    if not hasattr(transformers, f"{family}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    model = model_of(family)
    if part is None:
        convert(model, attention="lawcat", layers=[0])
        want = model(ids()).logits
        with torch.no_grad():
            model.model.layers[0].self_attn.q_norm.weight[0] += 1
        assert not torch.equal(model(ids()).logits, want)
    else:
        with pytest.raises(ValueError, match=rf"layers\.0\.self_attn: attention: expected none with {part}, which"):
            convert(model, attention="lawcat")


def test_chunks_are_refused() -> None:
    """Linear attention would go on at their edges; layers of the same model that see everything are converted."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    sizes |= {"num_key_value_heads": 2, "vocab_size": 61, "attention_chunk_size": 4, "no_rope_layers": [1, 0]}
    config = transformers.Llama4TextConfig(**sizes, use_qk_norm=False, num_local_experts=1, moe_layers=[])
    model = transformers.Llama4ForCausalLM(config)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn: attention: expected none in chunks.*chunk_size = 4"):
        convert(model, attention="lawcat")
    assert convert(model, attention="lawcat", layers=[1]) == ["model.layers.1.self_attn"]


def test_counts_of_a_conversion() -> None:
    model = model_of()
    before = sum(p.numel() for p in model.parameters())
    report = convert(model, attention="lawcat", layers=[0, 2])
    assert report.new_parameters == sum(p.numel() for p in model.parameters()) - before
    assert report.shared_parameters == 2 * sum(p.numel() for p in model.model.layers[1].self_attn.parameters())
    assert report.new_parameters == sum(p.numel() for p in trainable_parameters(model).values())


def test_lora() -> None:
    """LoRA put on converted layers, and layers converted that have it: in stage two it alone is trained."""
    peft = pytest.importorskip("peft")
    for first in ("convert", "wrap"):
        model = model_of()
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
        if first == "convert":
            convert(model, attention="lawcat", layers=[1])
        model = peft.get_peft_model(model, config)
        if first == "wrap":
            names = convert(model, attention="lawcat", layers=[1])
            assert names == ["base_model.model.model.layers.1.self_attn"]
        with attention_transfer(model) as transfer:
            model(ids(), use_cache=False)
            transfer.loss().backward()
        names = set(trainable_parameters(model, stage=2)) - set(trainable_parameters(model))
        assert names and {n.split("self_attn.")[1].split(".")[0] for n in names if "lora" in n} == {"q_proj", "v_proj"}
        assert not any("base_layer" in n for n in names)
        assert greedy(model, ids(), 3).shape == (2, 15)


def test_lora_by_name() -> None:
    """The same without the library: what is named lora_ counts."""
    model = model_of()
    convert(model, attention="lawcat", layers=[1])
    projection = model.model.layers[1].self_attn.q_proj
    projection.lora_a = torch.nn.Parameter(torch.zeros(2, 32))
    names = set(trainable_parameters(model, stage=2)) - set(trainable_parameters(model))
    base = "model.layers.1.self_attn."
    assert names == {f"{base}q_proj.lora_a"} | {f"{base}{n}_proj.weight" for n in "kvo"}


def test_beam_search() -> None:
    model = model_of()
    convert(model, attention="lawcat")
    stir(model)
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with_cache, without = (model.generate(ids(), use_cache=use, **options) for use in (True, False))
    assert torch.equal(with_cache, without)


def test_static_cache_of_a_hybrid() -> None:
    model = model_of()
    convert(model, attention="lawcat", layers=[0, 2])
    stir(model)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    want = greedy(model, ids(), 5, attention_mask=mask)
    assert torch.equal(greedy(model, ids(), 5, attention_mask=mask, cache_implementation="static"), want)


@pytest.mark.parametrize("implementation", ["sdpa", "subquad"])
@pytest.mark.parametrize("layers", [None, [0], [1]])
def test_padding_in_a_preallocated_cache(implementation: str, layers: list[int] | None) -> None:
    """Its masks have columns for later tokens, which are no padding of these."""
    register()
    model = model_of(implementation=implementation, num_hidden_layers=2)
    convert(model, attention="lawcat", layers=layers)
    stir(model)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    name = cache_name(model)
    with torch.no_grad():
        want = model(ids(), attention_mask=mask).logits
        cache = transformers.StaticCache(config=model.config, max_cache_len=20)
        first = model(ids()[:, :9], attention_mask=mask[:, :9], **{name: cache}).logits
        rest = [
            model(ids()[:, t : t + 1], attention_mask=mask[:, : t + 1], **{name: cache}).logits for t in (9, 10, 11)
        ]
    torch.testing.assert_close(torch.cat([first, *rest], 1)[0, 3:], want[0, 3:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat([first, *rest], 1)[1], want[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changed", ["conv_q", "conv_k"])
@pytest.mark.parametrize("options", [{"activation": "silu"}, {"kernel_size": 3}, {"kernel_size": 1}, {"bias": True}])
def test_convolutions_that_differ(changed: str, options: dict[str, Any]) -> None:
    """An exchanged convolution counts in single steps as it does in sequences."""
    torch.manual_seed(2)
    layer, x = LawcatAttention(32, 4, 2, layer_idx=0), torch.randn(2, 6, 32)
    groups = {"channel_groups": 2, "head_dim": 8} if changed == "conv_k" else {}
    with torch.no_grad():
        before, cache = layer(x)[0], LawcatCache()
        setattr(layer, changed, ShortConvolution(32, **groups, **options))
        want = layer(x)[0]
        got = [layer(piece, cache=cache)[0] for piece in x.split([3, 1, 1, 1], 1)]
    assert not torch.allclose(want, before, atol=1e-3)
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layers", [[0], [1], [0, 1], [2], None])
def test_a_preallocated_cache_of_layers_that_slide_and_others(layers: list[int] | None) -> None:
    """The masks of the softmax layers fit, whichever layers are replaced."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    more = {"num_hidden_layers": 4, "layer_types": kinds, "use_sliding_window": True, "sliding_window": 7}
    model = model_of("Qwen2", **more)
    convert(model, attention="lawcat", layers=layers)
    stir(model)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    for length in (5, 12):
        options = {"attention_mask": mask[:, :length], "disable_compile": True}
        want = greedy(model, ids()[:, :length], 5, **options)
        assert torch.equal(greedy(model, ids()[:, :length], 5, cache_implementation="static", **options), want)


@pytest.mark.parametrize(
    "options", [{}, {"linear_covers_window": False}, {"linear_covers_window": False, "gate": "none"}]
)
def test_a_window_and_no_tokens(options: dict[str, Any]) -> None:
    """A call without tokens returns none, and the next one is as if it had not been."""
    layer, x = LawcatAttention(32, 4, 2, layer_idx=0, window_size=3, **options), torch.randn(2, 5, 32)
    angle = torch.outer(torch.arange(5.0), 0.5 ** torch.arange(4)).repeat(1, 2)[None]
    for keep in (0, 4):
        cache, out = LawcatCache(keep=keep), []
        for columns in (slice(0, 0), slice(0, 4), slice(4, 4), slice(4, 5)):
            out.append(layer(x[:, columns], (angle[:, columns].cos(), angle[:, columns].sin()), cache=cache)[0])
        assert [y.shape[1] for y in out] == [0, 4, 0, 1]
        torch.testing.assert_close(torch.cat(out, 1), layer(x, (angle.cos(), angle.sin()))[0], rtol=1e-5, atol=1e-5)


def test_a_mask_with_columns_for_later_tokens() -> None:
    """Two dimensions with a cache: columns are positions from the first token on."""
    layer, x = LawcatAttention(32, 4, 2, layer_idx=0), torch.randn(2, 6, 32)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0]])
    with torch.no_grad():
        want, cache = layer(x, attention_mask=mask[:, :6])[0], LawcatCache()
        got = [layer(piece, attention_mask=mask, cache=cache)[0] for piece in x.split([4, 1, 1], 1)]
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-5, atol=1e-5)


def test_cache_is_constant_and_linear() -> None:
    model = model_of()
    convert(model, attention="lawcat")
    sizes = set()
    with torch.no_grad():
        name = cache_name(model)
        cache = model(ids(), use_cache=True)[name]
        for step in range(5):
            model(ids(2, 1), use_cache=True, **{name: cache})
            states = [layer.state.tensors().values() for layer in cache.layers]
            sizes.add(sum(x.numel() for state in states for x in state))
            assert cache.get_seq_length() == 13 + step
    assert len(sizes) == 1
    assert cache.has_previous_state(0)
    assert cache.layers[0].recurrent_states[0].shape == (2, 4, 8, 8)
    with pytest.raises(ValueError, match="tokens_to_remove: expected at most the 0 tokens"):
        cache.crop(-1)
    cache.reset()
    with torch.no_grad():
        again = model(ids(), use_cache=True, **{name: cache}).logits
        assert torch.equal(again, model(ids(), use_cache=True).logits)


def test_a_cache_with_keys_is_refused() -> None:
    model = model_of()
    name = cache_name(model)
    cache = model(ids(), use_cache=True)[name]
    convert(model, attention="lawcat")
    with pytest.raises(ValueError, match="past_key_values: expected an unused layer"):
        model(ids(2, 1), **{name: cache})


def test_save_and_load() -> None:
    model = stir_converted()
    other = model_of()
    convert(other, attention="lawcat", layers=[0, 2])
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids()).logits, model(ids()).logits)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids()).logits, model(ids()).logits)
    twin.model.layers[0].self_attn.q_proj.weight.data.zero_()
    assert twin.model.layers[0].self_attn.original.q_proj is twin.model.layers[0].self_attn.q_proj
    assert model.model.layers[0].self_attn.q_proj.weight.any()


def stir_converted() -> Any:
    model = model_of()
    convert(model, attention="lawcat", layers=[0, 2])
    return stir(model)


def test_both_conversions_at_once() -> None:
    model = model_of()
    names = convert(model, mlp="cats", attention="lawcat", layers=[1])
    assert names == ["model.layers.1.self_attn", "model.layers.1.mlp"]
    assert sorted(revert(model)) == sorted(names)


def test_bad_conversions_change_nothing() -> None:
    for arguments, error, message in (
        ({"attention": "sparse"}, ValueError, "attention: expected one of 'lawcat'"),
        ({}, ValueError, "mlp: expected"),
        ({"attention": "lawcat", "taps": 3}, TypeError, "taps: unknown option"),
        ({"attention": LawcatConfig(), "conv_size": 3}, TypeError, "conv_size: options come with"),
        ({"attention": "lawcat", "conv_size": 99}, ValueError, "self_attn: kernel_size"),
        ({"attention": "lawcat", "keep": -1}, ValueError, "keep: expected an int >= 0"),
        ({"attention": "lawcat", "layers": [7]}, ValueError, "layers: expected numbers below 3"),
        ({"attention": "lawcat", "mlp": "cats", "conv_size": 2}, TypeError, "conv_size: with mlp and attention"),
    ):
        model = model_of()
        with pytest.raises(error, match=message):
            convert(model, **arguments)
        assert not any(isinstance(m, LawcatAttention) for m in model.modules())
    with pytest.raises(ValueError, match="attention_dropout"):
        convert(model_of(attention_dropout=0.1), attention="lawcat")
    with pytest.raises(ValueError, match="model: expected attention layers"):
        convert(torch.nn.Linear(2, 2), attention="lawcat")


# --- attention transfer ---------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_transfer_returns_the_teacher(family: str) -> None:
    model = model_of(family)
    want = model(ids()).logits
    convert(model, attention="lawcat")
    with attention_transfer(model) as transfer:
        torch.testing.assert_close(model(ids(), use_cache=False).logits, want)
        assert list(transfer.losses) == [f"model.layers.{i}.self_attn" for i in range(3)]
    assert not torch.allclose(model(ids()).logits, want)


def test_transfer_loss_is_its_definition() -> None:
    """Student and teacher before o_proj, recorded by hooks on the models themselves."""
    stock = model_of()
    converted = stir_mapped(copy.deepcopy(stock))
    true, heard = [], []
    for layer in stock.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, a: true.append(a[0]))
        layer.self_attn.register_forward_pre_hook(lambda _, a, k: heard.append(k["hidden_states"]), with_kwargs=True)
    stock(ids(), use_cache=False)
    pred = [layer.self_attn.mix(x) for layer, x in zip(converted.model.layers, heard, strict=True)]
    want = sum((p - t).square().mean() for p, t in zip(pred, true, strict=True)) / 3 * 1000
    assert torch.allclose(attention_transfer_loss(pred, true), want)
    with attention_transfer(converted) as transfer:
        converted(ids(), use_cache=False)
        assert torch.allclose(transfer.loss(), want, rtol=1e-5)
        with pytest.raises(RuntimeError, match="run the model first"):
            transfer.loss()


def stir_mapped(model: Any) -> Any:
    convert(model, attention="lawcat")
    return stir(model)


def test_layer_local_backward_has_the_same_gradients() -> None:
    grads = []
    for local in (False, True):
        model = stir_mapped(model_of())
        parameters = trainable_parameters(model)
        with attention_transfer(model, layer_local=local) as transfer:
            model(ids(), use_cache=False)
            loss = transfer.loss()
            assert loss.requires_grad is not local
            if not local:
                loss.backward()
        grads.append([p.grad for p in parameters.values()])
        assert all(p.grad is None for n, p in model.named_parameters() if n not in parameters)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("implementation", ["sdpa", "subquad"])
def test_padding_does_not_count(implementation: str) -> None:
    register()
    losses = []
    for padding in (0, 5):
        model = stir_mapped(model_of(implementation=implementation))
        tokens = torch.cat([torch.zeros(2, padding, dtype=torch.long), ids()], 1)
        mask = torch.cat([torch.zeros(2, padding, dtype=torch.long), torch.ones(2, 12, dtype=torch.long)], 1)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        with attention_transfer(model) as transfer:
            model(tokens, attention_mask=mask, position_ids=positions, use_cache=False)
            losses.append(transfer.loss())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)


def test_a_transfer_loss_trains_its_own_layer_alone() -> None:
    """Though every parameter asks for a gradient."""
    model = stir_mapped(model_of()).requires_grad_()
    with attention_transfer(model) as transfer:
        model(ids(), use_cache=False)
        own = dict(model.model.layers[1].self_attn.named_parameters())
        others = {name: p for name, p in model.named_parameters() if not any(p is q for q in own.values())}
        loss = list(transfer.losses.values())[1]
    grads = torch.autograd.grad(loss, list(others.values()), retain_graph=True, allow_unused=True)
    assert [name for name, grad in zip(others, grads, strict=True) if grad is not None] == []
    assert torch.autograd.grad(loss, own["q_proj.weight"])[0].abs().max() > 0


def test_transfer_learns() -> None:
    """A few steps of AdamW lower the loss of every layer by a third at least."""
    model = model_of()
    convert(model, attention="lawcat")
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-2, weight_decay=0)
    history = []
    with attention_transfer(model, layer_local=True) as transfer:
        for _ in range(40):
            model(ids(4, 24), use_cache=False)
            history.append({name: float(loss) for name, loss in transfer.losses.items()})
            transfer.loss()
            optimizer.step()
            optimizer.zero_grad()
    assert all(history[-1][name] < 0.67 * first for name, first in history[0].items())


def test_trainable_parameters() -> None:
    model = model_of()
    with pytest.raises(ValueError, match="model: expected layers"):
        trainable_parameters(model)
    with pytest.raises(ValueError, match="model: expected layers"), attention_transfer(model):
        pass
    convert(model, attention="lawcat", layers=[1])
    first, second = set(trainable_parameters(model)), set(trainable_parameters(model, stage=2))
    names = {name for name, _ in model.named_parameters()}
    assert first < second <= names
    assert {name.split("self_attn.")[1].split(".")[0] for name in first} == {"conv_q", "conv_k", "feature_map", "gate"}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == second
    with pytest.raises(ValueError, match="stage: expected 1 or 2"):
        trainable_parameters(model, stage=3)


def test_bad_losses() -> None:
    x = torch.zeros(1, 2, 3)
    for pred, true, mask, message in (
        ([x], [], None, "true: expected 1 layers"),
        ([x], [x[:, :1]], None, "true: expected shape"),
        ([x], [x], torch.ones(1, 3), "mask: expected shape"),
    ):
        with pytest.raises(ValueError, match=message):
            attention_transfer_loss(pred, true, mask=mask)
    model = stir_mapped(model_of())
    with attention_transfer(model), pytest.raises(ValueError, match="past_key_values: expected None"):
        model(ids(), use_cache=True)
