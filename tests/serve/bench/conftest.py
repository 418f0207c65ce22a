"""The fake service of the HTTP tests."""

from tests.serve.http.conftest import service

__all__ = ["service"]
