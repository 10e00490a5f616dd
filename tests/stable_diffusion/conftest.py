"""The pipelines that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """SD 1.x and SD 2.x in small."""
    from ..text_to_image import pipeline  # here, as it needs an extra

    out = tmp_path_factory.mktemp("text_to_image")
    pipeline(out / "base")
    pipeline(out / "base2", "v_prediction")
    return out
