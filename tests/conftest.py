"""Where the tests run, what is checked while they run, and which of them are left out.

By default: 8 simulated CPU devices. With `DSKJAX_TEST_PLATFORM=gpu`: the machine's GPUs, from one
process, and the tests marked `gpu(count)` run too (`-m gpu`: only those). `--full` adds the tests
marked `full`.
"""

import gc
import os
import time
from pathlib import Path

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

PLATFORM = os.environ.get("DSKJAX_TEST_PLATFORM", "cpu")
if PLATFORM not in ("cpu", "gpu"):
    raise pytest.UsageError(f"DSKJAX_TEST_PLATFORM={PLATFORM!r} must be cpu or gpu")

# Both must be set before anything asks JAX for a device, so no import of ours may do that.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu" if PLATFORM == "cpu" else "cuda,cpu")
# A GPU multiplies fp32 in tf32 unless told otherwise, as the command line's --dtype float32 does.
jax.config.update("jax_default_matmul_precision", None if PLATFORM == "cpu" else "highest")

# No persistent compilation cache: a stale or foreign entry would make a test pass or fail for
# reasons that are not in the tree.

# Compiling makes a first example slow, and the same tree must give the same result every time.
hypothesis.settings.register_profile("dskjax", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("dskjax")

# From here on every annotated function of the four packages checks shapes and types when called.
install_import_hook(["dskjax", "pallas_kernels", "train_mtp", "serve"], "beartype.beartype")

_STARTED = pytest.StashKey[float]()

MEMORY_MAPS = Path("/proc/self/maps")
MOST_MAPS = 25_000
"""Memory maps of a process from which compiled programs are dropped. Each program for a CPU has
several, Linux allows 65,530 (vm.max_map_count), and XLA crashes where it gets no more.
"""

SET_BY_COMMANDS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_default_matmul_precision",
    "jax_num_cpu_devices",
    "jax_platforms",
)


@pytest.fixture
def dskjax(monkeypatch, capsys):
    """Runs `dskjax ARGS...`; returns (exit code, stdout, stderr). What a command sets for JAX is
    taken back.
    """
    from dskjax import cli  # not at the top: that would be before the hook

    def run(*args):
        monkeypatch.setattr("sys.argv", ["dskjax", *map(str, args)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    before = {name: getattr(jax.config, name) for name in SET_BY_COMMANDS}
    yield run
    for name, value in before.items():
        if getattr(jax.config, name) != value:
            jax.config.update(name, value)


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also run the tests marked `full`")


def pytest_configure(config):
    if PLATFORM == "gpu" and getattr(config.option, "numprocesses", None):
        raise pytest.UsageError("a GPU run is one process, which takes all GPU memory: pass -n 0")


def pytest_collection_modifyitems(config, items):
    gpus = _count_gpus() if PLATFORM == "gpu" else 0
    for item in items:
        if item.get_closest_marker("full") and not config.getoption("--full"):
            item.add_marker(pytest.mark.skip(reason="slow or large: runs with --full"))
        if marker := item.get_closest_marker("devices"):
            if jax.device_count() < marker.args[0]:
                reason = f"needs {marker.args[0]} devices, found {jax.device_count()}"
                item.add_marker(pytest.mark.skip(reason=reason))
        if marker := item.get_closest_marker("gpu"):
            needed = _gpus_wanted(*marker.args, **marker.kwargs)
            if PLATFORM == "cpu":
                reason = "needs a GPU: runs with DSKJAX_TEST_PLATFORM=gpu"
                item.add_marker(pytest.mark.skip(reason=reason))
            elif needed > gpus:
                reason = f"needs {needed} GPUs, found {gpus}"
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish(session):
    """Fewer garbage collections, and none that looks at what the imports made: tracing makes very
    many objects.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """After a file: drops compiled programs before there are too many."""
    if nextitem is not None and nextitem.path == item.path or not MEMORY_MAPS.exists():
        return
    if MEMORY_MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()


def pytest_sessionstart(session):
    session.config.stash[_STARTED] = time.time()


def pytest_terminal_summary(terminalreporter, config):
    now = time.time()
    tests = now - config.stash[_STARTED]
    line = f"{PLATFORM}: tests took {tests:.0f} s"
    if started := os.environ.get("DSKJAX_TEST_STARTED"):
        line += f"; with set-up, lint and types {now - float(started):.0f} s"
    terminalreporter.write_line(line)


def _gpus_wanted(count=1):
    return count


def _count_gpus():
    try:
        return len(jax.devices("gpu"))
    except RuntimeError as error:
        raise pytest.UsageError("DSKJAX_TEST_PLATFORM=gpu, but JAX finds no GPU") from error
