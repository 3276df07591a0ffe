"""Every test starts from the same seed, on one thread."""

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    # The tensors here are tiny: threads that wait for each other would cost more than they give.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
