"""A process in the place of `dskjax serve` for the tests of the demo: a fake service with metrics.

python -m tests.serve.demo_server BEHAVIOUR
"""

import dataclasses
import os
import sys

from serve.http import ServerConfig, create_app, run
from serve.metrics import Metrics
from tests.serve.http.fake import FakeService

BEHAVIOURS = ("well", "dies", "stumbles")


class Service(FakeService):
    """Counts what a prefill and a decode engine would."""

    def __init__(self, behaviour):
        super().__init__()
        self.behaviour = behaviour
        metrics = Metrics(self.model)
        self.registry = metrics.registry
        self.prefill = metrics.engine("prefill0", "prefill")
        self.decode = metrics.engine("decode0", "decode")

    def _usage(self, prompt, options, count):
        drafts = options.drafts != 0
        found = super()._usage(prompt, options, count)
        self.prefill.prefix(queries=len(prompt), hits=0)
        self.prefill.step(seconds=0.001, host_seconds=0.001)
        self.decode.prefix(queries=len(prompt), hits=0)
        self.decode._drafts.inc(count if drafts else 0)
        self.decode._accepted.inc(found.accepted if drafts else 0)
        return found if drafts else dataclasses.replace(found, drafted=0, accepted=0)

    def generate(self, prompt, options, *, request_id):
        if self.behaviour == "dies" and len(self.calls) > 12:
            print("out of memory, says the engine", flush=True)
            os._exit(7)
        return super().generate(prompt, options, request_id=request_id)


def main() -> int:
    (behaviour,) = sys.argv[1:]
    assert behaviour in BEHAVIOURS
    print("prefill0: compiled 1/2: prefill 1x64, 4 pages\nprefill0: compiled 2/2: x", flush=True)
    print("decode0: compiled 1/1: decode 8x4, 4 pages", flush=True)
    service = Service(behaviour)

    def announce(host: str, port: int) -> None:
        print(f"serving fake at http://{host}:{port}/v1 (prefill0, decode0; 1 s)", flush=True)

    status = run(
        create_app(service, registry=service.registry),
        service,
        "127.0.0.1",
        0,
        5.0,
        announce=announce,
        config=ServerConfig(log_level="critical"),
    )
    return 3 if behaviour == "stumbles" else status


if __name__ == "__main__":
    sys.exit(main())
