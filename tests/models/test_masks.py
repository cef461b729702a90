"""Masks in every form that transformers makes or a user gives, read as its own attention functions read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from subquad import IntervalMask, Packed
from subquad.integrations.transformers import attention_forward, attention_mask, convert, register

transformers = pytest.importorskip("transformers", minversion="5")
utils = transformers.masking_utils

S = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 60,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


# --- what transformers makes ----------------------------------------

IDS = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2, 3, 3, 3, 3], [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2]])
BLOCKS = torch.tensor([[-1, 0, 0, 0, -1, -1, 1, 1, 1, -1, 2, -1], [0, 0, 0, 0, 0, -1, -1, -1, -1, 1, 1, 1]])
POSITIONS = torch.stack([torch.arange(12) - (row[None] < row[:, None]).sum(1) for row in IDS])
LEFT = torch.tensor([0, 2])
BASES: dict[str, Callable[[], Any]] = {
    "causal": lambda: utils.causal_mask_function,
    "sliding": lambda: utils.sliding_window_causal_mask_function(4),
    "sliding-1": lambda: utils.sliding_window_causal_mask_function(1),
    "chunked": lambda: utils.chunked_causal_mask_function(5, LEFT),
    "full": lambda: utils.bidirectional_mask_function,
    "both-ways": lambda: utils.sliding_window_bidirectional_mask_function(2),
}


def composed(base: str, over: str) -> Any:
    """As transformers composes them."""
    return overlaid(BASES[base](), over)


def overlaid(function: Any, over: str) -> Any:
    """With what a user adds, sequences of a row, blocks."""
    if "user" in over:
        function = utils.or_masks(function, lambda b, h, q, kv: (q - kv) % 5 == 0)
    if "packed" in over:
        function = utils.remap_positions_for_packed_sequence(function, POSITIONS)
    if "blocks" in over:
        function = utils.or_masks(function, utils.blockwise_overlay(BLOCKS))
    if "cut" in over:
        function = utils.and_masks(function, utils.sliding_window_overlay(3))
    if "packed" in over:
        function = utils.and_masks(function, utils.packed_sequence_mask_function(IDS))
    return function


def made(function: Any, rows: int, first: int, padding: torch.Tensor | None, **more: Any) -> tuple[Any, torch.Tensor]:
    """(our mask, transformers' dense one) of the last rows of twelve keys, or of a preallocated cache's."""
    arguments = {
        "batch_size": 2, "q_length": rows, "kv_length": 12, "q_offset": first, "mask_function": function,
        "attention_mask": padding, "use_vmap": False, "allow_is_causal_skip": False, **more,
    }  # fmt: skip
    return attention_mask(**arguments), utils.sdpa_mask(**arguments)


@pytest.mark.parametrize("padded", ["no", "left", "inside"])
@pytest.mark.parametrize("over", ["", "packed", "blocks", "packed-blocks", "blocks-cut", "packed-blocks-cut"])
@pytest.mark.parametrize("base", BASES)
def test_predicates(base: str, over: str, padded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole prompts, chunks and steps, in a growing cache and in a preallocated one (whose offset is a tensor)."""
    padding = None if padded == "no" else torch.ones(2, 12, dtype=torch.bool)
    if padding is not None:
        padding[1, slice(0, 3) if padded == "left" else slice(4, 7)] = False
    function = composed(base, over)
    unknown = ("chunked", "full", "both-ways", *(("sliding", "sliding-1") if "cut" in over else ()))
    recognised = not ("blocks" in over and base in unknown)
    for rows, first in ((12, 0), (1, 11), (4, 3), (5, torch.tensor(2))):
        mask, dense = made(function, rows, first, padding)
        assert torch.equal(mask.to_dense().expand_as(dense), dense), (rows, first)
        assert mask.padded_causal == (base in ("causal", "sliding", "sliding-1") and "blocks" not in over)
        assert (mask.sequence_ids is not None) == ("packed" in over and recognised)
    monkeypatch.setattr(utils, "sdpa_mask", None)
    if recognised:
        attention_mask(2, 12, 12, mask_function=function, attention_mask=padding, use_vmap=False)
    else:
        with pytest.raises(TypeError, match="NoneType"):
            attention_mask(2, 12, 12, mask_function=function, attention_mask=padding, use_vmap=False)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("over", ["user", "user-packed"])
def test_a_function_of_a_users(base: str, over: str) -> None:
    mask, dense = made(composed(base, over), 12, 0, None, use_vmap=True)
    assert torch.equal(mask.to_dense(), dense) and not mask.padded_causal


def test_a_conjunction_of_three() -> None:
    """The library joins two at a time; a third one, a user's, is not left out."""
    function = utils.and_masks(
        utils.sliding_window_overlay(4), utils.causal_mask_function, lambda b, h, q, kv: (q - kv) % 2 == 0
    )
    mask, dense = made(function, 12, 0, None)
    assert torch.equal(mask.to_dense(), dense)


@pytest.mark.parametrize("which", ["packed", "positions", "blocks"])
def test_tables_of_another_kind_are_not_mistaken(which: str) -> None:
    """Sequences and blocks in pieces, positions that do not count on."""
    ids = torch.tensor([[0, 0, 1, 1, 0, 0, 2, 2, 2, 1, 1, 1]]).repeat(2, 1)
    function = utils.sliding_window_causal_mask_function(3)
    if which == "positions":
        positions = POSITIONS.clone()
        positions[0, 5:7] += 7
        function = utils.remap_positions_for_packed_sequence(function, positions)
        function = utils.and_masks(function, utils.packed_sequence_mask_function(IDS))
    elif which == "packed":
        function = utils.and_masks(function, utils.packed_sequence_mask_function(ids))
    else:
        function = utils.or_masks(function, utils.blockwise_overlay(ids - 1))
    mask, dense = made(function, 12, 0, None)
    assert torch.equal(mask.to_dense(), dense)


def test_sequence_ids() -> None:
    """Equal within a sequence, others in others, whatever window narrows the mask."""
    for base in ("causal", "sliding", "sliding-1", "chunked"):
        ids = made(composed(base, "packed"), 12, 0, None)[0].sequence_ids
        assert torch.equal(ids[:, :, None] == ids[:, None], IDS[:, :, None] == IDS[:, None])
        assert bool((ids.diff() >= 0).all())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_a_padding_mask_shorter_than_the_keys(base: str, padded: bool) -> None:
    """A preallocated cache has places for tokens that are still to come: nobody sees them, those that see ahead neither."""
    padding = torch.ones(2, 9, dtype=torch.bool)
    padding[1, 0] = not padded
    mask, dense = made(BASES[base](), 5, torch.tensor(4), padding)
    assert torch.equal(mask.to_dense().expand_as(dense), dense) and not mask.to_dense()[..., 9:].any()


def test_a_padding_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^attention_mask: expected shape \[B, T\]"):
        attention_mask(2, 12, 12, mask_function=utils.causal_mask_function, attention_mask=torch.ones(2, 1, 12))


# --- what a user gives ----------------------------------------


def qkv(batch: int = 2, tq: int = 12, tk: int = 12) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, 4, tq, 8, generator=generator)
    k, v = (torch.randn(batch, 2, tk, 8, generator=generator) for _ in range(2))
    return q, k, v


