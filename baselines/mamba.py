"""MAMBA (Cheng, Kolobov, Agarwal; NeurIPS 2020) on SAC, one of the paper's baselines.

V^k is the value of source k on the target task, and f(s) = max_k V^k(s) the baseline to improve
upon. The advantage over f of one step, and its generalisation, where lambda says how far to look:

    A(s, a) = r + gamma E[f(s')] - f(s),    A_lambda = sum_j (gamma lambda)^j A(s_j, a_j)

lambda = 0 improves on f by one step; lambda = 1 is reinforcement learning without f.

    python baselines/mamba.py --env-id push-wall-v2                   # the shipped source policies
    python baselines/mamba.py --env-id push-wall-v2 --gae-lambda 1    # what the roll-outs cost

It takes cup.py's arguments; those of the guidance (beta_1, beta_2, ...) have no effect.

As in the paper and its released code:
- Half of the episodes (the code: of the steps) are the learner's alone. In the others it acts until
  step t_e (roll-in), then a source, drawn uniformly, to the end (roll-out). Only the steps from t_e
  on train that source's V^k, on Monte-Carlo returns. A roll-in to the end is the learner's episode.
- Before that, every source has 16 roll-outs with t_e = 0 (the code: 2 iterations of 8).
- A source acts by samples, not by its mean.
- The V^k are networks of 256x256, trained by Adam at 1e-3, in 100 minibatches at a time.
- After a time limit the return goes on with V^k(s_T) as it is now; after a termination it ends.

Adapted to the SAC of cup.py:
- A_lambda is made for policy gradients. In SAC it is one changed line, the critic's target:
      y = r + gamma (1 - d) [(1 - lambda) f(s') + lambda (min Q(s', a') - alpha log pi(a'|s'))]
  because then Q - f is A_lambda, and f(s) does not matter to the actor. f has no entropy bonus.
- lambda is 0.98, slightly ahead of 0.9 on push-wall (README.md); the code's values are 0 to 0.9.
- The code does not train the learner during the first roll-outs; here it learns with lambda = 1.
- t_e is uniform over the episode (the length of the one that ended last), as in the paper. The
  code draws it geometrically, with the length of the learner's episodes as its mean, and cuts it at
  the last step: where every episode has 500 steps, 37 % of the roll-outs would be a single step.
- The 100 minibatches follow each roll-out; in the code, each iteration of eight episodes. There
  V^k also sees the time, which cup.py's observations do not have.
- All transitions are replayed, the roll-outs' too; MAMBA is on policy and learns from its own.
- Roll-outs count as environment steps. `train/return` and `train/success_rate` are means over the
  last 20 episodes, the roll-outs too; `train/learner_return` of the last 20 without a source.
"""

import math
import random
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cup


@dataclass
class Args(cup.Args):
    """Train a target policy that improves on the values of source policies (MAMBA)."""
    gae_lambda: float = 0.98  # lambda in A_lambda: 0 is one step of improvement on f, 1 is SAC's
    first_rollouts: int = 16  # roll-outs of every source, with t_e = 0, before f is used
    rollout_share: float = 0.5  # share of the later episodes that a source finishes, from t_e on
    value_updates: int = 100  # minibatches that train V^k when a roll-out of source k is over
    value_lr: float = 1e-3  # learning rate of every V^k

    def __post_init__(self):
        super().__post_init__()
        if not (0 <= self.gae_lambda <= 1 and 0 <= self.rollout_share <= 1):
            raise ValueError("--gae-lambda and --rollout-share must be from 0 to 1")
        if self.gae_lambda < 1 and self.first_rollouts < 1:
            raise ValueError("--first-rollouts 0 needs --gae-lambda 1: there is no f")
        if not (self.sources or self.num_random_sources):
            raise ValueError("MAMBA improves on source policies: name some with --sources")


@dataclass
class Episode:
    """The present episode of one environment."""
    source: int = 0  # k: the source that acts from step t_e on
    switch: float = math.inf  # t_e; infinity: the learner acts to the end
    length: int = 0  # steps so far
    total: float = 0.0  # sum of the rewards so far
    rollout: list[tuple] = field(default_factory=list)  # obs, next_obs, r, terminated since t_e


