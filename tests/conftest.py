"""Shared fixtures: a seed a test, one thread (processes share few cores), nothing compiled; golden files' renewal."""

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import distributed as dist


def pytest_addoption(parser):
    parser.addoption("--accept", action="store_true", help="renew the golden files from what the code gives now")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)  # precision is the process's, not the run's


@pytest.fixture(autouse=True)
def _nothing_compiled(request):
    if request.node.get_closest_marker("compile"):
        torch.compiler.reset()  # beyond torch's limit of programs for one class, its next models would run eager


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