def layer(causal: bool = True) -> torch.nn.Module:
    module = torch.nn.Module().eval()
    module.is_causal, module.num_key_value_groups = causal, 2
    return module


def check(mask: torch.Tensor, size: int = 12, **options: Any) -> None:
    """Ours against sdpa's function, whichever window the layer has."""
    tensors = qkv(tk=size)
    expected, _ = transformers.integrations.sdpa_attention.sdpa_attention_forward(
        layer(), *tensors, mask[..., :size], **options
    )
    for window in (None, 4, 1):
        out, _ = attention_forward(layer(), *tensors, mask, sliding_window=window, **options)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def some_mask(*shape: int) -> torch.Tensor:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.4
    mask[..., 0] = True
    return mask


@pytest.mark.parametrize("kind", ["bool", "min", "inf", "-1e4", "-1e9", "half", "bf16"])
@pytest.mark.parametrize(
    "shape", [(2, 1, 12, 12), (1, 1, 12, 12), (2, 4, 12, 12), (2, 1, 1, 12), (1, 4, 1, 12), (2, 1, 12, 1)]
)
def test_a_mask_in_four_dimensions_is_used_as_it_is(shape: tuple[int, ...], kind: str) -> None:
    visible = some_mask(*shape)
    if kind == "bool":
        check(visible)
        return
    dtype = {"half": torch.float16, "bf16": torch.bfloat16}.get(kind, torch.float32)
    low = {"inf": -torch.inf, "-1e4": -1e4, "-1e9": -1e9, "bf16": -1e4}.get(kind, torch.finfo(dtype).min)
    additive = torch.zeros(shape, dtype=dtype).masked_fill(~visible, low)
    q, k, v = qkv()
    wide = (x.repeat_interleave(2, 1) for x in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, *wide, attn_mask=visible)
    out, _ = attention_forward(layer(), q, k, v, additive, sliding_window=3)
    torch.testing.assert_close(out.transpose(1, 2), expected, atol=1e-5, rtol=1e-5)


