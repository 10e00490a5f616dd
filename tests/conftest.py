"""Options and fixtures that test files share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """No test finds what accelerate kept in the process from another one."""
    from .distributed.accelerated import forget_state

    yield
    forget_state()
