"""Exchanging layers, whatever they are: finding them, all or nothing wherever it fails, the registry, earlier places."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import methodcaller
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import subquad
from subquad.convert import Kind, Replacement, find_attentions, find_mlps, named, register, replace, restore
from subquad.convert.attentions import ATTENTION
from subquad.convert.replace import _REGISTRY
from subquad.integrations.transformers import CatsConfig, ConversionReport, LawcatConfig, convert, revert
from subquad.nn import CATSMLP, LawcatAttention

pytestmark = pytest.mark.filterwarnings("ignore:.*native kernels are not in use")  # any backend will do
BOTH: dict[str, Any] = {"mlp": CatsConfig(), "attention": LawcatConfig()}
NAMES = ["layers.0.self_attn", "layers.1.self_attn", "layers.0.mlp", "layers.1.mlp"]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head_dim = 4
        self.q_proj, self.o_proj = nn.Linear(8, 8), nn.Linear(8, 8)
        self.k_proj, self.v_proj = nn.Linear(8, 4), nn.Linear(8, 4)


class GatedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act_fn = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(), GatedMLP()


class Model(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))


def mixed_model() -> Model:
    """Modes, and a layout, that a conversion could lose."""
    model = Model().eval()
    model.layers[0].self_attn.q_proj.train()
    model.layers[1].mlp.up_proj.train()
    weight = model.layers[1].mlp.down_proj.weight
    weight.data = torch.randn(8, 20)[:, :12]
    return model


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a conversion touches: its modules, their modes and attributes, parameters and their strides."""
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        "modules": {name: (id(m), m.training, sorted(m.__dict__)) for name, m in modules.items()},
        "parameters": {name: (id(p), p.stride(), p.detach().flatten().tolist()) for name, p in parameters.items()},
        "buffers": {name: b.flatten().tolist() for name, b in model.named_buffers(remove_duplicate=False)},
    }


def counted(function: Callable[..., Any], number: int, error: type[BaseException], after: bool) -> Callable[..., Any]:
    """The function, which fails at its call of this number, having done its work or not."""
    calls = iter(range(1, 1000))

    def planted(*args: Any, **kwargs: Any) -> Any:
        fails = next(calls) == number
        if fails and not after:
            raise error("planted")
        result = function(*args, **kwargs)
        if fails:
            raise error("planted")
        return result

    return planted


STAGES = {
    "make attention": (LawcatAttention, "__init__", 2),
    "make mlp": (CATSMLP, "from_llama_mlp", 2),
    "count": (LawcatAttention, "new_parameters", 2),
    "settle": (CATSMLP, "lay_out", 2),
    "put": (Model, "set_submodule", 4),
}
UNSTAGES = {
    "restore attention": (LawcatAttention, "to_attention", 2),
    "restore mlp": (CATSMLP, "to_dense", 2),
    "put": (Model, "set_submodule", 4),
}


def plant(patch: pytest.MonkeyPatch, place: tuple[type, str, int], error: Any, number: int, after: bool) -> None:
    owner, name, _ = place
    planted = counted(getattr(owner, name), number, error, after)
    patch.setattr(owner, name, planted)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("stage", STAGES)
def test_a_failure_at_any_stage_changes_nothing(stage: str, error: Any, after: bool) -> None:
    for number in range(1, STAGES[stage][2] + 1):
        model = mixed_model()
        before = snapshot(model)
        with pytest.MonkeyPatch.context() as patch:
            plant(patch, STAGES[stage], error, number, after)
            with pytest.raises(error, match="planted"):
                convert(model, **BOTH)
        assert snapshot(model) == before, number
        assert convert(model, **BOTH) == NAMES  # and it goes well the next time


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("stage", UNSTAGES)
def test_a_failure_of_revert_changes_nothing(stage: str, error: Any, after: bool) -> None:
    for number in range(1, UNSTAGES[stage][2] + 1):
        model = mixed_model()
        first = snapshot(model)
        convert(model, **BOTH)
        before = snapshot(model)
        with pytest.MonkeyPatch.context() as patch:
            plant(patch, UNSTAGES[stage], error, number, after)
            with pytest.raises(error, match="planted"):
                revert(model)
        assert snapshot(model) == before, number
        assert revert(model) == NAMES and snapshot(model) == first


