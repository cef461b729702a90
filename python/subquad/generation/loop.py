"""`subquad.generate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from .. import _checks
from . import steps
from .choice import Choice, Processor, check_generator, check_prompt


@torch.no_grad()
def generate(
    model: nn.Module,
    ids: torch.Tensor,
    *,
    max_new_tokens: int,
    attention_mask: torch.Tensor | None = None,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
    generator: torch.Generator | None = None,
    processors: Sequence[Processor] = (),
    cache: Any = None,
    compile: bool | None = None,
    on_token: Callable[[torch.Tensor], object] | None = None,
    **config: Any,
) -> torch.Tensor:
    """Text as `model.generate` of transformers has it, greedy or sampled, in steps that are compiled once.

    The prompt runs as it is. Every token after it is one call of one graph: keys and values, or the states of converted
    layers, are written in place, positions are tensors, and no graph is compiled again as the text grows. The compiled step is
    kept with the model, for each batch size and power of two of columns; the first takes from seconds to minutes to compile.
    That a model has changed since the last text is noticed, not that it changes within a text.

    Args:
        model: a causal language model of transformers, converted or not, that is not training.
        ids: int [B, T], the prompt; with a `cache` that has seen its beginning, the whole of it.
        max_new_tokens: at most so many are added.
        attention_mask: [B, T], 0 at padding, which stands on the left; None: all are tokens.
        do_sample, temperature, top_k, top_p, eos_token_id, pad_token_id, config: as in a `GenerationConfig`; what is not given is
            taken from `model.generation_config`. An empty list of ends: no row ends early.
        generator: of the random numbers; None for torch's own, which are then those of `model.generate`.
        processors: called one after another with ids [B, T] and scores [B, V], returning scores: transformers' logits processors.
        cache: of transformers, or a `SinkCache`; it is advanced. None for a new one.
        compile: True: compiled, or an error that says why not; False: not compiled; None: compiled if possible, else there is one
            warning that says why not.
        on_token: called with every new token of each row, int [B]: progress, or a streamer's `put`.

    Returns:
        ids [B, T + n], n <= max_new_tokens: generation stops when every row has ended. Rows that have ended earlier are filled
        with pad_token_id.

    Raises:
        TypeError: arguments of another type, or entries that a generation config has not.
        ValueError: shapes that do not fit, padding on the right, entries of the config that need another loop (beams,
            drafts, stop strings), a cache without room or that has seen all of the prompt, a model that is training. Nothing has
            been computed then.
        RuntimeError: `compile=True`, and it cannot be.

    Example:
        >>> ids = subquad.generate(model, ids, max_new_tokens=100, on_token=lambda _: bar.update())  # doctest: +SKIP
    """
    _check_model(model)
    check_prompt(ids, attention_mask)
    _checks.size("max_new_tokens", max_new_tokens, 1)
    check_generator(generator, ids.device)
    if compile is not None:
        _checks.flag("compile", compile)
    if not isinstance(processors, Sequence) or not all(map(callable, processors)):
        raise TypeError(f"processors: expected a sequence of callables, got {type(processors).__name__}")
    if on_token is not None and not callable(on_token):
        raise TypeError(f"on_token: expected a callable or None, got {type(on_token).__name__}")
    if cache is not None and not isinstance(getattr(cache, "layers", None), list):
        raise TypeError(f"cache: expected a Cache of transformers, got {type(cache).__name__}")
    config |= {
        "do_sample": do_sample, "temperature": temperature, "top_k": top_k, "top_p": top_p, "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
    }  # fmt: skip
    length = ids.shape[1]
    choose = Choice(model, ids, config, processors, generator, max_new_tokens)
    past = 0 if cache is None else int(cache.get_seq_length())
    if past >= length:
        raise ValueError(f"ids: expected more than the {past} tokens that the cache has seen, got {length}")
    steps.check_room(cache, length + max_new_tokens - 1)
    return _Run(model, ids, attention_mask, max_new_tokens, cache, compile).text(choose, past, on_token)


def _check_model(model: object) -> None:
    _checks.module("model", model)
    assert isinstance(model, nn.Module)
    config = getattr(model, "config", None)
    if not hasattr(model, "generation_config") or not hasattr(config, "get_text_config"):
        raise TypeError(f"model: expected a causal language model of transformers, got {type(model).__name__}")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model: expected a decoder alone, got {type(model).__name__}, which has an encoder")
    if model.training:
        raise ValueError("model: expected one in eval mode, got one that is training; call model.eval()")


class _Run:
    """One call of `generate`, after its checks: position [B, 1] and column [1] are those of the last token that was fed."""

    position: torch.Tensor
    column: torch.Tensor

    def __init__(
        self, model: Any, ids: torch.Tensor, mask: torch.Tensor | None, new: int, cache: Any, compile: bool | None
    ) -> None:
        self.calls, self.compile = steps.Calls(model), compile
        self.length, self.columns = ids.shape[1], ids.shape[1] + new
        self.ids = torch.cat([ids, ids.new_zeros(ids.shape[0], new)], 1)
        if cache is None:
            cache = steps.static_cache(model, self.columns if compile is False else steps.room(self.columns))
        self.cache = cache
        sizes = [size for layer in cache.layers if (size := getattr(layer, "max_cache_len", None)) is not None]
        self.preallocated = bool(sizes)
        self.mask = None
        if mask is not None and bool((mask == 0).any()):  # of one shape for all steps
            width = max(sizes, default=0)
            width = (
                width if width >= self.columns else steps.room(self.columns)
            )  # rings alone are shorter than the text
            self.mask = nn.functional.pad(mask, (0, width - self.length), value=1)

    def text(self, choose: Choice, past: int, on_token: Callable[[torch.Tensor], object] | None) -> torch.Tensor:
        logits = self._prompt(past)
        with ExitStack() as stack:
            call, ended = None, torch.zeros(self.ids.shape[0], dtype=torch.bool, device=self.ids.device)
            for length in range(self.length + 1, self.columns + 1):
                token = choose(self.ids[:, : length - 1], logits)
                if choose.ends is not None:
                    token = token.masked_fill(ended, choose.pad)
                    ended |= torch.isin(token, choose.ends)
                self.ids[:, length - 1] = token
                if on_token is not None:
                    on_token(token)
                if length == self.columns or (choose.ends is not None and bool(ended.all())):
                    break
                call = call or self._step(stack)
                self.position, self.column = self.position + 1, self.column + 1
                logits = call(token[:, None])
        return self.ids[:, :length].clone() if length < self.columns else self.ids

    def _prompt(self, past: int) -> torch.Tensor:
        """Logits behind the prompt, of which the cache has seen so many columns."""
        column = torch.arange(self.length, device=self.ids.device)
        mask = None if self.mask is None else self.mask[:, : self.length]
        position = column.expand(self.ids.shape[0], -1) if mask is None else (mask.cumsum(1) - 1).clamp_min(0)
        arguments = self.calls.arguments(self.cache, position[:, past:], column[past:], mask)
        self.position, self.column = position[:, -1:].clone(), column[-1:].clone()
        return steps.step(self.calls.model, self.ids[:, past : self.length], arguments)

    # --- steps ----------------------------------------

    def _step(self, stack: ExitStack) -> Callable[[torch.Tensor], torch.Tensor]:
        """Logits behind one more token of each row [B, 1]."""
        if self.compile is False:
            return self._eager
        if (why := steps.grows(self.cache)) is not None:
            self._refuse(why)
            return self._eager
        width = None if self.mask is None else self.mask.shape[1]
        stack.enter_context(steps.counted_in_tensors(self.cache, width))
        sizes = tuple(getattr(layer, "max_cache_len", None) for layer in self.cache.layers)
        kept = steps.compiled_for(self.calls.model, self.ids.shape[0], width, sizes, self.ids.device)
        compiled = steps.Text(kept)

        def call(token: torch.Tensor) -> torch.Tensor:
            if kept.failed is None:
                try:
                    return compiled(self.calls.model, (token, self.position, self.column), self._arguments(self.mask))
                except Exception as error:
                    if not steps.of_compiler(error):
                        raise
                    kept.failed = steps.reason(error)
                    self._refuse(kept.failed, error)
            elif self.compile:
                self._refuse(kept.failed)
            return self._eager(token)

        return call

    def _eager(self, token: torch.Tensor) -> torch.Tensor:
        mask = self.mask
        if mask is not None and not self.preallocated:
            mask = mask[:, : int(self.column) + 1]
        return steps.step(self.calls.model, token, self._arguments(mask))

    def _arguments(self, mask: torch.Tensor | None) -> dict[str, Any]:
        return self.calls.arguments(self.cache, self.position, self.column, mask)

    def _refuse(self, why: str, error: BaseException | None = None) -> None:
        if self.compile:
            raise RuntimeError(f"compile: expected a step that can be compiled, got {why}") from error
        steps.warn_uncompiled(why)
