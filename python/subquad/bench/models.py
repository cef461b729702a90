"""`subquad bench models`: long prompts and packed training of a whole model beside transformers' own "sdpa", and LAWCAT's steps
after a long and after a short text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..integrations.transformers import LawcatConfig, convert, register
from ..testing.compare import relative_l2
from .measure import OURS, Result
from .timing import Candidate, Plan, interleaved

DOCUMENTS = 16
DENSE, ALONE, SDPA = "sdpa, dense mask", "sdpa, one by one", "sdpa"
LONG, SHORT = (65536, 1024), (512, 128)  # tokens before the steps, of the whole and of the quick case
TOLERANCE = 1e-4  # logits and gradients of float32, sums in another order
# SmolLM2-135M, but for the vocabulary and the layers, which cost the same each.
SMOLLM2: dict[str, Any] = {
    "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
    "vocab_size": 1000, "num_hidden_layers": 2,
}  # fmt: skip
TINY = SMOLLM2 | {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}


def _model(config: dict[str, Any], tokens: int) -> Any:
    import transformers

    register()
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config, max_position_embeddings=tokens))


def run(quick: bool, plan: Plan) -> list[Result]:
    """A result for a prompt, for a batch of packed documents, and for decoding far into a text.

    Args:
        quick: a tiny model and few tokens: shows that it works, no more.
        plan: how long to measure.
    """
    tokens = 256 if quick else 8192
    model = _model(TINY if quick else SMOLLM2, tokens)
    ids = torch.randint(1000, (1, tokens))
    name = "tiny" if quick else "smollm2"
    return [
        _prefill(f"{name}-prefill-{tokens}", model, ids, plan),
        _packed(f"{name}-packed-{tokens}", model, ids, plan),
        _decode(name, model, SHORT if quick else LONG, plan),
    ]


def _under(model: Any, implementation: str, call: Callable[[], Any]) -> Any:
    model.set_attn_implementation(implementation)
    return call()


def _prefill(case: str, model: Any, ids: torch.Tensor, plan: Plan) -> Result:
    """The prompt's hidden states, without a language model head."""

    @torch.no_grad()
    def prompt() -> torch.Tensor:
        hidden: torch.Tensor = model.model(ids, use_cache=False).last_hidden_state
        return hidden

    calls = {OURS: lambda: _under(model, "subquad", prompt), SDPA: lambda: _under(model, "sdpa", prompt)}
    return _timed(
        case, relative_l2(calls[OURS](), calls[SDPA]()), calls, {"tokens": ids.shape[1], "target": 0.80}, plan
    )


def _packed(case: str, model: Any, ids: torch.Tensor, plan: Plan) -> Result:
    """A step of training on documents of equal lengths, packed into one row, or each in a call of its own."""
    length = ids.shape[1] // DOCUMENTS
    positions = torch.arange(length).repeat(DOCUMENTS)[None]

    def packed() -> torch.Tensor:
        model.zero_grad()
        logits = model(ids, position_ids=positions, use_cache=False).logits
        logits.square().mean().backward()
        return _gradient(model)

    def alone() -> torch.Tensor:
        model.zero_grad()
        for document in ids.split(length, 1):
            (model(document, use_cache=False).logits.square().mean() / DOCUMENTS).backward()
        return _gradient(model)

    calls = {
        OURS: lambda: _under(model, "subquad", packed),
        DENSE: lambda: _under(model, "sdpa", packed),
        ALONE: lambda: _under(model, "sdpa", alone),
    }
    params = {"tokens": ids.shape[1], "documents": DOCUMENTS, "target": 0.35}
    return _timed(case, relative_l2(calls[OURS](), calls[ALONE]()), calls, params, plan)


@torch.no_grad()
def _decode(name: str, model: Any, lengths: tuple[int, int], plan: Plan) -> Result:
    """Steps of the model with LAWCAT in every layer after reading a long and a short text. Converts the model."""
    convert(model, attention=LawcatConfig())
    long, short = lengths
    ids, token = torch.randint(1000, (1, long)), torch.zeros(1, 1, dtype=torch.long)

    def after(length: int) -> Candidate:
        cache = model.model(ids[:, :length], use_cache=True).past_key_values
        return lambda: model(token, past_key_values=cache, use_cache=True).logits

    whole = model(torch.cat([ids[:, :short], token], 1), use_cache=False, logits_to_keep=1).logits
    error = relative_l2(after(short)(), whole)
    calls = {OURS: after(long), f"after {short} tokens": after(short)}
    return _timed(f"{name}-lawcat-decode-{long}", error, calls, {"tokens": long, "target": 1.1}, plan)


def _gradient(model: Any) -> torch.Tensor:
    """Of the embeddings, which all layers have a part in."""
    gradient: torch.Tensor = model.model.embed_tokens.weight.grad
    return gradient.clone()


def _timed(case: str, error: float, calls: dict[str, Candidate], params: dict[str, Any], plan: Plan) -> Result:
    failure = None if error <= TOLERANCE else f"relative error {error:.1e}"
    result = Result("models", case, params, "native", error, TOLERANCE, failure)
    if failure is None:
        result.times = interleaved(calls, plan)
    return result
