"""CUP: Critic-Guided Policy Reuse (Zhang, Li, Zhang; NeurIPS 2022), in one file.

Frozen source policies, trained on other tasks, guide Soft Actor-Critic (SAC) on a new task. At
every state of a minibatch the critic of the new task scores what each source would do, and what
the learning policy would do. Where a source scores higher, a KL term in the actor's loss pulls the
actor towards the best source. CUP trains the networks of SAC and no further network.

    python cup.py --env-id peg-insert-side-v2             # CUP, with the shipped source policies
    python cup.py --env-id peg-insert-side-v2 --sources   # no sources: SAC, the baseline

Equation numbers are the paper's. Two terms look alike: the target *policy* pi_tar is the actor
that learns the new task; the target *critic* is SAC's slowly following copy of the critic.
"""

import csv
import difflib
import fcntl
import json
import math
import os
import random
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

SOURCES = Path(__file__).parent / "sources"
SHIPPED = tuple(str(SOURCES / f"{task}-v2.pt") for task in ("reach", "push", "pick-place"))


class UserError(Exception):
    """Something the user can put right; `main` prints it and exits with code 2."""


@dataclass
class Args:
    """Train a target policy with the guidance of source policies (CUP)."""
    env_id: str  # Meta-World task (push-wall-v2), Gymnasium id (Pendulum-v1), or your module:Id
    seed: int = 1  # seed of everything random: networks, exploration, minibatches, goals
    total_timesteps: int = 1_000_000  # environment steps, all environments together
    num_envs: int = 4  # environments that step side by side
    buffer_size: int = 1_000_000  # capacity of the replay buffer D, in transitions
    batch_size: int = 256  # minibatch size of every gradient update
    learning_starts: int = 5_000  # steps with random actions, which also set the standardisation
    # gradient updates per environment step; they dominate the running time, since an update takes
    # as long as 5 to 20 steps of Meta-World; 0.25 is one for each step of the 4 environments
    utd_ratio: float = 0.25
    gamma: float = 0.99  # discount factor, gamma in Eq. 1
    tau: float = 0.005  # step of the target critic towards the critic, tau in Alg. 1
    policy_lr: float = 3e-4  # learning rate of the actor, lambda_pi in Alg. 1
    q_lr: float = 3e-4  # learning rate of the critics, lambda_theta in Alg. 1
    alpha_lr: float = 3e-4  # learning rate of the entropy weight, lambda_alpha in Alg. 1
    init_alpha: float = 0.1  # initial alpha in Eq. 2; at 1, entropy exceeds Q for 10,000 updates
    hidden_sizes: tuple[int, ...] = (256, 256)  # hidden layers of the actor and of each critic
    # policy files pi_1 ... pi_n; --sources with nothing after it is SAC (printed at the start)
    sources: tuple[str, ...] = SHIPPED
    num_random_sources: int = 0  # untrained policies added to the sources (paper, Section 4.3.3)
    # weight of the guidance KL, beta_1 in Eq. 12; the authors' code has 7.5; 10 pulled too hard on
    # push-wall and pick-place-wall once |V| was large
    beta1: float = 1.0
    # cap on the advantage in that weight as a fraction of |V|, beta_2 in Eq. 12; the authors' code
    # has 0.003, with which pick-place-wall learnt nothing in 300,000 steps: |V| was too small
    beta2: float = 0.03
    soft_advantage: bool = False  # entropy terms of Eq. 4; pick-place-wall learnt less with them
    guidance_starts: int = 5_000  # steps before the guidance; 60,000 if sources hardly help
    log_interval: int = 1_000  # steps between rows of metrics.csv, which show the last minibatch
    eval_interval: int = 20_000  # environment steps between evaluations; each writes policy.pt
    eval_episodes: int = 10  # episodes per evaluation, each with a goal never trained on
    checkpoint_interval: int = 20_000  # steps between checkpoints; all episodes begin anew there
    run_dir: str | None = None  # where to write; by default runs/<env-id>__<cup or sac>__<seed>
    resume: bool = False  # go on from the last checkpoint as if never interrupted, or start
    cuda: bool = False  # use the GPU; slower than a CPU core, except with benchmark/compiled.py
    threads: int = max(1, min(4, (os.cpu_count() or 1) - 1))  # CPU threads; on a busy machine, 1

    def __post_init__(self):  # tyro prints a ValueError as a usage error, with exit code 2
        guided = len(self.sources) + self.num_random_sources > 0
        starts = max(self.learning_starts, self.guidance_starts if guided else 0)
        if starts >= self.total_timesteps:
            raise ValueError(f"--total-timesteps must be more than {starts}, where learning starts")