@pytest.mark.parametrize("wrong", ["attention", "mlp"])
def test_a_layer_that_cannot_be_converted_changes_nothing(wrong: str) -> None:
    """The last of all: the others have been made by then."""
    model = mixed_model()
    layer = model.layers[1]
    if wrong == "attention":
        layer.self_attn.sinks = nn.Parameter(torch.zeros(2))
    else:
        layer.mlp.act_fn = nn.Tanh()
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"^layers.1.{'self_attn' if wrong == 'attention' else 'mlp'}: "):
        convert(model, **BOTH)
    assert snapshot(model) == before
    del layer.mlp
    before = snapshot(model)
    with pytest.raises(ValueError, match="layers: expected"):
        convert(model, **BOTH, layers=[0, "layers.1.self_attn"])
    assert snapshot(model) == before


class Interrupt(contextlib.AbstractContextManager["Interrupt"]):
    """KeyboardInterrupt before the n-th line that runs in the code of conversions, without that which only looks."""

    FILES = ("convert/replace.py", "nn/cats_mlp.py", "nn/lawcat.py", "nn/_children.py", "/contextlib.py")
    LOOKING = ("find", "named", "replacement_of", "_inherit", "_add", "<genexpr>", "<dictcomp>", "<listcomp>")

    def __init__(self, number: int) -> None:
        self.left = number

    def __enter__(self) -> Interrupt:
        self.outer = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.outer)

    def _call(self, frame: Any, event: str, _: Any) -> Any:
        code = frame.f_code
        return self._line if code.co_filename.endswith(self.FILES) and code.co_name not in self.LOOKING else None

    def _line(self, frame: Any, event: str, _: Any) -> Any:
        if event == "line":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._line


@pytest.mark.parametrize(("direction", "layout"), [("convert", "strided"), ("convert", "keep"), ("revert", "strided")])
def test_an_interrupt_at_any_line_is_all_or_nothing(direction: str, layout: str) -> None:
    config = {"mlp": CatsConfig(down_layout=layout), "attention": LawcatConfig(gate="none")}

    def act(model: nn.Module) -> None:
        convert(model, **config) if direction == "convert" else revert(model)

    outcomes = []
    for number in range(1, 5000):
        model = mixed_model()
        dense = snapshot(model)
        if direction == "revert":
            convert(model, **config)
        before = snapshot(model)
        try:
            with Interrupt(number):
                act(model)
        except KeyboardInterrupt:
            outcomes.append(snapshot(model) == before)
            if not outcomes[-1]:  # all was done, and the interrupt came before the return
                assert all((find(model) != {}) for find in (find_attentions, find_mlps))
                converted = [isinstance(m, (CATSMLP, LawcatAttention)) for m in map(model.get_submodule, NAMES)]
                assert converted == [direction == "convert"] * 4, number
            if direction == "convert":
                revert(model)
                assert snapshot(model) == dense, number
        else:
            break
    assert len(outcomes) > 100 and outcomes.index(False) > len(outcomes) - 12


def test_rolling_back_goes_on_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory, and again when a layout is to be undone: everything else is as it was."""
    model = mixed_model()
    before = snapshot(model)
    monkeypatch.setattr(CATSMLP, "lay_out", counted(CATSMLP.lay_out, 2, MemoryError, after=True))
    monkeypatch.setattr(CATSMLP, "restore_layout", counted(CATSMLP.restore_layout, 1, MemoryError, after=False))
    with pytest.raises(MemoryError):
        convert(model, **BOTH)
    after = snapshot(model)
    assert after["modules"] == before["modules"]
    changed = {name for name, value in after["parameters"].items() if value != before["parameters"][name]}
    assert changed == {"layers.1.mlp.down_proj.weight"}


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_applying_thresholds_is_all_or_nothing(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers are converted, with thresholds of either shape; the third is dense."""
    model = Model(3)
    convert(model, mlp="cats", layers=[0, 1])
    model.layers[0].mlp.set_threshold(0.25, target_sparsity=0.1, calibration_tokens=3)
    model.layers[1].mlp.set_threshold(torch.rand(12))
    with subquad.CatsCalibrator(model) as calibrator:
        for layer in model.layers:
            layer.mlp(torch.randn(20, 8))
    before, buffers = snapshot(model), dict(model.named_buffers())
    monkeypatch.setattr(
        CATSMLP, "set_threshold", counted(CATSMLP.set_threshold, failing, KeyboardInterrupt, after=True)
    )
    with pytest.raises(KeyboardInterrupt):
        calibrator.apply(0.5)
    assert snapshot(model) == before and all(value is buffers[name] for name, value in model.named_buffers())
    monkeypatch.undo()
    assert calibrator.apply(0.5) == [f"layers.{i}.mlp" for i in range(3)]


# --- finding ----------------------------------------


