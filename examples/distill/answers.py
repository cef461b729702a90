"""What the model itself says to questions, in its chat format: the text nearest to what it will be asked."""

from __future__ import annotations

from itertools import islice, product
from typing import Any

import torch
from torch import nn

TEMPLATES = (
    "Explain {} in simple terms.",
    "What are three interesting facts about {}?",
    "Why is {} important?",
    "Write a short story about {}.",
    "Give me advice for someone who wants to learn about {}.",
    "Write a summary of the history of {}.",
)
TOPICS = (
    "the water cycle", "bread", "photosynthesis", "the Roman Empire", "volcanoes", "chess", "Germany", "the moon", "bicycles",
    "electricity", "Japan", "honey bees", "the printing press", "gravity", "the Amazon river", "music", "vaccines", "Egypt",
    "computers", "coffee", "the human heart", "Italy", "dinosaurs", "democracy", "trains", "the ocean", "mathematics", "Brazil",
    "glass", "winter", "the Silk Road", "cats", "London", "Python programs", "Mozart", "forests",
)  # fmt: skip


def questions() -> list[str]:
    """Every topic in every form, topics in turn."""
    return [template.format(topic) for template, topic in product(TEMPLATES, TOPICS)]


@torch.no_grad()
def answers(
    model: nn.Module, tokenizer: Any, tokens: int, seed: int, rows: int = 24, longest: int = 320
) -> torch.Tensor:
    """At least `tokens` tokens [T] of conversations, sampled at temperature 0.8, or one round of all questions."""
    torch.manual_seed(seed)
    found: list[torch.Tensor] = []
    asked = iter(questions())
    while sum(map(len, found)) < tokens and (some := list(islice(asked, rows))):
        chats = [[{"role": "user", "content": question}] for question in some]
        texts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        out = model.generate(  # type: ignore[operator]
            **batch,
            max_new_tokens=longest,
            do_sample=True,
            temperature=0.8,
            top_k=0,
            pad_token_id=tokenizer.pad_token_id,
        )
        for row, mask in zip(out, batch["attention_mask"], strict=True):
            row = row[len(mask) - int(mask.sum()) :]
            ends = (row[int(mask.sum()) :] == tokenizer.eos_token_id).nonzero()
            found.append(row[: int(mask.sum()) + int(ends[0]) + 1] if len(ends) else row)
    return torch.cat(found)
