"""One block of cup.py, pasted into another SAC with a few lines around it, guides it."""

import runpy
from pathlib import Path

import torch

import cup

HOST = Path(__file__).with_name("plain_sac.py")
CUP = Path(cup.__file__).read_text()
WRITTEN = {
    # the comment above `squash`, and all functions up to the end of `guidance_loss`
    "functions": CUP[CUP.index("# ---- CUP:") : CUP.index("@torch.no_grad()\ndef query_sources")],
    "imports": """\
import math
from torch import Tensor
from cup import load_policy
source = load_policy("source.pt")
""",
    "guidance": """\
    source_mean, source_log_std = source(obs)
    kl_loss, per_state = guidance_loss(
        critic=min_q, obs=obs, mean=mean, log_std=log_std,
        source_mean=source_mean.clamp(-2.5, 2.5).unsqueeze(1),
        source_log_std=source_log_std.clamp(min=-1.5).unsqueeze(1),
        noise=noise, q=q, log_prob=log_prob, alpha=0.0, beta1=1.0, beta2=0.5,
    )
    actor_loss = actor_loss + kl_loss
    logged |= {"loss/kl": kl_loss.item()} | per_state
""",
}


def test_cup_pasted_into_it_guides(tmp_path, monkeypatch):
    text = HOST.read_text()
    for mark, lines in WRITTEN.items():
        assert text.count(f"# <{mark}>\n") == 1
        text = text.replace(f"# <{mark}>", lines.strip())
    monkeypatch.chdir(tmp_path)
    Path("guided_sac.py").write_text(text)
    torch.manual_seed(0)
    cup.save(cup.policy_content(cup.Actor(10, 2, [16])), Path("source.pt"))

    scripts = str(HOST), "guided_sac.py"
    sac, guided = (runpy.run_path(x, run_name="__main__")["logs"] for x in scripts)
    assert all(torch.tensor(list(row.values())).isfinite().all() for row in sac)
    assert sac[0]["loss/critic"] == guided[0]["loss/critic"]
    assert sac[-1]["loss/critic"] != guided[-1]["loss/critic"]
    selected = guided[-1]["guidance"] == 0  # in the last minibatch
    assert 0 < selected.float().mean() < 1 and guided[-1]["loss/kl"] > 0
    assert torch.equal(guided[-1]["weight"] > 0, selected)
    assert torch.equal(guided[-1]["kl"] > 0, selected)
