"""MAMBA (Cheng, Kolobov, Agarwal; NeurIPS 2020) on SAC, one of the paper's baselines.

V^k is the value of source k on the target task, and f(s) = max_k V^k(s) the baseline to improve
upon. The advantage over f of one step, and its generalisation, where lambda says how far to look:

    A(s, a) = r + gamma E[f(s')] - f(s),    A_lambda = sum_j (gamma lambda)^j A(s_j, a_j)

lambda = 0 improves on f by one step, lambda = 1 is reinforcement learning without f.

    python baselines/mamba.py --env-id push-wall-v2                   # the shipped source policies
    python baselines/mamba.py --env-id push-wall-v2 --gae-lambda 1    # what the roll-outs cost

It takes cup.py's arguments; those of the guidance (beta_1, beta_2, ...) mean nothing here.

As in the paper and its released code:
- Half of the episodes are the learner's alone. In the others it acts until step t_e (roll-in), then
  a source, drawn uniformly, to the end (roll-out). Only the steps from t_e on train that source's
  V^k, on their Monte-Carlo returns, in 100 minibatches when the episode is over. The first two
  roll-outs of every source have t_e = 0. An episode that ends before t_e is the learner's.
- t_e is uniform over the episode (the paper; the released code draws it geometrically). The length
  of the episode that ended last stands for this one's.
- lambda is 0.9; the V^k are networks of 256x256, trained by Adam at 1e-3.
- A time limit is not an end: the return goes on with V^k(s_T) as it is now. After a termination
  nothing follows.

Adapted to the SAC of cup.py:
- A_lambda is made for policy gradients. In SAC it is one changed line, the critic's target:
      y = r + gamma (1 - d) [(1 - lambda) f(s') + lambda (min Q(s', a') - alpha log pi(a'|s'))]
  because then Q(s, a) - f(s) is A_lambda, and f(s) makes no difference to the actor. f is a value
  without entropy bonus.
- Until every source has finished a roll-out there is no f, and lambda is 1.
- All transitions are replayed, the roll-outs' too; MAMBA is on policy and learns from its own.
- Roll-outs count as environment steps. `train/return` and `train/success_rate` are means over the
  last 20 episodes, the roll-outs too; `train/learner_return` over the last 20 without a source.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cup


@dataclass
class Args(cup.Args):
    """Train a target policy that improves on the values of source policies (MAMBA)."""

    gae_lambda: float = 0.9  # lambda in A_lambda: 0 is one step of improvement on f, 1 is SAC
    rollout_share: float = 0.5  # share of the episodes that a source finishes, from step t_e on
    first_rollouts: int = 2  # roll-outs of every source with t_e = 0, before t_e is random
    value_updates: int = 100  # minibatches that train V^k when a roll-out of source k is over
    value_lr: float = 1e-3  # learning rate of every V^k

    def __post_init__(self):
        super().__post_init__()  # nothing is negative, and counts are not zero
        if max(self.gae_lambda, self.rollout_share) > 1:
            raise ValueError("--gae-lambda and --rollout-share must be from 0 to 1")
        if self.rollout_share == 0 and self.gae_lambda < 1:
            raise ValueError("without roll-outs there is no f: --rollout-share 0, --gae-lambda 1")
        if not (self.sources or self.num_random_sources or self.evaluate):
            raise ValueError("MAMBA improves on source policies: name some with --sources")


class Visits(NamedTuple):
    """States of roll-outs, which train V^k on the return discounted + factor V^k(last_obs)."""

    obs: Tensor  # (batch, obs_dim)
    last_obs: Tensor  # (batch, obs_dim), where the roll-out ended
    discounted: Tensor  # (batch,), the discounted rewards up to there
    factor: Tensor  # (batch,), discount factor at last_obs; 0 after a termination
    forecast: Tensor  # (batch,), V^k(obs) before it learnt from this roll-out


class Mamba(cup.Agent):
    """SAC with roll-outs of the sources, with their values, and with another target."""

    RECENT_STATES = 1_000  # of a source's roll-outs, for the explained variance of V^k
    # what `get_extra_state` saves beside networks and generator
    BOOKKEEPING = ("source", "switch", "steps", "returns", "paths", "last_length", "num_rollouts",
                   "learner_returns", "logged")

    def __init__(self, args: Args, obs_dim: int, action_dim: int, sources: dict, device="cpu"):
        super().__init__(args, obs_dim, action_dim, {}, device)  # no sources: no guidance
        self.names, self.source_policies = list(sources), list(sources.values())
        # roll-outs are decided by a generator of their own: without them, lambda = 1 is SAC bit
        # for bit
        self.generator = torch.Generator().manual_seed(cup.derive_seed(args.seed, 4))
        with torch.random.fork_rng([0] if args.cuda else []):
            torch.manual_seed(cup.derive_seed(args.seed, 5))
            networks = [cup.mlp(obs_dim, *args.hidden_sizes, 1) for _ in sources]
        # V^k(s): obs (..., obs_dim) -> (..., 1)
        self.values = nn.ModuleList(nn.Sequential(cup.Standardize(obs_dim), *n) for n in networks)
        self.values.to(device)
        self.value_optimizers = nn.ModuleList(
            cup.Adam(value.parameters(), args.value_lr) for value in self.values
        )

        # ---- the present episode of every environment
        self.source = [0] * args.num_envs  # k, if it is a roll-out
        self.switch = [math.inf] * args.num_envs  # t_e; infinity: the learner acts to the end
        self.steps = [0] * args.num_envs  # steps before the last action
        self.returns = [math.nan] * args.num_envs  # NaN: it began among the random steps
        self.paths = [[] for _ in range(args.num_envs)]  # obs, next_obs, r, terminated since t_e
        # ---- the episodes before
        self.last_length, self.num_rollouts = 0, 0
        self.learner_returns = []  # of the last 20
        shapes = Visits((obs_dim,), (obs_dim,), (), (), ())
        self.visits = nn.ModuleList(
            cup.ReplayBuffer(args.buffer_size, shapes, device) for _ in sources
        )
        self.logged = {}  # scalars that `update` returns beside SAC's

    # ------------------------------------ roll-in and roll-out ------------------------------------

    @torch.no_grad()
    def act(self, obs: Tensor, episode_steps: Sequence[int]) -> Tensor:
        """The learner's actions; from step t_e on, samples from the source of the episode."""
        action = super().act(obs, episode_steps)
        for i, step in enumerate(episode_steps):
            if step == 0:
                self.end_episode(i)
                self.begin_episode(i)
            if step >= self.switch[i]:
                mean, log_std = self.source_policies[self.source[i]](obs[i : i + 1])
                noise = torch.randn(mean.shape, generator=self.generator).to(mean.device)
                action[i] = cup.squash(mean, log_std, noise)[0]
        self.steps = list(episode_steps)
        return action

    def begin_episode(self, i: int) -> None:
        """Draw whether a source takes over, which one, and its first step t_e."""
        self.returns[i], self.switch[i] = 0.0, math.inf
        rolls_out, which, when = torch.rand(3, generator=self.generator).tolist()
        if rolls_out < self.args.rollout_share:
            num_sources = len(self.source_policies)
            self.source[i] = int(which * num_sources)
            self.switch[i] = int(when * self.last_length)
            if self.num_rollouts < self.args.first_rollouts * num_sources:
                self.source[i], self.switch[i] = self.num_rollouts % num_sources, 0
            self.num_rollouts += 1

    def store(self, obs, action, next_obs, reward, terminated) -> None:
        """Put all transitions into the replay buffer, and those since t_e aside for V^k."""
        super().store(obs, action, next_obs, reward, terminated)
        for i, step in enumerate(self.steps):
            self.returns[i] += reward[i].item()
            if step >= self.switch[i]:
                self.paths[i].append(
                    (obs[i].cpu(), next_obs[i].cpu(), reward[i].item(), terminated[i].item())
                )

    def end_episode(self, i: int) -> None:
        """Learn from a roll-out, or note the return of an episode that was the learner's."""
        self.last_length = self.steps[i] + 1
        if self.paths[i]:
            self.add_rollout(self.source[i], self.paths[i])
            self.train_value(self.source[i])
            self.paths[i] = []
        elif not math.isnan(self.returns[i]):
            self.learner_returns = [*self.learner_returns[-19:], self.returns[i]]
            mean_return = sum(self.learner_returns) / len(self.learner_returns)
            self.logged["train/learner_return"] = mean_return

    # ------------------------------------- values of sources -------------------------------------

    def add_rollout(self, k: int, path: list[tuple]) -> None:
        """Put the states of a roll-out of source k among those that train V^k."""
        obs, next_obs, rewards, terminated = zip(*path, strict=True)
        discounted, factor, columns = 0.0, 1.0 - terminated[-1], []
        for reward in reversed(rewards):
            discounted, factor = reward + self.args.gamma * discounted, self.args.gamma * factor
            columns.append((discounted, factor))
        device = self.log_alpha.device
        obs, last_obs = torch.stack(obs).to(device), next_obs[-1].to(device)
        discounted, factor = torch.tensor(columns[::-1], device=device).T
        forecast = self.values[k](obs).squeeze(1)
        self.visits[k].add(Visits(obs, last_obs.expand_as(obs), discounted, factor, forecast))

    @torch.no_grad()
    def returns_of(self, k: int, visits: Visits) -> Tensor:
        """Monte-Carlo returns (batch,) of source k."""
        return visits.discounted + visits.factor * self.values[k](visits.last_obs).squeeze(1)

    @torch.enable_grad()
    def train_value(self, k: int) -> None:
        """Regress V^k on the returns of source k."""
        buffer = self.visits[k]
        newest = buffer.position - 1 - torch.arange(min(buffer.size, self.RECENT_STATES))
        recent = Visits(*(column[newest % buffer.capacity] for column in buffer.columns))
        target = self.returns_of(k, recent)
        unexplained = (target - recent.forecast).var(correction=0)
        explained = 1 - unexplained / target.var(correction=0).clamp(min=1e-8)
        for _ in range(self.args.value_updates):
            visits = self.visits[k].sample(self.args.batch_size)
            error = self.values[k](visits.obs).squeeze(1) - self.returns_of(k, visits)
            loss = error.square().mean()
            self.value_optimizers[k].minimize(loss)
        self.logged["loss/value"] = loss.item()
        self.logged[f"value/explained_variance/{self.names[k]}"] = explained.item()

    # ----------------------------------------- the update -----------------------------------------

    @torch.no_grad()
    def td_target(self, batch: cup.Batch, alpha: Tensor) -> Tensor:
        """r + gamma (1 - d) [(1 - lambda) f(s') + lambda (soft value of s')], (batch,)."""
        lam = self.args.gae_lambda
        target = super().td_target(batch, alpha)
        if not all(visits.size for visits in self.visits):
            return target
        values = torch.cat([value(batch.next_obs) for value in self.values], dim=1)  # (batch, K)
        f, largest = values.max(dim=1)
        for k, name in enumerate(self.names):
            self.logged[f"value/largest/{name}"] = (largest == k).float().mean()
        one_step = batch.reward + self.args.gamma * (1 - batch.terminated) * f
        return (1 - lam) * one_step + lam * target

    def update(self, batch: cup.Batch, guide: bool = True) -> dict[str, Tensor | float]:
        """SAC's update with that target. Returns its scalars and what there is on the V^k."""
        return super().update(batch, guide=False) | self.logged

    def fit_standardization(self) -> None:
        super().fit_standardization()
        for value in self.values:
            value[0].fit(self.buffer.obs())

    # ---------------------------------------- checkpoints ----------------------------------------

    def get_extra_state(self) -> dict:
        ours = {name: getattr(self, name) for name in self.BOOKKEEPING}
        ours["generator"] = self.generator.get_state()
        return ours

    def set_extra_state(self, state: dict) -> None:
        self.generator.set_state(state["generator"])
        for name in self.BOOKKEEPING:
            setattr(self, name, state[name])


if __name__ == "__main__":
    cup.main(Args, Mamba)