@dataclass
class Progress:
    """What a checkpoint holds beside weights, optimisers and buffers."""
    next_obs: Tensor  # (num_envs, obs_dim); another obs begins an episode, and so NaN does
    episodes: list[Episode | None]  # of the environments; None: it began among the random steps
    finished: list[int]  # roll-outs of every source
    scalars: dict[str, float]  # what `update` returns of the V^k; NaN: not known yet
    begun: int = 0  # roll-outs that have begun
    last_length: int = 1  # steps of the episode that ended last
    learner_returns: list[float] = field(default_factory=list)  # of its last 20 episodes


class Visits(NamedTuple):
    """States of roll-outs, which train V^k on the return discounted + factor V^k(last_obs)."""
    obs: Tensor  # (batch, obs_dim)
    last_obs: Tensor  # (batch, obs_dim), where the roll-out ended
    discounted: Tensor  # (batch,), the discounted rewards up to there
    factor: Tensor  # (batch,), discount factor at last_obs; 0 after a termination
    forecast: Tensor  # (batch,), V^k(obs) before it learnt from this roll-out


class Mamba(cup.Agent):
    """SAC with roll-outs of the sources, with their values, and with another target."""
    def __init__(self, args: Args, obs_dim: int, action_dim: int, sources: dict, device="cpu"):
        super().__init__(args, obs_dim, action_dim, {}, device)  # no sources: no guidance
        self.names, self.policies = list(sources), nn.ModuleList(sources.values()).to(device)
        networks = [cup.mlp(obs_dim, *args.hidden_sizes, 1).to(device) for _ in sources]
        # V^k: obs (batch, obs_dim) -> (batch, 1)
        self.values = nn.ModuleList(nn.Sequential(self.actor.standardize, n) for n in networks)
        parameters = [network.parameters() for network in networks]
        self.value_optimizers = [torch.optim.Adam(p, args.value_lr, fused=True) for p in parameters]
        self.optimizers += self.value_optimizers
        self.visits = [cup.ReplayBuffer(args.buffer_size, Visits) for _ in sources]
        kinds = "explained_variance", "largest"
        metrics = [f"value/{kind}/{name}" for kind in kinds for name in sources]
        scalars = dict.fromkeys(["train/learner_return", "loss/value", *metrics], math.nan)
        nothing = torch.full((args.num_envs, obs_dim), math.nan, device=device)
        self.progress = Progress(nothing, [None] * args.num_envs, [0] * len(sources), scalars)
        self.ended: list[Episode] = []  # seen by `act`, for the next `store`

    # ---- roll-in and roll-out --------------------------------------------------------------------
    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """The learner's actions; from step t_e on, samples from the source of the episode."""
        action, episodes = super().act(obs), self.progress.episodes
        for i, is_new in enumerate((obs != self.progress.next_obs).any(dim=1).tolist()):
            if is_new:
                if episodes[i] is not None:
                    self.ended.append(episodes[i])
                    self.progress.last_length = episodes[i].length
                episodes[i] = self.begin_episode()
            if episodes[i] is not None and episodes[i].length >= episodes[i].switch:
                mean, log_std = self.policies[episodes[i].source](obs[i : i + 1])
                action[i] = cup.squash(mean, log_std, torch.randn_like(mean))[0]
        return action

    def begin_episode(self) -> Episode:
        """Decide whether a source takes over, which one, and its first step t_e."""
        num_sources, progress = len(self.policies), self.progress
        # drawn from Python's generator: without roll-outs, torch's goes on as in SAC
        if progress.begun < self.args.first_rollouts * num_sources:
            source, t_e = progress.begun % num_sources, 0
        elif self.args.rollout_share and random.random() < self.args.rollout_share:
            source, t_e = random.randrange(num_sources), random.randrange(progress.last_length)
        else:
            return Episode()
        progress.begun += 1
        return Episode(source, t_e)

    def store(self, obs, action, next_obs, reward, terminated) -> None:
        """Put all transitions into the replay buffer, and learn from the episodes that ended."""
        super().store(obs, action, next_obs, reward, terminated)
        while self.ended:
            self.learn_from(self.ended.pop(0))
        rows = zip(obs, next_obs, reward.tolist(), terminated.tolist(), strict=True)
        for episode, row in zip(self.progress.episodes, rows, strict=True):
            if episode is not None:
                if episode.length >= episode.switch:
                    episode.rollout.append(row)
                episode.length += 1
                episode.total += row[2]
        self.progress.next_obs = next_obs.where(terminated.unsqueeze(1) == 0, math.nan)

    def learn_from(self, episode: Episode) -> None:
        """Train V^k on a roll-out of source k, or note the return of a learner's episode."""
        if episode.rollout:
            self.add_rollout(episode.source, episode.rollout)
            self.train_value(episode.source)
            self.progress.finished[episode.source] += 1
        else:
            returns = [*self.progress.learner_returns[-19:], episode.total]
            self.progress.learner_returns = returns
            self.progress.scalars["train/learner_return"] = sum(returns) / len(returns)

    # ---- values of the sources -------------------------------------------------------------------
    @torch.no_grad()
    def add_rollout(self, k: int, rollout: list[tuple]) -> None:
        """Put the states of a roll-out of source k among those that train V^k."""
        obs, next_obs, rewards, terminated = zip(*rollout, strict=True)
        discounted, factor, columns = 0.0, 1.0 - terminated[-1], []
        for reward in reversed(rewards):
            discounted, factor = reward + self.args.gamma * discounted, self.args.gamma * factor
            columns.append((discounted, factor))
        obs = torch.stack(obs)
        forecast = self.values[k](obs).squeeze(1)
        discounted, factor = forecast.new_tensor(columns[::-1]).T
        self.visits[k].add(Visits(obs, next_obs[-1].expand_as(obs), discounted, factor, forecast))

    @torch.no_grad()
    def returns_of(self, k: int, visits: Visits) -> Tensor:
        """Monte-Carlo returns (batch,) of source k."""
        return visits.discounted + visits.factor * self.values[k](visits.last_obs).squeeze(1)

    def train_value(self, k: int) -> None:
        """Regress V^k on the returns of source k."""
        buffer, scalars = self.visits[k], self.progress.scalars
        newest = (buffer.position - 1 - torch.arange(min(buffer.size, 1000))) % buffer.capacity
        recent = Visits(*(column[newest] for column in buffer.columns))
        returns = self.returns_of(k, recent)
        explained = 1 - (returns - recent.forecast).var(correction=0) / returns.var(correction=0)
        scalars[f"value/explained_variance/{self.names[k]}"] = explained.item()
        for _ in range(self.args.value_updates):
            visits = buffer.sample(self.args.batch_size)
            error = self.values[k](visits.obs).squeeze(1) - self.returns_of(k, visits)
            loss = error.square().mean()
            self.minimize(loss, self.value_optimizers[k])
            scalars["loss/value"] = loss.item()
        largest = self.source_values(self.buffer.sample(self.args.batch_size).obs).argmax(dim=1)
        for j, name in enumerate(self.names):
            scalars[f"value/largest/{name}"] = (largest == j).float().mean().item()

    def source_values(self, obs: Tensor) -> Tensor:
        """V^k(s) of every source, (batch, K), at obs (batch, obs_dim)."""
        return torch.cat([value(obs) for value in self.values], dim=1)

    # ---- the update ------------------------------------------------------------------------------
    @torch.no_grad()
    def td_target(self, batch: cup.Batch, alpha: Tensor) -> Tensor:
        """r + gamma (1 - d) [(1 - lambda) f(s') + lambda (soft value of s')], (batch,)."""
        lam = self.args.gae_lambda
        target = super().td_target(batch, alpha)
        if lam == 1 or min(self.progress.finished) < self.args.first_rollouts:
            return target
        f = self.source_values(batch.next_obs).amax(dim=1)
        one_step = batch.reward + self.args.gamma * (1 - batch.terminated) * f
        return (1 - lam) * one_step + lam * target

    def update(self, batch: cup.Batch, guide: bool = True) -> dict[str, Tensor | float]:
        """SAC's update with that target. Returns its scalars and what is known of the V^k."""
        return super().update(batch, guide=False) | self.progress.scalars

    # ---- checkpoints -----------------------------------------------------------------------------
    def get_extra_state(self) -> dict:
        visits = [([c[: x.size].clone() for c in x.columns], x.position) for x in self.visits]
        return super().get_extra_state() | {"progress": asdict(self.progress), "visits": visits}

    def set_extra_state(self, state: dict) -> None:
        super().set_extra_state(state)
        self.progress = Progress(**state["progress"])
        self.progress.episodes = [x and Episode(**x) for x in self.progress.episodes]
        for buffer, (rows, position) in zip(self.visits, state["visits"], strict=True):
            if rows:  # a source without a roll-out has none
                buffer.add(rows)
                buffer.position = position


if __name__ == "__main__":
    cup.main(Args, Mamba)
