"""What users do to a model, done to every converted one: afterwards it computes what it did, or a message says why it cannot."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from subquad.integrations.transformers import (
    CatsConfig,
    LawcatConfig,
    SinkConfig,
    SuperlinearConfig,
    convert,
    load_converted,
    register,
    revert,
)

from .compiled import Graphs

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*native kernels are not in use"),  # any backend will do
    pytest.mark.filterwarnings("ignore:.*must be called, so nothing is skipped"),
    pytest.mark.filterwarnings("ignore:.*SuperlinearConfig"),  # keys that are never reached, on purpose
]
# SmolLM2's shape: three query heads to a key head, tied embeddings.
SIZES = {"hidden_size": 96, "intermediate_size": 128, "num_attention_heads": 3}
SIZES |= {"num_key_value_heads": 1, "vocab_size": 64, "rope_theta": 1e5, "max_position_embeddings": 64}
SIZES |= {"tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
SUPERLINEAR = SuperlinearConfig(sw_index=1, num_spans=2, backward_factor=0.9, forward_factor=0.4)
CATS = CatsConfig(threshold=0.2)
CONVERSIONS: dict[str, dict[str, Any]] = {
    "lawcat": {"attention": "lawcat"},
    "hybrid": {"attention": LawcatConfig(window_size=4, share_qk_conv=True), "layers": [0]},
    "superlinear": {"attention": SUPERLINEAR},
    "sink": {"attention": SinkConfig(sink_tokens=2, window=6)},
    "cats": {"mlp": CATS},
    "cats_int8": {"mlp": CATS, "weights": "int8"},
    "cats_int4": {"mlp": CATS, "weights": "int4"},
    "subquad": {},  # attn_implementation="subquad", and nothing converted
}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def on_a_grid(name: str, parameter: torch.Tensor) -> torch.Tensor:
    """Multiples of 1/64 that depend on the name: exact in 16 bits, so that casts there and back lose nothing."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    numbers = torch.randint(-16, 17, parameter.shape, generator=generator).to(parameter.dtype) / 64
    return 1 + numbers if "norm" in name else numbers


def build(layers: int = 2) -> Any:
    """Dense."""
    config = transformers.LlamaConfig(**SIZES, num_hidden_layers=layers)
    config._attn_implementation = "eager"
    model = transformers.LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        parameter.copy_(on_a_grid(name, parameter))
    return model


def converted(model: Any, name: str) -> Any:
    """In place, with new parameters that have learned something."""
    if name == "subquad":
        register()
        model.set_attn_implementation("subquad")
        return model
    old = {id(parameter) for parameter in model.parameters()}
    convert(model, **CONVERSIONS[name])
    for own, parameter in model.named_parameters():
        if id(parameter) not in old:
            parameter.copy_(on_a_grid(own.replace("base_model.model.", ""), parameter))
    return model


def made(name: str, layers: int = 2) -> Any:
    return converted(build(layers), name)


def said(model: Any) -> tuple[torch.Tensor, list[int]]:
    """Logits of two rows, and greedy text behind one."""
    ids = torch.randint(2, 64, (2, 13), generator=torch.Generator().manual_seed(0))
    logits = model(input_ids=ids, use_cache=False).logits.float()
    assert logits.isfinite().all()
    text = model.generate(input_ids=ids[:1, :9], max_new_tokens=4, do_sample=False)
    return logits, text[0].tolist()


@functools.cache
def expected(name: str) -> tuple[torch.Tensor, list[int]]:
    """Of a conversion."""
    return said(made(name))


def same(got: Any, want: Any, exact: bool = True) -> None:
    """Two models, or what they said."""
    (logits, text), (other, wanted) = (said(x) if isinstance(x, nn.Module) else x for x in (got, want))
    if exact:
        assert torch.equal(logits, other)
    torch.testing.assert_close(logits, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
    assert text == wanted


# --- written and read ----------------------------------------


def saved(model: Any, folder: Path, **options: Any) -> Any:
    model.save_pretrained(folder, max_shard_size="40KB")
    if hasattr(model.config, "subquad"):
        return load_converted(folder, attn_implementation="eager", **options)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="subquad", **options)


def torch_saved(model: Any, folder: Path) -> Any:
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


def state_loaded(model: Any, folder: Path) -> Any:
    """Into a model that was converted in the same way, and holds nothing."""
    torch.save(model.state_dict(), folder / "state.pt")
    other = emptied(model)
    other.load_state_dict(torch.load(folder / "state.pt", weights_only=True), strict=True)
    return other


def emptied(model: Any) -> Any:
    other = copy.deepcopy(model)
    for tensor in other.state_dict(keep_vars=True).values():
        tensor.zero_()
    return other


def state_assigned(model: Any, folder: Path) -> Any:
    other = emptied(model)
    other.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    other.tie_weights()
    return other


def placed(model: Any, folder: Path) -> Any:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    return saved(model, folder, device_map={"": "cpu"})


