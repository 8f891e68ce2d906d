"""Shared fixtures: a seed a test, one thread (the suite's processes share few cores), and golden files' renewal."""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--accept", action="store_true", help="renew the golden files from what the code gives now")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
