"""Small models that the tests of the heads share."""

from __future__ import annotations

import pytest

from v2m.models import MODELS

FAMILIES = ("v2m_local_tiny_patch16_224", "v2m_hier_small_224", "vim_tiny_patch16_224")


def tiny_keywords(name: str) -> dict:
    """A registered model cut down to a few narrow layers, for RGB images."""
    if "patch" in name:
        size = {"embed_dim": 16, "depth": 4, "in_chans": 3, "d_state": 2}
        return {**size, "img_size": 32} if "patch4" in name else {**size, "img_size": 64}
    return {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48)}


@pytest.fixture(params=sorted(MODELS))
def any_model(request) -> tuple[str, dict]:
    """Each registered model in turn: (name, keywords of a tiny one)."""
    return request.param, tiny_keywords(request.param)


@pytest.fixture(params=FAMILIES)
def family(request) -> tuple[str, dict]:
    """One model of each kind: plain, hierarchical, with a class token."""
    return request.param, tiny_keywords(request.param)


@pytest.fixture
def hierarchical() -> tuple[str, dict]:
    return "v2m_hier_small_224", tiny_keywords("v2m_hier_small_224")


@pytest.fixture
def plain() -> tuple[str, dict]:
    return "v2m_tiny_patch16_224", tiny_keywords("v2m_tiny_patch16_224")
