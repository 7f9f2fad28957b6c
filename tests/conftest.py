"""Settings of all tests: offline, deterministic, one thread."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings


settings.register_profile(
    "laws", derandomize=True, deadline=None, max_examples=3, database=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("laws")


@pytest.fixture(autouse=True, scope="session")
def deterministic_torch() -> None:
    """Runs of these tests differ in nothing; tiny tensors are slower on several threads."""
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random numbers."""
    torch.manual_seed(0)
