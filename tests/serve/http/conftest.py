"""A fake service, an app on it, and the check that nothing is left open."""

import pytest
from starlette.testclient import TestClient

from serve.http import HttpConfig, create_app
from tests.serve.http.fake import FakeService


@pytest.fixture
def service():
    """Whatever a test does to it, no iterator may be open afterwards."""
    fake = FakeService()
    yield fake
    assert fake.open == 0


@pytest.fixture
def client(service):
    """Calls the app in process; a fault of the app fails the test."""
    with TestClient(create_app(service, HttpConfig())) as client:
        yield client