def test_a_mask_longer_than_the_keys() -> None:
    """Of a preallocated cache that is larger than a layer's own."""
    check(some_mask(2, 1, 12, 20))


def test_a_mask_written_to_is_read_again() -> None:
    mask, other = some_mask(2, 1, 12, 12), ~some_mask(2, 1, 12, 12)
    other[..., 0] = True
    check(mask)
    mask.copy_(other)
    check(mask)


def test_one_reading_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    original = IntervalMask.from_dense
    monkeypatch.setattr(IntervalMask, "from_dense", lambda mask: read.append(mask) or original(mask))
    model = models("Mistral", sliding_window=4)["subquad"]
    model(torch.randint(60, (2, 12)), attention_mask=some_mask(2, 1, 12, 12))
    assert len(read) == 1


class BlockMask:
    shape = (1, 1, 12, 12)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(2, 1, 12, 12, dtype=torch.long), TypeError, "torch.int64"),
        (torch.ones(2, 1, 12, 12, dtype=torch.uint8), TypeError, "torch.uint8"),
        ({"full_attention": torch.ones(2, 1, 12, 12)}, TypeError, "dict"),
        (BlockMask(), TypeError, "BlockMask"),
        (torch.full((2, 1, 12, 12), -1.5), ValueError, "other biases"),
        (torch.full((2, 1, 12, 12), 1e-3), ValueError, "other biases"),
        (torch.full((2, 1, 12, 12), torch.nan), ValueError, "other biases"),
        (torch.zeros(2, 1, 12, 12, requires_grad=True), ValueError, "requires_grad"),
        (torch.zeros(2, 1, 12, 11), ValueError, r"\[2, 1, 12, 11\]"),
        (torch.zeros(3, 1, 12, 12), ValueError, r"\[3, 1, 12, 12\]"),
        (torch.zeros(2, 2, 12, 12), ValueError, r"\[2, 2, 12, 12\]"),
        (torch.zeros(2, 1, 11, 12), ValueError, r"\[2, 1, 11, 12\]"),
        (torch.zeros(2, 12, 12), ValueError, r"\[2, 12, 12\]"),
        (torch.zeros(12, 12), ValueError, r"\[12, 12\]"),
        (torch.zeros(2, 1, 12, 12, device="meta"), ValueError, "meta"),
    ],
)
def test_masks_that_are_none_are_refused_by_name(mask: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^attention_mask: expected .*{message}"):
        attention_forward(layer(), *qkv(), mask)


def models(family: str, **more: Any) -> dict[str, Any]:
    """One model under three implementations."""
    torch.manual_seed(0)
    made = {}
    for implementation in ("eager", "sdpa", "subquad"):
        config = getattr(transformers, f"{family}Config")(**S, **more)
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        model.load_state_dict(next(iter(made.values())).state_dict() if made else model.state_dict())
        model.set_attn_implementation(implementation)
        made[implementation] = model
    return made


@pytest.mark.parametrize("kind", ["bool", "additive", "dict"])
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("Llama", {}),
        ("Mistral", {"sliding_window": 4}),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ],
)
def test_models_with_a_users_mask(family: str, more: dict[str, Any], kind: str) -> None:
    """Causal, with keys that the window would hide; for models with two kinds of layers one mask for each, too."""
    made = models(family, **more)
    ids = torch.randint(60, (2, 12))
    causal = torch.ones(12, 12, dtype=torch.bool).tril().expand(2, 1, 12, 12)
    mask: Any = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)
    if kind == "dict":
        if family != "Qwen2":
            return
        other = causal & some_mask(2, 1, 12, 12)
        mask = {"full_attention": causal, "sliding_attention": other | torch.eye(12, dtype=torch.bool)}
    with torch.no_grad():
        expected = made["sdpa"](ids, attention_mask=mask).logits
        if kind == "additive":
            torch.testing.assert_close(made["eager"](ids, attention_mask=mask).logits, expected, atol=1e-5, rtol=1e-4)
        out = made["subquad"](ids, attention_mask=causal if kind == "bool" else mask).logits
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_no_mask(causal: bool, window: int | None) -> None:
    """The last query stands at the last key; a window is as wide on both sides."""
    for tq in (12, 5, 1):
        q, k, v = qkv(tq=tq)
        away = torch.arange(12 - tq, 12)[:, None] - torch.arange(12)
        dense = (away >= 0) | (not causal)
        dense = dense if window is None else dense & (away.abs() < window)
        out, _ = attention_forward(layer(causal), q, k, v, None, sliding_window=window)
        wide = (x.repeat_interleave(2, 1) for x in (k, v))
        expected = torch.nn.functional.scaled_dot_product_attention(q, *wide, attn_mask=dense)
        torch.testing.assert_close(out.transpose(1, 2), expected, atol=1e-5, rtol=1e-5)


