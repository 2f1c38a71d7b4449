"""CUP pasted into somebody's SAC: at most 90 lines of cup.py, and ten lines in the host."""

import inspect
import runpy
from pathlib import Path

import torch

import cup

HOST = Path(__file__).with_name("plain_sac.py")
FUNCTIONS = [cup.squash, cup.expected_advantage, cup.guidance_policy, cup.guidance_weight]
FUNCTIONS += [cup.kl_divergence, cup.guidance_loss]
PASTED = "\n\n".join(inspect.getsource(function) for function in FUNCTIONS)
IMPORTS = """\
import math
from collections.abc import Callable
from torch import Tensor
from cup import load_policy
source = load_policy("source.pt")
"""
GUIDANCE = """\
    source_mean, source_log_std = source(b_obs)  # bounded: see `query_sources`
    dist = source_mean.clamp(-2.5, 2.5)[:, None], source_log_std.clamp(min=-1.5)[:, None]
    ours, rule = (noise[None], q[None], log_prob[None]), (0.0, 1.0, 0.03)
    kl_loss, states = guidance_loss(min_q, b_obs, mean, log_std, *dist, *ours, *rule)
    actor_loss = actor_loss + kl_loss
"""


def test_cup_pasted_into_it_guides(tmp_path, monkeypatch):
    assert len(PASTED.splitlines()) <= 90
    assert len((IMPORTS + GUIDANCE).splitlines()) <= 10
    text = HOST.read_text()
    for mark, lines in {"imports": IMPORTS, "functions": PASTED, "guidance": GUIDANCE}.items():
        assert text.count(f"# <{mark}>") == 1
        text = text.replace(f"# <{mark}>", lines.strip())
    (tmp_path / "guided_sac.py").write_text(text)
    torch.manual_seed(0)
    cup.save(cup.policy_content(cup.Actor(3, 1, [16])), tmp_path / "source.pt")

    monkeypatch.chdir(tmp_path)
    sac = runpy.run_path(str(HOST))
    assert torch.tensor(sac["losses"]).isfinite().all()
    cup_in_host = runpy.run_path("guided_sac.py")
    states = cup_in_host["states"]  # of the last minibatch
    selected = states["guidance"] == 0
    assert 0 < selected.float().mean() < 1
    assert ((states["weight"] > 0) == selected).all()
    assert ((states["kl"] > 0) == selected).all()
    assert cup_in_host["kl_loss"] > 0
    losses = torch.tensor(cup_in_host["losses"])
    assert losses.isfinite().all()
    assert losses[0, 0] == sac["losses"][0][0]  # the first critic update is the same
    assert losses[-1, 0] != sac["losses"][-1][0]
