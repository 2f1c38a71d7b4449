"""CUP: Critic-Guided Policy Reuse (Zhang, Li, Zhang; NeurIPS 2022), in one file.

Frozen source policies, trained on other tasks, guide Soft Actor-Critic (SAC) on a new task.
At every state of a minibatch the critic of the *new* task scores what each source would do
there; where a source beats the target policy, the actor is pulled towards the best source.
Nothing else is trained.

    python cup.py --env-id peg-insert-side-v2             # CUP, with the shipped source policies
    python cup.py --env-id peg-insert-side-v2 --sources   # no sources: SAC, the baseline
    python cup.py --evaluate sources/reach-v2.pt          # score a policy file

Equation numbers are the paper's. To learn the algorithm, read from `squash` to the end of
`Agent.update`; the rest is environments, files and the training loop.
"""

import csv
import json
import math
import os
import pickle
import random
import shutil
import signal
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.adam import adam

SOURCES_DIR = Path(__file__).parent / "sources"
SHIPPED = tuple(str(SOURCES_DIR / f"{task}-v2.pt") for task in ("reach", "push", "pick-place"))


class UserError(Exception):
    """Something the user can put right; `main` prints it and exits with code 2."""


@dataclass
class Args:
    """Train a target policy with the guidance of source policies (CUP)."""

    # Meta-World task (peg-insert-side-v2), Gymnasium id (Pendulum-v1), or module:Id, where the
    # module, beside cup.py or on PYTHONPATH, registers an environment of your own
    env_id: str | None = None
    seed: int = 1  # seed of everything random: networks, exploration, minibatches, goals
    total_timesteps: int = 1_000_000  # environment steps, all environments together
    num_envs: int = 4  # environments that step side by side
    buffer_size: int = 1_000_000  # capacity of the replay buffer D, in transitions
    batch_size: int = 256  # minibatch size of every gradient update
    learning_starts: int = 5_000  # environment steps with random actions before the first update
    utd_ratio: float = 0.25  # updates per environment step; one costs as much as 5 to 20 steps
    gamma: float = 0.99  # discount factor, gamma in Eq. 1
    tau: float = 0.005  # step of the target critic towards the critic, tau in Alg. 1
    policy_lr: float = 3e-4  # learning rate of the actor, lambda_pi in Alg. 1
    q_lr: float = 3e-4  # learning rate of the critics, lambda_theta in Alg. 1
    alpha_lr: float = 3e-4  # learning rate of the entropy weight, lambda_alpha in Alg. 1
    init_alpha: float = 0.1  # initial alpha, Eq. 2; SAC's usual 1 outweighs Q for 10,000 updates
    hidden_sizes: tuple[int, ...] = (256, 256)  # hidden layers of the actor and of each critic

    sources: tuple[str, ...] = SHIPPED  # policy files pi_1 ... pi_n; --sources alone: none, SAC
    num_random_sources: int = 0  # untrained policies added to the sources (paper, Section 4.3.3)
    # weight of the guidance KL, beta_1 in Eq. 12; 10 pulls too hard once values are large
    beta1: float = 1.0
    # cap on the advantage in that weight, as a fraction of |V|, beta_2 in Eq. 12; 0.003 is too
    # little while values are small
    beta2: float = 0.03
    num_guidance_samples: int = 1  # actions per candidate, Eq. 4, and per state in L_actor, Eq. 3
    # entropy term in the advantage, Eq. 4; the default leaves it out (Appendix B.3), because while
    # alpha is large it would rule out all sources for their low entropy
    soft_advantage: bool = False
    guidance_starts: int = 5_000  # environment steps before the guidance begins

    log_interval: int = 1_000  # steps between rows of metrics.csv, which show the last minibatch
    eval_interval: int = 20_000  # environment steps between evaluations
    eval_episodes: int = 10  # episodes per evaluation, a goal each; with --evaluate, take 50
    checkpoint_interval: int = 50_000  # environment steps between checkpoints
    run_dir: str | None = None  # where to write; by default runs/<env-id>__<cup or sac>__<seed>
    resume: bool = False  # go on from the run directory's checkpoint; start where there is none
    evaluate: str | None = None  # policy file to score instead, on --env-id or on its own task
    cuda: bool = torch.cuda.is_available()  # train on the GPU
    threads: int = max(1, min(4, (os.cpu_count() or 1) - 1))  # CPU threads; on a busy machine, 1
    compile: bool = False  # compile the update: faster after a minute; wants a C++ compiler
    tensorboard: bool = False  # also write TensorBoard logs into the run directory
    track: bool = False  # also log to Weights & Biases

    def __post_init__(self):
        """Raises ValueError, which tyro prints as a usage error with exit code 2."""
        may_be_zero = ("seed", "num_random_sources", "guidance_starts")
        for name, value in vars(self).items():
            smallest = 1 if type(value) is int and name not in may_be_zero else 0
            if type(value) in (int, float) and not smallest <= value < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} is out of range: {value}")
        if max(self.gamma, self.tau) > 1:
            raise ValueError("--gamma and --tau must not exceed 1")
        if self.init_alpha == 0 or min(self.hidden_sizes, default=1) < 1:
            raise ValueError("--init-alpha and --hidden-sizes must be positive")
        if not (self.num_envs < self.learning_starts < self.total_timesteps or self.evaluate):
            raise ValueError("--num-envs < --learning-starts < --total-timesteps must hold")
        if not (self.env_id or self.evaluate):
            raise ValueError("no task is named: give one, such as --env-id peg-insert-side-v2")
        if self.cuda and not torch.cuda.is_available():
            raise ValueError("PyTorch finds no CUDA device: use --no-cuda")
        if self.compile and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            raise ValueError("--compile needs a C++ compiler, such as g++: install one, or drop it")


