"""Every test starts from the same seed, and the workers share the cores."""

import os

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, min(4, (os.cpu_count() or 1) // workers)))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