# ---- networks ------------------------------------------------------------------------------------
def mlp(*sizes: int) -> nn.Sequential:
    layers = []
    for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


class Standardize(nn.Module):
    """Shift and scale obs (..., obs_dim) to mean 0 and a standard deviation of at most 1.

    Meta-World's observations are in metres, and centimetres matter. float64, because in float32 a
    Unix time would be a constant. A column is ignored until a value in it is not zero, so a source
    ignores what its own task never shows."""
    def __init__(self, obs_dim: int):
        super().__init__()
        self.register_buffer("shift", torch.zeros(obs_dim, dtype=torch.float64))
        self.register_buffer("scale", torch.ones(obs_dim, dtype=torch.float64))

    def fit(self, obs: Tensor) -> None:
        """Take the statistics from obs (n, obs_dim)."""
        std = obs.std(dim=0, correction=0)
        # at least 0.1, or the noise of a column that hardly moves would become large; if no column
        # moves as much as that, all are divided by the largest standard deviation
        floor = min(0.1, std.max().item()) or 0.1
        self.scale.copy_((obs != 0).any(dim=0) / std.clamp(min=floor))
        self.shift.copy_(-obs.mean(dim=0) * self.scale)

    def notice(self, obs: Tensor) -> None:
        """Let through, unscaled, the columns of obs (n, obs_dim) that were zero until now."""
        self.scale[(self.scale == 0) & (obs != 0).any(dim=0)] = 1

    def forward(self, obs: Tensor) -> Tensor:
        return torch.addcmul(self.shift, obs, self.scale).to(torch.get_default_dtype())


class Actor(nn.Module):
    """Tanh-Gaussian policy: obs (..., obs_dim) -> mean, log_std (..., action_dim).

    Both are those before the tanh, and softly bounded: a mean far out, where the tanh is flat, or
    a vanishing standard deviation hardly changes the action, but makes the KL of Eq. 11 huge.
    tanh(3) is 0.995; a raw output of 0 gives a log_std of -1.5."""
    def __init__(self, obs_dim: int, action_dim: int, hidden_sizes, mean_bound: float = 3.0,
                 log_std_min: float = -5.0, log_std_max: float = 2.0):
        super().__init__()
        self.obs_dim, self.action_dim, self.hidden_sizes = obs_dim, action_dim, list(hidden_sizes)
        self.mean_bound, self.log_std_min, self.log_std_max = mean_bound, log_std_min, log_std_max
        self.standardize = Standardize(obs_dim)
        self.net = mlp(obs_dim, *hidden_sizes, 2 * action_dim)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.net(self.standardize(obs)).chunk(2, dim=-1)
        mean = self.mean_bound * torch.tanh(mean / self.mean_bound)
        half_range = (self.log_std_max - self.log_std_min) / 2
        return mean, self.log_std_min + half_range * (1 + torch.tanh(log_std / half_range))


class TwinCritic(nn.Module):
    """Two Q networks: obs (..., obs_dim), action (..., action_dim) -> Q1, Q2 as (2, ...)."""
    def __init__(self, obs_dim: int, action_dim: int, hidden_sizes, standardize: Standardize):
        super().__init__()
        self.standardize = standardize
        self.q1 = mlp(obs_dim + action_dim, *hidden_sizes, 1)
        self.q2 = mlp(obs_dim + action_dim, *hidden_sizes, 1)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([self.standardize(obs), action], dim=-1)
        return torch.stack([self.q1(x), self.q2(x)]).squeeze(-1)

    def min_q(self, obs: Tensor, action: Tensor) -> Tensor:
        return self(obs, action).amin(dim=0)  # the smaller of the twins


