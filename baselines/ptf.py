"""PTF: Policy Transfer Framework (Yang et al., IJCAI 2020), on SAC, one of the paper's baselines.

The target policy always acts. Sources are options: an option network learns by Q-learning what
each is worth and when to leave it, and the target policy imitates the best option at every state:

    L_actor + c f(x) (1 - beta_o(s)) KL(pi_o || pi),    o = argmax Q_o(s)

    python baselines/ptf.py --env-id push-wall-v2          # with the shipped source policies
    python baselines/ptf.py --env-id push-wall-v2 --c 0    # no imitation: SAC, bit for bit

It takes cup.py's arguments; of those of the guidance only --guidance-starts has an effect: it is
when imitation begins.

As in the paper and its released code:
- Double Q-learning of the options that are compatible with the action taken, and, as in the code,
  of the active option.
- The termination loss of the active option, with the code's adaptive xi.
- Active options are chosen greedily ever more often, and imitation fades.

In the weight of the KL the two differ, and the paper counts: f (1 - beta). The code weighs it by f
alone: A3C has 1 - beta in a comment, PPO is given the terminations and does not use them.

Adapted to the SAC of cup.py:
- The clock is x, the fraction of the run that is over. The code's is t, in episodes: a run of
  500,000 steps here has 1,000 of them, its commands 20,000 (grid, pinball) or 10,000 (reacher), so
  that f would end at 0.99. The code has f = (1 + tanh(3 - 0.0005 t)) / 2 and a greedy share of
  0.001 t (pinball with PPO 0.0005 t, reacher 0.01 t). With t = 20,000 x these are mu = 10 and
  GREEDY_SLOPE = 20 (reacher: 5 and 100). Longer --total-timesteps with --resume set x back.
- The original is on policy (A3C, PPO). SAC learns from replay, where the active option is an old
  choice, so the teacher at a state is the option that is best now. The termination loss is replayed
  too, of the option that was active.
- c is relative to SAC's loss, not to A3C's or PPO's.
- The value head is linear; the code has a tanh, which these returns would saturate.
- One optimiser serves both losses of the option network, whose target network follows slowly, as
  the critic's does.
- Sources are bounded as for CUP (`cup.query_sources`), for the KL and for the question whether an
  action is theirs.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cup

GREEDY_SLOPE, GREEDY_MAX = 20, 0.95  # share of greedy choices: rise over the run, largest value


@dataclass
class Args(cup.Args):
    """Train a target policy that imitates the best of its options, the sources (PTF)."""
    c: float = 1.0  # weight of the imitation in the actor's loss, c; 0 is SAC
    mu: float = 10.0  # how fast it fades, mu in f: f is 1/2 after 3 / mu of the run
    # regularisation xi of the termination; by default 0.8 of the gap between the two best options
    xi: float | None = None
    option_lr: float = 5e-4  # learning rate of the option network

    def __post_init__(self):
        super().__post_init__()
        if not (self.sources or self.num_random_sources):
            raise ValueError("PTF imitates source policies: name some with --sources")


class OptionNetwork(nn.Module):
    """obs (batch, obs_dim) -> value Q_o and probability to terminate beta_o, both (batch, n)."""
    def __init__(self, obs_dim: int, num_options: int, hidden_sizes, standardize: cup.Standardize):
        super().__init__()
        self.standardize = standardize
        self.net = cup.mlp(obs_dim, *hidden_sizes, 2 * num_options)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        value, termination = self.net(self.standardize(obs)).chunk(2, dim=-1)
        return value, torch.sigmoid(termination)


def fade(x: float, mu: float) -> float:
    """f: what is left of the imitation when the fraction x of the run is over."""
    return (1 + math.tanh(3 - mu * x)) / 2


def greedy_share(x: float) -> float:
    """The probability that an option is chosen greedily, not at random."""
    return min(GREEDY_MAX, GREEDY_SLOPE * x)


def is_compatible(action: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Which sources could have taken the action (batch, action_dim): bool (batch, n).

    Those whose mean is within one standard deviation of it, before the tanh, in every dimension;
    mean, log_std (batch, n, action_dim)."""
    low, high = torch.tanh(mean - log_std.exp()), torch.tanh(mean + log_std.exp())
    action = action.unsqueeze(1)
    return ((low <= action) & (action <= high)).all(dim=2)


