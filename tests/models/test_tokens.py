"""Which tokens of a call count: padding anywhere and packed sequences, in every form in which a model is told about them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from subquad import CatsCalibrator
from subquad.cache import LawcatCache
from subquad.demo.model import cache_name
from subquad.integrations.transformers import LawcatConfig, convert, register
from subquad.masks import IntervalMask
from subquad.masks.model_mask import ModelMask
from subquad.nn import LawcatAttention, _tokens
from subquad.nn._inherited import remember
from subquad.nn._tokens import read

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "scalar": {"gate": "scalar", "share_kv_features": True},
    "plain": {"normalize": False, "gate": "none", "conv_size": 1},
    "values": {"conv_on_v": True, "conv_bias": True, "use_output_gate": True},
    "rope": {"rope": "linear"},
    "window": {"window_size": 3},
    "wide": {"window_size": 20, "conv_on_v": True},
    "one": {"window_size": 1},
    "before": {"window_size": 3, "linear_covers_window": False, "conv_on_v": True},
    "lolcats": {
        "window_size": 4, "linear_covers_window": False, "linear_scale": 1.0, "rope": "linear", "gate": "none",
        "tie_qk_feature_map": False, "conv_size": 1,
    },
}  # fmt: skip
MASKS = {
    "left": [[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9, [0] * 8 + [1]],
    "right": [[1, 1, 1, 1, 1, 1, 0, 0, 0], [1] * 9, [1] + [0] * 8],
    "inside": [[1, 1, 0, 0, 1, 0, 1, 1, 1], [0, 1, 1, 0, 0, 0, 0, 1, 1], [1, 0, 1, 0, 1, 0, 1, 0, 1]],
    "none": [[0] * 9, [1] * 9, [0] * 9],
}
each_option = pytest.mark.parametrize("name", OPTIONS)
each_mask = pytest.mark.parametrize("where", MASKS)
close = {"rtol": 1e-5, "atol": 2e-6}


def layer_of(name: str, **more: Any) -> LawcatAttention:
    torch.manual_seed(0)
    layer = LawcatAttention(32, 4, **{"num_kv_heads": 2, "layer_idx": 0, **OPTIONS[name], **more})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def rotations(places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    angle = (places[..., None].float() * 0.5 ** torch.arange(4)).repeat(1, 1, 2)
    return angle.cos(), angle.sin()


def places_of(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(1) - 1).clamp_min(0)


def dense(mask: torch.Tensor, dtype: torch.dtype = torch.bool) -> torch.Tensor:
    """Causal with padding, in four dimensions."""
    seen = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool).tril() & mask.bool()[:, None, None]
    return (
        seen if dtype is torch.bool else torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    )


def run(
    layer: LawcatAttention, x: torch.Tensor, mask: torch.Tensor, cache: Any, lengths: tuple[int, ...]
) -> torch.Tensor:
    """The calls of these lengths, each with the mask up to its end."""
    parts, start, (cos, sin) = [], 0, rotations(places_of(mask))
    for length in lengths:
        columns = slice(start, start := start + length)
        pair = cos[:, columns], sin[:, columns]
        parts.append(layer.mix(x[:, columns], pair, mask[:, :start], cache))
    return torch.cat(parts, 1)


# --- padding ----------------------------------------


@each_option
@each_mask
@pytest.mark.parametrize("lengths", [(9,), (4, 5), (1, 3, 1, 1, 3), (1,) * 9, (6, 1, 1, 1)])
@torch.no_grad()
def test_a_row_is_what_it_is_without_its_padding(name: str, where: str, lengths: tuple[int, ...]) -> None:
    """Its outputs, and its state."""
    layer, mask = layer_of(name), torch.tensor(MASKS[where])
    x = torch.where(mask.bool()[..., None], torch.randn(3, 9, 32), torch.nan)
    found = run(layer, x, mask, cache := LawcatCache(), lengths)
    assert not found[~mask.bool()].any()
    for row, keep in enumerate(mask.bool()):
        if not keep.any():
            continue
        own = x[row : row + 1, keep]
        want = run(layer, own, torch.ones(own.shape[:2]), alone := LawcatCache(), (own.shape[1],))
        torch.testing.assert_close(found[row, keep], want[0], **close)
        for part, value in alone.states[0].current().items():
            torch.testing.assert_close(cache.states[0].current()[part][row], value[0], **close, msg=part)


@each_option
@each_mask
@torch.no_grad()
def test_a_rollback_over_padding(name: str, where: str) -> None:
    """What is taken back was never there, whichever of it was padding."""
    layer, mask, x = layer_of(name), torch.tensor(MASKS[where]), torch.randn(3, 9, 32)
    for lengths, back in (((9,), 5), ((4, 5), 3), ((3, 1, 1, 1, 1, 1, 1), 4)):
        kept, other = LawcatCache(keep=6), LawcatCache()
        run(layer, x, mask, kept, lengths)
        kept.rollback(back)
        run(layer, x[:, : 9 - back], mask[:, : 9 - back], other, (9 - back,))
        for part, value in other.states[0].current().items():
            torch.testing.assert_close(kept.states[0].current()[part], value, **close, msg=part)


@each_option
def test_gradients_do_not_see_padding(name: str) -> None:
    layer, mask = layer_of(name), torch.tensor(MASKS["inside"])
    x = torch.where(mask.bool()[..., None], torch.randn(3, 9, 32), torch.nan)
    parameters = [p for p in layer.parameters() if p is not layer.o_proj.weight]
    found = torch.autograd.grad(run(layer, x, mask, None, (9,)).square().sum(), parameters)
    loss: Any = 0
    for row, keep in enumerate(mask.bool()):
        own = x[row : row + 1, keep]
        loss = loss + run(layer, own, torch.ones(own.shape[:2]), None, (own.shape[1],)).square().sum()
    for a, b in zip(found, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()) + 1e-6)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("default", marks=pytest.mark.full),
        pytest.param("values", marks=pytest.mark.full),
        "window",
        "before",
    ],
)
@torch.no_grad()
def test_padding_where_a_graph_is_compiled(name: str) -> None:
    """Compiled code cannot count tokens: prefill, a second chunk and steps, without a break."""
    torch._dynamo.reset()
    layer, mask = layer_of(name), torch.tensor(MASKS["inside"])
    x, (cos, sin) = torch.where(mask.bool()[..., None], torch.randn(3, 9, 32), torch.nan), rotations(places_of(mask))
    want = run(layer, x, mask, LawcatCache(), (9,))
    compiled = torch.compile(layer.mix, fullgraph=True, backend="aot_eager")
    for lengths in ((9,), (5, 1, 3)):
        cache, parts, start = LawcatCache() if len(lengths) > 1 else None, [], 0
        for length in lengths:
            c = slice(start, start := start + length)
            parts.append(compiled(x[:, c], (cos[:, c], sin[:, c]), mask[:, :start], cache))
        torch.testing.assert_close(torch.cat(parts, 1), want, **close)
    torch._dynamo.reset()


# --- forms of masks ----------------------------------------


def forms(mask: torch.Tensor) -> dict[str, Any]:
    causal = IntervalMask.causal(9, 9)
    padded = ModelMask.of(causal.with_keys(mask.bool()), padded_causal=True, padding=mask.bool(), first_row=0)
    anything = (dense(mask) | ~mask.bool()[:, None, :, None]) & (mask.bool()[:, None, None] | ~torch.eye(9).bool())
    return {
        "int": mask, "bool": mask.bool(), "float": mask.float(), "int32": mask.int(), "half": mask.half(),
        "dense": dense(mask), "additive": dense(mask, torch.float32), "bfloat16": dense(mask, torch.bfloat16),
        "minus a billion": torch.zeros(3, 1, 9, 9).masked_fill(~dense(mask), -1e9),
        "minus infinity": torch.zeros(3, 1, 9, 9).masked_fill(~dense(mask), -torch.inf),
        "padding sees all but itself": anything, "heads": dense(mask).expand(-1, 4, -1, -1),
        "of this package": padded, "final": ModelMask.of(IntervalMask.from_dense(dense(mask))),
        "by kind": {"sliding_attention": None, "full_attention": dense(mask)},
        "by other kinds": {"one": None, "another": mask},
    }  # fmt: skip


@each_mask
@torch.no_grad()
def test_forms_of_masks(where: str) -> None:
    layer, mask, x = layer_of("default"), torch.tensor(MASKS[where]), torch.randn(3, 9, 32)
    want = layer.mix(x, attention_mask=mask)
    for form, given in forms(mask).items():
        assert torch.equal(layer.mix(x, attention_mask=given), want), form


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(3, 8), ValueError, r"attention_mask: expected shape \[3, >= 9\], got \[3, 8\]"),
        (torch.ones(2, 9), ValueError, r"attention_mask: expected shape \[3, >= 9\], got \[2, 9\]"),
        (torch.zeros(3, 9).fill_(-1e9), ValueError, "attention_mask: expected 0 or 1 in two dimensions"),
        (torch.ones(9), ValueError, "attention_mask: expected"),
        (torch.ones(3, 9, 9), ValueError, "attention_mask: expected"),
        (torch.ones(2, 1, 9, 9), ValueError, "attention_mask: expected"),
        (torch.ones(3, 1, 9, 9), ValueError, "attention_mask: expected bool, or float of 0 and numbers below -1000"),
        (torch.ones(3, 1, 9, 9, dtype=torch.long), ValueError, "attention_mask: expected bool or float"),
        (torch.ones(3, 1, 9, 9, dtype=torch.bool), ValueError, "attention_mask: expected a causal mask"),
        (torch.ones(9, 9, dtype=torch.bool).tril(-1)[None, None] | torch.eye(9, dtype=torch.bool), None, ""),
        ((torch.eye(9).bool() | (torch.arange(81).view(9, 9) == 36))[None, None], ValueError,
         "attention_mask: expected a causal mask"),  # token 4 sees itself and token 0
        (ModelMask.of(IntervalMask.full(9, 9)), ValueError, "attention_mask: expected a causal mask"),
        ([[1] * 9] * 3, TypeError, "attention_mask: expected a tensor or a mask of the model, got list"),
    ],
)  # fmt: skip
def test_bad_masks(mask: Any, error: type[Exception] | None, message: str) -> None:
    if error is None:
        assert read(mask, 3, 9).begins is None
        return
    with pytest.raises(error, match=message):
        layer_of("default").mix(torch.randn(3, 9, 32), attention_mask=mask)


# --- packed sequences ----------------------------------------

BOUNDS = [0, 3, 4, 9]
LENGTHS = [3, 1, 5]


def told(batch: int = 1) -> dict[str, dict[str, Any]]:
    """The ways to say that rows hold sequences of three, one and five tokens."""
    cu = torch.tensor(BOUNDS, dtype=torch.int32)
    ids = torch.arange(3).repeat_interleave(torch.tensor(LENGTHS)).expand(batch, -1)
    places = torch.cat([torch.arange(n) for n in LENGTHS])[None].expand(batch, -1)
    block = torch.ones(9, 9, dtype=torch.bool).tril() & (ids[0, :, None] == ids[0])
    block = block[None, None].expand(batch, 1, -1, -1)
    causal = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril().expand(batch, 1, -1, -1)
    ways: dict[str, dict[str, Any]] = {
        "positions": {"position_ids": places},
        "seq_idx": {"seq_idx": ids.int()},
        "dense": {"attention_mask": block},
        "additive": {"attention_mask": torch.zeros(block.shape).masked_fill(~block, torch.finfo(torch.float32).min)},
        "of this package": {"attention_mask": ModelMask.of(IntervalMask.from_dense(block))},
        "by kind": {"attention_mask": {"full_attention": block}},
        "sequences of a mask": {"attention_mask": numbered(ids)},
    }
    if batch == 1:
        ways |= {
            "cu_seqlens": {"cu_seqlens": cu},
            "flash": {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu.clone(), "max_length_q": 5, "max_length_k": 5},
            "flash and a causal mask": {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "attention_mask": causal},
            "bounds and ones": {"cu_seqlens": cu.long(), "attention_mask": torch.ones(1, 9)},
            "all": {"cu_seq_lens_q": cu, "position_ids": places, "attention_mask": block},
        }
    return ways


def numbered(ids: torch.Tensor) -> ModelMask:
    mask = ModelMask.of(IntervalMask.causal(9, 9), padded_causal=True, first_row=0)
    mask.sequence_ids = ids[:1]
    return mask


def apart(layer: LawcatAttention, x: torch.Tensor, bounds: list[int]) -> tuple[torch.Tensor, LawcatCache]:
    """Every sequence alone, and the cache of the last one."""
    parts = []
    for a, b in itertools.pairwise(bounds):
        parts.append(layer.mix(x[:, a:b], rotations(torch.arange(b - a)[None]), None, cache := LawcatCache()))
    return torch.cat(parts, 1), cache


@each_option
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_packed_sequences_stay_apart(name: str, batch: int) -> None:
    """However it is said; with a cache the last sequence goes on, and nothing is kept that cannot be taken back."""
    layer, x = layer_of(name), torch.randn(batch, 10, 32)
    want, alone = apart(layer, x[:, :9], BOUNDS)
    after = layer.mix(x[:, 9:], rotations(torch.tensor([[5]])), None, alone)
    pair = rotations(torch.cat([torch.arange(n) for n in LENGTHS])[None])
    for way, arguments in told(batch).items():
        torch.testing.assert_close(layer.mix(x[:, :9], pair, **arguments), want, **close, msg=way)
        cache = LawcatCache(keep=4)
        found = layer.mix(x[:, :9], pair, past_key_values=cache, **arguments)
        torch.testing.assert_close(found, want, **close, msg=way)
        with pytest.raises(ValueError, match="at most the 0 that are kept"):
            cache.rollback(1)
        found = layer.mix(x[:, 9:], rotations(torch.tensor([[5]])), past_key_values=cache)
        torch.testing.assert_close(found, after, **close, msg=way)


@pytest.mark.parametrize("name", ["default", "before"])
@torch.no_grad()
def test_packed_sequences_with_padding(name: str) -> None:
    """Padding before, between, inside and behind them."""
    layer, x = layer_of(name), torch.randn(1, 9, 32)
    want, _ = apart(layer, x, BOUNDS)
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 0, 0, 1, 1, 0, 1, 1, 1, 0]])
    ids = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2]])
    padded = torch.full((1, 15, 32), torch.nan)
    padded[mask.bool()] = x[0]
    block = dense(mask) & (ids[:, None, :, None] == ids[:, None, None])
    places = torch.zeros(1, 15, dtype=torch.long)
    places[mask.bool()] = torch.cat([torch.arange(n) for n in LENGTHS])
    for arguments in (
        {"attention_mask": block},
        {"attention_mask": mask, "seq_idx": ids},
        {"attention_mask": mask, "cu_seqlens": torch.tensor([0, 5, 7, 15])},
    ):
        found = layer.mix(padded, rotations(places), **arguments)
        torch.testing.assert_close(found[mask.bool()], want[0], **close)
        assert not found[~mask.bool()].any()


@torch.no_grad()
def test_a_sliding_mask_of_packed_sequences() -> None:
    """A row that does not see the one before its window is no new sequence."""
    x, ids = torch.randn(1, 9, 32), torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    row, column = torch.arange(9)[:, None], torch.arange(9)
    block = (column <= row) & (row - column < 3) & (ids[0, :, None] == ids[0])
    found = read(block[None, None], 1, 9, window=3).begins
    assert found is not None and found.nonzero().tolist() == [[0, 4]]
    layer = layer_of("default")
    remember(layer, torch.nn.Module())
    layer.original.sliding_window = 3
    torch.testing.assert_close(layer.mix(x, attention_mask=block[None, None]), apart(layer, x, [0, 4, 9])[0], **close)


def test_gradients_of_packed_sequences() -> None:
    x = torch.randn(1, 9, 32)
    for name in ("default", "before"):
        layer = layer_of(name)
        pair = rotations(torch.cat([torch.arange(n) for n in LENGTHS])[None])
        want = torch.autograd.grad(apart(layer, x, BOUNDS)[0].square().sum(), layer.k_proj.weight)
        for way, arguments in told().items():
            loss = layer.mix(x, pair, **arguments).square().sum()
            torch.testing.assert_close(
                torch.autograd.grad(loss, layer.k_proj.weight), want, rtol=1e-4, atol=1e-4, msg=way
            )


@pytest.mark.heavy
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("default", marks=pytest.mark.full),
        pytest.param("plain", marks=pytest.mark.full),
        pytest.param("scalar", marks=pytest.mark.full),
        pytest.param("before", marks=pytest.mark.full),
        "window",
        "lolcats",
    ],
)
def test_packed_sequences_where_a_graph_is_compiled(name: str) -> None:
    """Values and gradients, with and without padding between them."""
    torch._dynamo.reset()
    layer, x = layer_of(name), torch.randn(1, 9, 32)
    pair = rotations(torch.cat([torch.arange(n) for n in LENGTHS])[None])
    compiled = torch.compile(layer.mix, fullgraph=True, backend="aot_eager")
    want = apart(layer, x, BOUNDS)[0]
    grad = torch.autograd.grad(want.square().sum(), layer.k_proj.weight)
    for way in ("positions", "dense", "cu_seqlens", "flash and a causal mask"):
        found = compiled(x, pair, **told()[way])
        torch.testing.assert_close(found, want, **close, msg=way)
        found = torch.autograd.grad(found.square().sum(), layer.k_proj.weight)
        torch.testing.assert_close(found, grad, rtol=1e-4, atol=1e-4, msg=way)
    mask, ids = torch.tensor([[1, 1, 0, 1, 0, 1, 1, 1, 1, 1, 1]]), torch.tensor([[0] * 5 + [1] + [2] * 5])
    padded = torch.full((1, 11, 32), torch.nan)
    padded[mask.bool()] = x[0]
    places = torch.zeros(1, 11, dtype=torch.long)
    places[mask.bool()] = torch.cat([torch.arange(n) for n in LENGTHS])
    found = compiled(padded, rotations(places), attention_mask=mask, seq_idx=ids)
    torch.testing.assert_close(found[mask.bool()], want[0], **close)
    torch._dynamo.reset()


@torch.no_grad()
def test_positions_are_those_of_one_sequence() -> None:
    """With a mask or a cache they begin a sequence where they begin at 0, and with padding nowhere."""
    layer, x = layer_of("default"), torch.randn(1, 9, 32)
    whole, odd = layer.mix(x), torch.tensor([[5, 6, 7, 9, 10, 11, 12, 13, 14]])
    for arguments in (
        {"position_ids": torch.arange(3, 12)[None]},
        {"position_ids": odd, "past_key_values": LawcatCache()},
        {"position_ids": odd, "attention_mask": torch.ones(1, 9)},
        {"position_ids": torch.arange(9).expand(3, 1, -1)},
        {"position_ids": torch.arange(9)},
    ):
        torch.testing.assert_close(layer.mix(x, **arguments), whole, **close)


def test_bad_bounds() -> None:
    layer, x, cu = layer_of("default"), torch.randn(1, 9, 32), torch.tensor(BOUNDS)
    layer.mix(x, past_key_values=(used := LawcatCache()))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"cu_seq_lens_q": torch.tensor([0, 3])}, "cu_seq_lens_q: expected numbers from 0 to 9"),
        ({"cu_seq_lens_q": cu, "cu_seq_lens_k": torch.tensor([0, 4, 5, 9])}, "cu_seq_lens_k: expected the bounds"),
        ({"cu_seq_lens_q": cu, "cu_seq_lens_k": torch.tensor([0, 9])}, "cu_seq_lens_k: expected the bounds"),
        ({"cu_seqlens": torch.tensor([0, 10])}, "cu_seqlens: expected numbers from 0 to 9"),
        ({"cu_seqlens": cu, "past_key_values": used}, "cu_seqlens: expected None once the cache has seen tokens"),
        ({"seq_idx": torch.zeros(1, 8)}, r"seq_idx: expected shape \[1, 9\]"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            layer.mix(x, **arguments)
    with pytest.raises(ValueError, match="cu_seq_lens_q: expected None with a batch of 2"):
        layer.mix(x.expand(2, -1, -1), cu_seq_lens_q=cu)


# --- what a calibration counts ----------------------------------------

transformers = pytest.importorskip("transformers")
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]


def model_of(family: str, implementation: str = "sdpa", **more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 61, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": None}
    sizes |= {"Gemma3Text": {"layer_types": KINDS, "sliding_window": 4}, "Mistral": {"sliding_window": 4}}.get(
        family, {}
    )
    config = getattr(transformers, f"{family}Config")(**(sizes | more))
    config._attn_implementation = implementation
    name = {"Gemma3Text": "Gemma3ForCausalLM"}.get(family, f"{family}ForCausalLM")
    return getattr(transformers, name)(config).eval().requires_grad_(False)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma3Text"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "subquad"])
def test_a_calibration_counts_real_tokens(family: str, implementation: str) -> None:
    """Around `generate` and around calls, with every cache and form of mask."""
    register()
    model = model_of(family, implementation)
    name = cache_name(model)
    ids, mask = torch.randint(3, 61, (2, 8)), torch.ones(2, 8, dtype=torch.long)
    mask[0, :5] = 0
    for kind in (None, "static"):
        for skip, want in ((0, 11 + 6), (2, 7 + 6)):
            with CatsCalibrator(model, skip_first_tokens=skip) as calibrator:
                options: dict[str, Any] = (
                    {} if kind is None else {"cache_implementation": kind, "disable_compile": True}
                )
                model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, **options)
            assert set(calibrator.tokens.values()) == {want}, (kind, skip)
    mask[1, 3:5] = 0
    for cache in (None, transformers.DynamicCache(config=model.config), transformers.StaticCache(model.config, 16)):
        with CatsCalibrator(model) as calibrator:
            for part in (slice(0, 5), slice(5, 6), slice(6, 8)) if cache is not None else (slice(0, 8),):
                more = {"use_cache": False} if cache is None else {name: cache}
                model(ids[:, part], attention_mask=mask[:, : part.stop], **more)
        assert set(calibrator.tokens.values()) == {9}
    whole = dense(mask)
    forms = [whole, dense(mask, torch.float32), {"full_attention": whole, "sliding_attention": whole}]
    for given in forms if family == "Gemma3Text" else forms[:2]:
        if implementation == "eager" and given is whole:
            continue  # a bool mask is added as numbers there
        with CatsCalibrator(model) as calibrator:
            model(ids, attention_mask=given, use_cache=False)
        assert set(calibrator.tokens.values()) == {9}


# --- packed rows of a model ----------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "subquad"])
@pytest.mark.parametrize("layers", [None, [0], [1, 2]])
@torch.no_grad()
def test_a_model_keeps_packed_rows_apart(implementation: str, layers: list[int] | None) -> None:
    """By positions with every mixture of layers, by bounds where all are linear (softmax of transformers ignores those)."""
    register()
    for family, config in (("Llama", LawcatConfig()), ("Mistral", LawcatConfig(window_size=3))):
        model = model_of(family, implementation)
        convert(model, attention=config, layers=layers)
        ids = torch.randint(3, 61, (1, 9))
        parts = [model(ids[:, a:b], use_cache=False).logits for a, b in itertools.pairwise(BOUNDS)]
        want = torch.cat(parts, 1)
        ways: list[dict[str, Any]] = [told()["positions"]]
        if layers is None:
            cu = torch.tensor(BOUNDS, dtype=torch.int32)
            ways += [told()["flash"], {"cu_seqlens": cu}, told()["flash"] | told()["positions"]]
        for way in ways:
            found = model(ids, use_cache=False, **way).logits
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
        if layers is None:
            found = model(ids, **told()["flash"]).logits  # with the cache that a model makes by itself
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(model(ids, **told()["positions"]).logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cut", [0, 6])
@torch.no_grad()
def test_a_sliding_layer_and_a_mask_without_the_window(cut: int) -> None:
    """A user's causal mask in four dimensions is what linear attention does, whether or not the window is in it."""
    model = model_of("Mistral")
    convert(model, attention="lawcat")
    ids, real = torch.randint(3, 61, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    real[0, :2] = False
    want = model(ids, attention_mask=real.long(), use_cache=False).logits
    near, name = torch.ones(9, 9, dtype=torch.bool).triu(-3), cache_name(model)
    for mask in (dense(real), dense(real) & near):
        cache = transformers.DynamicCache() if cut else None
        parts = [
            model(ids[:, a:b], attention_mask=mask[:, :, a:b, :b], use_cache=cut > 0, **{name: cache}).logits
            for a, b in ((0, cut), (cut, 9))
            if b > a
        ]
        torch.testing.assert_close(torch.cat(parts, 1)[real], want[real], rtol=1e-4, atol=1e-4)


def test_positions_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers are given the same tensor, and to look at it is to wait for the device; it may be written to in between."""
    looks = []
    but_first = _tokens._but_first
    monkeypatch.setattr(_tokens, "_but_first", lambda x: looks.append(1) or but_first(x))
    positions = torch.arange(9)[None].clone()
    assert all(read(None, 1, 9, position_ids=positions).begins is None for _ in range(3)) and len(looks) == 1
    positions[:, 5:] -= 5
    begins = read(None, 1, 9, position_ids=positions).begins
    assert begins is not None and begins.nonzero().tolist() == [[0, 5]]
