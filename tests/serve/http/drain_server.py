"""A process for the tests of draining: `run` on a fake service, with a line per event on stdout.

python -m tests.serve.http.drain_server DRAIN_TIMEOUT WORDS DELAY
"""

import sys

from serve.http import ServerConfig, create_app, run
from tests.serve.http.fake import FakeService


def main() -> int:
    timeout, length, delay = sys.argv[1:]
    service = FakeService()
    service.length, service.delay, service.max_model_len = int(length), float(delay), 10**6

    def announce(host: str, port: int) -> None:
        print(f"listening {host} {port}", flush=True)

    status = run(
        create_app(service),
        service,
        "127.0.0.1",
        0,
        float(timeout),
        announce=announce,
        config=ServerConfig(log_level="critical"),
    )
    print(f"open {service.open}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
