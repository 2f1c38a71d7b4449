"""HAAR: hierarchy with advantage-based auxiliary rewards (Li et al., NeurIPS 2019), on SAC.

A high-level policy pi_h(z|s) picks a skill z, which acts for k steps: a segment. The skills begin
as the source policies and learn together with pi_h. Each step of a segment is rewarded with the
high level's advantage of the segment, not by the environment:

    A_h / k = R / k + gamma_h V_h(s_k) - V_h(s_0),    R the sum of the segment's rewards

    python baselines/haar.py --env-id push-wall-v2                    # skills from the sources
    python baselines/haar.py --env-id push-wall-v2 --freeze-skills    # only choose among them

As in the paper: k = 10, and every update computes A_h with the present V_h. (The released code, for
sparse rewards, drops R and gamma_h. The paper shortens k in training; here it stays.)

Adapted to the SAC of cup.py, where the original has TRPO:
- The high level is a discrete SAC at --q-lr; its values, of rewards R / k, have no entropy bonus.
- The low level is SAC, whose critic takes [one-hot z, action] for an action.
- The original's skills move by TRPO steps of 0.01 nats. Here their loss has a KL to a copy of them
  that follows slowly (without it: 15 nats in 250 updates), and they wait for --guidance-starts.
- Q_h learns from recent segments, because the worth of a skill changes with it, and not from the
  random actions before --learning-starts, which cup.py draws. The low critic does, with random z.
- Skills keep the sources' standardisation. A segment that a time limit cuts is not used.

Evaluations choose the best skill anew at every state; train/return is of skills that last k steps.
A run writes no policy.pt: the policy is pi_h and all skills, and a policy file holds one network.
Of cup.py's arguments --beta1, --beta2 and --soft-advantage have no effect.
"""

import copy
import math
import sys
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
    recent_steps: int = 50_000  # the last steps, whose segments train the high level
    anchor: float = 10.0  # weight of KL(skill || slow copy) in the skills' loss
    anchor_tau: float = 1e-4  # step of the slow copy towards the skill, in every update
    guidance_starts: int = 50_000  # steps before the skills and alpha learn, after their critic
    freeze_skills: bool = False  # leave the skills as the sources are

    def __post_init__(self):
        super().__post_init__()
        if not (self.sources or self.num_random_sources):
            raise ValueError("HAAR's skills begin as source policies: name some with --sources")
        if not 0 < self.k * self.num_envs <= self.learning_starts:
            raise ValueError("--k times --num-envs must be from 1 to --learning-starts")


