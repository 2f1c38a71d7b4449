"""HAAR: hierarchy with advantage-based auxiliary rewards (Li et al., NeurIPS 2019), on SAC.

    python baselines/haar.py --env-id push-wall-v2                    # skills from the sources
    python baselines/haar.py --env-id push-wall-v2 --freeze-skills    # only choose among them

A high-level policy pi_h(z|s) picks a skill z, which acts for k steps: a segment. The skills begin
as the source policies and learn together with pi_h: each step of a segment is rewarded with
A_h / k, the high level's advantage of the segment, instead of the environment's reward.

As in the paper: k = 10, both levels learn at once, and every update computes the low reward with
the present V_h. (The released code, for sparse rewards, drops R and gamma_h from A_h.) The paper
shortens k in training; here it stays.

Adapted to SAC, where the original has TRPO: the high level is a discrete SAC whose values have no
entropy bonus, because A_h is about rewards; the low level is cup.py's SAC on the states
[s, one-hot z]. Without a trust region a young critic would ruin the skills: they learn from
--guidance-starts on. They keep the sources' standardisation, but may learn to see what the
sources' own tasks never showed. Before --learning-starts actions are uniform, as in cup.py, under
random z; those segments, and those of skills as they were, are replayed like all others. With the
same seed the goals are those of SAC, the networks and the random actions are not.

It takes cup.py's arguments; of those of the guidance only --guidance-starts means something here.
Evaluations choose the best skill anew at every state; train/return is of skills that last k steps.
policy.pt holds both levels: neither --evaluate nor --sources takes it. `high/...`,
`loss/high_...` and `skill/selected/<source>`, the mean pi_h, are the high level's; `low/reward`,
`alpha`, `entropy`, `loss/critic` and `loss/actor` the low level's.
"""

import copy
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cup


@dataclass
class Args(cup.Args):
    """Train a policy over skills, and the skills, which begin as the sources (HAAR)."""

    k: int = 10  # steps that a skill lasts, k
    gamma_h: float = 0.99  # discount factor of the high level, from segment to segment, gamma_h
    high_entropy: float = 0.3  # target entropy of pi_h, as a fraction of log K
    freeze_skills: bool = False  # leave the skills as the sources are
    init_alpha: float = 0.01  # initial alpha of the skills: their rewards, advantages, are small
    guidance_starts: int = 50_000  # steps before the skills and alpha learn, after their critic

    def __post_init__(self):
        super().__post_init__()
        if max(self.gamma_h, self.high_entropy) > 1:
            raise ValueError("--gamma-h and --high-entropy must not exceed 1")
        if not (self.sources or self.num_random_sources or self.evaluate):
            raise ValueError("HAAR's skills begin as source policies: name some with --sources")
        if self.learning_starts <= self.k * self.num_envs and not self.evaluate:
            raise ValueError("--learning-starts must exceed --k times --num-envs: one segment")


class HierarchicalActor(cup.Actor):
    """pi_h, whose logits are this actor's own network, and the skills."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_sizes, sources):
        super().__init__(obs_dim, action_dim, hidden_sizes)
        self.net = cup.mlp(obs_dim, *hidden_sizes, len(sources))
        self.skills = nn.ModuleList(copy.deepcopy(s).requires_grad_(True) for s in sources)

    def high_log_prob(self, obs: Tensor) -> Tensor:
        """log pi_h(z|s), (batch, K)."""
        return F.log_softmax(self.net(self.standardize(obs)), dim=-1)

    def with_skill(self, obs: Tensor, z: Tensor) -> Tensor:
        """[s, one-hot z] (batch, obs_dim + K), what the low level sees, of z (batch,)."""
        return torch.cat([obs, F.one_hot(z, len(self.skills))], dim=1)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-std (batch, action_dim) at [s, one-hot z]; at s alone, of the best z."""
        if obs.shape[1] == self.obs_dim:
            obs = self.with_skill(obs, self.high_log_prob(obs).argmax(dim=1))
        mean, log_std = (obs.new_empty(len(obs), self.action_dim) for _ in range(2))
        for k, skill in enumerate(self.skills):
            rows = obs[:, self.obs_dim + k] == 1
            mean[rows], log_std[rows] = skill(obs[rows, : self.obs_dim])
        return mean, log_std


def high_value(log_prob: Tensor, q: Tensor) -> Tensor:
    """V_h (batch,) = sum_z pi_h(z|s) min Q_h(s, z), from (batch, K) and (2, batch, K)."""
    return (log_prob.exp() * q.amin(dim=0)).sum(dim=1)