# --- packed sequences ----------------------------------------

CU = torch.tensor([0, 5, 5, 6, 12])


def packing(kind: str) -> dict[str, Any]:
    """What a call of a model says about the sequences of `CU`."""
    of = torch.repeat_interleave(torch.arange(4), CU.diff())
    positions = (torch.arange(12) - CU[:-1][of])[None]
    flash = {"cu_seq_lens_q": CU, "cu_seq_lens_k": CU.clone(), "max_length_q": 6, "max_length_k": 6}
    return {
        "flash": flash,
        "flash-int32": {"cu_seq_lens_q": CU.int(), "cu_seq_lens_k": CU.int()},
        "collator": flash | {"position_ids": positions},
        "cu_seqlens": {"cu_seqlens": CU},
        "Packed": {"cu_seqlens": Packed(CU)},
        "positions": {"position_ids": positions},
        "positions-ones": {"position_ids": positions, "attention_mask": torch.ones(1, 12, dtype=torch.long)},
        "seq_idx": {"seq_idx": of[None].int()},
        "all": flash | {"position_ids": positions, "cu_seqlens": CU, "seq_idx": of[None].int()},
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["flash", "flash-int32", "collator", "cu_seqlens", "Packed", "positions", "positions-ones", "seq_idx", "all"],
)
@pytest.mark.parametrize(("family", "more"), [("Llama", {}), ("Mistral", {"sliding_window": 4})])
def test_packed_sequences_stay_apart(family: str, more: dict[str, Any], kind: str) -> None:
    made = models(family, **more)
    ids = torch.randint(60, (1, 12))
    pairs = [(a, b) for a, b in zip(CU.tolist(), CU.tolist()[1:], strict=False) if a < b]
    with torch.no_grad():
        alone = torch.cat([made["sdpa"](ids[:, a:b], use_cache=False).logits for a, b in pairs], 1)
        out = made["subquad"](ids, use_cache=False, **packing(kind)).logits
        torch.testing.assert_close(out, alone, atol=1e-5, rtol=1e-4)
        for cache in (None, transformers.StaticCache(config=made["subquad"].config, max_cache_len=16)):
            out = made["subquad"](ids, cache=cache, use_cache=True, **packing(kind)).logits
            torch.testing.assert_close(out, alone, atol=1e-5, rtol=1e-4)