def test_shared_modules_are_converted_once() -> None:
    """A layer under two names, a module in two layers, a module that only one name of which is meant."""
    model = Model(3)
    model.layers[1] = model.layers[0]
    model.layers[2].self_attn = model.layers[0].self_attn
    before = snapshot(model)
    names = convert(model, **BOTH)
    assert len(names) == 6 and len({id(model.get_submodule(name)) for name in names}) == 3
    assert names.new_parameters == sum(p.numel() for p in model.layers[0].self_attn.new_parameters().values())
    assert sorted(revert(model)) == sorted(names) and snapshot(model) == before
    assert convert(model, attention="lawcat", layers=[2]) == ["layers.2.self_attn"]
    assert type(model.layers[0].self_attn) is Attention
    assert model.layers[2].self_attn.q_proj is model.layers[0].self_attn.q_proj
    revert(model)
    assert snapshot(model) == before


def test_a_model_that_is_a_layer() -> None:
    for module, options, name in (
        (Attention(), {"attention": "lawcat"}, "LawcatAttention.from_attention"),
        (GatedMLP(), {"mlp": "cats"}, "CATSMLP.from_llama_mlp"),
    ):
        with pytest.raises(ValueError, match=f"model: it is itself one .*; use {name}"):
            convert(module, **options)
    converted = LawcatAttention.from_attention(Attention())
    assert convert(converted, attention="lawcat") == [] and revert(converted) == []
    assert list(find_attentions(converted)) == [""]


def test_layers_inside_others_are_refused() -> None:
    model = Model()
    model.layers[0].self_attn.attn = Attention()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"got 'layers.0.self_attn.attn' in 'layers.0.self_attn'"):
        convert(model, **BOTH)
    assert snapshot(model) == before
    assert convert(model, attention="lawcat", layers=["layers.0.self_attn.attn"]) == ["layers.0.self_attn.attn"]


def test_some_layers_can_be_restored() -> None:
    model = mixed_model()
    with pytest.raises(ValueError, match="model: expected converted layers"):
        restore(model, "attention", layers=[0])
    convert(model, **BOTH)
    with pytest.raises(ValueError, match="layers: expected numbers below 2"):
        restore(model, "attention", layers=[2])
    assert restore(model, "mlp", layers=[-1]) == ["layers.1.mlp"]
    assert restore(model, "attention", layers=[0]) == ["layers.0.self_attn"]
    assert revert(model) == ["layers.1.self_attn", "layers.0.mlp"]


def test_layers_made_on_their_own_stay() -> None:
    """They have no original to go back to, whatever class they are of."""
    model = mixed_model()
    own = model.layers[0].mlp = CATSMLP(8, 12)
    assert convert(model, **BOTH) == ["layers.0.self_attn", "layers.1.self_attn", "layers.1.mlp"]
    assert sorted(revert(model)) == ["layers.0.self_attn", "layers.1.mlp", "layers.1.self_attn"]
    assert model.layers[0].mlp is own


def test_what_was_exchanged_since_goes_back_with_the_original() -> None:
    """Adapters that came after the conversion are not lost."""
    model = mixed_model()
    convert(model, **BOTH)
    layer = model.layers[0]
    others = layer.self_attn.q_proj, layer.mlp.up_proj = nn.Sequential(layer.self_attn.q_proj), nn.Linear(8, 12)
    layer.self_attn.q_norm = nn.RMSNorm(4)
    model.train()
    revert(model)
    assert (layer.self_attn.q_proj, layer.mlp.up_proj) == others and type(layer.self_attn) is Attention
    assert isinstance(layer.self_attn.q_norm, nn.RMSNorm)
    assert all(module.training for module in model.modules())


OTHERWISE: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    (
        "attention",
        {"attention": "lawcat"},
        {"gate": "scalar"},
        "gate: expected 'vector', as it was converted with, got",
    ),
    ("attention", {"attention": "lawcat", "keep": 3}, {"keep": 0}, "keep: expected 3, as it was converted with, got 0"),
    (
        "mlp",
        {"mlp": "cats"},
        {"mask_mode": "union"},
        "mask_mode: expected 'token', as it was converted with, got 'union'",
    ),
    ("mlp", {"mlp": "cats"}, {"threshold": 0.1}, "threshold: expected None, or that of the layer, got another"),
    ("mlp", {"mlp": "cats", "threshold": torch.ones(12)}, {"threshold": 1.0}, "threshold: expected None, or that of"),
]


