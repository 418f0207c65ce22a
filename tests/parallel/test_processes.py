"""Two processes with four devices each are one mesh; and how they are started and ended."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dskjax.commands import launch as module
from dskjax.commands.launch import free_port, launch
from dskjax.distributed import Membership
from tests.parallel import worker
from tests.parallel.common import needs_8

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "tiny-deepseek"


DECODES = pytest.param(["decoded"], marks=pytest.mark.full)  # as the test below does


@needs_8
@pytest.mark.parametrize("parts", [["forward", "trained"], DECODES], ids="-".join)
def test_two_processes_compute_what_one_does(parts, tmp_path):
    """Forward (tensor parallel, experts summed), decode (experts exchanged) and training."""
    started = []
    coordinator = f"127.0.0.1:{free_port()}"
    for number in range(2):
        place = Membership(coordinator=coordinator, processes=2, process=number)
        command = [sys.executable, "-m", "tests.parallel.worker", str(tmp_path / "out"), *parts]
        environment = {**os.environ, **place.environment()}
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment))
    want = worker.results(parts)
    assert [one.wait(300) for one in started] == [0, 0]
    for number in range(2):
        with np.load(tmp_path / f"out.{number}.npz") as got:
            assert set(got) == set(want)
            for name in got:
                if name in ("tokens", "steps"):
                    np.testing.assert_array_equal(got[name], want[name])
                else:
                    np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-5)
    if "trained" in parts:
        assert want["losses"][1] < want["losses"][0]


def test_launched_generation_reads_its_share_of_the_files(dskjax, tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(8, 20).reshape(3, 4))
    options = ["generate", MODEL, "--ids", tmp_path / "ids.npy", "--max-tokens", "6"]
    options += ["--speculate", "2", "--ignore-eos"]
    code, *_ = dskjax(*options, "--out-ids", tmp_path / "one.npy")
    assert code == 0
    more = ["--mesh", "dp=2,ep=2", "--out-ids", tmp_path / "two.npy"]
    code, _, told = dskjax("launch", "--processes", "2", "--cpu-devices", "2", *options, *more)
    assert code == 0, told
    np.testing.assert_array_equal(np.load(tmp_path / "two.npy"), np.load(tmp_path / "one.npy"))


@pytest.fixture
def python(monkeypatch, tmp_path):
    """Makes `launch` run a script of ours in the place of dskjax."""
    script = tmp_path / "script.py"
    popen = subprocess.Popen

    def start(command, **options):
        assert command[:3] == [sys.executable, "-m", "dskjax"]
        return popen([sys.executable, script, *command[3:]], **options)

    monkeypatch.setattr(module.subprocess, "Popen", start)

    def write(text: str) -> None:
        script.write_text("import os, sys, time\nme = int(os.environ['DSKJAX_PROCESS'])\n" + text)

    return write


def test_a_failure_ends_the_others_and_is_passed_on(python, capfd):
    python(
        "print('one', me); print('two', me, file=sys.stderr)\nif me: sys.exit(7)\ntime.sleep(60)"
    )
    begun = time.monotonic()
    assert launch([], processes=3, environment=os.environ) == 7
    assert time.monotonic() - begun < 30
    out, err = capfd.readouterr()
    assert set(out.split("\n")) <= {"one 0", ""}
    assert re.search(r"^\[[12]\] two [12]$", err, re.MULTILINE)


def test_processes_know_their_place_and_their_gpus(python, capfd):
    python(
        "print({k: v for k, v in sorted(os.environ.items()) if 'DSKJAX_' in k}, file=sys.stderr)"
    )
    at = "head:1234"
    sizes = {"processes": 2, "first": 2, "total": 4, "gpus_per_process": 3}
    code = launch([], environment=os.environ, coordinator=at, **sizes)
    assert code == 0
    found = dict(re.findall(r"^\[(\d)\] (.*)$", capfd.readouterr().err, re.MULTILINE))
    for number, gpus in (("2", "0,1,2"), ("3", "3,4,5")):
        told = {"COORDINATOR": at, "LOCAL_DEVICES": gpus, "PROCESS": number, "PROCESSES": "4"}
        assert eval(found[number]).items() >= {f"DSKJAX_{k}": v for k, v in told.items()}.items()


def test_a_membership_survives_the_environment():
    for gpus in (None, (2, 3)):
        place = Membership(coordinator="a:1", processes=4, process=3, local_devices=gpus)
        assert Membership.told(place.environment()) == place
    assert Membership.told({}) is None


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"DSKJAX_COORDINATOR": "a:1"}, "DSKJAX_PROCESSES must be a number, not None"),
        (
            {"DSKJAX_COORDINATOR": "a:1", "DSKJAX_PROCESSES": "2", "DSKJAX_PROCESS": "x"},
            "DSKJAX_PROCESS must be a number, not 'x'",
        ),
        (
            {"DSKJAX_COORDINATOR": "a", "DSKJAX_PROCESSES": "2", "DSKJAX_PROCESS": "0"},
            "'a' must be HOST:PORT",
        ),
        (
            {"DSKJAX_COORDINATOR": "a:1", "DSKJAX_PROCESSES": "2", "DSKJAX_PROCESS": "2"},
            r"process 2 must lie in 0\.\.1",
        ),
    ],
)
def test_a_place_that_makes_no_sense_is_refused(environment, problem):
    with pytest.raises(ValueError, match=problem):
        Membership.told(environment)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="3 processes from number 2 do not fit into 4"):
        launch([], processes=3, environment={}, first=2, total=4, coordinator="a:1")
    with pytest.raises(ValueError, match="need --coordinator"):
        launch([], processes=2, environment={}, total=4)
