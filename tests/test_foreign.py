"""What users bring along: policies of other libraries, environments and versions of their own.

The code is that of sources/README.md: its blocks run here as they are printed.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from program import metrics
from torch import nn

import cup

ROOT = Path(__file__).parents[1]
OBS = torch.randn(1000, 3, generator=torch.Generator().manual_seed(1))
OBS *= torch.logspace(-1, 1, 1000)[:, None]


def readme_block(first_line: str) -> str:
    """The fenced code block of the README that begins with this line."""
    readme = (ROOT / "sources" / "README.md").read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    return next(block for block in blocks if block.startswith(first_line))


def convert(first_line: str, written: str) -> cup.Actor:
    """Run such a block, at most ten lines after its title, and open the policy it writes."""
    code = readme_block(first_line)
    assert len(code.splitlines()) <= 11
    exec(code, {})
    return cup.load_policy(written)


def test_a_stable_baselines3_policy_becomes_a_source(tmp_path, monkeypatch):
    sb3 = pytest.importorskip("stable_baselines3")
    monkeypatch.chdir(tmp_path)
    options = {"learning_starts": 50, "batch_size": 32, "seed": 1, "device": "cpu"}
    model = sb3.SAC("MlpPolicy", "Pendulum-v1", **options)
    model.learn(100)
    with torch.no_grad():  # as far out as the head of a trained policy
        model.actor.mu.weight.mul_(20)
        model.actor.log_std.bias.fill_(-3)
    model.save("sac.zip")
    actor = convert("# stable-baselines3 policy -> source", "from_sb3.pt")
    mean, log_std = actor(OBS)
    low, high = model.action_space.low, model.action_space.high
    theirs, _ = model.predict(OBS.numpy(), deterministic=True)
    theirs = 2 * (theirs - low) / (high - low) - 1
    assert np.abs(theirs).max() > 0.99 and np.abs(theirs).min() < 0.1
    assert np.abs(mean.tanh().numpy() - theirs).max() < 1e-4
    expected = model.actor.get_action_dist_params(OBS)[1]
    torch.testing.assert_close(log_std, expected, rtol=0.05, atol=0.02)


def test_a_torch_mlp_becomes_a_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    hidden = nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()
    mlp = nn.Sequential(*hidden, nn.Linear(64, 1), nn.Tanh())
    torch.save(mlp.state_dict(), "mlp.pt")
    actor = convert("# torch MLP -> source", "from_mlp.pt")
    mean, log_std = actor(OBS)
    with torch.no_grad():
        assert (mean.tanh() - mlp(OBS)).abs().max() < 1e-4
    torch.testing.assert_close(log_std, torch.full_like(log_std, -1.5), rtol=0, atol=0.01)
    args = cup.Args(env_id="Pendulum-v1", sources=("from_mlp.pt",))
    assert list(cup.load_sources(args, 3, 1)) == ["from_mlp"]


def test_an_environment_of_ones_own_runs_as_printed(tmp_path):
    shutil.copy(ROOT / "cup.py", tmp_path)
    (tmp_path / "my_env.py").write_text(readme_block("# my_env.py"))
    command = readme_block("PYTHONPATH=. python cup.py --env-id my_env:")
    python = f"{shlex.quote(sys.executable)} "
    command = re.sub(r"\bpython ", lambda _: python, command)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "env": environment}
    result = subprocess.run(command, shell=True, timeout=300, check=False, **options)
    assert result.returncode == 0, result.stderr
    rows = metrics(tmp_path / "runs" / "my_env-Reach-v0__sac__1")
    rows = [row for row in rows if row["eval/return"]]
    assert float(rows[-1]["eval/success_rate"]) >= 0.9
    assert float(rows[-1]["eval/return"]) > 0.5 * float(rows[0]["eval/return"])  # both negative
