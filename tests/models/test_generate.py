"""`subquad.generate`: the text of `model.generate`, token by token, in graphs that are counted."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import subquad
from subquad.generation import graph
from subquad.integrations.transformers import LawcatConfig, SinkConfig, convert, register

from .compiled import Graphs
from .matrix.kinds import KINDS, VOCABULARY

transformers = pytest.importorskip("transformers", minversion="5")

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 60, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
CONVERT: dict[str, Callable[[Any], Any]] = {
    "stock": lambda model: None,
    "cats": lambda model: convert(model, mlp="cats", threshold=0.01),
    "sink": lambda model: convert(model, attention=SinkConfig(sink_tokens=2, window=9)),
    "lawcat": lambda model: convert(model, attention="lawcat"),
    "lawcat-window": lambda model: convert(model, attention=LawcatConfig(window_size=4), layers=[0]),
    "superlinear": lambda model: convert(model, attention="superlinear"),
}
pytestmark = pytest.mark.filterwarnings("ignore:subquad. SuperlinearConfig")


def made(kind: str = "stock", family: str = "Llama", attention: str = "sdpa", **more: Any) -> Any:
    """A tiny model with weights that leave no two tokens alike."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | more)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    CONVERT[kind](model)
    register()
    model.set_attn_implementation(attention)
    return model


def prompt(padded: bool = False, length: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(1, 60, (2, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, : 3 if padded else 0] = 0
    return ids, mask


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    torch._dynamo.reset()
    counted = Graphs()
    monkeypatch.setattr(graph, "BACKEND", counted)
    yield counted
    torch._dynamo.reset()


# --- the same text ----------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "subquad"])
@pytest.mark.parametrize("kind", CONVERT)
def test_greedy(kind: str, attention: str, padded: bool) -> None:
    model, (ids, mask) = made(kind, attention=attention), prompt(padded)
    want = model.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False)
    found = subquad.generate(model, ids, max_new_tokens=30, attention_mask=mask, compile=False)
    assert found.tolist() == want.tolist()


@pytest.mark.heavy
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", CONVERT)
def test_compiled(kind: str, padded: bool, graphs: Graphs) -> None:
    model, (ids, mask) = made(kind, attention="subquad" if padded else "sdpa"), prompt(padded)
    want = model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False)
    for _ in range(2):  # the second call finds the step of the first
        found = subquad.generate(model, ids, max_new_tokens=40, attention_mask=mask, compile=True)
        assert found.tolist() == want.tolist()
        assert 1 <= graphs.count <= 2


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["stock", "sink", "lawcat"])
def test_graphs_of_a_long_text(kind: str, graphs: Graphs) -> None:
    model, (ids, _) = made(kind), prompt()
    want = subquad.generate(model, ids, max_new_tokens=300, compile=False)
    assert subquad.generate(model, ids, max_new_tokens=300, compile=True).tolist() == want.tolist()
    assert graphs.count <= 2


@pytest.mark.heavy
def test_layers_that_slide(graphs: Graphs) -> None:
    model, (ids, mask) = made(family="Mistral", sliding_window=5), prompt(True)
    want = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
    for compile in (False, True):
        found = subquad.generate(model, ids, max_new_tokens=20, attention_mask=mask, compile=compile)
        assert found.tolist() == want.tolist()
    assert graphs.count == 1


@pytest.mark.heavy
@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        "cats",
        "sink",
        "lawcat",
        pytest.param("stock", marks=pytest.mark.full),
        pytest.param("superlinear", marks=pytest.mark.full),
    ],
)
def test_compiled_by_inductor(kind: str) -> None:
    """The same text, caches stay where they are, and no memory of their sizes is written beside them."""
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    model, (ids, mask) = made(kind, attention="subquad"), prompt(True)
    want = model.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False)
    cache = transformers.StaticCache(config=model.config, max_cache_len=77)
    places: list[dict[int, torch.Size]] = []

    def note(token: torch.Tensor) -> None:
        places.append({x.data_ptr(): x.shape for x in memory(cache) if x.numel() > 100})

    with torch._inductor.config.patch(fx_graph_cache=False):
        found, codes = run_and_get_code(
            subquad.generate,
            model,
            ids,
            max_new_tokens=30,
            attention_mask=mask,
            compile=True,
            cache=cache,
            on_token=note,
        )
    assert found.tolist() == want.tolist()
    assert places[2] and all(found == places[2] for found in places[2:])  # a first step drops what a prompt kept
    (code,) = codes
    for shape in set(places[2].values()):
        assert f"empty_strided_cpu(({', '.join(map(str, shape))})" not in code, shape


