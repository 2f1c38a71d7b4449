"""PTF: Policy Transfer Framework (Yang et al., IJCAI 2020), on SAC, beside CUP.

    python baselines/ptf.py --env-id push-wall-v2          # with the shipped source policies
    python baselines/ptf.py --env-id push-wall-v2 --c 0    # no imitation: SAC, bit for bit

The target policy always acts. Sources are options: an option network learns by Q-learning what
each is worth and when to leave it, and the target policy imitates the best option at every state.

As in the paper and its released code: double Q-learning of the options that are compatible with
the action taken (and of the active one, as in the code), the termination loss with its adaptive
xi, active options that are chosen greedily ever more often, imitation by c f(t) (1 - beta) times
the KL from the source, with f falling over the episodes t. Both are slow: after 500,000 steps, or
1,000 episodes, f is 0.98 and half of the choices are greedy.

Adapted to SAC: the original is on policy (A3C, PPO); SAC learns from replay, where the active
option is an old choice, so the teacher at a state is the option that is best now. c is relative to
SAC's loss, not PPO's. The value head is linear, where the code's last version has a tanh,
which these returns would saturate. One optimiser serves both losses of the option network; its
target network follows slowly, as the critic's does. Sources are bounded as for CUP
(`cup.query_sources`), for the KL and for the question whether an action is theirs.

It takes cup.py's arguments; of the guidance's only --guidance-starts matters: imitation begins. It
logs `guidance/weight`, c f (1 - beta), `guidance/kl`, the KL from the teacher,
`guidance/selected/<source>`, the share of states at which it is the teacher,
`option/match/<source>`, the share of actions that are compatible with it, and
`option/termination`, the teacher's beta.
"""

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cup

GREEDY_STEP, GREEDY_MAX = 5e-4, 0.9  # share of greedy choices: what an episode adds, the most


@dataclass
class Args(cup.Args):
    """Train a target policy that imitates the best of its options, the sources (PTF)."""

    c: float = 1.0  # weight of the imitation, c in PTF's loss of the policy; 0 is SAC
    mu: float = 1e-3  # how fast imitation fades: f(t) = (1 + tanh(3 - mu t)) / 2, t in episodes
    # regularisation xi of the termination; by default 0.8 of the gap between the two best options
    xi: float | None = None
    option_lr: float = 5e-4  # learning rate of the option network

    def __post_init__(self):
        super().__post_init__()
        if not (self.sources or self.num_random_sources or self.evaluate):
            raise ValueError("PTF imitates source policies: name some with --sources")


class OptionNetwork(nn.Module):
    """obs (batch, obs_dim) -> value Q_o and probability to terminate beta_o, both (batch, n)."""

    def __init__(self, obs_dim: int, num_options: int, hidden_sizes):
        super().__init__()
        self.standardize = cup.Standardize(obs_dim)
        self.net = cup.mlp(obs_dim, *hidden_sizes, 2 * num_options)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        value, termination = self.net(self.standardize(obs)).chunk(2, dim=-1)
        return value, torch.sigmoid(termination)