@pytest.mark.parametrize(("kind", "first", "then", "message"), OTHERWISE)
def test_other_options_for_a_converted_layer_are_refused(
    kind: str, first: dict[str, Any], then: dict[str, Any], message: str
) -> None:
    """Whether it is named or one of all; the same options change nothing."""
    model = mixed_model()
    convert(model, **first, layers=[1])
    before = snapshot(model)
    for layers in (None, [1]):
        with pytest.raises(
            ValueError, match=rf"^layers\.1\.{'self_attn' if kind == 'attention' else 'mlp'}: {message}"
        ):
            convert(model, **(first | then), layers=layers)
        assert snapshot(model) == before
    assert convert(model, **first, layers=[1]) == [] and snapshot(model) == before
    assert len(convert(model, **first)) == 1


# --- registry ----------------------------------------


class Silent(nn.Module):
    """A replacement that another issue could bring: attention that says one number."""

    def __init__(self, original: nn.Module, value: float) -> None:
        super().__init__()
        self.o_proj, self.head_dim, self.value = original.o_proj, original.head_dim, value
        object.__setattr__(self, "original", original)

    def back(self) -> nn.Module:
        return self.original


@dataclass(frozen=True)
class SilentConfig:
    value: float = 1.0


@pytest.fixture
def silent() -> Iterator[Replacement]:
    replacement = Replacement(
        kind=ATTENTION,
        name="silent",
        layer=Silent,
        config=SilentConfig,
        constructor="Silent",
        make=Silent,
        restore=methodcaller("back"),
    )
    yield register(replacement)
    del _REGISTRY["attention", "silent"]


def test_a_new_replacement_is_known_everywhere(silent: Replacement) -> None:
    model = mixed_model()
    before = snapshot(model)
    assert convert(model, attention="silent", value=2.0, layers=[0]) == NAMES[:1]
    assert model.layers[0].self_attn.value == 2.0
    report = convert(model, attention="lawcat", mlp=CatsConfig())  # the first layer is converted already
    assert report == ["layers.1.self_attn", *NAMES[2:]] and isinstance(report, ConversionReport)
    with pytest.raises(
        ValueError, match=r"^layers.0.self_attn: expected a layer that is not converted, got one of 'silent'"
    ):
        convert(model, attention="lawcat", layers=[1, 0])
    assert list(find_attentions(model)) == NAMES[:2]
    assert revert(model) == NAMES and snapshot(model) == before
    assert replace(model, [(silent, SilentConfig(3.0)), (named("mlp")["cats"], CatsConfig())]) == NAMES
    assert model.layers[1].self_attn.value == 3.0
    with pytest.raises(ValueError, match=r"'superlinear', 'silent' or a LawcatConfig .* or a SilentConfig, got 'loud'"):
        convert(model, attention="loud")
    with pytest.raises(TypeError, match="gate: unknown option; expected some of value"):
        convert(model, attention="silent", gate="none")
    with pytest.raises(TypeError, match="value: options come with attention='silent'; with a SilentConfig"):
        convert(model, attention=SilentConfig(), value=1.0)


def test_a_name_can_be_taken_once(silent: Replacement) -> None:
    other = Replacement(ATTENTION, "silent", Silent, SilentConfig, "Silent", Silent, methodcaller("back"))
    assert register(silent) is silent
    other = Replacement(**{**vars(other), "constructor": "another"})
    with pytest.raises(ValueError, match="name: expected one that no attention has yet, got 'silent'"):
        register(other)
    assert named("attention")["silent"] is silent and isinstance(ATTENTION, Kind)


def test_earlier_places() -> None:
    from subquad.nn import conversion, lawcat_conversion

    for name in (*conversion.__all__, *lawcat_conversion.__all__):
        place = conversion if name in conversion.__all__ else lawcat_conversion
        assert getattr(place, name) is getattr(subquad.convert, name)


@pytest.mark.heavy
def test_converting_does_not_import_the_library() -> None:
    code = (
        "import importlib.util as util, sys\n"
        f"spec = util.spec_from_file_location('models', {__file__!r}); module = util.module_from_spec(spec)\n"
        "sys.modules['models'] = module; spec.loader.exec_module(module)\n"
        "model = module.Model()\n"
        "assert module.convert(model, **module.BOTH) == module.NAMES and module.revert(model) == module.NAMES\n"
        "assert 'transformers' not in sys.modules and 'triton' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: convert(x, mlp="cats"),
        revert,
        subquad.CatsCalibrator,
        lambda x: subquad.attention_transfer(x).__enter__(),
        subquad.trainable_parameters,
        subquad.calibration.sparsity_report,
    ],
)
def test_what_is_no_module_is_refused(function: Any) -> None:
    with pytest.raises(TypeError, match=r"^model: expected a torch\.nn\.Module, got str"):
        function("model")