class HierarchicalActor(nn.Module):
    """pi_h, and the skills."""
    def __init__(self, obs_dim: int, action_dim: int, hidden_sizes, standardize, sources):
        super().__init__()
        self.action_dim, self.standardize = action_dim, standardize
        self.net = cup.mlp(obs_dim, *hidden_sizes, len(sources))
        self.skills = nn.ModuleList(copy.deepcopy(s).requires_grad_(True) for s in sources)
        for skill in self.skills:
            # what the source ignored is let through, with weight 0 to begin with
            skill.net[0].weight.data[:, skill.standardize.scale == 0] = 0
            skill.standardize.notice(torch.ones(1, obs_dim))

    def high_log_prob(self, obs: Tensor) -> Tensor:
        """log pi_h(z|s), (batch, K)."""
        return F.log_softmax(self.net(self.standardize(obs)), dim=-1)

    def forward(self, obs: Tensor, z: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log-std (batch, action_dim) of skill z (batch,), or of the most probable."""
        z = self.high_log_prob(obs).argmax(dim=1) if z is None else z
        mean, log_std = (torch.empty(*z.shape, self.action_dim, device=z.device) for _ in range(2))
        for k, skill in enumerate(self.skills):
            mean[z == k], log_std[z == k] = skill(obs[z == k])
        return mean, log_std


class Segments(NamedTuple):
    """A minibatch of segments: k steps, or fewer up to a termination."""
    first: Tensor  # (batch, obs_dim), s_0
    obs: Tensor  # (batch, k + 1, obs_dim), s_0 ... s_k; after a termination not defined
    action: Tensor  # (batch, k, action_dim)
    z: Tensor  # (batch,), the skill; -1 if the actions were random
    length: Tensor  # (batch,), steps
    mean_reward: Tensor  # (batch,), R / k, also of a segment with fewer than k steps
    terminated: Tensor  # (batch,)


class HAAR(cup.Agent):
    """SAC on two levels; critic, target critic, alpha and target entropy are the low level's."""
    def __init__(self, args: Args, obs_dim: int, action_dim: int, sources: dict, device="cpu"):
        super().__init__(args, obs_dim, len(sources) + action_dim, {}, device)
        self.target_entropy, self.names = -float(action_dim), list(sources)
        shape = obs_dim, action_dim, args.hidden_sizes, self.actor.standardize
        self.actor = HierarchicalActor(*shape, sources.values())
        self.slow_actor = copy.deepcopy(self.actor).requires_grad_(False)  # of it, the skills
        sizes = obs_dim, *args.hidden_sizes, len(sources)
        self.high_critic = nn.ModuleList([cup.mlp(*sizes), cup.mlp(*sizes)])  # twin Q_h
        self.high_target = copy.deepcopy(self.high_critic)
        self.log_high_alpha = nn.Parameter(torch.zeros(()))  # large: at first all z are tried
        # ---- the present segment of every environment, as in `Segments`
        n, self.row = args.num_envs, torch.arange(args.num_envs)
        self.register_buffer("obs", torch.zeros(n, args.k + 1, obs_dim).double())
        self.register_buffer("action", torch.zeros(n, args.k, action_dim))
        self.register_buffer("z", torch.full((n,), -1))
        self.register_buffer("length", torch.zeros(n).long())
        self.register_buffer("reward", torch.zeros(n))  # the sum
        self.to(device)
        skills = self.actor.skills.parameters()
        high = [*self.high_critic.parameters(), *self.actor.net.parameters(), self.log_high_alpha]
        self.skill_optimizer = torch.optim.Adam(skills, args.policy_lr, fused=True)
        self.high_optimizer = torch.optim.Adam(high, args.q_lr, fused=True)
        self.optimizers = [self.critic_optimizer, self.skill_optimizer, self.alpha_optimizer,
                           self.high_optimizer]
        self.buffer = cup.ReplayBuffer(args.buffer_size // args.k, Segments)

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Sampled actions of the skills, of which pi_h picks one for every segment."""
        self.forget_cut(obs)
        self.length[self.z < 0] = 0  # random actions are forgotten too
        picked = torch.multinomial(self.actor.high_log_prob(obs).exp(), 1).squeeze(1)
        self.z = torch.where(self.length == 0, picked, self.z)
        mean, log_std = self.actor(obs, self.z)
        return cup.squash(mean, log_std, torch.randn_like(mean))[0]

    def store(self, obs, action, next_obs, reward, terminated) -> None:
        """Add a step to each environment's segment; those that end go to the replay buffer."""
        self.actor.standardize.notice(obs)
        self.forget_cut(obs)
        t = self.length
        self.obs[self.row, t], self.obs[self.row, t + 1] = obs, next_obs
        self.action[self.row, t] = action
        self.reward = torch.where(t == 0, reward, self.reward + reward)
        self.length = t + 1
        ends = (self.length == self.args.k) | (terminated == 1)
        columns = (self.obs[:, 0], self.obs, self.action, self.z, self.length,
                   self.reward / self.args.k, terminated)
        self.buffer.add(Segments(*(column[ends] for column in columns)))
        self.length[ends] = 0

    def forget_cut(self, obs: Tensor) -> None:
        """Empty a segment that a new episode cuts: obs is not where its last step led."""
        self.length[(obs != self.obs[self.row, self.length]).any(dim=1)] = 0

    def sample_recent(self) -> Segments:
        """A uniform minibatch of the last segments."""
        recent = min(self.buffer.size, self.args.recent_steps // self.args.k)
        age = torch.randint(recent, (self.args.batch_size,), device=self.z.device)
        index = (self.buffer.position - 1 - age) % self.buffer.capacity
        return Segments(*(column[index] for column in self.buffer.columns))

    def high_q(self, critic: nn.ModuleList, obs: Tensor) -> Tensor:
        """Q_h of all skills (2, batch, K), from its two networks."""
        return torch.stack([q(self.actor.standardize(obs)) for q in critic])

    @torch.no_grad()
    def high_value(self, critic: nn.ModuleList, obs: Tensor) -> Tensor:
        """V_h (batch,) = sum_z pi_h(z|s) min Q_h(s, z)."""
        return (self.actor.high_log_prob(obs).exp() * self.high_q(critic, obs).amin(dim=0)).sum(1)

    def update(self, batch: Segments, guide: bool = True) -> dict[str, Tensor]:
        """One gradient step of the high level, then one of the low level."""
        args, recent, num_skills = self.args, self.sample_recent(), len(self.names)
        # ---- high critic: y_h = R / k + gamma_h V_h(s_k); random actions (z = -1) do not count
        last_value = (1 - recent.terminated) * self.high_value(self.high_target, recent.obs[:, -1])
        target = recent.mean_reward + args.gamma_h * last_value
        q = self.high_q(self.high_critic, recent.first)  # (2, batch, K)
        error = q[:, torch.arange(len(target)), recent.z] - target  # (2, batch)
        high_critic_loss = ((recent.z >= 0) * error.square()).mean(dim=1).sum()

        # ---- high policy and its entropy weight: SAC's losses, with exact means over z; no
        # parameter is in two of the three losses, so one optimiser serves them
        high_alpha, min_q = self.log_high_alpha.detach().exp(), q.detach().amin(dim=0)
        log_prob = self.actor.high_log_prob(recent.first)  # (batch, K)
        high_actor_loss = (log_prob.exp() * (high_alpha * log_prob - min_q)).sum(dim=1).mean()
        share, log_prob = log_prob.detach().exp(), log_prob.detach()
        high_entropy = -(share * log_prob).sum(dim=1).mean()
        target_entropy = args.high_entropy * math.log(num_skills)
        high_alpha_loss = self.log_high_alpha.exp() * (high_entropy - target_entropy)
        self.minimize(high_critic_loss + high_actor_loss + high_alpha_loss, self.high_optimizer)

        # ---- low level: a step of each segment, and its reward A_h / k
        row, last = torch.arange(len(batch.z)), batch.obs[:, -1]
        t = (torch.rand_like(batch.mean_reward) * batch.length).long()  # (batch,)
        obs, next_obs, action = batch.obs[row, t], batch.obs[row, t + 1], batch.action[row, t]
        z = torch.where(batch.z < 0, torch.randint_like(batch.z, num_skills), batch.z)
        one_hot, is_last = F.one_hot(z, num_skills), t + 1 == batch.length
        last_value = (1 - batch.terminated) * self.high_value(self.high_critic, last)
        value = self.high_value(self.high_critic, batch.first)
        reward = batch.mean_reward + args.gamma_h * last_value - value

        # ---- low critic
        alpha = self.log_alpha.detach().exp()
        with torch.no_grad():
            picked = torch.multinomial(self.actor.high_log_prob(last).exp(), 1).squeeze(1)
            next_z = torch.where(is_last, picked, z)
            mean, log_std = self.actor(next_obs, next_z)
            next_action, log_prob = cup.squash(mean, log_std, torch.randn_like(mean))
            next_action = torch.cat([F.one_hot(next_z, num_skills), next_action], dim=1)
            next_value = self.target_critic.min_q(next_obs, next_action) - alpha * log_prob
            target = reward + args.gamma * (1 - batch.terminated * is_last) * next_value
        td_error = self.critic(obs, torch.cat([one_hot, action], dim=1)) - target  # (2, batch)
        critic_loss = td_error.square().mean(dim=1).sum()
        self.minimize(critic_loss, self.critic_optimizer)

        # ---- skills and their entropy weight: SAC's losses, and the KL to the slow copy
        mean, log_std = self.actor(obs, z)
        action, log_prob = cup.squash(mean, log_std, torch.randn_like(mean))
        q = self.critic.min_q(obs, torch.cat([one_hot, action], dim=1))
        actor_loss = (alpha * log_prob - q).mean()
        kl = cup.kl_divergence(mean, log_std, *self.slow_actor(obs, z)).mean()
        entropy = -log_prob.detach().mean()
        alpha_loss = self.log_alpha.exp() * (entropy - self.target_entropy)
        if guide and not args.freeze_skills:
            self.minimize(actor_loss + args.anchor * kl, self.skill_optimizer)
            self.minimize(alpha_loss, self.alpha_optimizer)

        # ---- target networks and the slow copy
        with torch.no_grad():
            for slow, online, tau in (
                (self.high_target, self.high_critic, args.tau),
                (self.target_critic, self.critic, args.tau),
                (self.slow_actor.skills, self.actor.skills, args.anchor_tau),
            ):
                for target, source in zip(slow.parameters(), online.parameters()):
                    target.lerp_(source, tau)
        info = {
            "loss/critic": critic_loss, "loss/actor": actor_loss, "alpha": alpha, "low/kl": kl,
            "entropy": entropy, "low/reward": reward.mean(), "low/reward_std": reward.std(),
            "loss/high_critic": high_critic_loss, "loss/high_actor": high_actor_loss,
            "high/alpha": high_alpha, "high/entropy": high_entropy, "high/value": value.mean(),
        }
        info |= {f"skill/selected/{name}": share[:, k].mean() for k, name in enumerate(self.names)}
        return {name: scalar.detach() for name, scalar in info.items()}


if __name__ == "__main__":
    cup.main(Args, HAAR)
