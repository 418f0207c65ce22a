"""`dskjax serve` as a child process: started, waited for, drained; its output goes to a file."""

import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import httpx2

_PROGRESS = re.compile(r"^(\w+): compiled (\d+)/(\d+): ", re.MULTILINE)
_ADDRESS = re.compile(r"^serving .* at (http://\S+?)/v1 ", re.MULTILINE)
_TAIL = 15  # lines of the log that an error shows

Progress = Callable[[str, int, int], object]
"""Called with an engine's name, programs compiled and programs in all."""


class ServerDiedError(RuntimeError):
    """The process ended, or did not become ready, and the end of its log says why."""


class ServerProcess:
    """A server that lives as long as a `with` block; leaving it early kills the process.

    Args:
        command: `python -m dskjax serve ...`. Port 0 is fine: the address is read from the log.
        log: file for everything it prints.

    Attributes:
        url: where it answers, once it is ready.
    """

    def __init__(self, command: Sequence[str], log: Path):
        self.url = ""
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def wait_ready(self, progress: Progress, *, timeout: float = 600.0) -> None:
        """Waits until /ready says so.

        Args:
            progress: see `Progress`.
            timeout: seconds.

        Raises:
            ServerDiedError: it ended first, or took longer.
        """
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            self.check_alive()
            text = self._text()
            for engine, done, total in _PROGRESS.findall(text):
                progress(engine, int(done), int(total))
            if found := _ADDRESS.search(text):
                self.url = found[1]
                if self._is_ready():
                    return
            time.sleep(0.1)
        raise ServerDiedError(f"the server was not ready after {timeout:g} s; {self._end()}")

    def check_alive(self) -> None:
        """Raises ServerDiedError with the end of the log if the process has ended."""
        status = self._process.poll()
        if status is not None:
            raise ServerDiedError(f"the server ended with status {status}; {self._end()}")

    def drain(self, *, timeout: float = 60.0) -> int:
        """Asks it to end (SIGTERM) and returns its exit status.

        Raises:
            ServerDiedError: it had ended before, or did not end in time.
        """
        self.check_alive()
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise ServerDiedError(
                f"the server did not end within {timeout:g} s of SIGTERM; {self._end()}"
            ) from error

    def _is_ready(self) -> bool:
        try:
            answer = httpx2.get(f"{self.url}/ready", timeout=5.0, trust_env=False)
        except httpx2.HTTPError:
            return False  # it has announced itself: asked again until the time is up
        return answer.status_code == 200

    def _text(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def _end(self) -> str:
        lines = self._text().splitlines()[-_TAIL:]
        return "\n".join([f"the end of its log, {self._log}:", *lines])