# ---- environment ---------------------------------------------------------------------------------
def derive_seed(*numbers: int) -> int:
    """One seed from several numbers. (5,) and (5, 0) collide: use equal lengths."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class SeededEpisodes(gym.Wrapper):
    """An environment as CUP sees it: flat observations, actions in [-1, 1], seeded episodes.

    To go on inside an episode, set `start_at` to its number and its actions so far, then `reset`:
    the number decides the seed, and the actions are played again. An episode's last `info` holds
    its `return`, and its `success` in any of the steps, NaN where the task has no such thing.
    """

    def __init__(self, env: gym.Env, seed: int):
        super().__init__(env)
        self.seed, self.episode, self.start_at = seed, -1, None
        self.low, self.high = env.action_space.low, env.action_space.high
        obs_dim = gym.spaces.flatdim(env.observation_space)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)
        self.action_space = gym.spaces.Box(-1, 1, (self.low.size,), np.float32)

    def reset(self, *, seed=None, options=None):
        self.episode, actions = self.start_at or (self.episode + 1, ())
        self.start_at, self.actions, self.episode_return, self.success = None, [], 0.0, np.nan
        episode_seed = derive_seed(self.seed, self.episode)
        random.seed(episode_seed)  # some environments draw from the global generators
        np.random.seed(episode_seed)
        self.unwrapped.np_random = np.random.default_rng(episode_seed)  # Meta-World ignores a seed
        obs = self.checked(self.env.reset(seed=episode_seed)[0])
        for action in actions:
            obs = self.step(np.array(action, np.float32))[0]
        return obs, {}

    def step(self, action: np.ndarray):
        center, half_range = (self.high + self.low) / 2, (self.high - self.low) / 2
        scaled = center + half_range * action.reshape(center.shape)
        scaled = np.clip(scaled, self.low, self.high)  # rounding may leave the bounds
        obs, reward, terminated, truncated, info = self.env.step(scaled)
        self.actions.append(action.tolist())
        self.episode_return += float(reward)
        self.success = np.fmax(self.success, info.get("success", info.get("is_success", np.nan)))
        ended = terminated or truncated
        info = {"return": self.episode_return, "success": self.success} if ended else {}
        return self.checked(obs, reward), reward, terminated, truncated, info

    def checked(self, obs, reward: float = 0.0) -> np.ndarray:
        obs = gym.spaces.flatten(self.env.observation_space, obs).astype(np.float32)
        if not (np.isfinite(obs).all() and math.isfinite(reward)):
            after = f"episode {self.episode}, after the actions {self.actions[-1:]}"
            raise UserError(f"the environment returned NaN or infinity in {after}")
        return obs


def make_env(env_id: str, seed: int, **options) -> SeededEpisodes:
    """One environment; same seed, same sequence of episodes. Raises UserError for a wrong id.

    Meta-World tasks, `-v2` or `-v3`, follow the paper's protocol: the goal is visible and drawn
    anew for every episode; the reward is v2's; 500 steps, then truncation.
    """
    tasks, task = {}, env_id[:-1] + "3"  # Meta-World 3 has v2's tasks, under the name v3
    try:
        if env_id.endswith(("-v2", "-v3")):
            from metaworld import ALL_V3_ENVIRONMENTS as tasks
        if task in tasks:
            env = tasks[task](reward_function_version="v2", **options)
            env._partially_observable = False  # show the goal in the observation, ...
            del env.sawyer_observation_space  # ... which cached bounds would clip to zero
            env._freeze_rand_vec = False  # a new goal for every episode, ...
            env.seeded_rand_vec = env._set_task_called = True  # ... from env.np_random
        else:
            env = gym.make(env_id, **options)
    except Exception as error:  # an environment's own code may raise anything
        raise UserError(f"cannot make {env_id!r}: {error!r}") from error
    space = env.action_space
    if not (isinstance(space, gym.spaces.Box) and space.dtype.kind == "f" and space.is_bounded()):
        raise UserError(f"{env_id} has actions {space}: CUP needs a Box of bounded, real numbers")
    return SeededEpisodes(env, seed)


def make_envs(env_id: str, num_envs: int, *seed: int) -> gym.vector.SyncVectorEnv:
    """Environments that step in turn; to reset one whose episode has ended is up to the caller."""
    make = [lambda k=k: make_env(env_id, derive_seed(*seed, k)) for k in range(num_envs)]
    return gym.vector.SyncVectorEnv(make, autoreset_mode=gym.vector.AutoresetMode.DISABLED)


# ---- networks ------------------------------------------------------------------------------------
def mlp(*sizes: int, layer=nn.Linear) -> nn.Sequential:
    layers = []
    for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [layer(fan_in, fan_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


class Standardize(nn.Module):
    """obs (..., obs_dim) with mean 0 and a standard deviation of at most 1, by `fit`.

    Meta-World's observations are in metres, and centimetres matter.
    """

    def __init__(self, obs_dim: int):
        super().__init__()
        self.register_buffer("shift", torch.zeros(obs_dim))
        self.register_buffer("scale", torch.ones(obs_dim))

    def fit(self, obs: Tensor) -> None:
        """Take the statistics from obs (n, obs_dim)."""
        # at least 0.1, or the noise of what hardly moves would become large
        self.scale.copy_(1 / obs.std(dim=0, correction=0).clamp(min=0.1))
        self.scale[(obs == 0).all(dim=0)] = 1  # always zero so far: its size is unknown
        self.shift.copy_(-obs.mean(dim=0) * self.scale)

    def forward(self, obs: Tensor) -> Tensor:
        return torch.addcmul(self.shift, obs, self.scale)


class Actor(nn.Module):
    """Tanh-Gaussian policy: obs (..., obs_dim) -> mean, log_std (..., action_dim).

    Both are those before the tanh, and softly bounded: a mean far out, where the tanh is flat, or
    a vanishing standard deviation hardly changes the action, but makes the KL to this policy huge
    once it is a source (`query_sources` bounds it harder: it may come from elsewhere).
    tanh(3) is 0.995; a raw output of 0 gives a log_std of -1.5.
    """

    def __init__(
        self, obs_dim: int, action_dim: int, hidden_sizes: Sequence[int],
        mean_bound: float = 3.0, log_std_min: float = -5.0, log_std_max: float = 2.0,
    ):
        super().__init__()
        self.obs_dim, self.action_dim, self.hidden_sizes = obs_dim, action_dim, list(hidden_sizes)
        self.mean_bound, self.log_std_min, self.log_std_max = mean_bound, log_std_min, log_std_max
        self.standardize = Standardize(obs_dim)
        self.net = mlp(obs_dim, *hidden_sizes, 2 * action_dim)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.net(self.standardize(obs)).chunk(2, dim=-1)
        mean = self.mean_bound * torch.tanh(mean / self.mean_bound)
        middle = (self.log_std_max + self.log_std_min) / 2
        half_range = (self.log_std_max - self.log_std_min) / 2
        return mean, middle + half_range * torch.tanh(log_std / half_range)


class TwinLinear(nn.Module):
    """Two linear layers side by side, x (2, batch, fan_in) -> (2, batch, fan_out)."""

    def __init__(self, fan_in: int, fan_out: int):
        super().__init__()
        layers = [nn.Linear(fan_in, fan_out) for _ in range(2)]
        self.weight = nn.Parameter(torch.stack([layer.weight.T for layer in layers]))
        self.bias = nn.Parameter(torch.stack([layer.bias[None] for layer in layers]))

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.shape[2] == 1:  # Q: a batched product of width 1 is slow
            return self.bias + (x * self.weight.mT).sum(dim=2, keepdim=True)
        return torch.baddbmm(self.bias, x, self.weight)


class SoftQNetwork(nn.Module):
    """Twin critic: obs (..., obs_dim), action (..., action_dim) -> Q1, Q2 as (2, ...)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_sizes: Sequence[int]):
        super().__init__()
        self.standardize = Standardize(obs_dim)
        self.net = mlp(obs_dim + action_dim, *hidden_sizes, 1, layer=TwinLinear)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([self.standardize(obs), action], dim=-1)
        twins = x.reshape(-1, x.shape[-1]).expand(2, -1, -1)
        return self.net(twins).view(2, *x.shape[:-1])

    def min_q(self, obs: Tensor, action: Tensor) -> Tensor:
        return self(obs, action).amin(dim=0)  # the smaller of the twins