def memory(cache: Any) -> list[torch.Tensor]:
    """All that a cache keeps of tokens, without the bits that say which of the last columns were some."""
    held = []
    for layer in cache.layers:
        state = getattr(layer, "state", None)
        held += (
            [layer.keys, layer.values]
            if state is None
            else [x for name, x in state.tensors().items() if name != "late"]
        )
    return held


@pytest.mark.heavy
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model(kind: str, graphs: Graphs) -> None:
    torch.manual_seed(1)
    model = KINDS[kind].model()
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    ids, mask = prompt(True)
    given: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 25, "do_sample": False}
    found = subquad.generate(model, ids % VOCABULARY, compile=True, **given)
    assert found.tolist() == model.generate(ids % VOCABULARY, **given).tolist()
    assert graphs.count == 1


SAMPLED: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "top_k": 7},
    {"top_k": 0, "top_p": 0.6},
    {"repetition_penalty": 1.3, "min_p": 0.01},
]


@pytest.mark.parametrize("options", SAMPLED)
def test_sampling(options: dict[str, Any]) -> None:
    """The same random numbers make the same text only where the probabilities are the same, to rounding."""
    model, (ids, mask) = made(), prompt(True)
    torch.manual_seed(5)
    want = model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=True, **options)
    torch.manual_seed(5)
    given: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 40,
        "compile": False,
        "do_sample": True,
    } | options
    assert subquad.generate(model, ids, **given).tolist() == want.tolist()
    one, other, again = (
        subquad.generate(model, ids, generator=torch.Generator().manual_seed(seed), **given) for seed in (1, 2, 1)
    )
    assert one.tolist() == again.tolist() != other.tolist()


def test_what_the_model_says_about_itself_counts() -> None:
    model, (ids, mask) = made(), prompt()
    model.generation_config.update(do_sample=True, top_k=3, repetition_penalty=1.2)
    torch.manual_seed(5)
    want = model.generate(ids, attention_mask=mask, max_new_tokens=20)
    torch.manual_seed(5)
    assert subquad.generate(model, ids, max_new_tokens=20, compile=False).tolist() == want.tolist()


def test_rows_end_on_their_own() -> None:
    model, (ids, mask) = made(), prompt()
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
    ends = [int(plain[0, 9]), int(plain[1, 14])]
    want = model.generate(
        ids, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=ends, pad_token_id=59
    )
    found = subquad.generate(model, ids, max_new_tokens=20, eos_token_id=ends, pad_token_id=59, compile=False)
    assert found.tolist() == want.tolist() and found.shape[1] < 27 and (found == 59).any()


def test_no_ends_at_all() -> None:
    model = made(eos_token_id=5)
    ids, _ = prompt()
    model.generation_config.update(eos_token_id=list(range(60)), pad_token_id=0)
    options: dict[str, Any] = {"max_new_tokens": 6, "compile": False}
    assert subquad.generate(model, ids, **options).shape[1] == ids.shape[1] + 1
    assert subquad.generate(model, ids, eos_token_id=[], **options).shape[1] == ids.shape[1] + 6


def test_an_end_that_is_forced() -> None:
    model = made(eos_token_id=None)
    ids, _ = prompt()
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "forced_eos_token_id": 7, "pad_token_id": 0}
    found = subquad.generate(model, ids, compile=False, **options)
    assert found.tolist() == model.generate(ids, **options).tolist() and bool((found[:, -1] == 7).all())


