"""The example of the passkey: its texts, its plot, and that it runs and learns."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
import torch

pytest.importorskip("transformers")
PATH = Path(__file__).resolve().parents[2] / "examples" / "passkey.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("passkey", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("length", [32, 33, 100, 256])
def test_texts_say_the_key_once_and_ask_for_it(example: ModuleType, length: int) -> None:
    rows = example.texts(16, length, torch.Generator().manual_seed(length))
    assert rows.shape == (16, length)
    for row in rows:
        text = " ".join(example.WORDS[token] for token in row)
        key = " ".join(example.WORDS[token] for token in row[-example.DIGITS :])
        assert text.endswith(f"{example.QUESTION} {key}") and text.count(f"{example.NEEDLE} {key}") == 2
        assert sum(word.isdigit() for word in text.split()) == 2 * example.DIGITS


def test_the_plot_shows_every_length(example: ModuleType) -> None:
    found = {"lawcat": {256: 1.0, 512: 0.5, 16384: 0.25}, "softmax": {256: 1.0, 512: 0.0}}
    root = ElementTree.fromstring(example.plot(found))
    lines = [element.get("points").split() for element in root.iter() if element.tag.endswith("polyline")]
    heights = [[float(point.split(",")[1]) for point in line] for line in lines]
    assert heights == [[50.0, 165.0, 222.5], [50.0, 280.0]]
    assert {"256", "512", "16384", "LAWCAT"} <= {element.text for element in root.iter()}


@pytest.mark.heavy
def test_it_runs_and_learns(tmp_path: Path) -> None:
    command = [sys.executable, str(PATH), "--quick", "--output", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    ElementTree.parse(tmp_path / "passkey.svg")
    for kind, result in json.loads((tmp_path / "report.json").read_text())["models"].items():
        first, last = (sum(part) / len(part) for part in (result["losses"][:5], result["losses"][-5:]))
        assert last < 0.9 * first, (kind, first, last)
        assert all(0 <= share <= 1 for share in result["accuracy"].values())
