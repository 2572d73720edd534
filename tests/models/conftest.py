"""Every test of the models runs on the 1x1x1 mesh unless it enters another."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from specjax.models.sharding import mesh_scope


@pytest.fixture(scope="module", autouse=True)
def one_device_mesh() -> Iterator[None]:
    with mesh_scope():
        yield