def offloaded(model: Any, folder: Path) -> Any:
    """A layer on disk, read when it is called."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "model.layers.0", "lm_head"), "cpu")
    return saved(model, folder, device_map=places | {"model.layers.1": "disk"}, offload_folder=folder / "offloaded")


def dispatched(model: Any, folder: Path) -> Any:
    """As `device_map` does it, after the conversion."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)


KEEPING: dict[str, Callable[[Any, Path], Any]] = {
    "saved": saved,
    "deepcopy": lambda model, folder: copy.deepcopy(model),
    "pickle": lambda model, folder: pickle.loads(pickle.dumps(model)),
    "torch.save": torch_saved,
    "state": state_loaded,
    "assigned": state_assigned,
    "placed": placed,
    "offloaded": offloaded,
    "dispatched": dispatched,
}


@pytest.mark.parametrize("event", KEEPING)
@pytest.mark.parametrize("name", CONVERSIONS)
def test_nothing_changes(name: str, event: str, tmp_path: Path) -> None:
    model = made(name)
    model(input_ids=torch.full((1, 5), 7))  # it has been used, too
    got = KEEPING[event](model, tmp_path)
    same(got, expected(name), exact=event not in ("offloaded", "dispatched"))  # what is offloaded is called, in pieces
    assert not got.training
    assert [type(module) for module in got.modules()] == [type(module) for module in made(name).modules()]
    tied = got.lm_head.weight is got.model.embed_tokens.weight
    assert tied or got.lm_head.weight.is_meta  # where accelerate has taken it
    if event in ("saved", "deepcopy", "pickle", "torch.save", "state") and name != "subquad":
        revert(got)  # and what it was made from is still there
        if "int" not in name:
            same(got, build())


# --- cast ----------------------------------------

CASTS: dict[str, Callable[[Any], Any]] = {
    "bfloat16": lambda model: model.bfloat16(),
    "half": lambda model: model.half(),
    "to": lambda model: model.to(torch.bfloat16),
    "type": lambda model: model.type(torch.float16),
    "double": lambda model: model.double(),
    "there and back": lambda model: model.bfloat16().float(),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("name", CONVERSIONS)
def test_casts_before_and_after(name: str, cast: str) -> None:
    """Of a model that is converted then, or has been."""
    same(CASTS[cast](made(name)), converted(CASTS[cast](build()), name))


# --- adapters of peft ----------------------------------------

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(model: Any) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=TARGETS, r=2, lora_alpha=2)).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(on_a_grid(name, parameter) / 4)
    return model


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", CONVERSIONS)
def test_adapters(name: str, order: str, tmp_path: Path) -> None:
    """Beside, loaded, merged: always the model that is converted after they were merged into its weights."""
    if "int" in name:
        match = "expected no adapter around it, got peft" if order == "before" else "Quantised.* is not supported"
        with pytest.raises(ValueError, match=match):
            converted(adapted(build()), name) if order == "before" else adapted(made(name))
        return
    peft = pytest.importorskip("peft", reason="peft is not installed")
    want = converted(adapted(build()).merge_and_unload(), name)
    model = converted(adapted(build()), name) if order == "before" else adapted(made(name))
    same(model, want, exact=False)
    model.save_pretrained(tmp_path)
    same(peft.PeftModel.from_pretrained(made(name), tmp_path), want, exact=False)
    same(copy.deepcopy(model), want, exact=False)
    same(model.merge_and_unload(), want, exact=False)


# --- trained ----------------------------------------


def gradients(model: Any) -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 64, (2, 13), generator=torch.Generator().manual_seed(1))
    with torch.enable_grad():
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", CONVERSIONS)
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    want = gradients(made(name).train())
    model = made(name).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:  # inputs that need gradients, as trainers arrange it
        model.enable_input_require_grads()
    got = gradients(model)
    assert got.keys() == want.keys() and len(got) >= 5
    for parameter, grad in got.items():
        torch.testing.assert_close(grad, want[parameter])
        assert grad.any()


# --- captured ----------------------------------------

LAYERS = {"hybrid": 2}  # one of each kind; tracing takes its time


@pytest.mark.heavy
@pytest.mark.parametrize("name", CONVERSIONS)
def test_compiled(name: str) -> None:
    """In one graph; that of a copy is its own."""
    torch._dynamo.reset()
    model, graphs = made(name, LAYERS.get(name, 1)), Graphs()
    ids = torch.randint(2, 64, (2, 13), generator=torch.Generator().manual_seed(0))
    want = model(input_ids=ids, use_cache=False).logits
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, want)
    assert graphs.count == 1
    same(copy.deepcopy(model), model)  # which a graph has not changed


@pytest.mark.heavy
@pytest.mark.parametrize("name", CONVERSIONS)
def test_exported(name: str) -> None:
    """Written and read."""
    model = made(name, LAYERS.get(name, 1))
    ids = torch.randint(2, 64, (2, 20), generator=torch.Generator().manual_seed(0))
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (), {"input_ids": ids, "use_cache": False}), file)
    file.seek(0)
    read = torch.export.load(file).module()
    want = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(read(input_ids=ids, use_cache=False).logits, want, rtol=1e-4, atol=1e-4)
