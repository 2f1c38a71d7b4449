"""Lets the tests import cup.py from the repository root, and use one core."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(1)


@pytest.fixture
def double_precision():
    """Tolerances then speak of the mathematics, not of rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def pendulum(tmp_path_factory):
    """A finished run on Pendulum-v1 that nothing happened to, and what it said."""
    from program import PENDULUM, succeed

    run_dir = tmp_path_factory.mktemp("pendulum") / "run"
    return run_dir, succeed(*PENDULUM, "--run-dir", run_dir)