def squash(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Sample a tanh-Gaussian, reparameterised by standard normal `noise`.

    Shapes broadcast: (..., action_dim) -> action (..., action_dim), log_prob (...).
    """
    pre_tanh = mean + log_std.exp() * noise
    log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    # log(1 - tanh(x)^2), written so that it does not overflow
    log_prob = log_prob - 2 * (math.log(2) - pre_tanh - F.softplus(-2 * pre_tanh))
    return torch.tanh(pre_tanh), log_prob.sum(dim=-1)


# ---- CUP: which source to follow at a state, and how far ----------------------------------------
def expected_advantage(q: Tensor, log_prob: Tensor, alpha: Tensor | float) -> tuple[Tensor, Tensor]:
    """Soft expected advantage of every candidate over the target policy, Eq. 4.

    q, log_prob: (samples, batch, n + 1), of each candidate's own actions: Q by the target policy's
    critic, log_prob by the candidate itself; the n sources first, the target policy last.
    alpha = 0 gives the hard advantage of Appendix B.3. Returns the advantages (batch, n + 1),
    the target's zero, and the target's soft value V (batch,), Eq. 2.
    """
    soft_q = (q - alpha * log_prob).mean(dim=0)  # Monte Carlo, (batch, n + 1)
    value = soft_q[:, -1]  # Eq. 2
    return soft_q - value.unsqueeze(1), value  # Eq. 4


def guidance_policy(advantage: Tensor) -> Tensor:
    """Eq. 7: index (batch,) of the best candidate, from advantages (batch, n + 1).

    The target policy is candidate n; it wins a tie.
    """
    best, source = advantage[:, :-1].max(dim=1)
    return torch.where(best > advantage[:, -1], source, advantage.shape[1] - 1)


def guidance_weight(advantage: Tensor, value: Tensor, beta1: float, beta2: float) -> Tensor:
    """Eq. 12: beta_s (batch,), from the guidance policy's advantage and V, both (batch,).

    Zero where the target policy is its own guidance: its advantage over itself is zero. The cap,
    by the target policy's value, is for the critic's errors, which make sources look too good.
    """
    return beta1 * torch.minimum(advantage, beta2 * value.abs())


def kl_divergence(mean_p: Tensor, log_std_p: Tensor, mean_q: Tensor, log_std_q: Tensor) -> Tensor:
    """KL(p || q) of two tanh-Gaussians (Eqs. 9, 11), (..., action_dim) -> (...), in nats.

    A KL does not change when both variables go through the same bijection, here the tanh: it is
    the closed-form KL of the two Gaussians before it.
    """
    log_ratio = log_std_p - log_std_q
    distance = (mean_p - mean_q) / log_std_q.exp()
    kl = 0.5 * ((2 * log_ratio).exp() + distance.square() - 1) - log_ratio
    return kl.sum(dim=-1)


def guidance_loss(
    critic: Callable[[Tensor, Tensor], Tensor], obs: Tensor, mean: Tensor, log_std: Tensor,
    source_mean: Tensor, source_log_std: Tensor, noise: Tensor, q: Tensor, log_prob: Tensor,
    alpha: Tensor | float, beta1: float, beta2: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """What CUP adds to the actor's loss, Eq. 11: the mean over states of beta_s KL(tar || g).

    critic: obs (..., obs_dim), action (..., action_dim) in [-1, 1] -> Q (...), the smaller twin.
    q, log_prob (samples, batch) of the target policy's actions by noise (samples, batch,
    action_dim) and its mean, log_std (batch, action_dim) at obs. source_mean, source_log_std
    (batch, n, action_dim): bound them as `query_sources` does. alpha: 0 for the hard advantage,
    cup.py's default, or SAC's.
    Returns the loss, and advantage (batch, n + 1), guidance (an index), weight, kl (batch,).
    """
    with torch.no_grad():
        # the same noise for all candidates, so that only their policies differ
        source_action, source_log_prob = squash(source_mean, source_log_std, noise.unsqueeze(2))
        source_q = critic(obs.unsqueeze(1).expand(*source_action.shape[:3], -1), source_action)
        q = torch.cat([source_q, q.unsqueeze(2)], dim=2)  # (samples, batch, n + 1)
        log_prob = torch.cat([source_log_prob, log_prob.unsqueeze(2)], dim=2)
        advantage, value = expected_advantage(q, log_prob, alpha)  # Eq. 4
        guidance = guidance_policy(advantage)  # Eq. 7
        row = torch.arange(len(obs), device=obs.device)
        # Eq. 12; the best of noisy advantages is too large on average
        weight = guidance_weight(advantage[row, guidance], value, beta1, beta2)
        guide_mean = torch.cat([source_mean, mean.unsqueeze(1)], dim=1)[row, guidance]
        guide_log_std = torch.cat([source_log_std, log_std.unsqueeze(1)], dim=1)[row, guidance]
    kl = kl_divergence(mean, log_std, guide_mean, guide_log_std)
    states = {"advantage": advantage, "guidance": guidance, "weight": weight, "kl": kl.detach()}
    return (weight * kl).mean(), states


@torch.no_grad()
def query_sources(sources: dict[str, Actor], obs: Tensor, action_dim: int) -> tuple[Tensor, Tensor]:
    """Mean and log-std (batch, n, action_dim) of the n sources at obs (batch, obs_dim).

    Bounded, because a source that is nearly deterministic or saturated gives almost no probability
    to what the target policy does, and the KL to it would drown SAC's loss: it reached 1e11 without
    bounds and stays near 10 nats with 2.5 for the mean and -1.5 for the log-std.
    """
    mean, log_std = obs.new_empty(2, len(obs), len(sources), action_dim)
    for k, actor in enumerate(sources.values()):
        mean[:, k], log_std[:, k] = actor(obs)
    return mean.clamp(-2.5, 2.5), log_std.clamp(min=-1.5)


class Batch(NamedTuple):
    """A minibatch of transitions, with n sources."""

    obs: Tensor  # (batch, obs_dim)
    next_obs: Tensor  # (batch, obs_dim)
    action: Tensor  # (batch, action_dim)
    reward: Tensor  # (batch,)
    terminated: Tensor  # (batch,)
    # what every source would do at obs (`query_sources`): the sources are frozen, so they are
    # asked once, on arrival, and not in every gradient update
    source_mean: Tensor  # (batch, n, action_dim)
    source_log_std: Tensor  # (batch, n, action_dim)


class ReplayBuffer(nn.Module):
    """The replay buffer D: `columns` is a preallocated `Batch`, of which `size` rows are in use."""

    def __init__(self, capacity: int, shapes: Batch, device="cpu"):
        super().__init__()
        # `type(shapes)`: another method may have other columns
        self.columns = type(shapes)(*(torch.empty(capacity, *x, device=device) for x in shapes))
        self.capacity, self.size, self.position = capacity, 0, 0

    def add(self, batch: Batch) -> None:
        """Store transitions; the oldest make room."""
        index = (self.position + torch.arange(len(batch.obs))) % self.capacity
        for column, values in zip(self.columns, batch, strict=True):
            column[index] = values
        self.position = (self.position + len(index)) % self.capacity
        self.size = min(self.size + len(index), self.capacity)

    def sample(self, batch_size: int) -> Batch:
        """A uniform minibatch."""
        index = torch.randint(self.size, (batch_size,), device=self.columns.obs.device)
        return type(self.columns)(*(column[index] for column in self.columns))

    def obs(self) -> Tensor:
        """All states in it, (size, obs_dim)."""
        return self.columns.obs[: self.size]

    def get_extra_state(self) -> dict:
        """What `Agent.state_dict` holds of it: the rows in use, and where it goes on."""
        # by way of numpy, or torch would save the unused rows as well
        columns = [torch.from_numpy(x.cpu().numpy()[: self.size]) for x in self.columns]
        return {"columns": columns, "position": self.position}

    def set_extra_state(self, state: dict) -> None:
        self.size, self.position = len(state["columns"][0]), state["position"]
        for column, values in zip(self.columns, state["columns"], strict=True):
            column[: self.size] = values


class Adam(nn.Module):
    """torch.optim.Adam in a form that torch.compile can see into, with the same numbers."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float):
        super().__init__()
        self.learnt, self.lr = list(parameters), lr
        self.exp_avg = nn.ParameterList(torch.zeros_like(x) for x in self.learnt)
        self.exp_avg_sq = nn.ParameterList(torch.zeros_like(x) for x in self.learnt)
        self.steps = nn.ParameterList(torch.zeros((), device=x.device) for x in self.learnt)
        self.requires_grad_(False)  # the state above; `learnt` is a plain list, and not part of it

    def minimize(self, loss: Tensor) -> None:
        """One step of its parameters alone, whatever else the scalar `loss` depends on."""
        gradients = torch.autograd.grad(loss, self.learnt)
        with torch.no_grad():
            adam(
                self.learnt, list(gradients), list(self.exp_avg), list(self.exp_avg_sq), [],
                list(self.steps), lr=self.lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0,
                amsgrad=False, maximize=False, foreach=False,
                capturable=True,  # `steps` may be part of a CUDA graph
                fused=not torch.compiler.is_compiling(),  # one kernel, opaque to the compiler
            )


