"""Runs pytest again and again, each time in a fork of a process that has imported torch, Triton and transformers already.

A script of its own, which must not import subquad: its children import a copy with a fault. Requests are lines of JSON on
standard input, answers lines on standard output.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from typing import Any, TextIO

TEST_LIMIT = 240.0  # seconds for one test, many times what the slowest takes


def preload() -> None:
    """What every test imports. Nothing here starts a thread."""
    for name in ("torch", "numpy", "pytest", "hypothesis", "triton", "triton.language", "transformers"):
        __import__(name)


class Recorder:
    """Orders and leaves out tests, and says what becomes of each."""

    def __init__(self, out: TextIO, passed: list[str], first: list[str]) -> None:
        self.out, self.passed, self.first = out, set(passed), first

    def say(self, what: str, test: str) -> None:
        print(json.dumps([what, test]), file=self.out, flush=True)

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """After that of the conftest, which is registered later."""
        gone = [item for item in items if item.nodeid in self.passed]
        config.hook.pytest_deselected(items=gone)
        items[:] = [item for item in items if item.nodeid not in self.passed]
        items.sort(key=self._rank)

    def _rank(self, item: Any) -> tuple[bool, bool, int]:
        likely = next((i for i, word in enumerate(self.first) if word in item.nodeid), len(self.first))
        return item.get_closest_marker("slow") is not None, item.get_closest_marker("heavy") is not None, likely

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.say("start", nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.say("failed", report.nodeid)
        elif report.passed and report.when == "call":
            self.say("passed", report.nodeid)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.say("failed", report.nodeid)


def child(request: dict[str, Any], out: int) -> None:
    """One pytest run; never returns."""
    import pytest

    os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    os.chdir(request["root"])
    code = 70
    try:
        with os.fdopen(out, "w") as stream:
            plugin = Recorder(stream, request["passed"], request["first"])
            code = int(pytest.main(request["arguments"], plugins=[plugin]))
    finally:
        os._exit(code)


def run(request: dict[str, Any]) -> dict[str, Any]:
    """{"how": "survived" | "failed" | "crash" | "time-out", "test": which, "passed": [...]}."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        child(request, write)
    os.close(write)
    passed: list[str] = []
    current, failed, late, rest = "collection", None, False, b""
    limit = time.monotonic() + TEST_LIMIT
    while True:
        ready, _, _ = select.select([read], [], [], max(0.0, limit - time.monotonic()))
        if not ready:
            late = True
            os.killpg(pid, signal.SIGKILL)
            break
        data = os.read(read, 1 << 16)
        if not data:
            break
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            what, test = json.loads(line)
            limit = time.monotonic() + TEST_LIMIT
            if what == "start":
                current = test
            elif what == "passed":
                passed.append(test)
            else:
                failed = failed or test
    os.close(read)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    # 5: nothing was selected that had not passed before.
    how = "time-out" if late else "failed" if failed or code == 1 else "survived" if code in (0, 5) else "crash"
    return {"how": how, "test": failed or current, "passed": passed, "code": code}


def main() -> None:
    """Serve until standard input ends."""
    preload()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