def option_target(
    reward: Tensor, terminated: Tensor, next_value: Tensor, next_target_value: Tensor,
    termination: Tensor, gamma: float,
) -> Tensor:
    """y_o (batch, n): the option goes on with probability 1 - beta_o(s'), else the best follows.

    next_value chooses the best and next_target_value scores it (double Q-learning). reward,
    terminated (batch,), the others (batch, n)."""
    best = next_target_value.gather(1, next_value.argmax(dim=1, keepdim=True))
    follow = (1 - termination) * next_target_value + termination * best
    return reward.unsqueeze(1) + gamma * (1 - terminated).unsqueeze(1) * follow


def value_gap(value: Tensor) -> Tensor:
    """Q of the best option less Q of the second best, (batch, n) -> (batch, 1); 0 if n = 1."""
    best = value.topk(min(2, value.shape[1]), dim=1).values
    return best[:, :1] - best[:, -1:]


def termination_advantage(next_value: Tensor, xi: float | None) -> Tensor:
    """Q_o(s') - max Q(s') + xi, (batch, n): what an option gains by going on."""
    margin = 0.8 * value_gap(next_value) if xi is None else xi
    return next_value - next_value.amax(dim=1, keepdim=True) + margin


class OptionBatch(NamedTuple):
    """A `cup.Batch`, and the option that was active."""
    obs: Tensor
    next_obs: Tensor
    action: Tensor
    reward: Tensor
    terminated: Tensor
    source_mean: Tensor
    source_log_std: Tensor
    option: Tensor  # (batch,), its index; -1 for none


