"""Is the guidance signal or noise, and how hard does it pull? Looks into checkpoints.

    python benchmark/diagnose.py runs/push-wall-v2__cup__1 ...

It draws states from a run's replay buffer and takes those at which a source is the
guidance policy. The columns:

- selected: their share of all states
- advantage: of that source over the target policy, as the update estimates it (Eq. 4)
- again: the same with fresh actions, so without the luck that made the source the best
- lasting: that by the target critic, a running average of the critic over some 200
  updates: what is left without the errors that come and go with every update
- twins_agree: where, with these, both critics put the source ahead; a quarter by chance
- weight, kl: beta_s (Eq. 12) and the KL (Eq. 9), means over those states
- pull: the KL term's gradient with respect to the policy's mean, as a multiple of the
  gradient of SAC's loss; well above 1, imitation overrules the critic

Prints the rows and brings benchmark/diagnosis.csv up to date with them.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import cup
from benchmark.transfer import update_csv

RUN = ["env_id", "seed", "beta1", "beta2", "step"]
FOUND = ["selected", "advantage", "again", "lasting", "twins_agree"]
FOUND += ["weight", "kl", "pull"]


@dataclass
class Args:
    """Look into the checkpoints of CUP runs."""

    run_dirs: tyro.conf.Positional[tuple[Path, ...]]
    """run directories of cup.py, with sources"""
    states: int = 8_192
    """states to look at"""
    fresh_samples: int = 64
    """actions of every candidate at each of them, for the second look"""
    output: Path = HERE / "diagnosis.csv"
    """where to write"""


def mean_gradient(agent: cup.Agent, batch: tuple[Tensor, ...]) -> tuple[Tensor, dict]:
    """Gradient (batch, action_dim) of the actor's loss at every state's pre-tanh mean.

    By one update of the agent, which thereby changes; with it comes what it logs.
    """
    means = []

    def keep(_module, _inputs, outputs):
        if outputs[0].requires_grad:  # the actor's loss, not the TD target
            outputs[0].retain_grad()
            means.append(outputs[0])

    agent.actor.register_forward_hook(keep)
    torch.manual_seed(0)  # the same actions, whatever beta_1 is
    info = agent.update(batch)
    return means[0].grad, info


@torch.no_grad()
def fresh_advantage(actor, critic, batch, source: Tensor, samples: int) -> Tensor:
    """Advantage (3, batch) of each state's `source` over the target policy `actor`.

    By the first critic, by the second, and by the lesser Q, which is what counts.
    """
    obs, source_mean, source_log_std = batch[0], *batch[-2:]
    row = torch.arange(len(obs))
    dists = (source_mean[row, source], source_log_std[row, source]), actor(obs)
    total = torch.zeros(3, len(obs))
    for _ in range(samples):
        noise = torch.randn_like(dists[1][0])
        q = [critic(obs, cup.squash(*dist, noise)[0]) for dist in dists]
        theirs, ours = (torch.cat([x, x.amin(dim=0, keepdim=True)]) for x in q)
        total += theirs - ours
    return total / samples


def diagnose(run_dir: Path, args: Args) -> dict[str, str]:
    """One row: what the run is, and what was found."""
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True, mmap=True)
    settings = cup.Args(**checkpoint["args"])
    sizes = next(iter(checkpoint["sources"].values()))["actor"]
    obs_dim, action_dim = sizes["obs_dim"], sizes["action_dim"]

    def load_agent(beta1: float) -> cup.Agent:
        agent = cup.Agent(replace(settings, beta1=beta1), obs_dim, action_dim)
        agent.load_state_dict(checkpoint["agent"])
        # a critic that takes a step before the guidance would not be the one asked again
        agent.critic_optimizer.param_groups[0]["lr"] = 0.0
        return agent

    rows = checkpoint["buffer"]
    buffer = cup.ReplayBuffer(
        len(rows), obs_dim, action_dim, len(checkpoint["sources"])
    )
    buffer.rows.copy_(rows)
    buffer.size = len(rows)
    torch.manual_seed(0)
    batch = buffer.sample(args.states)
    sac_gradient, _ = mean_gradient(load_agent(0.0), batch)
    gradient, info = mean_gradient(load_agent(settings.beta1), batch)
    best, guidance = info["advantage"].max(dim=1).values, info["guidance"]
    chosen = guidance < len(checkpoint["sources"])
    batch = [column[chosen] for column in batch]
    agent = load_agent(settings.beta1)
    again, lasting = (
        fresh_advantage(
            agent.actor, critic, batch, guidance[chosen], args.fresh_samples
        )
        for critic in (agent.critic, agent.target_critic)
    )

    def length(x: Tensor) -> Tensor:
        return x[chosen].norm(dim=1).mean()

    found = {
        "selected": chosen.float().mean(),
        "advantage": best[chosen].mean(),
        "again": again[2].mean(),
        "lasting": lasting[2].mean(),
        "twins_agree": (again[:2] > 0).all(dim=0).float().mean(),
        "weight": info["weight"][chosen].mean(),
        "kl": info["kl"][chosen].mean(),
        "pull": length(gradient - sac_gradient) / length(sac_gradient),
    }
    about = {name: str(checkpoint["args"][name]) for name in RUN[:-1]}
    about["step"] = str(checkpoint["step"])
    return about | {name: f"{value:.3g}" for name, value in found.items()}


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    try:
        rows = [diagnose(run_dir, args) for run_dir in args.run_dirs]
    except (OSError, StopIteration) as error:
        print(f"diagnose.py: no checkpoint with sources: {error}", file=sys.stderr)
        sys.exit(2)
    for row in rows:
        print(", ".join(f"{name} {value}" for name, value in row.items()))
    update_csv(args.output, RUN + FOUND, len(RUN), rows)


if __name__ == "__main__":
    main()
