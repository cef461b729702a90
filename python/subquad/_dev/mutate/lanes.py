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


def judge(fault: Fault, tree: Tree, server: Server, lanes: tuple[str, ...] = LANES, every: bool = False) -> Verdict:
    """Plant it, build, run the quick lane, and what more the whole lane has if that noticed nothing.

    Args:
        lanes: which to run.
        every: all tests of a lane, instead of those that the catalogue names: for what survived them.
    """
    if fault.matches(tree.root) != 1:
        return Verdict("dead")
    passed: list[str] = []
    seen: dict[str, str] = {}
    try:
        with tree.planted(fault):
            for lane in lanes:
                where = fault.where
                paths = ["tests"] if every else [*where.tests, *(["-k", where.select] if where.select else [])]
                first = (*_LIKELY.get(fault.kind, ()), *where.first)
                answer = server.run(["--lane", lane, *paths], passed, first)
                passed += answer["passed"]
                if answer["how"] != "survived":
                    seen[lane] = f"{answer['how']}: {answer['test']}"
                    break
    except BuildError as error:
        raise SystemExit(f"{fault.name}: does not compile, which says nothing about tests:\n{error}") from error
    return Verdict("judged", seen.get("quick", ""), seen.get("quick", seen.get("whole", "")), len(passed))


def confirm(tests: list[str], server: Server) -> list[str]:
    """Which of the tests that noticed faults fail without one, too."""
    wrong: list[str] = []
    while True:
        left = [test for test in tests if test not in wrong]
        answer = server.run(left) if left else {"how": "survived"}
        if answer["how"] == "survived":
            return wrong
        wrong.append(answer["test"])
