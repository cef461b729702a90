"""The lanes of one fault: a server of test runs, and what it says about the fault."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from ..._build import BuildError
from .fault import Fault
from .results import Verdict
from .tree import Tree

LANES = ("quick", "whole")
_OPTIONS = ["-x", "-q", "--tb=no", "--no-header", "--benchmark-disable", "-p", "no:cacheprovider", "-p", "no:xdist"]

# Words of tests that are the likeliest to notice a kind of fault: they run first.
_LIKELY = {
    "nan": ("nan", "finite"),
    "barrier": ("schedules",),
    "guard": ("skipped", "refuse", "bad", "error"),
    "index width": ("32_bits",),
    "stride": ("forward", "layouts"),
    "bounds": ("forward", "tiles", "guards"),
    "stale": ("stale", "copy"),
    "mask": ("forward", "tiles", "mask"),
}


class Server:
    """`server.py` in a process that imports subquad from the copy."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        python = tree.root / "python"
        environment = [f"PYTHONPATH={python}", "TRITON_INTERPRET=1", "OMP_NUM_THREADS=1"]
        script = Path(__file__).with_name("server.py")
        self.process = subprocess.Popen(
            ["env", "-u", "PYTHONDONTWRITEBYTECODE", *environment, sys.executable, str(script)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tree.root,
        )  # fmt: skip

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def run(self, arguments: list[str], passed: list[str] | None = None, first: tuple[str, ...] = ()) -> dict[str, Any]:
        """The answer of `server.run`."""
        assert self.process.stdin is not None and self.process.stdout is not None
        request = {
            "root": str(self.tree.root),
            "log": str(self.tree.folder / "pytest.log"),
            "arguments": [*_OPTIONS, *arguments],
            "passed": passed or [],
            "first": list(first),
        }
        print(json.dumps(request), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server of test runs ended; see {request['log']}")
        return json.loads(line)


class Judge:
    """Judges faults, one after the other, by tests that were seen to pass without one."""

    def __init__(self, tree: Tree, server: Server, lanes: tuple[str, ...] = LANES, every: bool = False) -> None:
        """`every`: all tests of a lane, instead of those that the catalogue names: for what survived them."""
        self.tree, self.server, self.lanes, self.every = tree, server, lanes, every
        self.trusted: set[str] = set()  # tests that pass without a fault
        self.broken: list[str] = []  # and those that do not: they are left out
        self.refused: list[str] = []  # faults of the catalogue itself

    def judge(self, fault: Fault) -> Verdict:
        """Plant it, build, run the quick lane, and what more the whole lane has if that noticed nothing."""
        if fault.matches(self.tree.root) != 1:
            return Verdict("dead")
        while True:
            try:
                verdict = self._planted(fault)
            except BuildError as error:
                self.refused.append(f"{fault.name} does not compile, which says nothing about tests:\n{error}")
                return Verdict("not run")
            test = verdict.whole.partition(": ")[2]
            if "::" not in test or test in self.trusted:
                return verdict
            if self.server.run([test])["how"] == "survived":
                self.trusted.add(test)
                return verdict
            self.broken.append(test)

    def _planted(self, fault: Fault) -> Verdict:
        where, gone, passed = fault.where, list(self.broken), 0
        paths = ["tests"] if self.every else [*where.tests, *(["-k", where.select] if where.select else [])]
        with self.tree.planted(fault):
            for lane in self.lanes:
                first = (*_LIKELY.get(fault.kind, ()), *where.first)
                answer = self.server.run(["--lane", lane, *paths], gone, first)
                gone += answer["passed"]
                passed += len(answer["passed"])
                if answer["how"] != "survived":
                    seen = f"{answer['how']}: {answer['test']}"
                    return Verdict("judged", seen if lane == "quick" else "", seen, passed)
        return Verdict("judged" if self.lanes == LANES else "quick only", passed=passed)
