"""The next token of every row from its scores, as `model.generate` of transformers has it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import _checks

Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# What asks for another loop than one token per row and step, or for a tokenizer, and the value that asks for nothing.
OTHER_LOOPS: dict[str, Any] = {
    "num_beams": 1, "num_return_sequences": 1, "penalty_alpha": None, "dola_layers": None, "guidance_scale": None,
    "prompt_lookup_num_tokens": None, "assistant_early_exit": None, "stop_strings": None, "max_time": None,
    "prefill_chunk_size": None, "token_healing": False, "encoder_repetition_penalty": 1.0, "constraints": None,
    "force_words_ids": None, "return_dict_in_generate": False,
}  # fmt: skip


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, float) or _integer(value)


def _integers(value: Any) -> bool:
    return _integer(value) or (isinstance(value, (list, tuple)) and all(map(_integer, value)))


_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "do_sample": (lambda value: isinstance(value, bool), "a bool"),
    "temperature": (_number, "a float"),
    "top_k": (_integer, "an int"),
    "top_p": (_number, "a float"),
    "eos_token_id": (_integers, "an int or a list of them"),
    "pad_token_id": (_integer, "an int"),
}


class Choice:
    """How tokens are chosen, and which of them end a row.

    Args:
        model: whose `generation_config` says what is not given.
        prompt: ids [B, T].
        given: entries of a generation config, None for those of the model's.
        processors: of the user's, called with ids [B, T] and scores [B, V] after those of the config.
        generator: of the random numbers; None for torch's own.
        new: tokens that will be added at most.

    Attributes:
        ends: int64 [E], tokens that end a row; None for none.
        pad: what rows are filled with that have ended.

    Raises:
        TypeError, ValueError: entries that transformers refuses, that do not exist, or that this loop does not do.
    """

    def __init__(
        self,
        model: Any,
        prompt: torch.Tensor,
        given: dict[str, Any],
        processors: Sequence[Processor],
        generator: torch.Generator | None,
        new: int,
    ) -> None:
        for name in given:
            if name.startswith("_") or name not in vars(model.generation_config):
                raise TypeError(f"{name}: expected arguments of subquad.generate or entries of a generation config")
        given = {name: value for name, value in given.items() if value is not None}
        for name, (known, words) in _TYPES.items():
            if name in given and not known(given[name]):
                raise TypeError(f"{name}: expected {words}, got {given[name]!r}")
        config, _ = model._prepare_generation_config(None, **given)
        if isinstance(config.eos_token_id, list) and not config.eos_token_id:
            config.eos_token_id = None  # transformers would ask for the first of them
        for name, neutral in OTHER_LOOPS.items():
            value = getattr(config, name, None)
            if value is not None and value != neutral:
                raise ValueError(f"{name}: expected {neutral}, got {value!r}; use model.generate for that")
        if config.do_sample and (config.temperature or 0) <= 0:
            raise ValueError(f"temperature: expected a positive number to sample with, got {config.temperature}")
        config.max_length = prompt.shape[1] + new  # of what forces an end there
        model._prepare_special_tokens(config, True, device=prompt.device)  # True: no advice about masks
        self.processors = model._get_logits_processor(
            generation_config=config, input_ids_seq_length=prompt.shape[1], device=prompt.device, model_kwargs={},
            logits_processor=None,
        )  # fmt: skip
        self.processors.extend(processors)
        self.sample, self.generator = bool(config.do_sample), generator
        self.ends: torch.Tensor | None = config._eos_token_tensor
        self.pad = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Tokens [B] after ids [B, T], of logits [B, V]."""
        scores = self.processors(ids, logits.to(ids.device, torch.float32, copy=True))
        if not self.sample:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), 1, generator=self.generator)[:, 0]


def check_generator(generator: object, device: torch.device) -> None:
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}")
    if generator.device.type != device.type:
        raise ValueError(f"generator: expected device {device.type} as ids have, got {generator.device}")


def check_prompt(ids: object, mask: object) -> None:
    """ids [B, T] of integers, and a mask of as many columns that ends with tokens.

    Raises:
        TypeError, ValueError: by name.
    """
    _checks.integers("ids", ids, 2)
    assert isinstance(ids, torch.Tensor)
    if ids.shape[0] < 1 or ids.shape[1] < 1:
        raise ValueError(f"ids: expected shape [B, T] with at least a row and a column, got {list(ids.shape)}")
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"attention_mask: expected a torch.Tensor, got {type(mask).__name__}")
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask: expected shape {list(ids.shape)} as ids have, got {list(mask.shape)}")
    if not bool((mask[:, -1] != 0).all()):
        raise ValueError("attention_mask: expected padding on the left, got rows whose last column is padding")
