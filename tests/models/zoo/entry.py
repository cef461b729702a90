"""What the zoo knows of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

VOCABULARY, COLUMNS, IMAGE = 61, 12, 16  # tokens; tokens of a prompt; pixels of an image's side
IMAGE_TOKEN = 7


def _text(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(8, VOCABULARY, (2, COLUMNS), generator=generator)}


def _translation(generator: torch.Generator) -> dict[str, torch.Tensor]:
    later = torch.randint(8, VOCABULARY, (2, 7), generator=generator)
    return _text(generator) | {"decoder_input_ids": later}


def _image(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, IMAGE, IMAGE, generator=generator)}


def _both(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return _text(generator) | _image(generator)


def _prefix(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """PaliGemma: an image in a prefix that is seen both ways, type 0, and what follows it."""
    return _illustrated(generator) | {"token_type_ids": (torch.arange(COLUMNS) >= 10).long().expand(2, -1)}


def _illustrated(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Gemma 3: text around the four tokens of an image, type 1."""
    arguments, place = _both(generator), torch.arange(COLUMNS)
    image = (place >= 4) & (place < 8)
    arguments["input_ids"][:, image] = IMAGE_TOKEN
    return arguments | {"token_type_ids": image.long().expand(2, -1)}


def _speech(generator: torch.Generator) -> dict[str, torch.Tensor]:
    later = torch.randint(8, VOCABULARY, (2, 7), generator=generator)
    return {"input_features": torch.randn(2, 4, 24, generator=generator), "decoder_input_ids": later}


INPUTS: dict[str, Callable[[torch.Generator], dict[str, torch.Tensor]]] = {
    "decoder": _text,
    "encoder": _text,
    "encoder-decoder": _translation,
    "image": _image,
    "image and text": _both,
    "image in text": _illustrated,
    "prefix": _prefix,
    "speech": _speech,
}


@dataclass(frozen=True, eq=False)
class Entry:
    """A tiny model with random weights, and what is compared.

    Attributes:
        name: as model cards call the family.
        model, config_class: classes of transformers.
        fields: of the config.
        kind: which inputs it has, see `INPUTS`.
        attention: what is particular about it, for the table.
        sides: of the padding that is tried.
        generations: which of `run.GENERATIONS` are tried.
        notes: why something is not tried, for the table.
        refused: a pattern of the error that this attention raises; nothing else is then tried.
    """

    name: str
    model: str
    config_class: str
    fields: dict[str, Any]
    kind: str = "decoder"
    attention: str = "causal"
    sides: tuple[str, ...] = ("left", "right")
    generations: tuple[str, ...] = ()
    notes: str = ""
    refused: str = ""

    def config(self) -> Any:
        import transformers

        return getattr(transformers, self.config_class)(**self.fields)

    def inputs(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return INPUTS[self.kind](generator)

    @property
    def by_token(self) -> bool:
        """Whether results are those of the tokens of `input_ids`."""
        return self.kind in ("decoder", "encoder", "image in text", "prefix")
