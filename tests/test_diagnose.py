"""benchmark/diagnose.py: what it says of the guidance, against plain calculations."""

import subprocess
import sys

import pytest
import torch
from by_hand import random_batch
from program import PENDULUM, call_cup

import cup
from benchmark import diagnose
from benchmark.transfer import read_csv

STATES, SOURCES, OBS, ACTIONS = 64, 3, 5, 2


def make_agent(**settings) -> cup.Agent:
    torch.manual_seed(0)
    settings |= {"hidden_sizes": (16,), "sources": (), "num_random_sources": SOURCES}
    args = cup.Args("Pendulum-v1", cuda=False, **settings)
    return cup.Agent(args, OBS, ACTIONS, cup.load_sources(args, OBS, ACTIONS))


def test_the_two_gradients_at_the_mean():
    """d/d mean of beta KL(N(mean, .) || N(m, s^2)) is beta (mean - m) / s^2; SAC's by hand."""
    agent, batch = make_agent(beta1=2.0, beta2=0.5), random_batch(STATES, OBS, ACTIONS, SOURCES)
    torch.manual_seed(3)
    states, (sac, kl) = diagnose.guidance_and_pull(agent, batch)
    assert 0 < (states["guidance"] < SOURCES).sum() < STATES
    torch.manual_seed(3)
    noise = torch.randn(1, STATES, ACTIONS)[0]
    mean, log_std = (x.detach() for x in agent.actor(batch.obs))
    for k, guide in enumerate(states["guidance"].tolist()):
        expected = torch.zeros(ACTIONS)
        if guide < SOURCES:
            distance = mean[k] - batch.source_mean[k, guide]
            variance = batch.source_log_std[k, guide].exp() ** 2
            expected = states["weight"][k] * distance / variance / STATES
        assert torch.allclose(kl[k], expected, atol=1e-6)
        own_mean = mean[k].clone().requires_grad_()
        action, log_prob = cup.squash(own_mean, log_std[k], noise[k])
        loss = agent.log_alpha.exp() * log_prob - agent.critic(batch.obs[k], action).min()
        (expected,) = torch.autograd.grad(loss / STATES, own_mean)
        assert torch.allclose(sac[k], expected, atol=1e-6)


def test_command_line(tmp_path):
    """With many actions there is no luck: the update's own estimate is the expectation."""
    run_dir = tmp_path / "run"
    flags = "--num-guidance-samples", "64", "--checkpoint-interval", "1000"
    assert call_cup(*PENDULUM, *flags, "--run-dir", run_dir).returncode == 0
    command = [sys.executable, diagnose.__file__, run_dir, "--states", "500", "--out", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    (row,) = read_csv(tmp_path / "diagnosis.csv")
    assert (row["env_id"], row["seed"], row["step"]) == ("Pendulum-v1", "1", "1000")
    assert 0 < float(row["selected"]) < 1
    assert 0 <= float(row["twins_agree"]) <= 1
    assert float(row["pull"]) > 0
    assert float(row["again"]) == pytest.approx(float(row["advantage"]), rel=0.1)
    assert f"pull {row['pull']}" in result.stdout
    diagnose.play(run_dir, 16, tmp_path / "figure4.csv")
    rows = read_csv(tmp_path / "figure4.csv")
    assert len(rows) == 3 * 200
    assert [row["candidate"] for row in rows[:3]] == ["random-1", "random-2", "target"]
    assert {row["advantage"] for row in rows[2::3]} == {"0"}


def test_what_it_cannot_look_into(tmp_path, monkeypatch, capsys):
    torch.save({"args": {}, "agent": {}, "sources": {}}, tmp_path / "checkpoint.pt")
    for run_dir in (tmp_path, tmp_path / "nowhere"):
        monkeypatch.setattr(sys, "argv", ["diagnose.py", str(run_dir)])
        with pytest.raises(SystemExit) as stop:
            diagnose.main()
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "no checkpoint of a CUP run" in line
