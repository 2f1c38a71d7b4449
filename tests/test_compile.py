"""--compile: the same update, to rounding, through checkpoints, and a sentence without a compiler."""

import shutil

import pytest
import torch
from by_hand import random_batch
from program import PENDULUM, call_cup, metrics

import cup

OBS_DIM, ACTION_DIM = 3, 2
needs_a_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")


def make_agent(compiled: bool) -> cup.Agent:
    torch.manual_seed(1)
    args = cup.Args("x", hidden_sizes=(16, 16), buffer_size=500, cuda=False, compile=compiled)
    args.sources, args.num_random_sources = (), 2
    agent = cup.Agent(args, OBS_DIM, ACTION_DIM, cup.load_sources(args, OBS_DIM, ACTION_DIM))
    agent.buffer.add(random_batch(500, OBS_DIM, ACTION_DIM, num_sources=2))
    return agent


@needs_a_compiler
def test_the_compiled_update_is_the_eager_one_over_fifty_updates():
    """In double precision, where rounding does not grow into something else."""
    torch.set_default_dtype(torch.float64)
    try:
        results = []
        for compiled in (False, True):
            agent = make_agent(compiled)
            torch.manual_seed(2)
            rows = [agent.update(agent.buffer.sample(64)) for _ in range(50)]
            results.append((rows, agent.state_dict()))
    finally:
        torch.set_default_dtype(torch.float32)
    (eager, networks), (compiled, compiled_networks) = results
    for ours, theirs in zip(eager, compiled, strict=True):
        assert [*ours] == [*theirs]
        for name in ours:
            torch.testing.assert_close(theirs[name], ours[name], rtol=1e-7, atol=1e-9)
    for name, tensor in networks.items():
        if isinstance(tensor, torch.Tensor):
            torch.testing.assert_close(compiled_networks[name], tensor, rtol=1e-6, atol=1e-9)


@needs_a_compiler
def test_a_resumed_compiled_run_equals_an_unbroken_one(tmp_path):
    run = [*PENDULUM, "--compile"]
    unbroken = call_cup(*run, "--run-dir", tmp_path / "unbroken")
    assert unbroken.returncode == 0, unbroken.stderr
    for end in (600, 1000):
        typed = *run, "--run-dir", tmp_path / "resumed", "--resume", "--total-timesteps", end
        result = call_cup(*typed)
        assert result.returncode == 0, result.stderr
    last = [metrics(tmp_path / name)[-1] for name in ("unbroken", "resumed")]
    assert last[0] == last[1]


def test_without_a_compiler_it_is_a_sentence(monkeypatch):
    monkeypatch.setenv("PATH", "")
    result = call_cup(*PENDULUM, "--compile")
    assert result.returncode == 2
    assert "--compile needs a C++ compiler" in result.stderr
