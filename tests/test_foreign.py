"""What users bring along: the code blocks of sources/README.md run here as they are printed."""

import re
from unittest import mock

import gymnasium as gym
import numpy as np
import pytest
import torch
from program import ROOT, metrics, succeed

import cup

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
    _, expected, _ = model.actor.get_action_dist_params(OBS)
    torch.testing.assert_close(log_std, expected, rtol=0.05, atol=0.02)


def test_a_torch_mlp_becomes_a_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, names = readme_block("# torch MLP -> source"), {}
    exec(code[: code.index("mlp.load_state_dict")], names)
    torch.save(names["mlp"].state_dict(), "mlp.pt")
    exec(code, names)
    mean, log_std = cup.load_policy("from_mlp.pt")(OBS)
    torch.testing.assert_close(mean.tanh(), names["mlp"](OBS).detach(), rtol=0, atol=1e-4)
    torch.testing.assert_close(log_std, torch.full_like(log_std, -1.5), rtol=0, atol=0.01)


@mock.patch.dict(gym.registry)  # to which the environment is added for this test alone
def test_an_environment_and_a_controller_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_env.py").write_text(readme_block("# my_env.py"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(readme_block("# controller -> source"), {})
    succeed(*readme_block("python cup.py --env-id my_env:").split()[2:], "--threads", 1)
    about = cup.load_policy("cloned/my_env:Reach-v0.pt").about
    assert about["success_rate"] == about["sampled_success_rate"] == 1
    rows = metrics(tmp_path / "runs" / "my_env:Reach-v0__sac__1")
    success = [float(row["eval/success_rate"]) for row in rows if row["eval/success_rate"]]
    assert success[0] < 0.5 and success[-1] > 0.8
