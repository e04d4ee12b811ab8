"""Tiny products gain nothing from threads, and lose much when the cores are busy."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
