"""What users bring along: the code blocks of sources/README.md run here as they are printed."""

import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import cup

ROOT = Path(__file__).parents[1]
OBS = torch.randn(1000, 3, generator=torch.Generator().manual_seed(1))
OBS *= torch.logspace(-1, 1, 1000)[:, None]


def readme_block(first_words: str) -> str:
    """The fenced code block of the README that begins with these words."""
    readme = (ROOT / "sources" / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    return next(block for block in blocks if block.startswith(first_words))


def test_a_stable_baselines3_policy_becomes_a_source(tmp_path, monkeypatch):
    sb3 = pytest.importorskip("stable_baselines3")
    monkeypatch.chdir(tmp_path)
    model = sb3.SAC("MlpPolicy", "Pendulum-v1", seed=2, device="cpu")
    with torch.no_grad():  # as far out as the head of a trained policy
        model.actor.mu.weight.mul_(20)
        model.actor.log_std.bias.fill_(-3)
    model.save("sac.zip")
    exec(readme_block("# stable-baselines3 policy -> source"), {})
    mean, log_std = cup.load_policy("from_sb3.pt")(OBS)
    theirs = model.predict(OBS.numpy(), deterministic=True)[0] / 2  # its actions reach from -2 to 2
    assert np.abs(theirs).max() > 0.99 and np.abs(theirs).min() < 0.1
    np.testing.assert_allclose(mean.tanh(), theirs, rtol=0, atol=1e-4)
    expected = model.actor.get_action_dist_params(OBS)[1]
    torch.testing.assert_close(log_std, expected, rtol=0.05, atol=0.02)


def test_a_torch_mlp_becomes_a_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hidden = nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()
    mlp = nn.Sequential(*hidden, nn.Linear(64, 1), nn.Tanh()).requires_grad_(False)
    torch.save(mlp.state_dict(), "mlp.pt")
    exec(readme_block("# torch MLP -> source"), {})
    mean, log_std = cup.load_policy("from_mlp.pt")(OBS)
    torch.testing.assert_close(mean.tanh(), mlp(OBS), rtol=0, atol=1e-4)
    torch.testing.assert_close(log_std, torch.full_like(log_std, -1.5), rtol=0, atol=0.01)


def test_an_environment_and_a_controller_of_ones_own(tmp_path):
    for name in "cup.py", "train_sources.py":
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "my_env.py").write_text(readme_block("# my_env.py"))
    (tmp_path / "clone.py").write_text(readme_block("# controller -> source"))
    command = readme_block("python cup.py --env-id my_env:").split()[1:]
    for arguments in ["clone.py"], [*command, "--threads", "1"]:
        subprocess.run([sys.executable, *arguments], cwd=tmp_path, timeout=300, check=True)
    about = cup.load_policy(tmp_path / "cloned" / "my_env:Reach-v0.pt").about
    assert about["success_rate"] == about["sampled_success_rate"] == 1
    with open(tmp_path / "runs" / "my_env:Reach-v0__sac__1" / "metrics.csv") as file:
        success = [row["eval/success_rate"] for row in csv.DictReader(file)]
    assert float(success[0]) < 0.5 and float(success[-1]) > 0.8
