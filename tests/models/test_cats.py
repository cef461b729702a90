"""Conversion of transformers models: tiny random ones, no downloads."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import subquad
from subquad.integrations.transformers import CatsConfig, convert, dense_state_dict, revert
from subquad.nn import CATSMLP

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = pytest.mark.filterwarnings("ignore:.*native kernels are not in use")  # any backend will do

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
FAMILIES = {
    "Llama": ("LlamaConfig", {"mlp_bias": True}),
    "Mistral": ("MistralConfig", {}),
    "Qwen2": ("Qwen2Config", {}),
    "Gemma": ("GemmaConfig", {"head_dim": 8}),
    "Phi3": ("Phi3Config", {}),
}
NAMES = [f"model.layers.{i}.mlp" for i in range(3)]


def build(family: str = "Llama") -> nn.Module:
    torch.manual_seed(0)
    name, extra = FAMILIES[family]
    config = getattr(transformers, name)(**SIZES, **extra)
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 128, (4, 20), generator=torch.Generator().manual_seed(0))


def state_of(model: nn.Module) -> list[object]:
    return [
        [(name, id(module)) for name, module in model.named_modules()],
        [(name, id(p), p.stride(), p.data_ptr()) for name, p in model.named_parameters()],
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_convert_keeps_the_function_and_revert_the_objects(family: str, ids: torch.Tensor) -> None:
    model = build(family)
    modules, strides = dict(model.named_modules()), [p.stride() for p in model.parameters()]
    values = {name: p.clone() for name, p in model.named_parameters()}
    dense = model(ids).logits
    assert convert(model, mlp="cats") == NAMES
    assert all(isinstance(model.get_submodule(name), CATSMLP) for name in NAMES)
    torch.testing.assert_close(model(ids).logits, dense)
    assert list(values) == [name for name, _ in model.named_parameters()]
    assert model.get_submodule(NAMES[0]).activation == ("gelu_tanh" if family == "Gemma" else "silu")
    assert convert(model, mlp="cats") == []  # no double wrap
    assert model.get_submodule(NAMES[0]).original is modules[NAMES[0]]
    assert revert(model) == NAMES and revert(model) == []
    assert {name: id(m) for name, m in model.named_modules()} == {name: id(m) for name, m in modules.items()}
    assert [p.stride() for p in model.parameters()] == strides
    assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())
    assert torch.equal(model(ids).logits, dense)


@pytest.mark.parametrize("family", FAMILIES)
def test_threshold_acts_like_a_masked_model(family: str, ids: torch.Tensor) -> None:
    model = build(family)
    plain = copy.deepcopy(model)
    threshold = 0.3

    def mask(module: nn.Module, args: object, s: torch.Tensor) -> torch.Tensor:
        return torch.where(s.abs() > threshold, s, 0)

    for layer in plain.model.layers:
        act = getattr(layer.mlp, "act_fn", None) or layer.mlp.activation_fn
        act.register_forward_hook(mask)
    convert(model, mlp="cats", threshold=threshold)
    row = subquad.sparsity_report(model, [{"input_ids": ids}])[0]
    assert 0.05 < row.active_mean < 0.95
    for tokens in (ids, ids[:1, :6]):  # the dense and the sparse path
        want = plain(tokens).logits
        error = (model(tokens).logits - want).norm()
        assert error < 3e-3 * want.norm()  # rounding may move a neuron across the threshold
        for name in NAMES:
            model.get_submodule(name).enabled = False
        assert (model(tokens).logits - want).norm() > 20 * error
        for name in NAMES:
            model.get_submodule(name).enabled = True


@pytest.mark.parametrize("family", ["Llama", "Phi3"])
@pytest.mark.parametrize("converted", [False, True])
def test_calibrate_apply_generate(family: str, converted: bool, ids: torch.Tensor) -> None:
    model = build(family)
    with torch.no_grad():  # so that gates and the numbers they gate are not alike
        for block in model.model.layers:
            gate = block.mlp.gate_proj.weight if family == "Llama" else block.mlp.gate_up_proj.weight.chunk(2)[0]
            gate.mul_(3.0)
    if converted:
        convert(model, mlp="cats")
    with subquad.CatsCalibrator(model) as calibrator:
        model(ids)
    assert calibrator.apply(sparsity=0.5) == NAMES
    rows = subquad.sparsity_report(model, [{"input_ids": ids}])
    # Thresholds come from dense inputs, while a layer sees what the sparse layers before it made.
    assert abs(1 - rows[0].active_mean - 0.5) < 2e-3 and all(abs(1 - row.active_mean - 0.5) < 0.1 for row in rows)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    full = model(out[:, :-1]).logits[:, -1]
    assert torch.equal(full.argmax(-1), out[:, -1])  # cached single tokens and whole sequences agree


def test_padding_is_left_out(ids: torch.Tensor) -> None:
    model = build()
    mask = torch.ones_like(ids)
    mask[0, :8] = 0
    mask[2, :3] = 0
    padded = ids * mask
    with subquad.CatsCalibrator(model) as calibrator:
        model(input_ids=padded, attention_mask=mask)
        tokens = dict(calibrator.tokens)
        model.generate(padded, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert set(tokens.values()) == {80 - 11}
    assert set(calibrator.tokens.values()) == {2 * (80 - 11) + 2 * 4}  # prompt twice, and two of three new tokens fed


def test_skipping_first_tokens_works_with_a_cache(ids: torch.Tensor) -> None:
    model = build()
    with subquad.CatsCalibrator(model, skip_first_tokens=2) as calibrator:
        model.generate(
            ids[:1, :5], attention_mask=torch.ones(1, 5), max_new_tokens=4, min_new_tokens=4, do_sample=False
        )
    assert set(calibrator.tokens.values()) == {3 + 3}


def test_left_padded_batch_equals_single_rows(ids: torch.Tensor) -> None:
    model = build()
    convert(model, mlp="cats", threshold=0.3)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    batch = model(ids[:2, :8], attention_mask=mask).logits
    torch.testing.assert_close(batch[0, 3:], model(ids[:1, 3:8]).logits[0])


@pytest.mark.parametrize("layers, names", [([0, 2], [NAMES[0], NAMES[2]]), ([-1], NAMES[2:]), ([NAMES[1]], [NAMES[1]])])
def test_layers(layers: list[int | str], names: list[str]) -> None:
    model = build()
    assert convert(model, mlp="cats", layers=layers) == names
    assert [isinstance(model.get_submodule(name), CATSMLP) for name in NAMES] == [name in names for name in NAMES]
    assert convert(model, mlp="cats") == [name for name in NAMES if name not in names]


def test_config_object_carries_the_options() -> None:
    model = build()
    convert(
        model, mlp=CatsConfig(threshold=0.5, inclusive=True, prefill="dense", down_layout="keep", max_sparse_tokens=4)
    )
    module = model.model.layers[2].mlp
    assert module.inclusive and module.threshold == 0.5 and module.prefill == "dense" and module.max_sparse_tokens == 4
    assert module.down_proj.weight.is_contiguous()


def complexify(model: nn.Module) -> None:
    weight = model.model.layers[2].mlp.up_proj.weight
    weight.data = weight.data.to(torch.complex64)


def tensor_parallel(model: nn.Module) -> None:
    model.config.pretraining_tp = 2


@pytest.mark.parametrize(
    "damage, options, error, match",
    [
        (
            complexify,
            {"mlp": "cats"},
            ValueError,
            "model.layers.2.mlp: mlp.up_proj.weight: expected .* got torch.complex64",
        ),
        (tensor_parallel, {"mlp": "cats"}, ValueError, "model.layers.0.mlp: mlp.config.pretraining_tp"),
        (None, {"mlp": "cats", "layers": [3]}, ValueError, "layers: expected numbers below 3 .* got 3"),
        (None, {"mlp": "cats", "layers": [0, "lm_head"]}, ValueError, "layers: expected .* got 'lm_head'"),
        (None, {"mlp": "cats", "layers": 0}, TypeError, "layers: expected a list of .*, got 0"),
        (
            None,
            {"mlp": "cats", "layers": NAMES[0]},
            TypeError,
            "layers: expected a list of .*, got 'model.layers.0.mlp'",
        ),
        (None, {"mlp": "cats", "layers": [True]}, TypeError, "layers: expected numbers or names, got True"),
        (None, {"mlp": "cats", "layers": [None]}, TypeError, "layers: expected numbers or names, got None"),
        (None, {"mlp": "cats", "threshold": "x"}, TypeError, "mlp: threshold: expected a float or a tensor, got 'x'"),
        (None, {"mlp": "cats", "prefill": "no"}, ValueError, "model.layers.0.mlp: prefill: expected"),
        (None, {"mlp": "cats", "threshold": float("nan")}, ValueError, "threshold: expected numbers, got NaN"),
        (None, {"mlp": "cats", "size": 3}, TypeError, "size: unknown option"),
        (None, {"mlp": CatsConfig(), "prefill": "dense"}, TypeError, "prefill: options come with"),
        (None, {"mlp": "relu"}, ValueError, "mlp: expected one of 'cats' .* got 'relu'"),
        (None, {}, ValueError, "mlp: expected 'cats' .* got None"),
        (
            None,
            {"attention": "span"},
            ValueError,
            "attention: expected one of 'lawcat', 'sink', 'superlinear' .* got 'span'",
        ),
        (
            None,
            {"mlp": "cats", "attention": "span"},
            ValueError,
            "attention: expected one of 'lawcat', 'sink', 'superlinear' .* got 'span'",
        ),
    ],
)
def test_a_failed_conversion_changes_nothing(damage, options: dict, error: type[Exception], match: str) -> None:
    model = build()
    if damage is not None:
        damage(model)
    before = state_of(model)
    with pytest.raises(error, match=match):
        convert(model, **options)
    assert state_of(model) == before


def test_out_of_memory_while_laying_out_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    before = state_of(model)
    lay_out, calls = CATSMLP.lay_out, []

    def fails(self: CATSMLP) -> None:
        calls.append(self)
        if len(calls) == 2:
            raise MemoryError
        lay_out(self)

    monkeypatch.setattr(CATSMLP, "lay_out", fails)
    with pytest.raises(MemoryError):
        convert(model, mlp="cats")
    after = state_of(model)
    assert after[0] == before[0] and [p[:3] for p in after[1]] == [p[:3] for p in before[1]]


def test_models_that_have_nothing_to_convert() -> None:
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16)
    for model in (transformers.AutoModelForCausalLM.from_config(config), nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="model: expected gated MLPs"):
            convert(model, mlp="cats")
    with pytest.raises(ValueError, match="from_llama_mlp"):
        convert(build().model.layers[0].mlp, mlp="cats")


def test_a_module_used_twice_is_converted_once(ids: torch.Tensor) -> None:
    model = build()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    dense = model(ids).logits
    assert convert(model, mlp="cats") == NAMES
    assert model.model.layers[1].mlp is model.model.layers[0].mlp
    torch.testing.assert_close(model(ids).logits, dense)
    assert revert(model) == NAMES and model.model.layers[1].mlp is model.model.layers[0].mlp


def test_checkpoints_go_both_ways(ids: torch.Tensor) -> None:
    dense, other = build(), build()
    for p in other.parameters():
        nn.init.normal_(p, std=0.02)
    want = other(ids).logits
    model = copy.deepcopy(dense)
    convert(model, mlp="cats")
    model.load_state_dict(other.state_dict(), strict=True)
    torch.testing.assert_close(model(ids).logits, want)
    dense.load_state_dict(dense_state_dict(model), strict=True)
    torch.testing.assert_close(dense(ids).logits, want)


@pytest.mark.parametrize("family", ["Llama", "Phi3"])
def test_save_pretrained_round_trip(family: str, ids: torch.Tensor, tmp_path) -> None:
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    model = build(family)
    convert(model, mlp="cats", threshold=0.3)
    want = model(ids).logits
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "model.safetensors")
    assert saved["model.layers.0.mlp.threshold"] == torch.tensor(0.3)
    dense = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path
    ).eval()  # the thresholds are unexpected: a warning
    revert(model)
    torch.testing.assert_close(dense(ids).logits, model(ids).logits)
    convert(dense, mlp="cats")
    missing, unexpected = dense.load_state_dict(saved, strict=False)
    assert not unexpected and all("lm_head" in name for name in missing)
    with torch.no_grad():
        torch.testing.assert_close(dense(ids).logits, want)


def test_half_keeps_the_thresholds() -> None:
    model = build()
    convert(model, mlp="cats", threshold=0.1234567)
    model.half().bfloat16()
    assert model.dtype == torch.bfloat16
    assert all(model.get_submodule(name).threshold == torch.tensor(0.1234567) for name in NAMES)


def test_training_through_a_converted_model(ids: torch.Tensor) -> None:
    model = build().train().requires_grad_(True)
    convert(model, mlp="cats", threshold=0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    gate = model.model.layers[0].mlp.gate_proj.weight.grad
    assert gate.abs().sum() > 0
