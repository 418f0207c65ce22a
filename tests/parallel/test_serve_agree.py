"""Two processes agree on the sizes of many steps, each from its own wishes.

python -m tests.parallel.test_serve_agree OUT     is one of the processes
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from dskjax.commands.launch import free_port
from dskjax.distributed import Membership
from serve.agree import Sizes, agree, agree_with_processes

ROOT, STEPS = Path(__file__).parents[2], 300


def wishes(process: int) -> list[Sizes]:
    """Half the time nothing."""
    rng = np.random.default_rng(process)
    drawn = rng.integers(0, 9, (STEPS, 7)) * rng.integers(0, 2, (STEPS, 1))
    return [Sizes.unpack(row) for row in drawn]


def test_processes_agree(tmp_path):
    coordinator, started = f"127.0.0.1:{free_port()}", []
    for number in range(2):
        place = Membership(coordinator=coordinator, processes=2, process=number)
        out = str(tmp_path / f"{number}.json")
        command = [sys.executable, "-m", "tests.parallel.test_serve_agree", out]
        environment = {**os.environ, **place.environment()}
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment))
    assert [one.wait(120) for one in started] == [0, 0]
    told = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2)]
    want = [agree(pair).pack().tolist() for pair in zip(wishes(0), wishes(1), strict=True)]
    assert told == [want, want]
    assert 0 < sum(not any(row) for row in want) < STEPS


def test_a_process_alone_agrees_with_itself():
    for own in wishes(0)[:5]:
        assert agree_with_processes(own) == own


if __name__ == "__main__":
    place = Membership.told(os.environ)
    assert place is not None
    place.join()
    found = [agree_with_processes(own).pack().tolist() for own in wishes(place.process)]
    Path(sys.argv[1]).write_text(json.dumps(found))
