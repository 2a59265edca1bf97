"""What the tests of all web clients start from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from webclients.backend import KINDS, Backend, serving


@pytest.fixture(params=KINDS)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """A web application behind a session, over each kind of link."""
    with serving(request.param) as backend:
        yield backend