class PTF(cup.Agent):
    """SAC with an option network, whose best option the actor imitates."""
    def __init__(self, args: Args, obs_dim: int, action_dim: int, sources: dict, device="cpu"):
        super().__init__(args, obs_dim, action_dim, {}, device)  # no sources: no guidance
        self.names, self.policies = list(sources), nn.ModuleList(sources.values())
        shape = (obs_dim, len(sources), args.hidden_sizes, self.actor.standardize)
        self.options, self.target_options = OptionNetwork(*shape), OptionNetwork(*shape)
        self.target_options.load_state_dict(self.options.state_dict())
        # ---- of every environment: its active option, none (-1) while actions are random; the
        # next_obs stored last; another observation begins an episode, and so NaN does
        self.register_buffer("active", torch.full((args.num_envs,), -1))
        next_obs = torch.full((args.num_envs, obs_dim), math.nan, dtype=torch.float64)
        self.register_buffer("next_obs", next_obs)
        self.register_buffer("steps", torch.tensor(0))  # transitions stored so far
        self.to(device)
        self.option_optimizer = torch.optim.Adam(
            self.options.parameters(), args.option_lr, fused=True
        )
        self.optimizers.append(self.option_optimizer)
        self.buffer = cup.ReplayBuffer(args.buffer_size, OptionBatch)

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """The target policy's actions; beside that, options end and others become active."""
        value, termination = self.options(obs)
        num_envs, num_options = value.shape
        # a generator of its own: SAC's random numbers stay what they are without options
        seed = cup.derive_seed(self.args.seed, 4, self.steps.item())
        generator = torch.Generator(obs.device).manual_seed(seed)
        draw = torch.rand(2, num_envs, generator=generator, device=obs.device)
        other = torch.randint(num_options, (num_envs,), generator=generator, device=obs.device)
        greedy = draw[1] < greedy_share(self.steps.item() / self.args.total_timesteps)
        choice = torch.where(greedy, value.argmax(dim=1), other)
        begins = (obs != self.next_obs).any(dim=1) | (self.active < 0)
        active = self.active.clamp(min=0).unsqueeze(1)  # (num_envs, 1)
        ends = draw[0] < termination.gather(1, active).squeeze(1)
        self.active = torch.where(begins | ends, choice, self.active)
        return super().act(obs)

    def store(self, obs, action, next_obs, reward, terminated) -> None:
        """Put a transition of each environment into the replay buffer; shapes as in `cup.Batch`."""
        self.actor.standardize.notice(obs)
        dists = cup.query_sources(self.policies, obs, action.shape[1])
        self.buffer.add(
            OptionBatch(obs, next_obs, action, reward, terminated, *dists, self.active)
        )
        self.next_obs = next_obs.where(terminated.unsqueeze(1) == 0, math.nan)
        self.steps += len(obs)

    def update(self, batch: OptionBatch, guide: bool = True) -> dict[str, Tensor]:
        """One gradient step of the options, then one of SAC, whose actor imitates the best."""
        # ---- options: the values of those that fit the action, and the active one's termination
        value, termination = self.options(batch.obs)  # (batch, n)
        next_value, next_termination = self.options(batch.next_obs)
        with torch.no_grad():
            next_target_value, _ = self.target_options(batch.next_obs)
            target = option_target(
                batch.reward, batch.terminated, next_value, next_target_value, next_termination,
                self.args.gamma,
            )
            match = is_compatible(batch.action, batch.source_mean, batch.source_log_std)
            active = batch.option.unsqueeze(1) == torch.arange(value.shape[1], device=value.device)
            advantage = termination_advantage(next_value, self.args.xi)
            may_end = active * (1 - batch.terminated).unsqueeze(1)
        option_loss = ((match | active) * (target - value).square()).sum(dim=1).mean()
        termination_loss = (may_end * next_termination * advantage).sum(dim=1).mean()
        self.minimize(option_loss + termination_loss, self.option_optimizer)
        with torch.no_grad():
            pairs = zip(self.target_options.parameters(), self.options.parameters())
            for slow, online in pairs:
                slow.lerp_(online, self.args.tau)

        # ---- imitation: c f(x) (1 - beta_o(s)) KL(pi_o || pi), the source in front
        value, termination = value.detach(), termination.detach()
        row, teacher = torch.arange(len(value), device=value.device), value.argmax(dim=1)
        teacher_termination = termination[row, teacher]  # (batch,)
        f = fade(self.steps.item() / self.args.total_timesteps, self.args.mu)
        weight = self.args.c * f * (1 - teacher_termination) * guide
        teacher_dist = batch.source_mean[row, teacher], batch.source_log_std[row, teacher]
        kl = cup.kl_divergence(*teacher_dist, *self.actor(batch.obs))
        self.imitation_loss = (weight * kl).mean()

        info = super().update(batch)  # SAC, with what `minimize` adds
        info |= {
            "loss/kl": self.imitation_loss.detach(), "loss/option": option_loss.detach(),
            "loss/termination": termination_loss.detach(), "guidance/weight": weight.mean(),
            "guidance/kl": kl.detach().mean(), "option/gap": value_gap(value).mean(),
            "option/termination": teacher_termination.mean(),
        }
        for k, name in enumerate(self.names):
            info[f"guidance/selected/{name}"] = (teacher == k).float().mean()
            info[f"option/active/{name}"] = active[:, k].float().mean()
            info[f"option/match/{name}"] = match[:, k].float().mean()
        return info

    def minimize(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """As in cup.py, where the actor's loss has the imitation added to it."""
        if optimizer is self.actor_optimizer:
            loss = loss + self.imitation_loss
        super().minimize(loss, optimizer)


if __name__ == "__main__":
    cup.main(Args, PTF)
