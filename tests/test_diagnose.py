"""benchmark/diagnose.py: what it says of the guidance, against plain calculations."""

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from program import PENDULUM, run_cup
from torch import nn

import cup
from benchmark import diagnose

SCRIPT = Path(diagnose.__file__)
STATES, SOURCES, OBS, ACTIONS = 64, 3, 5, 2
SETTINGS = cup.Args(hidden_sizes=(16,), beta1=2.0, beta2=0.5, alpha_lr=0.0)


def make_batch():
    obs, next_obs = torch.randn(2, STATES, OBS)
    reward, terminated = torch.randn(STATES), torch.zeros(STATES)
    mean, log_std = torch.randn(2, STATES, SOURCES, ACTIONS)
    action = torch.rand(STATES, ACTIONS)
    return obs, next_obs, action, reward, terminated, mean, log_std


def gradient(batch, **changes):
    torch.manual_seed(3)
    agent = cup.Agent(replace(SETTINGS, **changes), OBS, ACTIONS)
    mean, _ = agent.actor(batch[0])
    return mean.detach(), *diagnose.mean_gradient(agent, batch)


def test_the_kl_terms_share_of_the_gradient():
    """d/d mean of beta KL(N(mean, .) || N(m, s^2)) is beta (mean - m) / s^2."""
    torch.manual_seed(0)
    batch = make_batch()
    _, sac, _ = gradient(batch, beta1=0.0)
    mean, both, info = gradient(batch)
    found = both - sac
    assert 0 < (info["guidance"] < SOURCES).sum() < STATES
    for state, guide in enumerate(info["guidance"].tolist()):
        expected = torch.zeros(ACTIONS)
        if guide < SOURCES:
            distance = mean[state] - batch[-2][state, guide]
            variance = batch[-1][state, guide].exp() ** 2
            expected = info["weight"][state] * distance / variance / STATES
        assert torch.allclose(found[state], expected, atol=1e-6)


class Critics(nn.Module):
    """Q1 = the first action component, Q2 = -2 times the second."""

    def forward(self, obs, action):
        return torch.stack([action[..., 0], -2 * action[..., 1]])


def test_fresh_advantage_is_an_expectation():
    torch.manual_seed(0)
    agent, batch = cup.Agent(SETTINGS, OBS, ACTIONS), make_batch()
    source = torch.randint(SOURCES, (STATES,))
    found = diagnose.fresh_advantage(agent.actor, Critics(), batch, source, 4_000)
    mean, log_std = (x.detach() for x in agent.actor(batch[0]))
    for state in range(8):
        q = []
        k = source[state]
        for m, s in (
            (batch[-2][state, k], batch[-1][state, k]),
            (mean[state], log_std[state]),
        ):
            action = torch.tanh(m + s.exp() * torch.randn(40_000, ACTIONS))
            twins = action[:, 0], -2 * action[:, 1]
            q.append(torch.stack([*twins, torch.minimum(*twins)]).mean(dim=1))
        assert torch.allclose(found[:, state], q[0] - q[1], atol=0.1)


def train_and_diagnose(tmp_path, *flags):
    """What the program prints of a short run, and the row that it writes."""
    run_dir, output = tmp_path / "run", tmp_path / "diagnosis.csv"
    assert run_cup(*PENDULUM, *flags, "--run-dir", run_dir).returncode == 0
    command = [sys.executable, SCRIPT, run_dir, "--states", "500", "--output", output]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    with open(output, newline="") as file:
        (row,) = csv.DictReader(file)
    return result.stdout, row


def test_command_line(tmp_path):
    stdout, row = train_and_diagnose(tmp_path)
    assert (row["env_id"], row["seed"], row["step"]) == ("Pendulum-v1", "1", "1000")
    assert 0 < float(row["selected"]) < 1
    assert 0 <= float(row["twins_agree"]) <= 1
    assert float(row["pull"]) > 0
    assert f"pull {row['pull']}" in stdout


def test_with_many_actions_there_is_no_luck(tmp_path):
    """The update's own estimate is then the expectation, and asking again finds the same.

    A critic that had taken a step in between, here a large one, would say otherwise.
    """
    flags = "--num-guidance-samples", "64", "--q-lr", "0.3"
    _, row = train_and_diagnose(tmp_path, *flags)
    assert float(row["again"]) == pytest.approx(float(row["advantage"]), rel=0.1)


@pytest.mark.parametrize("what", ["nowhere", "without sources"])
def test_what_it_cannot_look_into(tmp_path, what):
    if what == "without sources":
        content = {"args": {}, "sources": {}}
        torch.save(content, tmp_path / "checkpoint.pt")
    run_dir = tmp_path if what == "without sources" else tmp_path / "nowhere"
    command = [sys.executable, SCRIPT, run_dir, "--output", tmp_path / "out.csv"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "no checkpoint with sources" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out.csv").exists()
