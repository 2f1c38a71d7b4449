"""MULTIPOLAR (Barekatain, Yonetani, Hamaya; IJCAI 2020) on SAC, one of the paper's baselines.

The target policy's mean is a weighted mean of what the K sources would do, plus a residual:

    mu(s) = 1/K sum_k theta_k * A_k(s) + F(s)

A_k(s) is source k's action, F is a network, and the product is per action dimension.

    python baselines/multipolar.py --env-id push-wall-v2    # with the shipped source policies

It takes cup.py's arguments; those of the guidance (beta_1, beta_2, ...) have no effect.

As in the paper and its released code:
- theta is (K, action_dim), does not depend on the state, starts at ones, and has no softmax.
- A_k is deterministic, and no gradient reaches a source.
- F and the log-std are two heads of one network, whose input is the observation alone.
- theta, F and the log-std learn from SAC's actor loss, with the actor's learning rate. The critic
  is SAC's. The aggregate acts from the first step after the random ones.

Adapted to the SAC of cup.py:
- The released code puts the sources' *squashed* actions into the mean before the tanh, which
  squashes them again: an action of 0.91 = tanh(1.5) becomes 0.72. Here A_k is the source's mean
  before the tanh, clipped as in CUP, so that the policy can represent a source exactly.
- F has the soft bound of `cup.Actor`; the sum has none.

The actor is evaluated at s and at s', so every update evaluates each source twice. A run writes no
policy.pt: the policy is F, theta and all sources, and a policy file holds one network.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cup


@dataclass
class Args(cup.Args):
    """Train a target policy that aggregates source policies (MULTIPOLAR)."""
    def __post_init__(self):
        super().__post_init__()
        if not (self.sources or self.num_random_sources):
            raise ValueError("MULTIPOLAR aggregates source policies: name some with --sources")


class Aggregate(nn.Module):
    """The target policy: obs (batch, obs_dim) -> mean, log_std (batch, action_dim)."""
    def __init__(self, residual: cup.Actor, sources: dict[str, cup.Actor]):
        super().__init__()
        self.residual, self.action_dim = residual, residual.action_dim
        self.standardize = residual.standardize
        self.sources = nn.ModuleList(sources.values()).requires_grad_(False)
        self.theta = nn.Parameter(torch.ones(len(sources), self.action_dim))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        residual, log_std = self.residual(obs)  # F(s)
        # A_k(s), (batch, K, action_dim), before the tanh; the sources' log-stds are not used
        action, _ = cup.query_sources(self.sources, obs, self.action_dim)
        # theta is divided, not the sum: with theta = K e_k, source k is exact to the last bit
        aggregate = (self.theta / len(self.sources) * action).sum(dim=1)
        return aggregate + residual, log_std


class Multipolar(cup.Agent):
    """SAC with another actor."""
    def __init__(self, args: Args, obs_dim: int, action_dim: int, sources: dict, device="cpu"):
        super().__init__(args, obs_dim, action_dim, {}, device)  # no sources: no guidance
        self.actor = Aggregate(self.actor, sources).to(device)  # F starts as SAC's actor
        learnt = [p for p in self.actor.parameters() if p.requires_grad]
        self.actor_optimizer = torch.optim.Adam(learnt, args.policy_lr, fused=True)
        self.optimizers[0] = self.actor_optimizer  # the old actor's
        self.theta_names = [f"theta/{name}/{i}" for name in sources for i in range(action_dim)]

    def update(self, batch: cup.Batch, guide: bool = True) -> dict[str, Tensor]:
        """SAC's update. Returns its scalars and every theta, by source and action dimension."""
        info = super().update(batch, guide=False)
        theta = self.actor.theta.detach().flatten()
        return info | dict(zip(self.theta_names, theta, strict=True))


if __name__ == "__main__":
    cup.main(Args, Multipolar)
