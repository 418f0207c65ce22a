"""Runs every test, the `full` ones included, and writes what happened as one JSON file.

    .venv/bin/python scripts/test_full.py [pytest arguments]

The file says what was tested (commit, versions, platform), how many tests ended how, how long it
all took and which tests were slowest. It is replaced only at the end of a run, whole.
"""

import collections
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "test-full.json"
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "optax", "orbax-checkpoint", "pytest")
SLOWEST = 20


class Summary:
    """A pytest plugin that counts outcomes and adds up the phases of each test."""

    def __init__(self):
        self.outcomes = collections.Counter()
        self.seconds = collections.Counter()
        self.failed = []

    def pytest_runtest_logreport(self, report):
        """Counts a test once: by its call, or by the set-up or tear-down that ended it."""
        self.seconds[report.nodeid] += report.duration
        if hasattr(report, "wasxfail"):
            if report.when == "call" or report.skipped:
                self.outcomes["xfailed" if report.skipped else "xpassed"] += 1
        elif report.when == "call" or not report.passed:
            outcome = "error" if report.failed and report.when != "call" else report.outcome
            self.outcomes[outcome] += 1
            if report.failed:
                self.failed.append(report.nodeid)

    def pytest_collectreport(self, report):
        """Counts a file that could not be collected as an error."""
        if report.failed:
            self.outcomes["error"] += 1
            self.failed.append(report.nodeid)


def git(*args: str) -> str | None:
    """The output of a git command, or None outside a repository."""
    done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def main(arguments: list[str]) -> int:
    """Runs pytest on the whole tree and returns its exit code."""
    os.chdir(ROOT)
    summary = Summary()
    commit = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", ".", ":!benchmarks/results")
    start = time.monotonic()
    exit_code = int(pytest.main(["--full", *arguments], plugins=[summary]))
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "uncommitted_changes": bool(changed),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": {"architecture": platform.machine(), "cpus": os.cpu_count()},
        "platform": os.environ.get("DSKJAX_TEST_PLATFORM", "cpu"),
        "arguments": arguments,
        "exit_code": exit_code,
        "seconds": round(time.monotonic() - start, 1),
        "outcomes": dict(sorted(summary.outcomes.items())),
        "failed": sorted(summary.failed),
        "slowest": [
            {"test": test, "seconds": round(seconds, 2)}
            for test, seconds in summary.seconds.most_common(SLOWEST)
        ],
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    partial = RESULT.with_suffix(".tmp")
    partial.write_text(json.dumps(result, indent=2) + "\n")
    partial.replace(RESULT)
    return exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