# ---- the update, Alg. 1 --------------------------------------------------------------------------
class Agent(nn.Module):
    """Actor, twin critic, entropy weight, and one optimiser for each."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int, sources: dict, device="cpu"):
        super().__init__()
        self.args, self.sources, self.target_entropy = args, sources, -float(action_dim)
        self.actor = Actor(obs_dim, action_dim, args.hidden_sizes)
        self.critic = SoftQNetwork(obs_dim, action_dim, args.hidden_sizes)
        self.target_critic = SoftQNetwork(obs_dim, action_dim, args.hidden_sizes)
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.init_alpha)))
        self.to(device)
        self.actor_optimizer = Adam(self.actor.parameters(), args.policy_lr)
        self.critic_optimizer = Adam(self.critic.parameters(), args.q_lr)
        self.alpha_optimizer = Adam([self.log_alpha], args.alpha_lr)
        state, dist = (obs_dim,), (len(sources), action_dim)
        shapes = Batch(state, state, (action_dim,), (), (), dist, dist)  # of one transition
        self.buffer = ReplayBuffer(args.buffer_size, shapes, device)
        if args.compile:
            torch._dynamo.config.trace_autograd_ops = True  # gradients are taken inside `update`
            torch._inductor.config.fallback_random = True  # the random numbers stay the same
            mode = "reduce-overhead" if args.cuda else "default"  # CUDA graphs
            self.update = torch.compile(self.update, fullgraph=True, mode=mode)

    @torch.no_grad()
    def act(self, obs: Tensor, episode_steps: Sequence[int]) -> Tensor:
        """Sampled actions (num_envs, action_dim); baselines/ use the steps since each reset."""
        mean, log_std = self.actor(obs)
        return squash(mean, log_std, torch.randn_like(mean))[0]

    def store(self, obs, action, next_obs, reward, terminated) -> None:
        """Put transitions into the replay buffer, one of each environment."""
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

    def update(self, batch: Batch, guide: bool = True) -> dict[str, Tensor]:
        """One gradient step of Alg. 1. Returns scalars under the names that are logged.

        With guide=False, without sources, or with --beta1 0 (and one guidance sample) it is SAC,
        bit for bit.
        """
        args = self.args
        alpha = self.log_alpha.detach().exp()

        # ---- critic: L_critic, Eq. 3
        td_error = self.critic(batch.obs, batch.action) - self.td_target(batch, alpha)  # (2, batch)
        critic_loss = td_error.square().mean(dim=1).sum()
        self.critic_optimizer.minimize(critic_loss)

        # ---- actor: L_actor, Eq. 3
        guide = guide and len(self.sources) > 0
        samples = args.num_guidance_samples if guide else 1
        mean, log_std = self.actor(batch.obs)
        noise = torch.randn(samples, *mean.shape, device=mean.device)
        action, log_prob = squash(mean, log_std, noise)
        q = self.critic.min_q(batch.obs.expand(samples, -1, -1), action)
        actor_loss = (alpha * log_prob - q).mean()  # log_prob, q: (samples, batch)
        info = {"loss/critic": critic_loss.detach(), "loss/actor": actor_loss.detach()}

        # ---- guidance: the KL term of L_CUP, Eq. 11. Alg. 1 chooses pi_g before the critic's
        # step; here the actor's q serves for both
        if guide:
            entropy_weight = alpha if args.soft_advantage else 0.0
            kl_loss, states = guidance_loss(
                self.critic.min_q, batch.obs, mean, log_std, batch.source_mean,
                batch.source_log_std, noise, q, log_prob, entropy_weight, args.beta1, args.beta2,
            )
            actor_loss = actor_loss + kl_loss
            info["loss/kl"] = kl_loss.detach()
            info["guidance/weight"] = states["weight"].mean()
            info["guidance/kl"] = states["kl"].mean()
            advantages = states["advantage"].mean(dim=0)  # (n + 1,)
            for k, name in enumerate([*self.sources, "target"]):
                info[f"guidance/selected/{name}"] = (states["guidance"] == k).float().mean()
                info[f"guidance/advantage/{name}"] = advantages[k]

        self.actor_optimizer.minimize(actor_loss)  # through the critic, which stays as it is

        # ---- entropy weight: L_entropy, Eq. 3
        entropy = -log_prob.detach().mean()
        alpha_loss = self.log_alpha.exp() * (entropy - self.target_entropy)
        self.alpha_optimizer.minimize(alpha_loss)

        # ---- target critic
        with torch.no_grad():
            for target, online in zip(self.target_critic.parameters(), self.critic.parameters()):
                target.lerp_(online, args.tau)
        return info | {"alpha": alpha, "entropy": entropy}

    def fit_standardization(self) -> None:
        """Fix how the networks see observations, by the states in the replay buffer."""
        for network in (self.actor, self.critic, self.target_critic):
            network.standardize.fit(self.buffer.obs())


# ---- policy files --------------------------------------------------------------------------------
def save(content: dict, path: Path) -> None:
    """torch.save, then rename: `path` holds the old content or the new, never a half."""
    partial = path.with_suffix(".tmp")
    try:
        torch.save(content, partial)
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch has a RuntimeError for a full disk
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({error}); what it held is intact") from error


def policy_content(actor: Actor, **about) -> dict:
    """What a policy file holds, as torch.save writes it.

    `actor`: the arguments of `Actor`. `weights`: "standardize.shift", "standardize.scale"
    (obs_dim,), by which the network sees obs * scale + shift; then "net.0.weight"
    (hidden, obs_dim), "net.0.bias" and so on by twos, with ReLU between; the last layer's rows are
    the means', then the log-stds', before they are bounded. The rest is `about` the policy:
    env_id, step, return, success_rate.
    """
    names = ("obs_dim", "action_dim", "hidden_sizes", "mean_bound", "log_std_min", "log_std_max")
    weights = {name: tensor.cpu().clone() for name, tensor in actor.state_dict().items()}
    return {"actor": {name: getattr(actor, name) for name in names}, **about, "weights": weights}


def load_policy(path: str | Path) -> Actor:
    """The frozen actor of a policy file: `mean, log_std = actor(obs)`, both before the tanh.

    `about` is what the file says of itself. Nothing in it is executed. Raises UserError for
    anything but a whole, finite policy.
    """
    try:
        if damaged := zipfile.ZipFile(path).testzip():  # torch.load skips the checksums
            raise ValueError(f"{damaged} in it is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True)
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced
            actor = Actor(**content["actor"])
        actor.load_state_dict(content["weights"], assign=True)
        actor.float().requires_grad_(False)
        actor.about = {k: v for k, v in content.items() if k not in ("actor", "weights")}
        tensors = [*actor.state_dict().values(), *actor(torch.zeros(actor.obs_dim))]
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise ValueError("a weight or a bound is not finite")
    except FileNotFoundError:
        raise UserError(f"there is no policy file {path}: see sources/ for some") from None
    except Exception as error:  # whatever else is wrong with the file
        reason = "it may hold code" if isinstance(error, pickle.UnpicklingError) else repr(error)
        raise UserError(f"{path} is not a policy file: {reason}") from error
    return actor


def check_sizes(path: str | Path, actor: Actor, env_id: str, sizes: tuple[int, ...]) -> None:
    ours = (actor.obs_dim, actor.action_dim)
    if ours != sizes:
        reason = f"{path} has observation and action sizes {ours}, but {env_id} has {sizes}"
        raise UserError(f"{reason}: name one that fits, or as a source none (--sources alone)")


def load_sources(args: Args, obs_dim: int, action_dim: int, device="cpu") -> dict[str, Actor]:
    """Source policies by name. Raises UserError for one that does not fit the task.

    It draws none of the run's random numbers: with the same seed, CUP and SAC begin with the
    same networks, the same random actions and the same goals.
    """
    sources = {}
    with torch.random.fork_rng([0] if args.cuda else []):
        for k in range(args.num_random_sources):
            torch.manual_seed(derive_seed(args.seed, 3, k))
            sources[f"random-{k + 1}"] = Actor(obs_dim, action_dim, args.hidden_sizes).to(device)
    for path in map(Path, args.sources):
        actor = load_policy(path)
        check_sizes(path, actor, args.env_id, (obs_dim, action_dim))
        # runs/x/policy.pt goes by the name of its run; a name that is taken gets a suffix
        name = path.absolute().parent.name if path.stem == "policy" else path.stem
        while name in (*sources, "target"):
            name += "-2"
        sources[name] = actor.to(device)
    return sources


# ---- evaluation and training ---------------------------------------------------------------------
@torch.no_grad()
def evaluate(
    actor: Actor, env: SeededEpisodes, episodes: int, first_episode: int = 0, sample: bool = False
) -> np.ndarray:
    """Return and success (2, episodes) of the mean action, or of sampled ones.

    `first_episode` is the number of the first, which decides its goal.
    """
    device, results = next(actor.parameters()).device, []
    env.start_at = first_episode, ()
    for _ in range(episodes):
        obs, ended = env.reset()[0], False
        while not ended:
            mean, log_std = actor(torch.as_tensor(obs[None], device=device))  # a batch of one
            noise = torch.randn_like(mean) if sample else torch.zeros_like(mean)
            action, _ = squash(mean, log_std, noise)
            obs, _, terminated, truncated, info = env.step(action[0].cpu().numpy())
            ended = terminated or truncated
        results.append([info["return"], info["success"]])
    return np.array(results).T


def load_checkpoint(args: Args, method: str, run_dir: Path) -> dict:
    """The checkpoint to go on with; empty for a new run. Raises UserError if it does not fit."""
    if any(run_dir.glob("*")) and not args.resume:
        raise UserError(f"{run_dir} exists: go on with --resume, or choose another --run-dir")
    if not (run_dir / "checkpoint.pt").exists():
        return {}
    try:
        checkpoint = torch.load(run_dir / "checkpoint.pt", "cpu", weights_only=True, mmap=True)
        started_with = checkpoint["args"] | {"method": checkpoint["method"]}
    except Exception as error:  # whatever is wrong with the file
        raise UserError(f"{run_dir}/checkpoint.pt is damaged ({type(error).__name__})") from error
    may_differ = ("total_timesteps", "checkpoint_interval", "run_dir", "resume", "cuda", "threads",
                  "tensorboard", "track")
    for name, value in (asdict(args) | {"method": method}).items():
        before = started_with.get(name)
        if name == "sources":  # by folder and file: a run may move, and its sources with it
            value, before = ([Path(x).parts[-2:] for x in paths] for paths in (value, before))
        if value != before and name not in may_differ:
            raise UserError(f"{run_dir} was started with {name} = {before}, not {value}")
    return checkpoint


class Logger:
    """What a run logs: metrics.csv, TensorBoard, Weights & Biases, and a line of progress."""

    def __init__(self, args: Args, run_dir: Path, checkpoint: dict):
        self.rows, self.wandb_id = checkpoint.get("rows", []), checkpoint.get("wandb_id")
        self.args, self.run_dir, self.columns, self.tensorboard = args, run_dir, {}, None
        self.last = self.rows[-1] if self.rows else {"step": 0, "time/seconds": 0}
        if args.tensorboard or args.track:
            from torch.utils.tensorboard import SummaryWriter
            if args.track:  # it gets what TensorBoard gets
                import wandb
                about = {"project": "cup", "name": run_dir.name, "config": asdict(args)}
                wandb.init(id=self.wandb_id, resume="allow", sync_tensorboard=True, **about)
                self.wandb_id = wandb.run.id
            self.tensorboard = SummaryWriter(run_dir, purge_step=self.last["step"] + 1)
        self.start = time.monotonic() - checkpoint.get("seconds", 0)

    def log(self, step: int, row: dict[str, float]) -> None:
        """Add a row."""
        seconds = time.monotonic() - self.start
        rate = (step - self.last["step"]) / (seconds - self.last["time/seconds"])
        row = {"step": step, "time/seconds": seconds, "time/steps_per_second": rate} | row
        row = {name: value for name, value in row.items() if not math.isnan(value)}
        if not row.keys() <= self.columns.keys():  # it brings a column: the file begins anew
            self.columns = dict.fromkeys(name for row in (*self.rows, row) for name in row)
            self.file = open(self.run_dir / "metrics.csv", "w", newline="")
            self.csv = csv.DictWriter(self.file, self.columns)
            self.csv.writeheader()
            self.csv.writerows(self.rows)
        self.csv.writerow(row)
        self.file.flush()
        self.rows.append(row)  # once it is on the disk: a checkpoint may follow a full one
        self.last = row
        if self.tensorboard:
            for name, value in row.items():
                self.tensorboard.add_scalar(name, value, step)
        shown = ("train/", "eval/", "guidance/selected/")
        scores = [f"{name} {row[name]:.3g}" for name in row if name.startswith(shown)]
        minutes = (self.args.total_timesteps - step) / rate / 60
        print(f"{step:,} steps, {minutes:.0f} min left", *scores, sep=", ", flush=True)


def train(args: Args, agent_class: type[Agent] = Agent) -> None:
    """Alg. 1, from the start or from a checkpoint; another method brings its own agent."""
    method = "cup" if args.sources or args.num_random_sources else "sac"
    method = method if agent_class is Agent else agent_class.__name__.lower()
    if args.compile and agent_class is not Agent:
        raise UserError(f"--compile knows the update of cup.py, and not that of {method}: drop it")
    name = f"{args.env_id}__{method}__{args.seed}".replace(":", "-").replace("/", "-")
    run_dir = Path(args.run_dir or f"runs/{name}")
    checkpoint = load_checkpoint(args, method, run_dir)
    device = torch.device("cuda" if args.cuda else "cpu")
    torch.set_flush_denormal(True)  # Adam's moments become denormal numbers, which are slow
    signals = []

    def on_signal(number, _):
        signals.append(number)  # heeded after this step or evaluation; a second ends it at once
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)

    # streams 0 and 1 of the seed: no evaluation goal is ever a training goal
    envs = make_envs(args.env_id, args.num_envs, args.seed, 0)
    eval_env = make_env(args.env_id, derive_seed(args.seed, 1, 0))
    if eval_env.spec and not eval_env.spec.max_episode_steps:
        print(f"warning: {args.env_id} has no time limit (gymnasium.wrappers.TimeLimit sets one): "
              "an evaluation lasts as long as its episodes", file=sys.stderr)
    (obs_dim,), (action_dim,) = envs.single_observation_space.shape, envs.single_action_space.shape
    sources = load_sources(args, obs_dim, action_dim, device)
    agent = agent_class(args, obs_dim, action_dim, sources, device)
    step = checkpoint.get("step", 0)  # environment steps so far
    info = checkpoint.get("info", {})  # what the last update returned
    recent = checkpoint.get("recent", [])  # return and success of the last training episodes
    if checkpoint:
        agent.load_state_dict(checkpoint["agent"])
        torch.manual_seed(derive_seed(args.seed, 6, step))  # for the GPU, whose state isn't saved
        torch.set_rng_state(checkpoint["rng_state"])
        envs.set_attr("start_at", checkpoint["episodes"])
    obs = torch.as_tensor(envs.reset()[0], device=device)
    logger = Logger(args, run_dir, checkpoint)
    del checkpoint  # it is mapped into memory: its file would keep its place on the disk
    run_dir.mkdir(parents=True, exist_ok=True)
    packages = ("torch", "numpy", "gymnasium", "metaworld", "mujoco", "tyro")
    settings = {"args": asdict(args), "versions": {name: version(name) for name in packages}}
    (run_dir / "args.json").write_text(json.dumps(settings, indent=2) + "\n")
    print(f"{args.env_id}, {method} with {len(sources)} sources; writing to {run_dir}", flush=True)

    def save_checkpoint():
        if not all(math.isfinite(value) for value in info.values()):
            return  # the one before is better
        state = {
            "args": asdict(args), "method": method, "step": step, "recent": recent[-20:],
            "rows": logger.rows, "wandb_id": logger.wandb_id,
            "seconds": time.monotonic() - logger.start,
            "info": {name: float(value) for name, value in info.items()},
            "agent": agent.state_dict(), "rng_state": torch.get_rng_state(),
            "episodes": [(env.episode, env.actions) for env in envs.envs],
        }
        save(state, run_dir / "checkpoint.pt")

    def due(interval):  # was a multiple of `interval` among the steps just taken?
        return step % interval < args.num_envs

    try:
        while not signals:
            for name, value in info.items():
                if name.startswith("loss/") and not math.isfinite(value):
                    raise UserError(f"{name} is {value} at step {step:,}; the checkpoint is older")

            # ---- evaluate, log, save
            row, is_last = {}, step >= args.total_timesteps
            is_new = step > logger.last["step"]  # not so if the checkpoint holds this step's row
            if is_new and (is_last or due(args.eval_interval)):
                # the step as first episode's number: new goals for every evaluation
                scores = evaluate(agent.actor, eval_env, args.eval_episodes, step)
                row["eval/return"], row["eval/success_rate"] = scores.mean(axis=1).tolist()
                about = {"return": row["eval/return"], "success_rate": row["eval/success_rate"]}
                policy = policy_content(agent.actor, env_id=args.env_id, step=step, **about)
                # as a source it will ignore what its own task has never shown
                policy["weights"]["standardize.scale"] *= (agent.buffer.obs() != 0).any(dim=0).cpu()
                save(policy, run_dir / "policy.pt")
            if is_new and (row or due(args.log_interval)):
                if recent:
                    means = np.mean(recent[-20:], axis=0)
                    row["train/return"], row["train/success_rate"] = means.tolist()
                logger.log(step, row | {name: float(value) for name, value in info.items()})
                info = {}
            if is_last:
                break
            if due(args.checkpoint_interval):
                save_checkpoint()

            # ---- act
            if step < args.learning_starts:
                action = 2 * torch.rand(args.num_envs, action_dim, device=device) - 1
            else:
                action = agent.act(obs, [len(env.actions) for env in envs.envs])

            # ---- learn, from what is stored so far: this step's transitions come after
            next_step = step + args.num_envs
            if step < args.learning_starts <= next_step:  # once
                agent.fit_standardization()
            updates_before = int(max(step - args.learning_starts, 0) * args.utd_ratio)
            updates_after = int(max(next_step - args.learning_starts, 0) * args.utd_ratio)
            for _ in range(updates_after - updates_before):
                batch = agent.buffer.sample(args.batch_size)
                info = agent.update(batch, guide=next_step > args.guidance_starts)

            # ---- step, store
            next_obs, reward, terminated, truncated, infos = envs.step(action.cpu().numpy())
            stored = [torch.as_tensor(x, dtype=torch.float32, device=device)
                      for x in (next_obs, reward, terminated)]
            agent.store(obs, action, *stored)
            ended = terminated | truncated
            if ended.any():
                recent += np.stack([infos["return"], infos["success"]], axis=1)[ended].tolist()
                next_obs, _ = envs.reset(options={"reset_mask": ended})
            step = next_step
            obs = torch.as_tensor(next_obs, device=device)
    finally:  # also where an environment failed; this step's updates are then made once more
        save_checkpoint()
        envs.close()
        eval_env.close()
    if signals:
        print(f"stopped at step {step:,}: the same command with --resume goes on")
        sys.exit(128 + signals[0])  # as of a program that a signal has ended
    print(f"finished {step:,} steps: {run_dir}/policy.pt, {run_dir}/metrics.csv")


# ---- command line --------------------------------------------------------------------------------
def score_policy(args: Args) -> None:
    """--evaluate: how a policy file does on fresh goals, by mean and by sampled action."""
    from scipy.stats import binomtest, sem, t  # Meta-World brings it

    actor = load_policy(args.evaluate)
    env_id = args.env_id or actor.about.get("env_id")
    # "module:Name" would import a module that a stranger's file chose
    if not isinstance(env_id, str) or (":" in env_id and not args.env_id):
        raise UserError(f"{args.evaluate} names no task: choose one with --env-id")
    env = make_env(env_id, derive_seed(args.seed, 2, 0))
    check_sizes(args.evaluate, actor, env_id, env.observation_space.shape + env.action_space.shape)
    print(f"{args.evaluate} on {env_id}, {args.eval_episodes} episodes, 95 % intervals")
    for name in ("mean", "sampled"):
        returns, wins = evaluate(actor, env, args.eval_episodes, sample=name == "sampled")
        half_width = t.ppf(0.975, len(returns) - 1) * sem(returns)
        line = f"{name} action: return {returns.mean():.1f} +- {half_width:.1f}"
        if not np.isnan(wins).any():
            low, high = binomtest(int(wins.sum()), len(wins)).proportion_ci(method="wilson")
            line += f", success {wins.mean():.2f} [{low:.2f}, {high:.2f}]"
        print(line)


def main(args_class: type[Args] = Args, agent_class: type[Agent] = Agent) -> None:
    try:
        args = tyro.cli(args_class, description=sys.modules["__main__"].__doc__)
        torch.set_num_threads(args.threads)
        torch.manual_seed(args.seed)
        if args.evaluate:
            score_policy(args)
        else:
            train(args, agent_class)
    except (UserError, OSError, ImportError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
