"""The edge's API in front of a backend that says "Hello"."""

from __future__ import annotations

import pytest
from edge_api import Backend, local
from starlette.testclient import TestClient

from sliplm.edge.api import create_app


@pytest.fixture
def backend() -> Backend:
    return Backend()


@pytest.fixture
def client(backend) -> TestClient:
    return local(create_app(backend, lambda: "m"))