def low_reward(
    mean_reward: Tensor, terminated: Tensor, first_value: Tensor, last_value: Tensor,
    gamma_h: float,
) -> Tensor:
    """A_h / k = R / k + gamma_h V_h(s_k) - V_h(s_0), all (batch,); V_h is that of rewards R / k."""
    return mean_reward + gamma_h * (1 - terminated) * last_value - first_value


class Steps(NamedTuple):
    """A minibatch of steps, each with what its segment was: s_0, s_k, R / k, and how it ended."""

    obs: Tensor  # (batch, obs_dim)
    next_obs: Tensor  # (batch, obs_dim)
    action: Tensor  # (batch, action_dim)
    mean_reward: Tensor  # (batch,)
    terminated: Tensor  # (batch,), after the segment
    first: Tensor  # (batch, obs_dim)
    last: Tensor  # (batch, obs_dim)
    z: Tensor  # (batch,), the skill, as a float
    is_last: Tensor  # (batch,), whether the step was the segment's last


class HAAR(cup.Agent):
    """SAC on two levels. What cup.Agent has, apart from the replay buffer, is the low level's."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int, sources: dict, device="cpu"):
        super().__init__(args, obs_dim + len(sources), action_dim, {}, device)
        self.sources = sources
        actor = HierarchicalActor(obs_dim, action_dim, args.hidden_sizes, sources.values())
        self.actor = actor.to(device)
        # obs (2, batch, obs_dim) -> twin Q_h of every skill (2, batch, K)
        net = cup.mlp(obs_dim, *args.hidden_sizes, len(sources), layer=cup.TwinLinear)
        self.high_critic = nn.Sequential(cup.Standardize(obs_dim), net).to(device)
        self.high_target = copy.deepcopy(self.high_critic).requires_grad_(False)
        self.log_high_alpha = nn.Parameter(torch.zeros((), device=device))  # all z tried at first
        self.actor_optimizer = cup.Adam(self.actor.skills.parameters(), args.policy_lr)
        self.high_actor_optimizer = cup.Adam(self.actor.net.parameters(), args.policy_lr)
        self.high_critic_optimizer = cup.Adam(self.high_critic.parameters(), args.q_lr)
        self.high_alpha_optimizer = cup.Adam([self.log_high_alpha], args.alpha_lr)
        state, scalar = (obs_dim,), ()
        shapes = Steps(state, state, (action_dim,), scalar, scalar, state, state, scalar, scalar)
        self.buffer = cup.ReplayBuffer(args.buffer_size, shapes, device)
        # in every environment: the skill, random until `act` chooses, and the segment so far
        self.register_buffer("z", torch.randint(len(sources), (args.num_envs,), device=device))
        self.segments = [[] for _ in range(args.num_envs)]  # of steps s, s', a, r, z

    @torch.no_grad()
    def act(self, obs: Tensor, episode_steps: Sequence[int]) -> Tensor:
        """Sampled actions of the skills, which pi_h chooses every k steps of an episode."""
        chosen = torch.multinomial(self.actor.high_log_prob(obs).exp(), 1).squeeze(1)
        begins = torch.tensor(episode_steps, device=obs.device) % self.args.k == 0
        self.z = torch.where(begins, chosen, self.z)
        return super().act(self.actor.with_skill(obs, self.z), episode_steps)

    def store(self, obs, action, next_obs, reward, terminated) -> None:
        """Add a step to every environment's segment; whole segments go to the replay buffer."""
        for i, step in enumerate(zip(obs, next_obs, action, reward, self.z.float(), strict=True)):
            # another state than the last step led to: a time limit has ended the episode
            if self.segments[i] and not torch.equal(obs[i], self.segments[i][-1][1]):
                self.end_segment(i, terminated=0.0)
            self.segments[i].append(step)
            if len(self.segments[i]) == self.args.k or terminated[i]:
                self.end_segment(i, terminated[i].item())
                self.z[i] = torch.randint(len(self.sources), ())

    def end_segment(self, i: int, terminated: float) -> None:
        """Put the steps of environment i's segment into the replay buffer."""
        obs, next_obs, action, reward, z = map(torch.stack, zip(*self.segments[i], strict=True))
        is_last = torch.zeros_like(z)
        is_last[-1] = 1
        self.buffer.add(Steps(
            obs, next_obs, action, mean_reward=reward.mean().expand_as(z),
            terminated=torch.full_like(z, terminated), first=obs[0].expand_as(obs),
            last=next_obs[-1].expand_as(obs), z=z, is_last=is_last,
        ))
        self.segments[i] = []

    def update(self, batch: Steps, guide: bool = True) -> dict[str, Tensor]:
        """One gradient step of the high level, then one of the low level."""
        args, actor, z = self.args, self.actor, batch.z.long()
        # ---- high critic: y_h = R / k + gamma_h V_h(s_k)
        with torch.no_grad():
            last_log_prob = actor.high_log_prob(batch.last)
            last = batch.last.expand(2, -1, -1)
            last_value = high_value(last_log_prob, self.high_critic(last))
            target = high_value(last_log_prob, self.high_target(last))
            target = batch.mean_reward + args.gamma_h * (1 - batch.terminated) * target
        q = self.high_critic(batch.first.expand(2, -1, -1))  # (2, batch, K)
        chosen = q.gather(2, z.expand(2, -1).unsqueeze(2)).squeeze(2)  # (2, batch)
        critic_loss = (chosen - target).square().mean(dim=1).sum()

        # ---- high policy and its entropy weight: SAC's losses, with the exact mean over z
        alpha, q = self.log_high_alpha.detach().exp(), q.detach()
        log_prob = actor.high_log_prob(batch.first)
        actor_loss = (log_prob.exp() * (alpha * log_prob - q.amin(dim=0))).sum(dim=1).mean()
        log_prob = log_prob.detach()
        entropy = -(log_prob.exp() * log_prob).sum(dim=1).mean()
        target_entropy = args.high_entropy * math.log(len(self.sources))
        alpha_loss = self.log_high_alpha.exp() * (entropy - target_entropy)
        self.high_critic_optimizer.minimize(critic_loss)
        self.high_actor_optimizer.minimize(actor_loss)
        self.high_alpha_optimizer.minimize(alpha_loss)
        with torch.no_grad():
            for slow, online in zip(self.high_target.parameters(), self.high_critic.parameters()):
                slow.lerp_(online, args.tau)

        # ---- low level: cup.py's update on [s, one-hot z], rewarded with A_h / k
        value = high_value(log_prob, q)
        reward = low_reward(batch.mean_reward, batch.terminated, value, last_value, args.gamma_h)
        info = {"loss/high_critic": critic_loss.detach(), "loss/high_actor": actor_loss.detach()}
        info |= {"high/alpha": alpha, "high/entropy": entropy, "high/value": value.mean()}
        info["low/reward"] = reward.mean()
        for name, share in zip(self.sources, log_prob.exp().mean(dim=0)):
            info[f"skill/selected/{name}"] = share
        if args.freeze_skills:
            return info
        # within a segment the same skill acts next, at its end one that pi_h picks
        next_z = torch.multinomial(last_log_prob.exp(), 1).squeeze(1)
        next_z = torch.where(batch.is_last == 1, next_z, z)
        states = actor.with_skill(batch.obs, z), actor.with_skill(batch.next_obs, next_z)
        # a policy that does not learn has the entropy it has: alpha would only drift
        self.actor_optimizer.lr = args.policy_lr * guide
        self.alpha_optimizer.lr = args.alpha_lr * guide
        low = cup.Batch(*states, batch.action, reward, batch.terminated * batch.is_last, None, None)
        return info | super().update(low, guide=False)

    def fit_standardization(self) -> None:
        obs = self.buffer.obs()
        for layer in (self.actor.standardize, self.high_critic[0], self.high_target[0]):
            layer.fit(obs)
        for network in (self.critic, self.target_critic):
            network.standardize.fit(F.pad(obs, (0, len(self.sources))))  # one-hot z stays one-hot
        ours = self.actor.standardize
        for skill in self.actor.skills:  # what the source ignored has weight 0, to begin with
            theirs, unseen = skill.standardize, skill.standardize.scale == 0
            skill.net[0].weight.data[:, unseen] = 0
            theirs.scale[unseen], theirs.shift[unseen] = ours.scale[unseen], ours.shift[unseen]

    def get_extra_state(self) -> list:
        return self.segments

    def set_extra_state(self, segments: list) -> None:
        device = self.z.device
        self.segments = [[tuple(x.to(device) for x in step) for step in s] for s in segments]


if __name__ == "__main__":
    cup.main(Args, HAAR)