# ---- CUP: which source to follow at a state, and how far -----------------------------------------
# For your own SAC, `import cup`, or paste from here to the end of `guidance_loss` and import math,
# torch, Tensor (from torch) and F (torch.nn.functional). Your critic must take actions in [-1, 1]
# and any leading dimensions. Bound the sources as `query_sources` does. `Agent.update` has a call.
def squash(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Sample a tanh-Gaussian, reparameterised by standard normal `noise`.

    Shapes broadcast: (..., action_dim) -> action (..., action_dim), log_prob (...)."""
    pre_tanh = mean + log_std.exp() * noise
    log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    # log(1 - tanh(x)^2), written so that it does not overflow
    log_prob = log_prob - 2 * (math.log(2) - pre_tanh - F.softplus(-2 * pre_tanh))
    return torch.tanh(pre_tanh), log_prob.sum(dim=-1)


def expected_advantage(q: Tensor, log_prob: Tensor, alpha: Tensor | float) -> tuple[Tensor, Tensor]:
    """Expected advantage of every candidate over the target policy, Eq. 4.

    q, log_prob (batch, n + 1), of one action of each candidate: Q by the critic, log_prob by the
    candidate itself; the n sources first, the target policy last. alpha = 0 leaves the entropy
    terms out (Appendix B.3). Returns the advantages (batch, n + 1), which are zero for the target
    policy, and the target policy's value V (batch,), Eq. 2."""
    soft_q = q - alpha * log_prob  # an estimate of the expectation over actions
    value = soft_q[:, -1]  # Eq. 2
    return soft_q - value.unsqueeze(1), value  # Eq. 4


def guidance_policy(advantage: Tensor) -> Tensor:
    """Eqs. 5, 7: index (batch,) of the best candidate, from advantages (batch, n + 1).

    The target policy is candidate n; it wins a tie."""
    best, source = advantage[:, :-1].max(dim=1)
    return torch.where(best > advantage[:, -1], source, advantage.shape[1] - 1)


def guidance_weight(advantage: Tensor, value: Tensor, beta1: float, beta2: float) -> Tensor:
    """Eq. 12: beta_s (batch,), from the guidance policy's advantage and V, both (batch,).

    Zero where the target policy is its own guidance: its advantage over itself is zero. The cap
    limits what errors of the critic can do: they make sources look too good."""
    return beta1 * torch.minimum(advantage, beta2 * value.abs())


def kl_divergence(mean_p: Tensor, log_std_p: Tensor, mean_q: Tensor, log_std_q: Tensor) -> Tensor:
    """KL(p || q) of two tanh-Gaussians (Eqs. 9, 11), (..., action_dim) -> (...), in nats.

    A KL does not change when both variables go through the same bijection, here the tanh: it is
    the closed-form KL of the two Gaussians before it."""
    log_ratio = log_std_p - log_std_q
    distance = (mean_p - mean_q) / log_std_q.exp()
    return (0.5 * ((2 * log_ratio).exp() + distance.square() - 1) - log_ratio).sum(dim=-1)


def guidance_loss(
    *, critic, obs: Tensor, mean: Tensor, log_std: Tensor, source_mean: Tensor,
    source_log_std: Tensor, noise: Tensor, q: Tensor, log_prob: Tensor, alpha: Tensor | float,
    beta1: float, beta2: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """What CUP adds to the actor's loss, Eq. 11: the mean over states of beta_s KL(tar || g).

    critic: obs (..., obs_dim), action (..., action_dim) -> Q (...) as in the actor's loss, by the
    online twins, not by the target critic. mean, log_std (batch, action_dim): the target policy at
    obs (batch, obs_dim), before the tanh. noise (batch, action_dim), q, log_prob (batch,): of its
    actions in the actor's loss. source_mean, source_log_std: (batch, n, action_dim).
    Returns the loss, and advantage (batch, n + 1), guidance (an index), weight, kl (batch,)."""
    shape, source_shape = mean.shape, mean.shape[:1] + source_mean.shape[1:2] + mean.shape[1:]
    for name, tensor, expected in (
        ("log_std", log_std, shape), ("noise", noise, shape), ("q", q, shape[:1]),
        ("log_prob", log_prob, shape[:1]), ("source_mean", source_mean, source_shape),
        ("source_log_std", source_log_std, source_shape), ("obs", obs, shape[:1] + obs.shape[-1:]),
    ):
        if tensor.shape != expected:
            raise ValueError(f"{name} is {[*tensor.shape]}, not {[*expected]}; mean is {[*shape]}")
    with torch.no_grad():
        # the same noise for all candidates, so that only their policies differ
        source_action, source_log_prob = squash(source_mean, source_log_std, noise.unsqueeze(1))
        source_q = critic(obs.unsqueeze(1).expand(*source_shape[:2], -1), source_action)
        if source_q.shape != source_shape[:2]:
            raise ValueError(f"critic returned {[*source_q.shape]}, not {[*source_shape[:2]]}")
        q = torch.cat([source_q, q.unsqueeze(1)], dim=1)  # (batch, n + 1)
        log_prob = torch.cat([source_log_prob, log_prob.unsqueeze(1)], dim=1)
        advantage, value = expected_advantage(q, log_prob, alpha)  # Eq. 4
        guidance = guidance_policy(advantage)  # Eq. 7
        # Eq. 12; the guidance policy's advantage is the largest
        weight = guidance_weight(advantage.amax(dim=1), value, beta1, beta2)
    # Eq. 9 for every source (batch, n), and 0 from the target policy to itself
    kl = kl_divergence(mean.unsqueeze(1), log_std.unsqueeze(1), source_mean, source_log_std)
    kl = F.pad(kl, (0, 1)).gather(1, guidance.unsqueeze(1)).squeeze(1)
    per_state = {"advantage": advantage, "guidance": guidance, "weight": weight, "kl": kl.detach()}
    return (weight * kl).mean(), per_state  # Eq. 11


@torch.no_grad()
def query_sources(sources: nn.ModuleList, obs: Tensor, action_dim: int) -> tuple[Tensor, Tensor]:
    """Mean and log-std (batch, n, action_dim) of the n sources at obs (batch, obs_dim).

    Bounded, because a source that is nearly deterministic or saturated gives almost no probability
    to what the target policy does, and the KL to it would outweigh SAC's loss: it reached 1e11
    without bounds and stays near 10 nats with 2.5 for the mean and -1.5 for the log-std. The critic
    scores the bounded source. The target policy may go further, to 3 and -5: it learns on."""
    mean, log_std = torch.empty(2, len(obs), len(sources), action_dim, device=obs.device)
    for k, actor in enumerate(sources):
        mean[:, k], log_std[:, k] = actor(obs)
    return mean.clamp(-2.5, 2.5), log_std.clamp(min=-1.5)


# ---- the update, Alg. 1 --------------------------------------------------------------------------
class Batch(NamedTuple):
    """A minibatch of transitions, with n sources."""
    obs: Tensor  # (batch, obs_dim), float64
    next_obs: Tensor  # (batch, obs_dim), float64
    action: Tensor  # (batch, action_dim), in [-1, 1]
    reward: Tensor  # (batch,)
    terminated: Tensor  # (batch,)
    # what every source would do at obs (`query_sources`): the sources are frozen, so they are
    # asked once, when a state is stored, and not in every gradient update
    source_mean: Tensor  # (batch, n, action_dim)
    source_log_std: Tensor  # (batch, n, action_dim)


class Agent(nn.Module):
    """Actor, twin critic, entropy weight, an optimiser for each, and the replay buffer."""
    def __init__(self, args: Args, obs_dim: int, action_dim: int, sources: dict, device="cpu"):
        super().__init__()
        self.args, self.target_entropy = args, -float(action_dim)
        self.source_names, self.sources = list(sources), nn.ModuleList(sources.values())
        self.actor = Actor(obs_dim, action_dim, args.hidden_sizes)
        shape = (obs_dim, action_dim, args.hidden_sizes, self.actor.standardize)
        self.critic, self.target_critic = TwinCritic(*shape), TwinCritic(*shape)
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.init_alpha)))
        self.to(device)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), args.policy_lr, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), args.q_lr, fused=True)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], args.alpha_lr, fused=True)
        self.optimizers = [self.actor_optimizer, self.critic_optimizer, self.alpha_optimizer]
        self.buffer = ReplayBuffer(args.buffer_size)

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Sampled actions (num_envs, action_dim) at obs (num_envs, obs_dim)."""
        mean, log_std = self.actor(obs)
        return squash(mean, log_std, torch.randn_like(mean))[0]

    def store(self, obs, action, next_obs, reward, terminated) -> None:
        """Put a transition of each environment into the replay buffer; shapes as in `Batch`."""
        self.actor.standardize.notice(obs)
        dists = query_sources(self.sources, obs, action.shape[1])
        self.buffer.add(Batch(obs, next_obs, action, reward, terminated, *dists))

    @torch.no_grad()
    def td_target(self, batch: Batch, alpha: Tensor) -> Tensor:
        """r + gamma V(s'), (batch,), with V by the target critic, Eq. 2."""
        mean, log_std = self.actor(batch.next_obs)
        action, log_prob = squash(mean, log_std, torch.randn_like(mean))
        next_value = self.target_critic.min_q(batch.next_obs, action) - alpha * log_prob
        # `terminated`, not `truncated`: a time limit is not the task's end
        return batch.reward + self.args.gamma * (1 - batch.terminated) * next_value

    def minimize(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Step only this optimiser's parameters; other networks in the loss stay as they are."""
        optimizer.zero_grad()
        loss.backward(inputs=optimizer.param_groups[0]["params"])
        optimizer.step()

    def update(self, batch: Batch, guide: bool = True) -> dict[str, Tensor]:
        """One gradient step of Alg. 1. Returns scalars under the names that are logged.

        With guide=False, without sources, or with --beta1 0 it is SAC, bit for bit."""
        alpha = self.log_alpha.detach().exp()
        # ---- critic: L_critic, Eq. 3
        td_error = self.critic(batch.obs, batch.action) - self.td_target(batch, alpha)  # (2, batch)
        critic_loss = td_error.square().mean(dim=1).sum()
        self.minimize(critic_loss, self.critic_optimizer)
        # ---- actor: L_actor, Eq. 3
        mean, log_std = self.actor(batch.obs)
        noise = torch.randn_like(mean)
        action, log_prob = squash(mean, log_std, noise)
        q = self.critic.min_q(batch.obs, action)
        actor_loss = (alpha * log_prob - q).mean()
        info = {"loss/critic": critic_loss.detach(), "loss/actor": actor_loss.detach()}
        # ---- guidance: Eq. 11, after the critic's step (Alg. 1: before it), to reuse the actor's q
        if self.sources:
            kl_loss, per_state = guidance_loss(
                critic=self.critic.min_q, obs=batch.obs, mean=mean, log_std=log_std,
                source_mean=batch.source_mean, source_log_std=batch.source_log_std, noise=noise,
                q=q, log_prob=log_prob, alpha=alpha if self.args.soft_advantage else 0.0,
                beta1=self.args.beta1 if guide else 0.0, beta2=self.args.beta2,
            )
            actor_loss = actor_loss + kl_loss
            info["loss/kl"] = kl_loss.detach()
            info["guidance/weight"] = per_state["weight"].mean()
            info["guidance/kl"] = per_state["kl"].mean()
            for k, name in enumerate([*self.source_names, "target"]):  # `selected`: Fig. 3
                info[f"guidance/selected/{name}"] = (per_state["guidance"] == k).float().mean()
                info[f"guidance/advantage/{name}"] = per_state["advantage"][:, k].mean()
        self.minimize(actor_loss, self.actor_optimizer)  # through the critic, which stays as it is
        # ---- entropy weight: L_entropy, Eq. 3
        entropy = -log_prob.detach().mean()
        self.minimize(self.log_alpha.exp() * (entropy - self.target_entropy), self.alpha_optimizer)
        # ---- target critic
        with torch.no_grad():
            for target, online in zip(self.target_critic.parameters(), self.critic.parameters()):
                target.lerp_(online, self.args.tau)
        return info | {"alpha": alpha, "entropy": entropy}

    def get_extra_state(self) -> dict:  # what `state_dict` holds beside the weights
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        rows = [column[: self.buffer.size].clone() for column in self.buffer.columns]
        return {"optimizers": optimizers, "rows": rows, "position": self.buffer.position}

    def set_extra_state(self, state: dict) -> None:
        for optimizer, content in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(content)
        self.buffer.add(state["rows"])
        self.buffer.position = state["position"]


class ReplayBuffer:
    """The replay buffer D: a preallocated column for each field of `batch_type`."""
    def __init__(self, capacity: int, batch_type: type = Batch):
        self.capacity, self.batch_type = capacity, batch_type
        self.columns, self.size, self.position = [], 0, 0

    def add(self, batch: NamedTuple) -> None:
        """Store transitions; the oldest make room."""
        if not self.columns:  # shapes, dtypes and device are those of the first transitions
            self.columns = [values.new_empty(self.capacity, *values.shape[1:]) for values in batch]
        index = (self.position + torch.arange(len(batch[0]))) % self.capacity
        for column, values in zip(self.columns, batch, strict=True):
            column[index] = values
        self.position = (self.position + len(index)) % self.capacity
        self.size = min(self.size + len(index), self.capacity)

    def sample(self, batch_size: int) -> NamedTuple:
        """A uniform minibatch."""
        index = torch.randint(self.size, (batch_size,), device=self.columns[0].device)
        return self.batch_type(*(column[index] for column in self.columns))


# ---- environment ---------------------------------------------------------------------------------
def derive_seed(*numbers: int) -> int:
    """One seed of 32 bits from several numbers. (5,) and (5, 0) collide: use equal lengths."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class RecordSuccess(gym.Wrapper):
    """Replace `info` by {}, or at an episode's end by its return and success: 1 if any step reports
    a success, 0 if none does, NaN if no step says anything of it."""
    total, success = 0.0, np.nan

    def step(self, action: np.ndarray):
        obs, reward, terminated, truncated, info = super().step(action)
        reward = np.asarray(reward).item()  # some environments have an array of one
        self.total += reward
        success = info.get("success", info.get("is_success"))
        self.success = np.fmax(self.success, np.nan if success is None else np.max(success) > 0)
        scores = {}
        if terminated or truncated:
            scores = {"return": self.total, "success": float(self.success)}
            self.total, self.success = 0.0, np.nan
        return obs, reward, terminated, truncated, scores


def make_env(env_id: str, seed: int, **options) -> gym.Env:
    """An environment with flat observations, actions in [-1, 1] and `RecordSuccess`.

    Meta-World tasks, `-v2` or `-v3`, follow the paper's protocol: the goal is visible and drawn
    anew for every episode; the reward is v2's; 500 steps, then truncation. Give the first `reset`
    the same seed. Raises UserError for a wrong id and for spaces that CUP cannot learn in."""
    from metaworld import ALL_V3_ENVIRONMENTS as tasks  # v2's tasks have the name v3 there
    task = env_id.replace("-v2", "-v3")
    try:
        if task in tasks:
            env = tasks[task](reward_function_version="v2", **options)
            env._partially_observable = False  # show the goal in the observation, ...
            del env.sawyer_observation_space  # ... which cached bounds would clip to zero
            env._freeze_rand_vec = False  # a new goal for every episode, ...
            env.seeded_rand_vec = env._set_task_called = True  # ... from a generator of its own
            env.seed(seed)  # it ignores the seed of `reset`
        else:
            env = gym.make(env_id, **options)
        env = gym.wrappers.FlattenObservation(env)
        assert isinstance(env.observation_space, gym.spaces.Box), "observations of no fixed size"
    except Exception as error:  # an environment's own code may raise anything
        close = difflib.get_close_matches(env_id, [x.replace("-v3", "-v2") for x in tasks])
        raise UserError(f"cannot make {env_id!r}: {error!r}; Meta-World has {close}") from error
    torch.set_default_dtype(torch.float32)  # whatever the environment's module has set
    space = env.action_space
    is_real = isinstance(space, gym.spaces.Box) and space.dtype.kind == "f"
    if not (is_real and np.abs([space.low, space.high]).max() < 1e10):  # 1e38 is no bound
        raise UserError(f"{env_id} has actions {space}: CUP needs a Box of bounded, real numbers")

    def rescale(action: np.ndarray) -> np.ndarray:
        center, half_range = (space.high + space.low) / 2, (space.high - space.low) / 2
        scaled = center + half_range * action.reshape(space.shape)
        return np.clip(scaled, space.low, space.high, dtype=space.dtype)  # rounding may leave them
    unit_box = gym.spaces.Box(-1, 1, (space.low.size,))
    return RecordSuccess(gym.wrappers.TransformAction(env, rescale, unit_box))


def save(content: dict, path: Path) -> None:
    """torch.save, then rename: if the process dies, `path` holds the old content or the new."""
    try:
        with open(path.with_suffix(".tmp"), "wb") as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch's RuntimeError follows a write that failed
        raise UserError(f"cannot write {path}; is the disk full?") from error
    path.with_suffix(".tmp").replace(path)


def policy_content(actor: Actor, **about) -> dict:
    """What a policy file holds; sources/README.md documents the format."""
    names = ("obs_dim", "action_dim", "hidden_sizes", "mean_bound", "log_std_min", "log_std_max")
    arguments = {name: getattr(actor, name) for name in names}
    return {"actor": arguments, "weights": actor.state_dict(), **about}


def load_policy(path: str | Path) -> Actor:
    """The frozen actor of a policy file, which can run no code; `about` has the file's rest."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        actor = Actor(**content.pop("actor"))
        actor.load_state_dict(content.pop("weights"))
    except Exception as error:  # whatever is wrong with the file
        raise UserError(f"{path} is not a policy file ({type(error).__name__})") from error
    actor.about = content
    return actor.requires_grad_(False)


def load_sources(args: Args, obs_dim: int, action_dim: int) -> dict[str, Actor]:
    """Source policies by name. Raises UserError for one that does not fit the task."""
    sources = {}
    for k in range(args.num_random_sources):
        torch.manual_seed(derive_seed(args.seed, 3, k))  # not the seed of the learner's networks
        sources[f"random-{k + 1}"] = Actor(obs_dim, action_dim, args.hidden_sizes)
    for path in map(Path, args.sources):
        actor = load_policy(path)
        theirs, ours = (actor.obs_dim, actor.action_dim), (obs_dim, action_dim)
        if theirs != ours:
            raise UserError(f"{path} has observation and action sizes {theirs}, the task {ours}")
        # runs/x/policy.pt goes by the name of its run; a name that is taken gets a suffix
        name = path.absolute().parent.name if path.stem == "policy" else path.stem
        while name in (*sources, "target"):
            name += "-2"
        sources[name] = actor
    return sources


# ---- evaluation and training ---------------------------------------------------------------------
@torch.no_grad()
def evaluate(actor, env_id: str, episodes: int, seed: int, device="cpu") -> list[tuple]:
    """Return and success of every episode, by the mean action."""
    env, scores = make_env(env_id, seed), []
    for episode in range(episodes):
        obs, info = env.reset(seed=None if episode else seed)[0], {}
        while not info:  # the last step of an episode has it
            mean, _ = actor(torch.as_tensor(obs[None], device=device))  # a batch of one
            obs, _, _, _, info = env.step(torch.tanh(mean)[0].cpu().numpy())
        scores.append((info["return"], info["success"]))
    return scores


def train(args: Args, agent_class: type[Agent] = Agent) -> None:
    """Alg. 1, from the start or from a checkpoint; another method brings its own agent."""
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # Adam's moments become denormal numbers, which are slow
    device = torch.device("cuda" if args.cuda else "cpu")
    env = make_env(args.env_id, seed=0)
    (obs_dim,), (action_dim,) = env.observation_space.shape, env.action_space.shape
    limit = getattr(env.spec, "max_episode_steps", 500) or math.inf  # Meta-World's has no spec
    if limit * args.num_envs > args.checkpoint_interval:
        raise UserError(f"episodes of up to {limit} steps do not fit into --checkpoint-interval")
    sources = load_sources(args, obs_dim, action_dim)
    method = agent_class.__name__.lower().replace("agent", "cup" if sources else "sac")
    name = f"{args.env_id}__{method}__{args.seed}"
    run_dir = Path(args.run_dir or f"runs/{name}").expanduser()
    if any(run_dir.glob("*")) and not args.resume:
        raise UserError(f"{run_dir} exists: go on with --resume, or choose another --run-dir")
    run_dir.mkdir(parents=True, exist_ok=True)
    # line by line; a source's name may hold any byte
    metrics = open(run_dir / "metrics.csv", "a", 1, "utf-8", "surrogateescape", newline="")
    try:  # the lock ends with the process
        fcntl.flock(metrics, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process trains in {run_dir}") from None
    # a run goes on with the same arguments, but for these
    free = ("total_timesteps", "run_dir", "resume", "cuda", "threads")
    settings = asdict(args) | dict.fromkeys(free) | {"method": method, "sources": tuple(sources)}
    run = {"args": settings, "step": 0, "updates": 0, "seconds": 0.0, "episodes": [], "csv_size": 0}
    if (run_dir / "checkpoint.pt").exists():
        run = torch.load(run_dir / "checkpoint.pt", map_location=device, weights_only=True)
    if metrics.tell() < run["csv_size"] or (metrics.tell() > 0 and "agent" not in run):
        raise UserError(f"{run_dir} has lost checkpoint.pt or metrics.csv: use another --run-dir")
    if differs := dict(run["args"].items() - settings.items()):
        raise UserError(f"{run_dir} was begun with {differs}: choose another --run-dir")
    step, updates = run["step"], run["updates"]  # environment steps and updates so far
    if step >= args.total_timesteps:
        return print(f"{run_dir} has all of its {step:,} steps")
    torch.manual_seed(derive_seed(args.seed, 2, 0))  # CUP and SAC begin with the same networks
    agent = agent_class(args, obs_dim, action_dim, sources, device)
    if step > 0:
        agent.load_state_dict(run.pop("agent"))
    metrics.seek(metrics.truncate(run["csv_size"]))  # later rows will come again
    print(f"{args.env_id}, {method} with {len(sources)} sources; writing to {run_dir}", flush=True)
    as_obs = partial(torch.tensor, dtype=torch.float64, device=device)
    start = time.monotonic() - run["seconds"]
    while True:
        # ---- checkpoint: new episodes and new seeds, so that a resumed run equals an unbroken one
        is_last = step >= args.total_timesteps
        if is_last or step == run["step"] or step % args.checkpoint_interval < args.num_envs:
            run |= {"step": step, "updates": updates, "csv_size": metrics.tell()}
            run["seconds"] = time.monotonic() - start
            save(run | {"agent": agent.state_dict()}, run_dir / "checkpoint.pt")
            if is_last:
                break
            about = {"args": asdict(args), "packages": {x.name: x.version for x in distributions()}}
            (run_dir / "args.json").write_text(json.dumps(about, indent=2) + "\n")
            seeds = [derive_seed(args.seed, 0, step, k) for k in range(args.num_envs)]
            for seed_globally in (random.seed, np.random.seed, torch.manual_seed):
                seed_globally(seeds[0])
            makers = [partial(make_env, args.env_id, seed) for seed in seeds]
            envs = gym.vector.SyncVectorEnv(makers, autoreset_mode="Disabled")
            obs, info = as_obs(envs.reset(seed=seeds)[0]), {}
        # ---- act, step, store
        random_action = 2 * torch.rand(args.num_envs, action_dim, device=device) - 1
        action = random_action if step < args.learning_starts else agent.act(obs)
        next_obs, reward, terminated, truncated, infos = envs.step(action.cpu().numpy())
        numbers = torch.tensor(np.array([reward, terminated]), dtype=torch.float32, device=device)
        agent.store(obs, action, as_obs(next_obs), *numbers)
        if (ended := terminated | truncated).any():
            run["episodes"] += zip(*(infos[key][ended].tolist() for key in ("return", "success")))
            next_obs, _ = envs.reset(options={"reset_mask": ended})
        obs = as_obs(next_obs)
        step += args.num_envs
        # ---- learn
        while updates < (step - args.learning_starts) * args.utd_ratio:
            if updates == 0:
                agent.actor.standardize.fit(agent.buffer.columns[0][: agent.buffer.size])
            batch = agent.buffer.sample(args.batch_size)
            info = agent.update(batch, guide=step > args.guidance_starts)
            updates += 1
        if info and not math.isfinite(info["loss/critic"] + info["loss/actor"]):
            raise UserError(f"a loss is not finite at step {step:,}: are the rewards too large?")
        # ---- evaluate, save the policy, log
        evaluates = step % args.eval_interval < args.num_envs or step >= args.total_timesteps
        if not info or not (evaluates or step % args.log_interval < args.num_envs):
            continue
        scores, seed = [], derive_seed(args.seed, 1, step, 0)  # no training goal
        if evaluates:
            scores = evaluate(agent.actor, args.env_id, args.eval_episodes, seed, device)
        if evaluates and type(agent.actor) is Actor:  # another method's may not fit into a file
            save(policy_content(agent.actor, env_id=args.env_id, step=step), run_dir / "policy.pt")
        has_success = not np.isnan([success for _, success in run["episodes"] + scores]).all()
        row = {"step": step, "time/seconds": time.monotonic() - start}
        row["time/steps_per_second"] = step / row["time/seconds"]
        for prefix, some in (("train", run["episodes"][-20:]), ("eval", scores)):
            returns, success = np.array(some or [(np.nan, np.nan)]).T
            # once an episode has said something of success, one that says nothing is a failure
            success = np.nan_to_num(success) if has_success and some else success
            row |= {f"{prefix}/return": returns.mean(), f"{prefix}/success_rate": success.mean()}
        row |= {name: float(value) for name, value in info.items()}
        if metrics.tell() == 0:
            csv.writer(metrics).writerow(row)
        csv.writer(metrics).writerow("" if math.isnan(x) else x for x in row.values())
        minutes = (args.total_timesteps - step) / row["time/steps_per_second"] / 60
        shown = [f"{key} {row[key]:.3g}" for key in list(row)[3:7] if not math.isnan(row[key])]
        print(f"{step:,} steps, {minutes:.0f} min left", *shown, sep=", ", flush=True)
    print(f"finished {step:,} steps: see {run_dir}")


def main(args_class: type[Args] = Args, agent_class: type[Agent] = Agent) -> None:
    """The command line, of cup.py or of another method with its own arguments and agent."""
    try:
        indented = (sys.modules["__main__"].__doc__ or "").replace("\n", "\n ")
        train(tyro.cli(args_class, description=indented), agent_class)
    except (UserError, OSError, ImportError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped: with --resume the same command goes on from the last checkpoint")
        sys.exit(130)


if __name__ == "__main__":
    main()