POSITIONS_APART = torch.stack([torch.arange(12), torch.cat([torch.arange(5), torch.arange(7)])])


def test_rows_of_a_batch_are_packed_each_for_itself() -> None:
    """By positions beside a mask of ones; a row whose positions go on is one sequence."""
    model, ids = models("Mistral", sliding_window=4)["subquad"], torch.randint(60, (2, 12))
    with torch.no_grad():
        out = model(ids, attention_mask=torch.ones(2, 12), position_ids=POSITIONS_APART).logits
        alone = [model(x, use_cache=False).logits for x in (ids[:1], ids[1:, :5], ids[1:, 5:])]
    torch.testing.assert_close(out, torch.cat([alone[0], torch.cat(alone[1:], 1)]), atol=1e-5, rtol=1e-4)


def test_packed_rows_of_a_model_that_does_not_tell_its_masks() -> None:
    """GPT-OSS gives positions to its layers alone."""
    torch.manual_seed(0)
    more = {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4}
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**S, **more, attn_implementation="subquad")).eval()
    ids = torch.randint(60, (1, 12))
    with torch.no_grad():
        out = model(ids, position_ids=POSITIONS_APART[1:], use_cache=False).logits
        alone = torch.cat([model(x, use_cache=False).logits for x in ids.split((5, 7), 1)], 1)
    torch.testing.assert_close(out, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["padding", "zeros", "jumps", "four dimensions"])
def test_positions_that_say_nothing_about_sequences(kind: str) -> None:
    """Beside padding, all alike, not from 0, or under a mask that says all: transformers' own attention is followed."""
    made, ids = models("Llama"), torch.randint(60, (2, 12))
    mask, positions = torch.ones(2, 12, dtype=torch.long), POSITIONS_APART
    if kind == "padding":
        mask[1, 10:] = 0
    elif kind == "four dimensions":
        mask = torch.ones(12, 12, dtype=torch.bool).tril().expand(2, 1, 12, 12)
    else:
        positions = torch.zeros_like(positions) if kind == "zeros" else positions + 3
    with torch.no_grad():
        want, out = (
            made[name](ids, attention_mask=mask, position_ids=positions).logits for name in ("sdpa", "subquad")
        )
    seen = mask.bool() if kind == "padding" else slice(None)
    torch.testing.assert_close(out[seen], want[seen], atol=1e-5, rtol=1e-4)


def test_positions_that_a_mask_contradicts_are_refused() -> None:
    """Sequences that begin behind cached tokens, or in chunks that are counted from where the row begins."""
    model, ids = models("Llama")["subquad"], torch.randint(60, (2, 12))
    ones = torch.ones(2, 24, dtype=torch.long)
    cache = transformers.DynamicCache(config=model.config)
    model(ids, attention_mask=ones[:, :12], cache=cache)
    with pytest.raises(ValueError, match=r"^position_ids: expected numbers that go on behind cached tokens"):
        model(ids, attention_mask=ones, position_ids=POSITIONS_APART, cache=cache)
    chunked = attention_mask(2, 12, 12, mask_function=BASES["chunked"](), attention_mask=ones[:, :12])
    with pytest.raises(ValueError, match=r"^position_ids: expected numbers that go on beside a mask of chunks"):
        attention_forward(layer(), *qkv(), chunked, position_ids=POSITIONS_APART)


def test_packed_gradients() -> None:
    """In training, and with padding at the end of the row."""
    model = models("Llama")["subquad"].train()
    ids = torch.randint(60, (1, 12))
    grads = []
    for arguments in (packing("flash"), packing("positions")):
        model.zero_grad()
        model(ids, labels=ids, use_cache=False, **arguments).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 2])