def is_compatible(action: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Which sources could have taken the action (batch, action_dim): bool (batch, n).

    Those whose mean is within one standard deviation of it, before the tanh, in every dimension;
    mean, log_std (batch, n, action_dim).
    """
    low, high = torch.tanh(mean - log_std.exp()), torch.tanh(mean + log_std.exp())
    action = action.unsqueeze(1)
    return ((low <= action) & (action <= high)).all(dim=2)


def option_target(
    reward: Tensor, terminated: Tensor, next_value: Tensor, next_target_value: Tensor,
    termination: Tensor, gamma: float,
) -> Tensor:
    """y_o (batch, n): the option goes on with probability 1 - beta_o(s'), else the best follows.

    next_value chooses the best and next_target_value scores it (double Q-learning). reward,
    terminated (batch,), the others (batch, n).
    """
    best = next_target_value.gather(1, next_value.argmax(dim=1, keepdim=True))
    follow = (1 - termination) * next_target_value + termination * best
    return reward.unsqueeze(1) + gamma * (1 - terminated).unsqueeze(1) * follow


def termination_advantage(next_value: Tensor, xi: float | None) -> Tensor:
    """Q_o(s') - max Q(s') + xi, (batch, n): what an option gains by going on."""
    best = next_value.topk(min(2, next_value.shape[1]), dim=1).values
    margin = 0.8 * (best[:, :1] - best[:, -1:]) if xi is None else xi
    return next_value - best[:, :1] + margin


class OptionBatch(NamedTuple):
    """A `cup.Batch`, and the option that was active."""

    obs: Tensor
    next_obs: Tensor
    action: Tensor
    reward: Tensor
    terminated: Tensor
    source_mean: Tensor
    source_log_std: Tensor
    option: Tensor  # (batch,), its index as a float; -1 for none


class PTF(cup.Agent):
    """SAC with an option network, whose best option the actor imitates."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int, sources: dict, device="cpu"):
        super().__init__(args, obs_dim, action_dim, sources, device)
        # SAC's random numbers stay what they are without options
        with torch.random.fork_rng([0] if args.cuda else []):
            torch.manual_seed(cup.derive_seed(args.seed, 4))
            self.options = OptionNetwork(obs_dim, len(sources), args.hidden_sizes).to(device)
        self.target_options = copy.deepcopy(self.options).requires_grad_(False)
        self.option_optimizer = cup.Adam(self.options.parameters(), args.option_lr)
        state, dist, scalar = (obs_dim,), (len(sources), action_dim), ()
        shapes = OptionBatch(state, state, (action_dim,), scalar, scalar, dist, dist, scalar)
        self.buffer = cup.ReplayBuffer(args.buffer_size, shapes, device)
        self.generator = torch.Generator().manual_seed(cup.derive_seed(args.seed, 5))
        # the active option of every environment; none while the actions are random
        self.register_buffer("active", torch.full((args.num_envs,), -1))
        self.register_buffer("episodes", torch.tensor(0))

    @torch.no_grad()
    def act(self, obs: Tensor, episode_steps: Sequence[int]) -> Tensor:
        """The target policy's actions; beside that, options end and others become active."""
        value, termination = (x.cpu() for x in self.options(obs))
        num_envs, num_options = value.shape
        starts = torch.tensor(episode_steps) == 0
        self.episodes += starts.sum()
        chance = torch.rand(2, num_envs, generator=self.generator)
        # where no option is active, -1 reads the last one's; the choice below overrides it
        ends = chance[0] < termination[torch.arange(num_envs), self.active]
        greedy = chance[1] < min(GREEDY_MAX, GREEDY_STEP * self.episodes.item())
        other = torch.randint(num_options, (num_envs,), generator=self.generator)
        choice = torch.where(greedy, value.argmax(dim=1), other)
        self.active = torch.where(starts | ends | (self.active < 0), choice, self.active)
        return super().act(obs, episode_steps)

    def store(self, obs, action, next_obs, reward, terminated) -> None:
        dists = cup.query_sources(self.sources, obs, action.shape[1])
        option = self.active.to(obs)  # as float, on its device
        self.buffer.add(OptionBatch(obs, next_obs, action, reward, terminated, *dists, option))

    def update(self, batch: OptionBatch, guide: bool = True) -> dict[str, Tensor]:
        """One gradient step of the options, then one of SAC, whose actor imitates the best."""
        args = self.args
        row = torch.arange(len(batch.option), device=batch.option.device)
        alpha = self.log_alpha.detach().exp()

        # ---- options: the values of those that fit the action, and the active one's termination
        value, termination = self.options(batch.obs)  # (batch, n)
        next_value, next_termination = self.options(batch.next_obs)
        with torch.no_grad():
            next_target_value, _ = self.target_options(batch.next_obs)
            target = option_target(
                batch.reward, batch.terminated, next_value, next_target_value, next_termination,
                args.gamma,
            )
            match = is_compatible(batch.action, batch.source_mean, batch.source_log_std)
            index = torch.arange(len(self.sources), device=row.device)
            active = batch.option.unsqueeze(1) == index
            advantage = termination_advantage(next_value, args.xi)
            may_end = active * (1 - batch.terminated).unsqueeze(1)
        option_loss = ((match | active) * (target - value).square()).sum(dim=1).mean()
        termination_loss = (may_end * next_termination * advantage).sum(dim=1).mean()
        self.option_optimizer.minimize(option_loss + termination_loss)
        teacher = value.detach().argmax(dim=1)
        teacher_termination = termination.detach()[row, teacher]

        # ---- critic: L_critic, as in cup.py
        td_error = self.critic(batch.obs, batch.action) - self.td_target(batch, alpha)
        critic_loss = td_error.square().mean(dim=1).sum()
        self.critic_optimizer.minimize(critic_loss)

        # ---- actor: L_actor + c f(t) (1 - beta_o(s)) KL(pi_o || pi)
        mean, log_std = self.actor(batch.obs)
        noise = torch.randn(1, *mean.shape, device=mean.device)
        action, log_prob = cup.squash(mean, log_std, noise)
        actor_loss = (alpha * log_prob - self.critic.min_q(batch.obs.unsqueeze(0), action)).mean()
        fade = (1 + torch.tanh(3 - args.mu * self.episodes)) / 2  # f(t)
        weight = args.c * fade * (1 - teacher_termination) * guide  # (batch,)
        teacher_dist = batch.source_mean[row, teacher], batch.source_log_std[row, teacher]
        kl = cup.kl_divergence(*teacher_dist, mean, log_std)  # (batch,), the source in front
        kl_loss = (weight * kl).mean()
        self.actor_optimizer.minimize(actor_loss + kl_loss)

        # ---- entropy weight: L_entropy, as in cup.py
        entropy = -log_prob.detach().mean()
        alpha_loss = self.log_alpha.exp() * (entropy - self.target_entropy)
        self.alpha_optimizer.minimize(alpha_loss)

        # ---- target networks
        with torch.no_grad():
            for slow, fast in (
                (self.target_critic, self.critic), (self.target_options, self.options)
            ):
                for target, online in zip(slow.parameters(), fast.parameters()):
                    target.lerp_(online, args.tau)

        info = {
            "loss/critic": critic_loss, "loss/actor": actor_loss, "loss/kl": kl_loss,
            "loss/option": option_loss, "loss/termination": termination_loss,
            "alpha": alpha, "entropy": entropy, "guidance/weight": weight.mean(),
            "guidance/kl": kl.mean(), "option/termination": teacher_termination.mean(),
        }
        for k, name in enumerate(self.sources):
            info[f"guidance/selected/{name}"] = (teacher == k).float().mean()
            info[f"option/match/{name}"] = match[:, k].float().mean()
        return {name: scalar.detach() for name, scalar in info.items()}

    def fit_standardization(self) -> None:
        super().fit_standardization()
        for network in (self.options, self.target_options):
            network.standardize.fit(self.buffer.obs())

    def get_extra_state(self) -> dict:
        return {"generator": self.generator.get_state()}

    def set_extra_state(self, state: dict) -> None:
        self.generator.set_state(state["generator"])


if __name__ == "__main__":
    cup.main(Args, PTF)
