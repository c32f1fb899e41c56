"""The oracle that several files compare with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.harness import ProcessPool

if TYPE_CHECKING:
    from tests.oracle import Oracle


@pytest.fixture(scope="session")
def reference(processes: ProcessPool) -> Oracle:
    """Runs of one process in float64, each made once."""
    from tests.oracle import Oracle

    return Oracle(processes)
