"""Learning where to look: a Superlinear layer trained from scratch to look things up far behind its window, on a CPU.

    python examples/superlinear_needle.py             # about a minute
    python examples/superlinear_needle.py --quick     # seconds: that it runs, not what it shows

A text is a row of stretches, each about a topic and with a number of its own. At its end stand questions that name a topic; the
answer is the number of its stretch. The window ends long before that, and the spans of a query hold a part of the text only, so
a query must choose the anchor that lies in the right stretch. Two models learn the same from the same texts. In one
the search learns, by the gate that its scores are: it finds nearly every answer. In the other `q_search_proj` stays as it was
initialised, the gradient of the gate has nowhere to go, and it does not get far beyond guessing. Embeddings and keys stay
random in both, so that nothing but the search can learn where to look.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import nn

import subquad

STRETCHES, LENGTH, QUESTIONS, TOPICS, NUMBERS, WIDTH = 15, 16, 8, 24, 8, 64
CONFIG = subquad.SuperlinearConfig(
    sw_index=4, num_spans=3, search_power=0.7, inv_search_power_int=None, span_power=0.3, backward_factor=2.0,
    forward_factor=1.0, search_scale=0.25,
)  # fmt: skip
STEPS = 300
LEARNS, FROZEN = 0.9, 0.5  # accuracies that the two must be above, and below; guessing gives 1 / NUMBERS


def texts(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Topics and numbers of every token [count, T], the questions last, and the answers [count, QUESTIONS].

    Nothing is asked about the last stretch, which the window of the first questions still sees.
    """
    topics = torch.rand(count, TOPICS, generator=generator).argsort(1)[:, :STRETCHES]
    numbers = torch.randint(NUMBERS, (count, STRETCHES), generator=generator)
    asked = torch.randint(STRETCHES - 1, (count, QUESTIONS), generator=generator)
    unknown = torch.full((count, QUESTIONS), NUMBERS)
    return (
        torch.cat([topics.repeat_interleave(LENGTH, 1), topics.gather(1, asked)], 1),
        torch.cat([numbers.repeat_interleave(LENGTH, 1), unknown], 1),
        numbers.gather(1, asked),
    )


class Reader(nn.Module):
    """One Superlinear layer between embeddings and an answer."""

    def __init__(self) -> None:
        super().__init__()
        self.topics, self.numbers = nn.Embedding(TOPICS, WIDTH), nn.Embedding(NUMBERS + 1, WIDTH)
        self.norm = nn.RMSNorm(WIDTH)
        self.attention = subquad.nn.SuperlinearAttention(WIDTH, 2, config=CONFIG)
        self.head = nn.Sequential(
            nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, NUMBERS)
        )
        for part in (self.topics, self.numbers, self.norm, self.attention.k_proj):
            part.requires_grad_(False)

    def forward(self, topics: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Logits [B, QUESTIONS, NUMBERS]."""
        x = self.norm(self.topics(topics) + self.numbers(numbers))
        answer: torch.Tensor = self.head((x + self.attention(x)[0])[:, -QUESTIONS:])
        return answer


def trained(learns: bool, steps: int = STEPS, seed: int = 0, batch: int = 32, lr: float = 1e-2) -> Reader:
    """A model that has learned from `steps` batches, with its search or without."""
    torch.manual_seed(seed)
    model, generator = Reader(), torch.Generator().manual_seed(seed)
    model.attention.q_search_proj.requires_grad_(learns)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        topics, numbers, answers = texts(batch, generator)
        loss = F.cross_entropy(model(topics, numbers).flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def accuracy(model: Reader, count: int = 128) -> float:
    """Share of questions about new texts that are answered right."""
    topics, numbers, answers = texts(count, torch.Generator().manual_seed(10**6))
    return float((model(topics, numbers).argmax(-1) == answers).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps: it runs, and learns nothing yet")
    parser.add_argument("--steps", type=int, help=f"batches of 32 texts (default: {STEPS}, quick 5)")
    args = parser.parse_args()
    steps = args.steps if args.steps is not None else 5 if args.quick else STEPS
    if steps < 1:
        parser.error(f"--steps: expected at least 1, got {steps}")
    tokens = STRETCHES * LENGTH + QUESTIONS
    print(
        f"Texts of {tokens} tokens, a window of {CONFIG.window_len()}, {CONFIG.num_anchors(tokens)} anchors to choose "
        f"{CONFIG.num_spans} from; guessing is right in {1 / NUMBERS:.0%}."
    )
    found = {learns: accuracy(trained(learns, steps)) for learns in (True, False)}
    print(f"The search learns: {found[True]:.1%} right. The search is frozen: {found[False]:.1%}.")
    if not args.quick and (found[True] < LEARNS or found[False] > FROZEN):
        raise SystemExit(f"expected at least {LEARNS:.0%}, and at most {FROZEN:.0%} with a frozen search")


if __name__ == "__main__":
    main()
