"""What linear attention remembers: laws of associative memory, and small models trained on them.

Keys are cues, values what they stand for: S = sum of k v^T. A kernel that drops a chunk, counts a boundary twice or cuts a state
off breaks these laws at once. Training is with the reference or the CPU kernel, judgement with every backend.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import subquad
from subquad.testing import backend_params

STEM = "gated_linear_attention"


def unit_rows(*shape: int, seed: int) -> torch.Tensor:
    """Random directions."""
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def attend(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
    return subquad.gated_linear_attention(*tensors, **options)[0]


def recall(keys: torch.Tensor, values: torch.Tensor, backend: str, g: torch.Tensor | None = None) -> torch.Tensor:
    """What every key brings back after all pairs were stored: [trials, n, V]."""
    trials, n = keys.shape[:2]
    k = torch.cat([keys, torch.zeros_like(keys)], 1).unsqueeze(2)
    v = torch.cat([values, torch.zeros_like(values)], 1).unsqueeze(2)
    q = torch.cat([torch.zeros_like(keys), keys], 1).unsqueeze(2)
    gate = None if g is None else torch.cat([g, torch.zeros(trials, n, *g.shape[2:])], 1).unsqueeze(2)
    return attend(q, k, v, gate, scale=1.0, backend=backend)[:, n:, 0]


@backend_params(STEM, "native", "triton", "simt")
@pytest.mark.parametrize("width", [32, 64])
def test_capacity(backend: str, width: int) -> None:
    """Mean cosine to the stored value: 1 / sqrt(1 + (n - 1) / K). Nearest-value decoding fails only far beyond n = K."""
    for ratio, least in ((0.25, 0.99), (0.5, 0.99), (1, 0.99), (2, 0.94), (4, 0.6)):
        n = int(ratio * width)
        keys, values = unit_rows(8, n, width, seed=n), unit_rows(8, n, 64, seed=n + 1)
        found = recall(keys, values, backend)
        cosine = F.cosine_similarity(found, values, dim=-1).mean()
        assert abs(float(cosine) - (1 + (n - 1) / width) ** -0.5) <= 0.03, (ratio, float(cosine))
        decoded = (found @ values.mT).argmax(-1)
        assert float((decoded == torch.arange(n)).float().mean()) >= least, ratio


@backend_params(STEM, "native", "triton", "simt")
@pytest.mark.parametrize("gate", ["head", "channel"])
def test_forgetting(backend: str, gate: str) -> None:
    """With decay c per token, age a comes back with cosine c^a / sqrt(c^2a + sum of the others c^2b / K)."""
    n, width, decay = 64, 64, 0.97
    keys, values = unit_rows(16, n, width, seed=3), unit_rows(16, n, 64, seed=4)
    g = torch.full((16, n, width) if gate == "channel" else (16, n), decay).log()
    cosine = F.cosine_similarity(recall(keys, values, backend, g), values, dim=-1).mean(0).flip(0)
    weights = decay ** (2 * torch.arange(n))
    for age in (0, 8, 16, 32, 63):
        others = float(weights.sum() - weights[age]) / width
        expected = decay**age / (float(weights[age]) + others) ** 0.5
        assert abs(float(cosine[age]) - expected) <= 0.05, (age, float(cosine[age]), expected)


@backend_params(STEM, "native", "triton", "simt")
def test_overwriting(backend: str) -> None:
    """The same key stored twice: the sum without decay, the first faded with it, their mean when normalised."""
    k = torch.zeros(1, 2, 1, 4)
    k[..., 1] = 1.0
    v, g = torch.randn(1, 2, 1, 3, generator=torch.Generator().manual_seed(0)), torch.full((1, 2, 1), 0.5).log()
    first, second = v[0, 0, 0], v[0, 1, 0]
    expected = {
        (False, False): first + second,
        (True, False): 0.5 * first + second,
        (True, True): (first + 2 * second) / 3,
    }
    for (decays, normalize), what in expected.items():
        o = attend(k, k, v, g if decays else None, scale=1.0, normalize=normalize, backend=backend)
        torch.testing.assert_close(o[0, 1, 0], what)


class Recaller(nn.Module):
    """One layer: queries from the token, keys and values after a causal convolution of width 2 (LAWCAT's recipe)."""

    def __init__(self, vocabulary: int = 32, width: int = 32, features: int = 16, conv: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.q, self.k = (nn.Linear(width, features, bias=False) for _ in range(2))
        self.v, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.taps = nn.Parameter(torch.randn(width, 2) * 0.5) if conv else None

    def forward(self, tokens: torch.Tensor, backend: str | None = None) -> torch.Tensor:
        x = self.embed(tokens)
        mixed = x if self.taps is None else subquad.causal_conv1d(x, self.taps)[0]
        q, k, v = self.q(x), self.k(mixed), self.v(x)
        o = attend(*(y.unsqueeze(2) for y in (q, k, v)), backend=backend).squeeze(2)
        return self.head(self.norm(x + self.out(o)))


def pairs(
    generator: torch.Generator, batch: int = 64, n: int = 4, vocabulary: int = 32
) -> tuple[torch.Tensor, torch.Tensor]:
    """k1 v1 .. kn vn, then the keys again in random order; targets are their values."""
    order = torch.stack([torch.randperm(vocabulary // 2, generator=generator)[:n] for _ in range(batch)])
    values = (
        torch.stack([torch.randperm(vocabulary // 2, generator=generator)[:n] for _ in range(batch)]) + vocabulary // 2
    )
    asked = torch.stack([torch.randperm(n, generator=generator) for _ in range(batch)])
    stored = torch.stack([order, values], -1).flatten(1)
    return torch.cat([stored, order.gather(1, asked)], 1), values.gather(1, asked)


@functools.cache
def trained(conv: bool, backend: str, seed: int = 0, steps: int = 150) -> tuple[Recaller, float]:
    """A model, and its accuracy on fresh sequences."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Recaller(conv=conv)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for _ in range(steps):
        tokens, targets = pairs(generator)
        logits = model(tokens, backend)[:, -targets.shape[1] :]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model, accuracy(model, backend)


@torch.no_grad()
def accuracy(model: Recaller, backend: str) -> float:
    tokens, targets = pairs(torch.Generator().manual_seed(99), batch=128)
    return float((model(tokens, backend)[:, -targets.shape[1] :].argmax(-1) == targets).float().mean())


@backend_params(STEM, "native")
def test_recall_is_learned_with_the_convolution_and_not_without(backend: str) -> None:
    assert trained(True, backend)[1] >= 0.95
    assert trained(False, backend)[1] <= 0.5


@backend_params(STEM, "native", "triton", "simt")
def test_trained_with_the_reference_judged_with_the_kernels(backend: str) -> None:
    model, score = trained(True, "reference", steps=100)
    tokens, _ = pairs(torch.Generator().manual_seed(7), batch=16)
    with torch.no_grad():
        expected, found = model(tokens, "reference"), model(tokens, backend)
    assert score >= 0.8
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


class Passkey(nn.Module):
    """The recaller with one of three mixers: additive, normalised over positive features, normalised with gates."""

    def __init__(self, mixer: str, vocabulary: int = 32, width: int = 32, features: int = 16) -> None:
        super().__init__()
        self.mixer = mixer
        self.embed = nn.Embedding(vocabulary, width)
        self.q, self.k = (nn.Linear(width, features, bias=False) for _ in range(2))
        self.v, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, features)
        nn.init.constant_(self.gate.bias, 2.0)
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.taps = nn.Parameter(torch.randn(width, 2) * 0.5)

    def forward(self, tokens: torch.Tensor, backend: str) -> torch.Tensor:
        x = self.embed(tokens)
        q, k, v = self.q(x), self.k(subquad.causal_conv1d(x, self.taps)[0]), self.v(x)
        g = None
        if self.mixer == "additive":
            q = q * tokens.shape[1] ** -0.5
        else:
            q, k = (subquad.feature_map(y.unsqueeze(2)).squeeze(2) for y in (q, k))
        if self.mixer == "gated":
            g = F.logsigmoid(self.gate(x)) / 16
            g = torch.cat([g, g], -1).unsqueeze(2)
        heads = (y.unsqueeze(2) for y in (q, k, v))
        o = attend(*heads, g, normalize=self.mixer != "additive", backend=backend).squeeze(2)
        return self.head(self.norm(x + self.out(o)))[:, -1]


def passkeys(generator: torch.Generator, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise with a marker and a digit somewhere, and the marker again at the end; the digit is asked for."""
    tokens = torch.randint(11, 32, (batch, length), generator=generator)
    digits = torch.randint(0, 10, (batch,), generator=generator)
    place = torch.randint(0, length - 2, (batch,), generator=generator)
    tokens[torch.arange(batch), place], tokens[torch.arange(batch), place + 1] = 10, digits
    tokens[:, -1] = 10
    return tokens, digits


@functools.cache
def passkey_scores(mixer: str, backend: str, seed: int) -> dict[int, float]:
    """Accuracy by length after training at 48 tokens."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Passkey(mixer)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for _ in range(200):
        tokens, digits = passkeys(generator, 64, 48)
        loss = F.cross_entropy(model(tokens, backend), digits)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    scores = {}
    with torch.no_grad():
        for length in (48, 192, 384):
            tokens, digits = passkeys(torch.Generator().manual_seed(length), 256, length)
            scores[length] = float((model(tokens, backend).argmax(-1) == digits).float().mean())
    return scores


@pytest.mark.slow
@backend_params(STEM, "native")
def test_normalised_attention_finds_the_passkey_at_eight_times_the_length(backend: str) -> None:
    """Length generalisation comes from the normaliser (LAWCAT's claim, small): additive memory drowns in noise."""
    scores = {mixer: passkey_scores(mixer, backend, 0) for mixer in ("additive", "normalised", "gated")}
    for mixer, by_length in scores.items():
        assert by_length[48] >= 0.97, (mixer, by_length)
        if mixer != "additive":
            assert by_length[192] >= 0.97, (mixer, by_length)
            assert by_length[384] > scores["additive"][384], scores