def test_processors_see_what_has_been_said() -> None:
    model, (ids, _) = made(), prompt()

    lengths: list[int] = []

    def never_twice(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        lengths.append(ids.shape[1])
        return scores.scatter(1, ids, -torch.inf)

    found = subquad.generate(model, ids, max_new_tokens=30, processors=[never_twice], compile=False)
    assert lengths == list(range(7, 37))
    assert all(len(set(row[7:]) | set(row[:7])) == 30 + len(set(row[:7])) for row in found.tolist())


def test_every_token_is_told_at_once() -> None:
    model, (ids, _) = made(), prompt()
    said: list[torch.Tensor] = []
    found = subquad.generate(model, ids, max_new_tokens=5, on_token=said.append, compile=False)
    assert torch.stack(said, 1).tolist() == found[:, 7:].tolist()


# --- caches ----------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cache", ["sink", "dynamic", "static"])
@pytest.mark.parametrize("compile", [False, True])
def test_turns_in_one_cache(cache: str, compile: bool, padded: bool, graphs: Graphs) -> None:
    """Far beyond what the cache holds, in one graph."""
    model, (said, mask) = made("sink"), prompt(padded)
    caches = [
        {
            "sink": lambda: subquad.SinkCache(model.config, sink_tokens=2, window=9),
            "dynamic": lambda: transformers.DynamicCache(config=model.config),
            "static": lambda: transformers.StaticCache(config=model.config, max_cache_len=100),
        }[cache]()
        for _ in range(2)
    ]
    for turn in range(3):
        given: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
        want = model.generate(said, cache=caches[0], **given)
        found = subquad.generate(model, said, cache=caches[1], compile=compile, **given)
        assert found.tolist() == want.tolist(), turn
        assert int(caches[1].get_seq_length()) == int(caches[0].get_seq_length())
        said = torch.cat([found, prompt()[0]], 1)
        mask = torch.nn.functional.pad(mask, (0, said.shape[1] - mask.shape[1]), value=1)
    assert graphs.count <= (3 if compile else 0)


def test_a_sink_cache_of_a_model_as_it_is() -> None:
    model, (ids, _) = made(), prompt()
    caches = [subquad.SinkCache(model.config, sink_tokens=2, window=9) for _ in range(2)]
    want = model.generate(ids, cache=caches[0], max_new_tokens=30, do_sample=False)
    with pytest.warns(subquad.SubquadWarning, match="SinkLayer is no cache of constant size; convert"):
        found = subquad.generate(model, ids, cache=caches[1], max_new_tokens=30)
    assert found.tolist() == want.tolist()


@pytest.mark.parametrize("length", [4, 7])
def test_rings_of_a_static_cache_run_as_they_are(length: int) -> None:
    """Prompts and texts that are longer than all of them, with padding."""
    model, (ids, mask) = made(family="Mistral", sliding_window=5), prompt(True, length)
    given: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    caches = [transformers.StaticCache(config=model.config, max_cache_len=40) for _ in range(2)]
    why = "a StaticCache with a StaticSlidingWindowLayer, whose ring stands at a number"
    with pytest.raises(RuntimeError, match=f"compile: expected a step that can be compiled, got {why}"):
        subquad.generate(model, ids, compile=True, cache=caches[0], **given)
    with pytest.warns(subquad.SubquadWarning, match=f"without torch.compile: {why}"):
        found = subquad.generate(model, ids, cache=caches[1], **given)
    assert found.tolist() == model.generate(ids, **given).tolist()


# --- the compiled step ----------------------------------------


@pytest.mark.heavy
def test_a_model_that_changes_is_compiled_again(graphs: Graphs) -> None:
    model, (ids, _) = made(), prompt()
    for kind in ("stock", "cats", "sink"):
        CONVERT[kind](model)
        want = subquad.generate(model, ids, max_new_tokens=20, compile=False)
        assert subquad.generate(model, ids, max_new_tokens=20, compile=True).tolist() == want.tolist(), kind


@pytest.mark.heavy
def test_copies_do_not_share_steps(graphs: Graphs) -> None:
    model, (ids, _) = made(), prompt()
    subquad.generate(model, ids, max_new_tokens=3, compile=True)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.mul_(-1.3)
    want = subquad.generate(other, ids, max_new_tokens=20, compile=False)
    assert subquad.generate(other, ids, max_new_tokens=20, compile=True).tolist() == want.tolist()


@pytest.mark.heavy
def test_steps_go_with_their_model(graphs: Graphs) -> None:
    model, (ids, _) = made(), prompt()
    subquad.generate(model, ids, max_new_tokens=9, compile=True)
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None


@pytest.mark.heavy
def test_what_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says why; unless it was asked for, there is one warning, and the text all the same."""
    torch._dynamo.reset()

    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(graph, "BACKEND", broken)
    model, (ids, mask) = made(), prompt()
    want = model.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False)
    with pytest.warns(subquad.SubquadWarning, match="without torch.compile: .*no compiler here") as caught:
        found = subquad.generate(model, ids, max_new_tokens=10)
    assert found.tolist() == want.tolist() and len(caught) == 1
    assert subquad.generate(model, ids, max_new_tokens=10).tolist() == want.tolist()  # said once
    with pytest.raises(RuntimeError, match=r"compile: expected a step that can be compiled, got .*no compiler here"):
        subquad.generate(model, ids, max_new_tokens=10, compile=True)


@pytest.mark.heavy
def test_an_error_in_a_compiled_step_is_no_lack_of_a_compiler(graphs: Graphs) -> None:
    model, (ids, _) = made(), prompt()

    def beyond(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.zeros(2, 100).index_fill(1, torch.tensor([99]), 1.0)  # a token that the model has not

    with pytest.raises((IndexError, RuntimeError), match=r"index|range"):
        subquad.generate(model, ids, max_new_tokens=3, processors=[beyond], compile=True)


@pytest.fixture
def unguarded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for every step that looks at no guards."""
    calls: list[int] = []
    before = graph.Closed.__call__

    def counted(self: graph.Closed, *arguments: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return before(self, *arguments)

    monkeypatch.setattr(graph.Closed, "__call__", counted)
    return calls


@pytest.mark.heavy
@pytest.mark.parametrize("kind", CONVERT)
def test_guards_are_looked_at_by_the_first_steps(kind: str, graphs: Graphs, unguarded: list[int]) -> None:
    """And counters of states are where they would be."""
    model, (ids, mask) = made(kind), prompt(True)
    caches = [transformers.StaticCache(config=model.config, max_cache_len=40) for _ in range(2)]
    want, found = (
        subquad.generate(model, ids, max_new_tokens=30, attention_mask=mask, cache=cache, compile=compile)
        for cache, compile in zip(caches, (False, True), strict=True)
    )
    assert found.tolist() == want.tolist()
    assert len(unguarded) >= 25
    lengths = [[int(layer.get_seq_length()) for layer in cache.layers] for cache in caches]
    assert lengths == [[36, 36]] * 2


class Remembers(torch.nn.Module):
    """What it was called with last, which no graph may leave behind."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.last: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = x
        y: torch.Tensor = self.inner(x)
        return y


@pytest.mark.heavy
def test_steps_with_side_effects_keep_their_guards(graphs: Graphs, unguarded: list[int]) -> None:
    model, (ids, _) = made(), prompt()
    model.lm_head = Remembers(model.lm_head)
    last = []
    for compile in (False, True):
        subquad.generate(model, ids, max_new_tokens=20, compile=compile)
        last.append(model.lm_head.last)
    torch.testing.assert_close(*last)
    assert not unguarded


def test_what_makes_a_graph_closed() -> None:
    a, b, c, d, x, y, z = (torch.zeros(()) for _ in range(7))

    def call(*inputs: Any) -> tuple[Any, ...]:
        return inputs[2] + 1, inputs[0] + inputs[1]

    first = graph.Record(call, (a, x, c), (z, b))
    second = graph.Record(call, (a, y, z), (d, b := b + 1))
    found = graph.closed(first, second, ((x,), (y,)), b)
    assert found is not None and found.given == {1: 0} and found.carried == {2: 0} and found.result == 1
    held = found.inputs[2]
    assert held is d and float(found(torch.tensor(5.0))) == 5 and float(d) == 1 and found.inputs[2] is held
    for name, other in {
        "another graph": graph.Record(lambda *_: (d, b), second.inputs, second.outputs),
        "a new input": graph.Record(call, (d.clone(), y, z), second.outputs),
        "a number": graph.Record(call, (a, y, 3), second.outputs),
        "another result": graph.Record(call, second.inputs, (*second.outputs, a.clone())),
        "no result": graph.Record(call, second.inputs, (d, d)),
    }.items():
        assert graph.closed(first, other, ((x,), (y,)), b) is None, name
    assert graph.closed(None, second, ((), (y,)), b) is None


# --- bad input ----------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ids": [[1, 2]]}, TypeError, "ids: expected"),
        ({"ids": torch.ones(2, 3)}, TypeError, "ids: expected"),
        ({"ids": torch.ones(3, dtype=torch.long)}, ValueError, "ids: expected"),
        ({"ids": torch.ones(2, 0, dtype=torch.long)}, ValueError, "ids: expected"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens: expected at least 1"),
        ({"max_new_tokens": 2.0}, TypeError, "max_new_tokens: expected"),
        ({"attention_mask": torch.ones(2, 5)}, ValueError, "attention_mask: expected shape"),
        ({"attention_mask": [[1] * 7] * 2}, TypeError, "attention_mask: expected"),
        ({"attention_mask": torch.eye(7)[:2]}, ValueError, "attention_mask: expected padding on the left"),
        ({"generator": 3}, TypeError, "generator: expected"),
        ({"compile": "yes"}, TypeError, "compile: expected a bool"),
        ({"num_beams": 2}, ValueError, "num_beams: expected 1, got 2; use model.generate"),
        ({"stop_strings": ["."]}, ValueError, "stop_strings: expected"),
        ({"prompt_lookup_num_tokens": 3}, ValueError, "prompt_lookup_num_tokens: expected"),
        ({"encoder_repetition_penalty": 1.2}, ValueError, "encoder_repetition_penalty: expected 1.0, got 1.2; use"),
        ({"constraints": [3]}, ValueError, r"constraints: expected None, got \[3\]; use model.generate"),
        ({"force_words_ids": [[3]]}, ValueError, r"force_words_ids: expected None, got \[\[3\]\]; use model.generate"),
        ({"return_dict_in_generate": True}, ValueError, "return_dict_in_generate: expected False, got True; use"),
        ({"validate": 1}, TypeError, "validate: expected arguments of subquad.generate"),
        ({"temperature": "a"}, TypeError, "temperature: expected a float, got 'a'"),
        ({"do_sample": "a"}, TypeError, "do_sample: expected a bool, got 'a'"),
        ({"top_k": 1.5}, TypeError, "top_k: expected an int, got 1.5"),
        ({"top_p": "a"}, TypeError, "top_p: expected a float, got 'a'"),
        ({"eos_token_id": "a"}, TypeError, "eos_token_id: expected an int or a list of them, got 'a'"),
        ({"pad_token_id": [1]}, TypeError, r"pad_token_id: expected an int, got \[1\]"),
        ({"tempreature": 0.5}, TypeError, "tempreature: expected arguments of subquad.generate"),
        ({"do_sample": True, "temperature": 0.0}, ValueError, "temperature: expected a positive"),
        ({"processors": 3}, TypeError, "processors: expected"),
        ({"on_token": 3}, TypeError, "on_token: expected"),
        ({"cache": 3}, TypeError, "cache: expected"),
    ],
)  # fmt: skip
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    """Before anything is computed."""
    model = made()
    model.forward = None
    given: dict[str, Any] = {"ids": prompt()[0], "max_new_tokens": 3} | change
    with pytest.raises(error, match=message):
        subquad.generate(model, given.pop("ids"), **given)


def test_errors_of_models_and_caches() -> None:
    model, (ids, _) = made(), prompt()
    with pytest.raises(TypeError, match="model: expected a causal language model of transformers, got Linear"):
        subquad.generate(torch.nn.Linear(2, 2), ids, max_new_tokens=3)
    with pytest.raises(ValueError, match="model: expected one in eval mode"):
        subquad.generate(copy.deepcopy(model).train(), ids, max_new_tokens=3)
    config = transformers.T5Config(vocab_size=60, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    with pytest.raises(ValueError, match="model: expected a decoder alone"):
        subquad.generate(transformers.T5ForConditionalGeneration(config).eval(), ids, max_new_tokens=3)
    small = transformers.StaticCache(config=model.config, max_cache_len=8)
    with pytest.raises(ValueError, match="cache: expected room for 9 tokens, got one of 8"):
        subquad.generate(model, ids, max_new_tokens=3, cache=small)
    assert subquad.generate(model, ids, max_new_tokens=2, cache=small, compile=False).shape == (2, 9)
    with pytest.raises(ValueError, match="ids: expected more than the 8 tokens that the cache has seen, got 7"):
        subquad.generate(model, ids, max_new_tokens=1, cache=small)
