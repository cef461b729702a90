"""attn_implementation="subquad" under torch.compile and torch.export: as many graphs as with sdpa, and the same numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from subquad.integrations.transformers import attention_mask, convert, register

from .compiled import Graphs
from .test_masks import IDS, overlaid

transformers = pytest.importorskip("transformers", minversion="5")
utils = transformers.masking_utils

pytestmark = pytest.mark.heavy

S = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 60, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 4},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Any:
    register()
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.fixture
def never_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """No mask is made for every pair of positions."""
    from subquad import IntervalMask

    monkeypatch.setattr(IntervalMask, "from_dense", None)


def pair(family: str) -> tuple[Any, Any]:
    """The same weights with sdpa and with ours."""
    torch.manual_seed(0)
    made: list[Any] = []
    for implementation in ("sdpa", "subquad"):
        model = getattr(transformers, f"{family}ForCausalLM")(
            getattr(transformers, f"{family}Config")(**S, **FAMILIES[family])
        )
        model.load_state_dict((made or [model])[0].state_dict())
        model.set_attn_implementation(implementation)
        made.append(model.eval())
    return made[0], made[1]


def close(a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    if mask is not None:
        a, b = a[mask.bool()], b[mask.bool()]
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def ids_and_mask(length: int, side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, slice(0, 3) if side == "left" else slice(3, 5)] = 0
    return torch.randint(1, 60, (2, length)), mask


@pytest.mark.usefixtures("never_dense")
@pytest.mark.parametrize("padded", ["no", "left", "inside"])
@pytest.mark.parametrize("family", ["Llama", pytest.param("Qwen2", marks=pytest.mark.full)])
def test_prompts_of_many_lengths(family: str, padded: str) -> None:
    sdpa, ours = pair(family)
    graphs = Graphs()
    compiled = torch.compile(ours, fullgraph=True, backend=graphs)
    for length in (9, 10, 14, 30):
        ids, mask = ids_and_mask(length, padded)
        arguments = {} if padded == "no" else {"attention_mask": mask}
        out = compiled(ids, use_cache=False, **arguments).logits
        close(out, sdpa(ids, use_cache=False, **arguments).logits, mask if arguments else None)
    assert graphs.count <= 2


@pytest.mark.usefixtures("never_dense")
@pytest.mark.parametrize("kind", ["positions", "flash", "both"])
@pytest.mark.parametrize("family", ["Qwen2"])
def test_packed_rows(family: str, kind: str) -> None:
    sdpa, ours = pair(family)
    graphs = Graphs()
    compiled = torch.compile(ours, fullgraph=True, backend=graphs)
    for lengths in ((5, 7), (3, 10), (1, 12)):
        ids = torch.randint(60, (1, sum(lengths)))
        cu = torch.tensor([0, lengths[0], sum(lengths)])
        arguments: dict[str, Any] = {}
        if kind != "flash":
            arguments |= {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
        if kind != "positions":
            arguments |= {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu}
        out = compiled(ids, use_cache=False, **arguments).logits
        close(out, torch.cat([sdpa(x, use_cache=False).logits for x in ids.split(lengths, 1)], 1))
    assert graphs.count <= 2


@pytest.mark.usefixtures("never_dense")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["Mistral", pytest.param("Qwen2", marks=pytest.mark.full)])
def test_decoding(family: str, cache: str, padded: bool) -> None:
    """A prompt, then tokens: a graph for the prompt and at most two for all the steps."""
    sdpa, ours = pair(family)
    graphs = Graphs()
    compiled = torch.compile(ours, backend=graphs)
    ids, mask = ids_and_mask(6)
    kind = transformers.StaticCache if cache == "static" else transformers.DynamicCache
    size = {"max_cache_len": 24} if cache == "static" else {}
    caches = [kind(config=ours.config, **size) for _ in range(2)]
    for step in range(9):
        arguments = {"attention_mask": mask} if padded else {}
        a, b = (m(ids, cache=c, **arguments).logits[:, -1] for m, c in zip((compiled, sdpa), caches, strict=True))
        close(a, b)
        assert graphs.count <= (1 if step == 0 else 3), step
        ids, mask = b.argmax(-1)[:, None], torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_generate_compiles_its_steps_once(family: str) -> None:
    """With a preallocated cache, where masks are made outside of what is compiled."""
    sdpa, ours = pair(family)
    ids, mask = ids_and_mask(7)
    graphs = Graphs()
    options = {"max_new_tokens": 10, "do_sample": False, "cache_implementation": "static", "attention_mask": mask}
    expected = sdpa.generate(ids, **options, disable_compile=True)
    config = transformers.CompileConfig(backend=graphs, mode=None, fullgraph=True)
    config._compile_all_devices = True  # a CPU is left out otherwise
    assert torch.equal(ours.generate(ids, **options, compile_config=config), expected)
    assert 1 <= graphs.count <= 2


@pytest.mark.parametrize("kind", ["bool", "additive", "one row"])
def test_a_users_mask(kind: str) -> None:
    sdpa, ours = pair("Mistral")
    compiled = torch.compile(ours, fullgraph=True, backend=Graphs())
    ids = torch.randint(60, (2, 12))
    mask = torch.rand(2, 1, 1 if kind == "one row" else 12, 12) < 0.5
    mask[..., 0] = True
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    close(
        compiled(ids, attention_mask=mask, use_cache=False).logits,
        sdpa(ids, attention_mask=mask, use_cache=False).logits,
    )
    if kind == "additive":
        with pytest.raises(RuntimeError, match="attention_mask: expected"):
            compiled(ids, attention_mask=torch.where(mask == 0, -1.0, mask), use_cache=False)


def test_training() -> None:
    sdpa, ours = pair("Mistral")
    ids, grads = torch.randint(60, (2, 12)), []
    with torch.enable_grad():
        for model in (sdpa, torch.compile(ours, fullgraph=True, backend="aot_eager")):
            model(ids, labels=ids, use_cache=False).loss.backward()
            grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        close(a, b)


# --- predicates that a graph composes itself ----------------------------------------


COMPOSED = [  # what transformers puts together: blocks go with causal masks, packed rows with those that look back alone
    *itertools.product(("causal", "sliding", "one"), ("", "packed", "blocks", "packed-blocks", "user")),
    *itertools.product(("chunked",), ("", "packed", "user")),
    *itertools.product(("both-ways",), ("", "user")),
]


@pytest.mark.parametrize(("base", "over"), COMPOSED)
def test_predicates(base: str, over: str) -> None:
    """As transformers composes them, with the keywords that it gives beside them."""
    size = {"sliding": 4, "one": 1, "chunked": 5, "both-ways": 2}.get(base)
    keywords: dict[str, Any] = {"local_size": size, "use_vmap": over == "user", "config": transformers.LlamaConfig()}
    if base == "chunked":
        keywords["config"].attention_chunk_size = size
    if base == "both-ways":
        keywords["allow_is_bidirectional_skip"] = True

    def make(function: Callable[..., Any], left: torch.Tensor) -> Any:
        if base == "chunked":
            predicate = utils.chunked_causal_mask_function(size, left)
        elif base == "both-ways":
            predicate = utils.sliding_window_bidirectional_mask_function(size)
        else:
            predicate = utils.causal_mask_function if size is None else utils.sliding_window_causal_mask_function(size)
        predicate = overlaid(predicate, over)
        made = function(2, 12, 12, mask_function=predicate, allow_is_causal_skip=False, **keywords)
        return (
            made if isinstance(made, torch.Tensor) else (made.starts, made.ends, made.padded_causal, made.sequence_ids)
        )

    if base == "both-ways":
        keywords["allow_is_bidirectional_skip"] = False
    left = torch.tensor([0, 2])
    dense = make(utils.sdpa_mask, left)
    starts, ends, linear, ids = torch.compile(make, fullgraph=True, backend=Graphs())(attention_mask, left)
    place = torch.arange(12)
    seen = place <= place[:, None]
    if starts is not None:
        seen = ((place >= starts[..., None]) & (place < ends[..., None])).any(-2)
    assert torch.equal(seen.expand_as(dense), dense)
    assert not (linear and (base in ("chunked", "both-ways") or over in ("blocks", "user")))
    if "packed" in over and ids is not None:
        assert torch.equal(ids[:, :, None] == ids[:, None], IDS[:, :, None] == IDS[:, None])


# --- export ----------------------------------------


class Logits(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None) -> Any:
        return self.model(input_ids, attention_mask, position_ids, use_cache=False).logits


@pytest.mark.parametrize(
    ("form", "strict"),
    [
        ("none", False),
        ("none", True),
        ("2d", False),
        ("2d", True),
        ("4d", False),
        ("additive", False),
        ("positions", False),
    ],
)
def test_export(form: str, strict: bool) -> None:
    """Made from an example without padding or sequences, right for others, of other lengths."""
    sdpa, ours = pair("Mistral")

    def inputs(length: int, plain: bool) -> dict[str, Any]:
        ids, mask = ids_and_mask(length)
        pairs = torch.rand(2, 1, length, length) < 0.5
        pairs[..., 0] = True
        if plain:
            mask, pairs = torch.ones_like(mask), torch.ones(length, length).tril().bool().expand_as(pairs).contiguous()
        restart = 0 if plain else 5
        arguments = {
            "none": {},
            "2d": {"attention_mask": mask},
            "4d": {"attention_mask": pairs},
            "additive": {"attention_mask": torch.zeros(pairs.shape).masked_fill(~pairs, -torch.inf)},
            "positions": {
                "position_ids": torch.cat([torch.arange(restart), torch.arange(length - restart)])[None].repeat(2, 1)
            },
        }[form]
        return {"input_ids": ids, **arguments}

    length = torch.export.Dim("length", min=2, max=64)
    sizes = {"attention_mask": {1: length} if form == "2d" else {2: length, 3: length}}
    example = inputs(11, plain=True)
    shapes = {name: sizes.get(name, {1: length}) for name in example}
    program = torch.export.export(Logits(ours), (), example, dynamic_shapes=shapes, strict=strict).module()
    for given in (inputs(11, plain=False), inputs(17, plain=False), inputs(2, plain=True)):
        mask = given.get("attention_mask") if form == "2d" else None
        close(program(**given), sdpa(use_cache=False, **given).logits, mask)


@pytest.mark.parametrize("form", ["none", "2d"])
@pytest.mark.parametrize(("options", "layers"), [({}, None), ({"window_size": 3, "linear_covers_window": False}, [1])])
def test_export_of_lawcat(form: str, options: dict[str, Any], layers: list[int] | None) -> None:
    """Any batch and any length from 2 on, also where a model tells its layers positions and no mask."""
    model = pair("Llama")[1]
    convert(model, attention="lawcat", layers=layers, **options)

    def inputs(batch: int, length: int) -> dict[str, torch.Tensor]:
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[-1, : length // 3] = 0
        ids = {"input_ids": torch.randint(1, 60, (batch, length))}
        return ids if form == "none" else ids | {"attention_mask": mask}

    sizes = {0: torch.export.Dim("batch", min=1, max=16), 1: torch.export.Dim("length", min=2, max=64)}
    example = inputs(2, 9)
    program = torch.export.export(Logits(model), (), example, dynamic_shapes=dict.fromkeys(example, sizes)).module()
    for given in (inputs(2, 9), inputs(3, 17), inputs(1, 2)):
        close(program(**given), model(use_cache=False, **given).logits, given.get("attention_mask"))
