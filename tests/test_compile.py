"""--compile: the same update, also through checkpoints; a sentence without a compiler."""

import shutil

import pytest
import torch
from by_hand import random_batch
from program import PENDULUM, call_cup, metrics, succeed

import cup

OBS_DIM, ACTION_DIM = 3, 2
needs_a_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")


@needs_a_compiler
@pytest.mark.usefixtures("double_precision")
def test_the_compiled_update_is_the_eager_one_over_fifty_updates():
    """In double precision, where rounding does not grow into something else."""
    rows, networks = [], []
    for compiled in (False, True):
        torch.manual_seed(1)
        settings = {"hidden_sizes": (16, 16), "buffer_size": 500, "cuda": False}
        args = cup.Args("x", sources=(), num_random_sources=2, compile=compiled, **settings)
        agent = cup.Agent(args, OBS_DIM, ACTION_DIM, cup.load_sources(args, OBS_DIM, ACTION_DIM))
        assert ("update" in vars(agent)) == compiled  # it takes the place of the method
        agent.buffer.add(random_batch(500, OBS_DIM, ACTION_DIM, num_sources=2))
        rows.append([agent.update(agent.buffer.sample(64)) for _ in range(50)])
        networks.append({k: x for k, x in agent.state_dict().items() if torch.is_tensor(x)})
    torch.testing.assert_close(*rows, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(*networks, rtol=1e-6, atol=1e-9)


@needs_a_compiler
def test_a_resumed_compiled_run_equals_an_unbroken_one(tmp_path):
    run = [*PENDULUM, "--compile"]
    succeed(*run, "--run-dir", tmp_path / "unbroken")
    for end in (600, 1000):
        succeed(*run, "--run-dir", tmp_path / "resumed", "--resume", "--total-timesteps", end)
    last = [metrics(tmp_path / name)[-1] for name in ("unbroken", "resumed")]
    assert last[0] == last[1]


def test_without_a_compiler_it_is_a_sentence(monkeypatch):
    monkeypatch.setenv("PATH", "")
    result = call_cup(*PENDULUM, "--compile")
    assert result.returncode == 2
    assert "--compile needs a C++ compiler" in result.stderr
