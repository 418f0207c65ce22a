"""Whether tokens still come: one probe for everybody who asks at about the same time."""

import asyncio
import time

from serve.api import TextService, UnavailableError


class Health:
    """Generates a token when asked, and repeats the result for a while.

    However often it is asked, at most one probe runs at a time and one starts per `ttl` seconds, so
    asking cannot load an engine.
    """

    def __init__(self, service: TextService, timeout: float, ttl: float):
        self._service = service
        self._timeout = timeout
        self._ttl = ttl
        self._probe: asyncio.Task[float] | None = None
        self._ended = -float("inf")

    async def check(self) -> float:
        """Seconds that a token took.

        Raises:
            UnavailableError: none came.
        """
        fresh = time.monotonic() < self._ended + self._ttl
        if self._probe is None or (self._probe.done() and not fresh):
            self._probe = asyncio.create_task(self._run())
        # A client that leaves must not take the probe from the others who wait for it.
        return await asyncio.shield(self._probe)

    async def close(self) -> None:
        """Ends a probe under way."""
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.gather(self._probe, return_exceptions=True)

    async def _run(self) -> float:
        try:
            async with asyncio.timeout(self._timeout):
                return await self._service.probe(self._timeout)
        except TimeoutError:
            raise UnavailableError(f"no token within {self._timeout:g} seconds") from None
        finally:
            self._ended = time.monotonic()