def test_packed_queries_of_longer_keys(window: int | None) -> None:
    """As flash attention aligns them: the last query of a sequence stands at its last key."""
    cu_q, cu_k = torch.tensor([0, 2, 3]), torch.tensor([0, 5, 12])
    q, k, v = qkv(1, 3, 12)
    out, _ = attention_forward(layer(), q, k, v, None, sliding_window=window, cu_seq_lens_q=cu_q, cu_seq_lens_k=cu_k)
    for (a, b), (c, d) in (((0, 2), (0, 5)), ((2, 3), (5, 12))):
        alone, _ = attention_forward(layer(), q[:, :, a:b], k[:, :, c:d], v[:, :, c:d], None, sliding_window=window)
        torch.testing.assert_close(out[:, a:b], alone, atol=1e-5, rtol=1e-5)


def test_packed_under_a_users_mask() -> None:
    mask, (q, k, v) = some_mask(1, 1, 12, 12), qkv(1)
    of = torch.repeat_interleave(torch.arange(4), CU.diff())
    both = mask & (of[:, None] == of)
    both |= torch.eye(12, dtype=torch.bool)
    mask |= torch.eye(12, dtype=torch.bool)
    out, _ = attention_forward(layer(), q, k, v, mask, cu_seq_lens_q=CU, cu_seq_lens_k=CU)
    expected, _ = attention_forward(layer(), q, k, v, both)
    torch.testing.assert_close(out, expected)


def test_bounds_written_to_are_read_again() -> None:
    cu, (q, k, v) = CU.clone(), qkv(1)
    mask = attention_mask(1, 12, 12, mask_function=utils.causal_mask_function)
    outs = []
    for bounds in (CU, torch.tensor([0, 2, 4, 8, 12])):
        cu.copy_(bounds)
        given = cu, bounds.clone()
        outs += [attention_forward(layer(), q, k, v, mask, cu_seq_lens_q=x, cu_seq_lens_k=x)[0] for x in given]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[2], outs[3]) and not torch.equal(outs[0], outs[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cu_seq_lens_q": torch.tensor([0, 5, 11])}, "cu_seq_lens_q: expected numbers from 0 to 12"),
        ({"cu_seq_lens_q": CU, "cu_seq_lens_k": torch.tensor([0, 3, 2, 6, 12])}, "cu_seq_lens_k: expected numbers"),
        ({"cu_seq_lens_q": CU, "cu_seq_lens_k": torch.tensor([0, 12])}, r"cu_seq_lens_k: expected shape \[5\]"),
        ({"cu_seq_lens_k": CU}, "cu_seq_lens_q: expected together"),
        ({"cu_seqlens": torch.tensor([0, 13])}, "cu_seqlens: expected numbers"),
        ({"seq_idx": torch.zeros(1, 11, dtype=torch.int32)}, r"seq_idx: expected shape \[1, 12\]"),
    ],
)
def test_bounds_that_are_none_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    mask = attention_mask(1, 12, 12, mask_function=utils.causal_mask_function)
    with pytest.raises(ValueError, match=f"^{message}"):
        attention_forward(layer(), *qkv(1), mask, **arguments)


def test_a_batch_of_packed_rows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^cu_seq_lens_q: expected a batch of 1"):
        attention_forward(layer(), *qkv(2), None, cu_seq_lens_q=CU, cu_seq_lens_k=CU)
    with pytest.raises(TypeError, match=r"^cu_seqlens: expected"):
        attention_forward(layer(), *qkv(1), None, cu_seqlens=[0, 12])


@pytest.mark.parametrize("implementation", ["sdpa", "subquad"])
def test_linear_attention_keeps_packed_rows_apart_or_refuses_them(implementation: str) -> None:
    model = models("Llama")[implementation]
    convert(model, attention="lawcat", window_size=3)
    ids = torch.randint(60, (1, 12))
    with torch.no_grad():
        alone = torch.cat([model(x, use_cache=False).logits for x in ids.split((5, 7), 1)], 1)
        positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
        try:
            out = model(ids, position_ids=positions, use_cache=False).logits
        except ValueError as error:
            assert str(error).startswith("attention_mask: ")
        else:
            torch.testing.assert_close(out, alone, atol=1e-5, rtol=1e-4)
