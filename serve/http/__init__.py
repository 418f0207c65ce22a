"""The OpenAI-compatible HTTP server, on top of any `serve.api.TextService`.

    app = create_app(service, HttpConfig(api_keys=("secret",)), registry=registry)
    status = run(app, service, "127.0.0.1", 8000, drain_timeout=30.0)

Text goes in and comes out; how it is generated is the service's business.
"""

from serve.http.app import create_app
from serve.http.config import HttpConfig, ServerConfig
from serve.http.server import run

__all__ = ["HttpConfig", "ServerConfig", "create_app", "run"]
