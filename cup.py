"""CUP: Critic-Guided Policy Reuse (Zhang, Li, Zhang; NeurIPS 2022), in one file.

Frozen source policies, trained on other tasks, guide Soft Actor-Critic on a new task.
At every state of a minibatch the critic of the *new* task scores what each source would
do there; where a source beats the target policy, the actor is pulled towards the best
source. Nothing else is trained.

    python cup.py --env-id peg-insert-side-v2             # CUP, shipped source policies
    python cup.py --env-id peg-insert-side-v2 --sources   # no sources: the SAC baseline
    python cup.py --evaluate sources/reach-v2.pt          # score a policy file

Equation numbers are the paper's. To learn the algorithm, read from `expected_advantage`
to the end of `Agent.update`; what comes after is files, logs and the command line.
"""

import contextlib
import csv
import ctypes
import difflib
import fcntl
import inspect
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import sys
import time
import zipfile
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C while PyTorch loads: just end
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

try:
    import metaworld
except (AttributeError, ImportError, RuntimeError) as error:
    if not (opengl := os.environ.get("MUJOCO_GL")):  # MuJoCo loads it at once
        raise
    problem = f"MUJOCO_GL={opengl} does not load ({error})"
    print(f"cup.py: {problem}: install its library or unset it", file=sys.stderr)
    sys.exit(2)

SOURCES_DIR = Path(__file__).parent / "sources"
SHIPPED = [
    SOURCES_DIR / f"{task}.pt" for task in ("reach-v2", "push-v2", "pick-place-v2")
]


class UserError(Exception):
    """Something the user can put right; `main` prints it and exits with code 2."""


class RunError(Exception):
    """A run that cannot go on; `main` prints it and exits with code 1."""


class EnvironmentFault(RunError):
    """An environment that raised, died or returned NaN; a checkpoint is written first."""


@dataclass
class Args:
    """Train a target policy with the guidance of source policies (CUP)."""

    env_id: str | None = None
    """Meta-World task (peg-insert-side-v2) or Gymnasium id with Box spaces (Pendulum-v1)"""
    seed: int = 1
    """seed of everything random: networks, exploration, minibatches, goals"""
    total_timesteps: int = 1_000_000
    """environment steps, all environments together"""
    num_envs: int = 4
    """environments that step side by side, while the gradient update runs"""
    buffer_size: int = 1_000_000
    """capacity of the replay buffer D, in transitions"""
    batch_size: int = 256
    """minibatch size of every gradient update"""
    learning_starts: int = 5_000
    """environment steps with uniformly random actions before the first update"""
    utd_ratio: float = 0.25
    """gradient updates per environment step"""
    gamma: float = 0.99
    """discount factor, gamma in Eq. 1"""
    tau: float = 0.005
    """step of the target critic towards the critic, tau in Alg. 1"""
    policy_lr: float = 3e-4
    """learning rate of the actor, lambda_pi in Alg. 1"""
    q_lr: float = 3e-4
    """learning rate of the critics, lambda_theta in Alg. 1"""
    alpha_lr: float = 3e-4
    """learning rate of the entropy weight, lambda_alpha in Alg. 1"""
    init_alpha: float = 0.1
    """initial entropy weight alpha, Eq. 2; 1 would rule the losses for 10,000 updates"""
    hidden_sizes: tuple[int, ...] = (256, 256)
    """hidden layers of the actor and of each critic"""

    sources: tuple[str, ...] = field(
        default_factory=lambda: tuple(str(path) for path in SHIPPED if path.exists())
    )
    """policy files pi_1 ... pi_n to reuse; nothing after the flag: none, which is SAC"""
    num_random_sources: int = 0
    """untrained policies added to the sources (paper, Section 4.3.3)"""
    beta1: float = 1.0
    """weight of the guidance KL, beta_1 in Eq. 12"""
    beta2: float = 0.03
    """cap on the advantage in that weight, as a fraction of |V|: beta_2 in Eq. 12"""
    num_guidance_samples: int = 1
    """actions sampled per candidate to estimate its expected advantage, Eq. 4"""
    soft_advantage: bool = False
    """entropy term in the expected advantage: Eq. 4 as it is; off: Appendix B.3's variant"""
    source_mean_bound: float = 2.5
    """sources' pre-tanh means are clipped to plus or minus this (see query_sources)"""
    source_log_std_min: float = -1.5
    """sources' log standard deviations are raised to at least this (see query_sources)"""
    guidance_starts: int = 5_000
    """environment steps before the guidance begins"""

    log_interval: int = 1_000
    """environment steps between rows of metrics.csv"""
    eval_interval: int = 20_000
    """environment steps between evaluations"""
    eval_episodes: int = 10
    """episodes per evaluation, each with a goal of its own; with --evaluate, take 50"""
    checkpoint_interval: int = 50_000
    """environment steps between checkpoints"""
    run_dir: str | None = None
    """directory to write to; by default runs/<env-id>__<cup or sac>__<seed>"""
    resume: str | None = None
    """run directory to go on with, from its checkpoint"""
    evaluate: str | None = None
    """policy file to score instead of training: on --env-id, or else on its own task"""
    capture_video: bool = False
    """with --evaluate: also write one episode as a GIF beside the policy file"""
    cuda: bool = torch.cuda.is_available()
    """train on the GPU"""
    threads: int = max(1, min(4, (os.cpu_count() or 1) - 1))
    """CPU threads of the learner; the default leaves a core to the environments"""
    tensorboard: bool = False
    """also write TensorBoard logs into the run directory"""
    track: bool = False
    """also log to Weights & Biases"""


# ------------------------------------ environment -------------------------------------


class SeededEpisodes(gym.Wrapper):
    """Gives every episode its own seed, from (seed, episode number), and sums it up.

    An episode can thus be rebuilt from its number and its actions: set `resume_from` to
    the two before `reset`, and the environment comes back as it was. That is how a
    resumed run equals an unbroken one. The last `info` of an episode holds its `return`
    and its `success` in any of the steps, NaN where the task has no such thing.
    """

    def __init__(self, env: gym.Env, seed: int):
        super().__init__(env)
        self.seed, self.episode = seed, 0
        self.resume_from: tuple[int, Sequence] | None = None

    def reset(self, *, seed=None, options=None):
        self.episode, actions = self.resume_from or (self.episode, ())
        self.resume_from = None
        episode_seed = derive_seed(self.seed, self.episode)
        self.episode += 1
        self.episode_return, self.success = 0.0, np.nan
        if isinstance(self.unwrapped, metaworld.SawyerXYZEnv):
            self.unwrapped.seed(episode_seed)  # Meta-World's reset ignores its seed
        obs, _ = self.env.reset(seed=episode_seed)
        for action in actions:
            obs = self.step(action)[0]
        return obs, {}

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.episode_return += float(reward)
        self.success = np.fmax(self.success, float(info.get("success", np.nan)))
        summary = {"return": self.episode_return, "success": self.success}
        info = summary if terminated or truncated else {}
        return obs, reward, terminated, truncated, info


def derive_seed(*numbers: int) -> int:
    """One seed from several numbers: other numbers, an unrelated seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def make_env(env_id: str, seed: int, render_mode: str | None = None) -> gym.Env:
    """One environment with actions in [-1, 1]. Same seed, same sequence of episodes.

    Meta-World tasks, `-v2` or `-v3`, follow the paper's protocol: the goal is visible and
    drawn anew for every episode; the reward is v2's; 500 steps, then truncation. Any other
    id goes to `gym.make`. Raises UserError for an id that is unknown or does not fit.
    """
    tasks = metaworld.ALL_V3_ENVIRONMENTS
    if (task := re.sub(r"-v[23]$", "-v3", env_id)) in tasks:
        env = tasks[task](render_mode=render_mode, reward_function_version="v2")
        env._partially_observable = False  # show the goal in the observation, ...
        del env.sawyer_observation_space  # ... which cached bounds would clip to zero
        env._freeze_rand_vec = False  # a new goal for every episode, ...
        env.seeded_rand_vec = env._set_task_called = True  # ... from env.seed
        return SeededEpisodes(env, seed)
    try:
        # an environment of one's own need not know about rendering
        env = gym.make(env_id, **({"render_mode": render_mode} if render_mode else {}))
    except Exception as error:  # noqa: BLE001, its constructor may raise anything
        names = [re.sub("3$", digit, name) for name in tasks for digit in "23"]
        near = difflib.get_close_matches(env_id, [*names, *gym.registry], cutoff=0.5)
        near = near or ["the name of a Meta-World task"]
        hint = f"did you mean {', '.join(near)}?"
        raise UserError(f"no environment {env_id!r} ({error}): {hint}") from None
    for name in ("observation", "action"):
        space = getattr(env, f"{name}_space")
        if not isinstance(space, gym.spaces.Box):
            raise UserError(f"the {name}s of {env_id} are {space}, but CUP needs a Box")
    if not env.action_space.is_bounded():
        raise UserError(f"the actions of {env_id} have no bounds, but CUP needs them")
    env = gym.wrappers.FlattenObservation(env)
    env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    return SeededEpisodes(env, seed)


class VectorEnv:
    """Environments in a process of their own: they step while the networks learn.

    One process for all of them: they are quick beside an update, and to wake up several
    processes at every step costs more than it saves. A finished episode is followed by
    the next within the same step, whose `infos` hold `final_obs` and `final_info`.
    """

    def __init__(self, env_id: str, num_envs: int, *seed: int):
        seeds = [derive_seed(*seed, index) for index in range(num_envs)]
        self.num_envs = num_envs
        self.pipe, remote = multiprocessing.Pipe()
        process = multiprocessing.Process
        self.process = process(target=serve, args=(remote, env_id, seeds), daemon=True)
        self.process.start()
        remote.close()
        self.obs_dim, self.action_dim = self.wait()

    def send(self, method: str, *args) -> None:
        """Ask for `gymnasium.vector.SyncVectorEnv.method(*args)`; `wait` for the answer."""
        self.pipe.send((method, args))

    def wait(self):
        try:
            answer = self.pipe.recv()
        except (EOFError, ConnectionError):
            raise EnvironmentFault("its process died") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def call(self, method: str, *args):
        self.send(method, *args)
        return self.wait()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.send("close")
        self.process.join(timeout=5)
        self.process.kill()


def serve(pipe, env_id: str, seeds: Sequence[int]) -> None:
    """The process of a VectorEnv."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the main process decides
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":  # and if that is killed, this goes with it
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    try:
        env_fns = [lambda seed=seed: make_env(env_id, seed) for seed in seeds]
        envs = gym.vector.SyncVectorEnv(env_fns, autoreset_mode="SameStep")
        spaces = envs.single_observation_space, envs.single_action_space
        pipe.send([math.prod(space.shape) for space in spaces])
        method = ""
        while method != "close":
            method, args = pipe.recv()
            pipe.send(getattr(envs, method)(*args))
    except UserError as error:
        pipe.send(error)
    except (EOFError, OSError):
        pass  # nobody is listening any more
    except Exception as error:  # noqa: BLE001, whatever the environment raises
        pipe.send(EnvironmentFault(f"{type(error).__name__}: {error}"))


# -------------------------------------- networks --------------------------------------


def mlp(*sizes: int, layer=nn.Linear) -> nn.Sequential:
    layers = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [layer(fan_in, fan_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


class Standardize(nn.Module):
    """obs (..., obs_dim) with mean 0 and standard deviation 1, by statistics set once.

    Meta-World's observations are in metres, and centimetres decide: as they come, they
    would hardly differ. Until `fit` is called, this is the identity.
    """

    def __init__(self, obs_dim: int):
        super().__init__()
        self.register_buffer("shift", torch.zeros(obs_dim))
        self.register_buffer("scale", torch.ones(obs_dim))

    def fit(self, obs: Tensor) -> None:
        """Take the statistics from obs (n, obs_dim)."""
        self.scale.copy_(1 / obs.std(dim=0, correction=0).clamp(min=0.1))
        self.scale[(obs == 0).all(dim=0)] = 0  # padding, which other tasks may use
        self.shift.copy_(-obs.mean(dim=0) * self.scale)

    def forward(self, obs: Tensor) -> Tensor:
        return torch.addcmul(self.shift, obs, self.scale)


class Actor(nn.Module):
    """Tanh-Gaussian policy: obs (..., obs_dim) -> mean, log_std (..., action_dim).

    Both are those before the tanh, and softly bounded: a mean far out, where the tanh is
    flat, or a vanishing standard deviation would hardly change the action, but would send
    the KL to this policy to infinity once it is somebody's source.
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        hidden_sizes: Sequence[int],
        mean_bound: float = 3.0,
        log_std_min: float = -5.0,
        log_std_max: float = 2.0,
    ):
        super().__init__()
        self.obs_dim, self.action_dim = obs_dim, action_dim
        self.hidden_sizes, self.mean_bound = list(hidden_sizes), mean_bound
        self.log_std_min, self.log_std_max = log_std_min, log_std_max
        self.standardize = Standardize(obs_dim)
        self.net = mlp(obs_dim, *hidden_sizes, 2 * action_dim)
        low = torch.tensor([-mean_bound, log_std_min]).repeat_interleave(action_dim)
        high = torch.tensor([mean_bound, log_std_max]).repeat_interleave(action_dim)
        self.register_buffer("center", (low + high) / 2, persistent=False)
        self.register_buffer("half_range", (high - low) / 2, persistent=False)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        x = self.net(self.standardize(obs))
        bounded = self.center + self.half_range * torch.tanh(x / self.half_range)
        return bounded.chunk(2, dim=-1)


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


def squash(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Sample a tanh-Gaussian, reparameterised by standard normal `noise`.

    Shapes broadcast: (..., action_dim) -> action (..., action_dim), log_prob (...).
    """
    pre_tanh = mean + log_std.exp() * noise
    log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    # log(1 - tanh(x)^2), written so that it does not overflow
    log_prob = log_prob - 2 * (math.log(2) - pre_tanh - F.softplus(-2 * pre_tanh))
    return torch.tanh(pre_tanh), log_prob.sum(dim=-1)


# ------------------ CUP: which source to follow at a state, and how far ------------------


def expected_advantage(
    q: Tensor, log_prob: Tensor, alpha: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Soft expected advantage of every candidate over the target policy, Eq. 4.

    q, log_prob: (samples, batch, n + 1), of each candidate's own actions, under the
    target policy's critic and under the candidate; the n sources first, the target policy
    last. alpha = 0 gives the hard advantage of Appendix B.3. Returns the advantages
    (batch, n + 1), the target's zero, and the target's soft value V (batch,), Eq. 2.
    """
    soft_q = (q - alpha * log_prob).mean(dim=0)  # Monte Carlo, (batch, n + 1)
    value = soft_q[:, -1]  # Eq. 2
    return soft_q - value.unsqueeze(1), value  # Eq. 4


def guidance_policy(advantage: Tensor) -> Tensor:
    """Eq. 7: index (batch,) of the best candidate, from advantages (batch, n + 1).

    The target policy is candidate n; it wins a tie.
    """
    target = advantage.shape[1] - 1
    best, source = advantage[:, :target].max(dim=1)
    return torch.where(best > advantage[:, target], source, target)


def guidance_weight(
    advantage: Tensor, value: Tensor, beta1: float, beta2: float
) -> Tensor:
    """Eq. 12: beta_s (batch,), from the guidance policy's advantage and V, both (batch,).

    Zero where the target policy is its own guidance: its advantage over itself is zero.
    """
    return beta1 * torch.minimum(advantage, beta2 * value.abs())


def kl_divergence(
    mean_p: Tensor, log_std_p: Tensor, mean_q: Tensor, log_std_q: Tensor
) -> Tensor:
    """KL(p || q) of two tanh-Gaussians (Eqs. 9, 11), (..., action_dim) -> (...), in nats.

    A KL does not change when both variables go through the same bijection, here the tanh:
    it is the closed-form KL of the two Gaussians before it.
    """
    log_ratio = log_std_p - log_std_q
    distance = (mean_p - mean_q) / log_std_q.exp()
    kl = 0.5 * ((2 * log_ratio).exp() + distance.square() - 1) - log_ratio
    return kl.sum(dim=-1)


def query_sources(sources: Iterable[Actor], obs: Tensor, args: Args) -> Tensor:
    """Mean and log-std of every source at obs (batch, obs_dim): (batch, n, 2, action_dim).

    Bounded, because a source that is nearly deterministic or saturated gives almost no
    probability to what the target policy does: the KL to it would drown the SAC loss.
    """
    dists = []
    for actor in sources:
        mean, log_std = actor(obs)
        mean = mean.clamp(-args.source_mean_bound, args.source_mean_bound)
        log_std = log_std.clamp(min=args.source_log_std_min)
        dists.append(torch.stack([mean, log_std], dim=1))
    return torch.stack(dists, dim=1) if dists else obs.new_empty(len(obs), 0)


class ReplayBuffer:
    """The replay buffer D, one preallocated row per transition.

    Beside the state lies what every source would do there (`query_sources`): the sources
    are frozen, so this is computed once, on arrival, and not in every gradient update.
    """

    def __init__(self, capacity, obs_dim, action_dim, num_sources, device="cpu"):
        self.source_shape = (num_sources, 2, action_dim)
        source_width = math.prod(self.source_shape)
        self.widths = [obs_dim, obs_dim, action_dim, 1, 1, source_width]
        self.rows = torch.empty(capacity, sum(self.widths), device=device)
        self.size = self.position = 0

    def add(self, obs, next_obs, action, reward, terminated, source_dist) -> None:
        """Store a batch of transitions; the oldest make room."""
        scalars = torch.stack([reward, terminated], dim=1)
        row = torch.cat([obs, next_obs, action, scalars, source_dist.flatten(1)], dim=1)
        index = (self.position + torch.arange(len(row))) % len(self.rows)
        self.rows[index] = row
        self.position = (self.position + len(row)) % len(self.rows)
        self.size = min(self.size + len(row), len(self.rows))

    def sample(self, batch_size: int) -> tuple[Tensor, ...]:
        """A uniform minibatch, in the order of `add`.

        obs, next_obs (batch, obs_dim); action (batch, action_dim); reward, terminated
        (batch,); then the sources' mean and log-std, (batch, n, action_dim) each.
        """
        index = torch.randint(self.size, (batch_size,), device=self.rows.device)
        columns = self.rows[index].split(self.widths, dim=1)
        obs, next_obs, action, reward, terminated, source_dist = columns
        scalars = reward.squeeze(1), terminated.squeeze(1)
        source_dist = source_dist.unflatten(1, self.source_shape)
        return obs, next_obs, action, *scalars, *source_dist.unbind(2)


# --------------------------------- the update (Alg. 1) ---------------------------------


class Agent:
    """Actor, twin critic, entropy weight, and one optimiser for each."""

    MODULES = ("actor", "critic", "target_critic")
    MODULES += ("actor_optimizer", "critic_optimizer", "alpha_optimizer")

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device="cpu"):
        self.args, self.target_entropy = args, -float(action_dim)
        sizes = obs_dim, action_dim, args.hidden_sizes
        self.actor = Actor(*sizes).to(device)
        self.critic = SoftQNetwork(*sizes).to(device)
        self.target_critic = SoftQNetwork(*sizes).to(device).requires_grad_(False)
        self.target_critic.load_state_dict(self.critic.state_dict())
        log_alpha = torch.tensor(math.log(args.init_alpha), device=device)
        self.log_alpha = nn.Parameter(log_alpha)
        adam = torch.optim.Adam
        self.actor_optimizer = adam(self.actor.parameters(), args.policy_lr, fused=True)
        self.critic_optimizer = adam(self.critic.parameters(), args.q_lr, fused=True)
        self.alpha_optimizer = adam([self.log_alpha], args.alpha_lr, fused=True)

    def update(self, batch: Sequence[Tensor], guide: bool = True) -> dict[str, Tensor]:
        """One gradient step of Alg. 1 on a minibatch of `ReplayBuffer.sample`.

        Without sources, or with guide=False, it is SAC. Returns what there is to log:
        the losses, alpha and entropy (scalars), and with guidance `guidance`, `weight`,
        `kl` (batch,) and `advantage` (batch, n + 1).
        """
        args = self.args
        obs, next_obs, action, reward, terminated, source_mean, source_log_std = batch
        alpha = self.log_alpha.detach().exp()

        # ---- critic: L_critic, Eq. 3
        with torch.no_grad():
            mean, log_std = self.actor(next_obs)
            next_action, log_prob = squash(mean, log_std, torch.randn_like(mean))
            next_q = self.target_critic(next_obs, next_action).amin(dim=0)
            next_value = next_q - alpha * log_prob  # Eq. 2
            # `terminated`, not `truncated`: after a time limit there would be more to come
            td_target = reward + args.gamma * (1 - terminated) * next_value  # (batch,)
        q = self.critic(obs, action)  # (2, batch)
        critic_loss = (q - td_target).square().mean(dim=1).sum()
        self.critic_optimizer.zero_grad()
        critic_loss.backward()
        self.critic_optimizer.step()

        # ---- actor: L_actor, Eq. 3
        guide = guide and source_mean.shape[1] > 0
        samples = args.num_guidance_samples if guide else 1
        mean, log_std = self.actor(obs)
        noise = torch.randn(samples, *mean.shape, device=mean.device)
        action, log_prob = squash(mean, log_std, noise)
        q = self.critic(obs.expand(samples, -1, -1), action).amin(dim=0)
        actor_loss = (alpha * log_prob - q).mean()  # log_prob, q: (samples, batch)
        info = {"loss/critic": critic_loss.detach(), "loss/actor": actor_loss.detach()}
        info["alpha"] = alpha

        # ---- guidance: the KL term of L_CUP, Eq. 11
        if guide:
            with torch.no_grad():
                # the same noise for all candidates: their policies differ, not their luck
                source = squash(source_mean, source_log_std, noise.unsqueeze(2))
                source_action, source_log_prob = source  # (samples, batch, n, ...)
                source_obs = obs.unsqueeze(1).expand(*source_action.shape[:3], -1)
                # the Q that the actor climbs; where the twins disagree, it is in doubt
                source_q = self.critic(source_obs, source_action).amin(dim=0)
                advantage, value = expected_advantage(  # Eq. 4
                    torch.cat([source_q, q.unsqueeze(2)], dim=2),
                    torch.cat([source_log_prob, log_prob.unsqueeze(2)], dim=2),
                    alpha if args.soft_advantage else 0.0,
                )
                guidance = guidance_policy(advantage)  # Eq. 7
                best = advantage.amax(dim=1)
                beta = guidance_weight(best, value, args.beta1, args.beta2)  # Eq. 12
                row = torch.arange(len(obs), device=obs.device)
                means = torch.cat([source_mean, mean.unsqueeze(1)], dim=1)
                log_stds = torch.cat([source_log_std, log_std.unsqueeze(1)], dim=1)
                chosen = means[row, guidance], log_stds[row, guidance]
            kl = kl_divergence(mean, log_std, *chosen)  # (batch,)
            kl_loss = (beta * kl).mean()
            actor_loss = actor_loss + kl_loss  # Eq. 11
            info |= {"loss/kl": kl_loss.detach(), "weight": beta, "kl": kl.detach()}
            info |= {"guidance": guidance, "advantage": advantage}

        self.actor_optimizer.zero_grad()
        # through the critic, but not into it: its own gradients would be thrown away
        actor_loss.backward(inputs=list(self.actor.parameters()))
        self.actor_optimizer.step()

        # ---- entropy weight: L_entropy, Eq. 3
        entropy = info["entropy"] = -log_prob.detach().mean()
        alpha_loss = self.log_alpha.exp() * (entropy - self.target_entropy)
        self.alpha_optimizer.zero_grad()
        alpha_loss.backward()
        self.alpha_optimizer.step()

        # ---- target critic
        with torch.no_grad():
            parameters = self.target_critic.parameters(), self.critic.parameters()
            for target, online in zip(*parameters, strict=True):
                target.lerp_(online, args.tau)
        return info

    def standardize(self, obs: Tensor) -> None:
        """Fix how the networks see observations, by the statistics of obs (n, obs_dim)."""
        for network in (self.actor, self.critic, self.target_critic):
            network.standardize.fit(obs)

    def state_dict(self) -> dict:
        """Everything that training changes."""
        modules = {name: getattr(self, name).state_dict() for name in self.MODULES}
        return modules | {"log_alpha": self.log_alpha.detach()}

    def load_state_dict(self, state: dict) -> None:
        for name in self.MODULES:
            getattr(self, name).load_state_dict(state[name])
        self.log_alpha.data.copy_(state["log_alpha"])


# ---------------------------------------- files ----------------------------------------


def save(content: dict, path: Path) -> None:
    """torch.save, then rename: `path` holds the old content or the new, never a half."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch has a RuntimeError for a full disk
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = str(error).split("\n")[0]
        problem = f"cannot write {path} ({reason}); what it held is intact"
        raise RunError(problem) from None


def policy_file(actor: Actor, **about) -> dict:
    """The content of a policy file: how to build the actor, `about` it, its weights."""
    names = list(inspect.signature(Actor).parameters)
    weights = {name: w.detach().cpu() for name, w in actor.state_dict().items()}
    return {"actor": {n: getattr(actor, n) for n in names}, **about, "weights": weights}


def build_actor(content: dict) -> Actor:
    """The frozen actor of a policy file's content, which stays with it as `about`."""
    actor = Actor(**content["actor"])
    actor.load_state_dict(content["weights"])
    actor.about = {n: v for n, v in content.items() if n not in ("actor", "weights")}
    return actor.requires_grad_(False)


def load_policy(path: str | Path) -> Actor:
    """The frozen actor of a policy file: `mean, log_std = actor(obs)`, before the tanh.

    Nothing in the file is executed. Raises UserError, a sentence, for anything but a
    whole and finite policy; what the file says of itself is in `actor.about`.
    """
    try:
        if damaged := zipfile.ZipFile(path).testzip():  # torch.load skips the checksums
            raise ValueError(f"{damaged} in it is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True)
        config, weights = content["actor"], content["weights"]
        room = os.path.getsize(path)
        if not isinstance(config, dict) or not isinstance(weights, dict):
            raise TypeError("architecture and weights must be dictionaries")
        sizes = [config["obs_dim"], *config["hidden_sizes"], 2 * config["action_dim"]]
        # nothing is built or read that the file would be too small to hold
        num_weights = sum(fan_in * fan_out for fan_in, fan_out in pairwise(sizes))
        stored = max(
            sum(w.untyped_storage().nbytes() for w in weights.values()),
            sum(w.nbytes for w in weights.values()),  # an expanded tensor claims more
        )
        if min(sizes) < 1 or 4 * num_weights > room or stored > room:
            raise ValueError(f"layer sizes {sizes} do not fit it")
        bounds = [config[n] for n in ("mean_bound", "log_std_min", "log_std_max")]
        if not (0 < bounds[0] <= 100 and -20 <= bounds[1] < bounds[2] <= 20):
            raise ValueError(f"bounds {bounds} are out of range")
        plain = torch.float32, torch.strided, torch.device("cpu")
        for w in weights.values():
            # beyond a million, finite weights could add up to infinity
            if (w.dtype, w.layout, w.device) != plain or not (w.abs() < 1e6).all():
                raise ValueError("a weight is not a number of a sensible size")
        return build_actor(content)
    except FileNotFoundError:
        problem = f"there is no policy file {path}: see sources/ for some"
        raise UserError(problem) from None
    except Exception as error:  # noqa: BLE001, a stranger's file may raise anything
        reason = f"{type(error).__name__}: {error}".split("\n")[0][:200]
        raise UserError(f"{path} is not a policy file of cup.py ({reason})") from None


def load_sources(args: Args, obs_dim: int, action_dim: int) -> dict[str, Actor]:
    """Source policies by name. Raises UserError for one that does not fit the task."""
    sources = {}
    for path in args.sources:
        actor = load_policy(path)
        if (actor.obs_dim, actor.action_dim) != (obs_dim, action_dim):
            raise UserError(
                f"source {path} has observation size {actor.obs_dim} and action size "
                f"{actor.action_dim}, but {args.env_id} has {obs_dim} and {action_dim}: "
                "name others, or none (--sources with nothing after it)"
            )
        name = Path(path).stem
        sources[name if name not in sources else f"{name}-{len(sources) + 1}"] = actor
    for k in range(args.num_random_sources):
        actor = Actor(obs_dim, action_dim, args.hidden_sizes)
        sources[f"random-{k + 1}"] = actor.requires_grad_(False)
    return sources


class Run:
    """A run directory: args.json, metrics.csv, policy.pt, checkpoint.pt; and the display."""

    def __init__(self, args: Args, sources: dict[str, Actor], checkpoint: dict | None):
        self.args, self.dir = args, Path(args.run_dir)
        self.candidates = [*sources, "target"] if sources else []
        self.writer = self.wandb = None
        if not checkpoint and self.dir.exists():
            problem = f"run directory {self.dir} already exists: --resume {self.dir} "
            problem += "goes on with it, or choose another --run-dir"
            raise UserError(problem)
        try:
            if args.tensorboard:
                from torch.utils.tensorboard import SummaryWriter
            if args.track:
                import wandb

                about = {"id": self.dir.name, "resume": "allow", "config": asdict(args)}
                self.wandb = wandb.init(project="cup", **about)
        except ImportError:
            flag, name = ("track", "wandb") if args.track else ("tensorboard",) * 2
            raise UserError(f"--{flag} needs a package: pip install {name}") from None
        except Exception as error:  # noqa: BLE001, W&B has its own for every trouble
            raise UserError(f"--track: {error}") from None
        try:
            self.dir.mkdir(parents=True, exist_ok=bool(checkpoint))
        except OSError as error:
            raise UserError(f"cannot create the run directory: {error}") from None
        self.metrics = open(self.dir / "metrics.csv", "a", newline="")  # noqa: SIM115
        try:  # a lock that goes with this process, however it ends
            fcntl.lockf(self.metrics, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            problem = f"another run writes to {self.dir}: choose another"
            raise UserError(problem) from None
        step, seconds = 0, 0.0
        if checkpoint:
            step, seconds = checkpoint["step"], checkpoint["seconds"]
            # rows from after the checkpoint will be written again
            self.metrics.truncate(min(self.metrics.tell(), checkpoint["metrics_bytes"]))
            self.metrics.seek(0, os.SEEK_END)
        self.start, self.last_log = time.time() - seconds, (time.time(), step)
        packages = ("torch", "numpy", "gymnasium", "metaworld", "mujoco", "tyro")
        versions = {"python": platform.python_version()}
        versions |= {package: version(package) for package in packages}
        about = json.dumps({"args": asdict(args), "versions": versions}, indent=2)
        (self.dir / "args.json").write_text(about + "\n")
        columns = "step time/seconds time/steps_per_second"
        columns += " train/return train/success_rate"
        columns += " eval/return eval/success_rate"
        columns += " loss/critic loss/actor loss/kl alpha entropy"
        if sources:
            columns += " guidance/weight guidance/kl"
        columns = columns.split()
        for kind in ("selected", "advantage"):
            columns += [f"guidance/{kind}/{name}" for name in self.candidates]
        self.csv = csv.DictWriter(self.metrics, columns, restval="")
        if self.metrics.tell() == 0:
            self.csv.writeheader()
        if args.tensorboard:
            self.writer = SummaryWriter(str(self.dir), purge_step=step)

    def log(self, step: int, recent: Sequence, info: dict, evaluation: dict) -> None:
        """Write one row. `info`: what the last `Agent.update` returned."""
        self.check_losses(step, info)
        now, (last_time, last_step) = time.time(), self.last_log
        self.last_log = now, step
        seconds = now - last_time - evaluation.get("seconds", 0.0)
        rate = (step - last_step) / max(seconds, 1e-9)
        row = {"step": step, "time/seconds": round(now - self.start, 1)}
        row["time/steps_per_second"] = round(rate, 1)
        # the losses, alpha and entropy; the rest is one number a state
        row |= {name: value.item() for name, value in info.items() if value.ndim == 0}
        if "guidance" in info:
            advantage = info["advantage"].mean(dim=0).tolist()
            for k, name in enumerate(self.candidates):
                share = (info["guidance"] == k).float().mean().item()
                row[f"guidance/selected/{name}"] = share
                row[f"guidance/advantage/{name}"] = advantage[k]
            row["guidance/weight"] = info["weight"].mean().item()
            row["guidance/kl"] = info["kl"].mean().item()
        if recent:
            episodes = np.mean(recent, axis=0).tolist()
            row["train/return"], row["train/success_rate"] = episodes
        for name in ("return", "success_rate") if evaluation else ():
            row[f"eval/{name}"] = evaluation[name]
        row = {name: value for name, value in row.items() if not math.isnan(value)}
        self.csv.writerow(row)
        self.metrics.flush()
        if self.writer:
            for name, value in row.items():
                self.writer.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(row, step=step)
        self.show(row, keep=bool(evaluation))

    def check_losses(self, step: int, info: dict) -> None:
        for name, value in info.items():
            if name.startswith("loss/") and not math.isfinite(value):
                problem = f"{name} is {value:.0f} at step {step:,}: stopped; "
                raise RunError(f"{problem}{self.dir}/checkpoint.pt is from before")

    def show(self, row: dict, keep: bool) -> None:
        """A line overwritten in place on a terminal; elsewhere, one per evaluation."""
        total, rate = self.args.total_timesteps, max(row["time/steps_per_second"], 0.1)
        left = timedelta(seconds=round(min(max(total - row["step"], 0) / rate, 1e9)))
        done = f"{self.args.env_id} {row['step']:,}/{total:,}"
        line = f"{done}, {rate:.0f}/s, {left} left"
        for kind in ("train", "eval"):
            if f"{kind}/return" in row:
                line += f" | {kind} return {row[f'{kind}/return']:.1f}"
            if f"{kind}/success_rate" in row:
                line += f" success {row[f'{kind}/success_rate']:.0%}"
        if "guidance/kl" in row:
            share = {name: row[f"guidance/selected/{name}"] for name in self.candidates}
            guides = sorted(share, key=share.get, reverse=True)
            line += " | guides: " + ", ".join(f"{n} {share[n]:.0%}" for n in guides)
        if sys.stdout.isatty():
            width = os.get_terminal_size().columns - 1
            line = line.ljust(width) + "\n" if keep else line[:width].ljust(width)
            print("\r" + line, end="", flush=True)
        elif keep:
            print(line, flush=True)

    def save_checkpoint(self, **state) -> None:
        state |= {"args": asdict(self.args), "seconds": time.time() - self.start}
        state |= {"metrics_bytes": self.metrics.tell()}
        save(state, self.dir / "checkpoint.pt")


# ------------------------------- evaluation and training -------------------------------


@torch.no_grad()
def evaluate(actor, envs, episodes: int, first_episode=0, sample=False) -> dict:
    """Play episodes with the mean action, or with sampled ones.

    `first_episode` chooses the goals. Every environment plays a fixed share of the
    episodes, so that short ones do not crowd out long ones. Returns arrays: `return` and
    `success` (episodes,), `log_std` and `saturated`, the share of |action| > 0.99, (steps,).
    """
    n, device = envs.num_envs, next(actor.parameters()).device
    todo = [len(range(index, episodes, n)) for index in range(n)]
    results = {"return": [], "success": [], "log_std": [], "saturated": []}
    envs.call("set_attr", "resume_from", [(first_episode, ())] * n)
    obs, _ = envs.call("reset")
    while any(todo):
        mean, log_std = actor(torch.as_tensor(obs, dtype=torch.float32, device=device))
        noise = torch.randn_like(mean) if sample else torch.zeros_like(mean)
        action = torch.tanh(mean + log_std.exp() * noise)
        results["log_std"].append(log_std.mean().item())
        results["saturated"].append((action.abs() > 0.99).float().mean().item())
        step = envs.call("step", action.cpu().numpy())
        obs, _, terminated, truncated, infos = step
        for index in np.flatnonzero(terminated | truncated):
            if todo[index]:
                todo[index] -= 1
                for name in ("return", "success"):
                    results[name].append(infos["final_info"][name][index])
    return {name: np.array(values) for name, values in results.items()}


def spare_the_processor() -> None:
    """Two settings of this process that save a tenth of the time and change no number."""
    # Adam's moments of idle weights fade to below 1e-38, where processors are slow
    torch.set_flush_denormal(True)
    if sys.platform == "linux":
        # glibc: keep freed memory; to fetch pages for every large tensor takes longer
        # than to fill them
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc = ctypes.CDLL(None)
        libc.mallopt(m_trim_threshold, 2**28)
        libc.mallopt(m_mmap_threshold, 2**25)


def train(args: Args, checkpoint: dict | None = None) -> None:
    """Alg. 1, from the start or from a checkpoint."""
    device = torch.device("cuda" if args.cuda else "cpu")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    stop_signals: list[int] = []  # the first lets the step finish, a second does not

    def on_signal(number, _):
        if stop_signals:
            sys.exit(128 + number)
        stop_signals.append(number)

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)

    with contextlib.ExitStack() as stack:
        # streams 0 and 1 of the seed: no evaluation goal is ever a training goal
        envs = VectorEnv(args.env_id, args.num_envs, args.seed, 0)
        stack.callback(envs.close)
        eval_envs = VectorEnv(args.env_id, args.num_envs, args.seed, 1)
        stack.callback(eval_envs.close)
        obs_dim, action_dim = envs.obs_dim, envs.action_dim
        spare_the_processor()  # not before: the environments would inherit it

        try:
            if checkpoint:
                stored = checkpoint["sources"].items()
                sources = {name: build_actor(content) for name, content in stored}
            else:
                sources = load_sources(args, obs_dim, action_dim)
            sources = {name: actor.to(device) for name, actor in sources.items()}
            sizes = args.buffer_size, obs_dim, action_dim, len(sources)
            buffer = ReplayBuffer(*sizes, device)
            agent = Agent(args, obs_dim, action_dim, device)
        except (RuntimeError, TypeError):  # PyTorch's words for too little memory
            problem = "too little memory for --buffer-size or --hidden-sizes"
            raise UserError(f"{problem}: lower them") from None
        step, recent = 0, deque(maxlen=20)  # return and success of the last 20 episodes
        # number of each environment's present episode, and its actions (SeededEpisodes)
        episodes, actions = [0] * args.num_envs, [[] for _ in range(args.num_envs)]
        if checkpoint:
            step, episodes = checkpoint["step"], checkpoint["episodes"]
            recent.extend(checkpoint["recent"])
            actions = [list(a.numpy()) for a in checkpoint["episode_actions"]]
            unfinished = list(zip(episodes, actions, strict=True))
            envs.call("set_attr", "resume_from", unfinished)
            agent.load_state_dict(checkpoint["agent"])
            buffer.size = len(checkpoint["buffer"])
            buffer.rows[: buffer.size] = checkpoint["buffer"]
            buffer.position = checkpoint["buffer_position"]
            torch.set_rng_state(checkpoint["rng_state"])
            if args.cuda:
                torch.cuda.set_rng_state(checkpoint["cuda_rng_state"])

        def save_checkpoint():
            run.check_losses(step, info)
            so_far = [np.array(a, np.float32).reshape(-1, action_dim) for a in actions]
            run.save_checkpoint(
                step=step,
                episodes=episodes,
                episode_actions=[torch.from_numpy(a) for a in so_far],
                recent=list(recent),
                agent=agent.state_dict(),
                # by way of numpy, or torch would save the buffer's unused rows as well
                buffer=torch.from_numpy(buffer.rows.cpu().numpy()[: buffer.size]),
                buffer_position=buffer.position,
                sources={name: policy_file(actor) for name, actor in sources.items()},
                rng_state=torch.get_rng_state(),
                cuda_rng_state=torch.cuda.get_rng_state() if args.cuda else None,
            )

        def due(interval):  # was a multiple of `interval` among the steps just taken?
            return step // interval > (step - args.num_envs) // interval

        def tensor(array):
            return torch.as_tensor(array, dtype=torch.float32, device=device)

        @contextlib.contextmanager
        def saving_when_the_environment_fails():
            try:
                yield
            except EnvironmentFault as error:
                save_checkpoint()
                message = f"environment failed at step {step:,}: {error}"
                raise RunError(message) from None

        info: dict[str, Tensor] = {}
        obs = tensor(envs.call("reset")[0])
        run = Run(args, sources, checkpoint)  # what can go wrong at once has not
        method = f"CUP with {', '.join(sources)}" if sources else "SAC, no sources"
        print(f"{args.env_id}, {method}; writing to {run.dir}", flush=True)
        if not checkpoint:
            save_checkpoint()  # from now on the run can be resumed
        stack.enter_context(saving_when_the_environment_fails())
        while step < args.total_timesteps and not stop_signals:
            # ---- act; the environments then step while the networks learn
            with torch.no_grad():
                if step < args.learning_starts:
                    shape = args.num_envs, action_dim
                    action = 2 * torch.rand(shape, device=device) - 1
                else:
                    mean, log_std = agent.actor(obs)
                    action, _ = squash(mean, log_std, torch.randn_like(mean))
            numpy_action = action.cpu().numpy()
            envs.send("step", numpy_action)
            source_dist = query_sources(sources.values(), obs, args)

            # ---- learn
            if step < args.learning_starts <= step + args.num_envs:  # once
                agent.standardize(buffer.rows[: buffer.size, :obs_dim])
            before = int(max(step - args.learning_starts, 0) * args.utd_ratio)
            step += args.num_envs
            after = int(max(step - args.learning_starts, 0) * args.utd_ratio)
            for _ in range(after - before):
                batch = buffer.sample(args.batch_size)
                info = agent.update(batch, guide=step > args.guidance_starts)

            # ---- store
            next_obs, reward, terminated, truncated, infos = envs.wait()
            final_obs = next_obs.copy()
            for index, done in enumerate(terminated | truncated):
                actions[index].append(numpy_action[index])
                if done:  # next_obs is already the next episode's first
                    final_obs[index] = infos["final_obs"][index]
                    result = infos["final_info"]
                    result = [result[name][index] for name in ("return", "success")]
                    recent.append([value.item() for value in result])
                    episodes[index] += 1
                    actions[index] = []
            for array in (final_obs, next_obs, reward):
                if not np.isfinite(array).all():
                    raise EnvironmentFault("it returned NaN or infinity")
            outcome = tensor(final_obs), action, tensor(reward), tensor(terminated)
            buffer.add(obs, *outcome, source_dist)
            obs = tensor(next_obs)

            # ---- log, evaluate, save
            last = step >= args.total_timesteps
            evaluation = {}
            if last or due(args.eval_interval):
                start = time.time()
                # the step as first episode's number: new goals for every evaluation
                score = evaluate(agent.actor, eval_envs, args.eval_episodes, step)
                evaluation["return"] = score["return"].mean().item()
                evaluation["success_rate"] = score["success"].mean().item()
                evaluation["seconds"] = time.time() - start
            if evaluation or due(args.log_interval):
                run.log(step, recent, info, evaluation)
                info = {}
            if evaluation:
                about = {"env_id": args.env_id, "step": step}
                about["eval_episodes"] = args.eval_episodes
                about |= {name: evaluation[name] for name in ("return", "success_rate")}
                save(policy_file(agent.actor, **about), run.dir / "policy.pt")
            if due(args.checkpoint_interval):
                save_checkpoint()

        save_checkpoint()
        if stop_signals:
            print(f"\nstopped at step {step:,}: --resume {run.dir} goes on")
        else:
            line = f"\nfinished {step:,} steps: return {evaluation['return']:.1f}"
            if not math.isnan(evaluation["success_rate"]):
                line += f", success {evaluation['success_rate']:.0%}"
            print(f"{line} over {args.eval_episodes} episodes with the mean action")
            print(f"policy: {run.dir}/policy.pt, learning curve: {run.dir}/metrics.csv")


# ------------------------------------ command line ------------------------------------


def score_policy(args: Args) -> None:
    """--evaluate: how a policy file does on fresh goals, by mean and by sampled action."""
    from scipy.stats import binomtest, sem  # Meta-World brings it

    actor = load_policy(args.evaluate)
    env_id = args.env_id or actor.about.get("env_id")
    # "module:Name" would import a module that a stranger's file chose
    if not isinstance(env_id, str) or not env_id or (":" in env_id and not args.env_id):
        raise UserError(f"{args.evaluate} names no task: choose one with --env-id")
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    with contextlib.closing(VectorEnv(env_id, args.num_envs, args.seed, 2)) as envs:
        theirs = envs.obs_dim, envs.action_dim
        if theirs != (actor.obs_dim, actor.action_dim):
            ours = f"{(actor.obs_dim, actor.action_dim)}, but {env_id} has {theirs}"
            raise UserError(f"{args.evaluate} has observation and action sizes {ours}")
        what = f"{args.eval_episodes} episodes, seed {args.seed}"
        print(f"{args.evaluate} on {env_id}: {what}")
        for name in ("mean", "sampled"):
            score = evaluate(actor, envs, args.eval_episodes, sample=name == "sampled")
            wins, returns = score["success"], score["return"]
            line = f"{name} action: ".rjust(16)
            if not np.isnan(wins).any():
                test = binomtest(int(wins.sum()), len(wins))
                low, high = test.proportion_ci(method="wilson")  # 95 %
                line += f"success {wins.mean():.2f} [{low:.2f}, {high:.2f}], "
            spread = 1.96 * sem(returns) if len(returns) > 1 else math.nan
            line += f"return {returns.mean():.1f} ± {spread:.1f}, "
            line += f"mean log-std {score['log_std'].mean():.2f}, "
            print(line + f"{score['saturated'].mean():.0%} of actions saturated")
    if args.capture_video:
        video = Path(args.evaluate).with_suffix(".gif")
        film(actor, env_id, derive_seed(args.seed, 2, 0), video)
        print(f"video: {video}")


@torch.no_grad()
def film(actor: Actor, env_id: str, seed: int, path: Path) -> None:
    """Write one episode as a GIF."""
    import imageio  # Gymnasium's mujoco extra brings it

    frames, step, done = [], 0, False
    try:
        env = make_env(env_id, seed, render_mode="rgb_array")
        obs, _ = env.reset()
        while not done:
            if step % 4 == 0:
                frames.append(env.render())
            step += 1
            mean, _ = actor(torch.as_tensor(obs, dtype=torch.float32))
            obs, _, terminated, truncated, _ = env.step(torch.tanh(mean).numpy())
            done = terminated or truncated
    except Exception as error:  # noqa: BLE001, each OpenGL backend raises its own
        problem = f"cannot render without an OpenGL library ({error}): install libegl1 "
        problem += "or libosmesa6 and set MUJOCO_GL=egl or MUJOCO_GL=osmesa"
        raise UserError(problem) from None
    imageio.mimsave(path, frames, fps=20, loop=0)


def check(args: Args) -> Args:
    """The arguments, with run_dir filled in. Raises UserError where they make no sense."""
    positive = "total_timesteps num_envs buffer_size batch_size learning_starts threads"
    positive += " policy_lr q_lr alpha_lr init_alpha num_guidance_samples eval_episodes"
    positive += " source_mean_bound log_interval eval_interval checkpoint_interval"
    not_negative = "seed utd_ratio beta1 beta2 num_random_sources guidance_starts"
    for names, words in ((positive, "be positive"), (not_negative, "not be negative")):
        for name in names.split():
            value, flag = getattr(args, name), name.replace("_", "-")
            if not 0 <= value < math.inf or (value == 0 and names is positive):
                raise UserError(f"--{flag} must {words}, not {value}")
    log_std_min = args.source_log_std_min
    problems = {
        "--seed must be below 2**63": args.seed >= 2**63,
        "--threads must not exceed 1024": args.threads > 1024,
        "--num-random-sources and --num-guidance-samples must not exceed 1000": (
            max(args.num_random_sources, args.num_guidance_samples) > 1000
        ),
        "--utd-ratio must not exceed 1000": args.utd_ratio > 1000,
        "--policy-lr, --q-lr and --alpha-lr must not exceed 1": (
            max(args.policy_lr, args.q_lr, args.alpha_lr) > 1
        ),
        "--gamma must be between 0 and 1": not 0 <= args.gamma <= 1,
        "--tau must be between 0 and 1": not 0 <= args.tau <= 1,
        "--source-log-std-min must be a number below 2": not log_std_min < 2,
        "--hidden-sizes must be positive": min(args.hidden_sizes, default=0) < 1,
        "--batch-size must not exceed --buffer-size": (
            args.batch_size > args.buffer_size
        ),
        "--num-envs must be below --learning-starts": (
            args.num_envs >= args.learning_starts
        ),
        "--num-envs must not exceed --buffer-size": args.num_envs > args.buffer_size,
        "--learning-starts must be before the end, --total-timesteps": (
            args.learning_starts >= args.total_timesteps and not args.evaluate
        ),
        "--cuda was asked for, but PyTorch finds no CUDA device: use --no-cuda": (
            args.cuda and not torch.cuda.is_available()
        ),
        "--capture-video films a finished policy: give it with --evaluate": (
            args.capture_video and not args.evaluate
        ),
        "no environment is named: give one, such as --env-id peg-insert-side-v2": (
            args.env_id is None and not args.evaluate
        ),
    }
    for problem, found in problems.items():
        if found:
            raise UserError(problem)
    method = "cup" if args.sources or args.num_random_sources else "sac"
    run_dir = f"runs/{args.env_id}__{method}__{args.seed}"
    return replace(args, run_dir=args.run_dir or run_dir)


def resume(run_dir: str) -> None:
    """--resume: go on where the checkpoint was written, with the arguments of then."""
    path = Path(run_dir) / "checkpoint.pt"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        before = Args(**checkpoint["args"])
    except FileNotFoundError:
        raise UserError(f"{run_dir} has no checkpoint.pt to resume from") from None
    except Exception as error:  # noqa: BLE001, whatever is wrong with the file
        reason = f"{type(error).__name__}: {error}".split("\n")[0][:200]
        raise UserError(f"{path} is not a checkpoint of cup.py ({reason})") from None
    args = tyro.cli(Args, default=before)
    if args.run_dir != before.run_dir:
        raise UserError(f"--resume goes on in {run_dir}: leave --run-dir out")
    args = replace(args, resume=None, run_dir=run_dir)
    free = {"run_dir", "total_timesteps", "checkpoint_interval", "tensorboard", "track"}
    changed = []
    for name in (f.name for f in fields(Args) if f.name not in free):
        old, new = getattr(before, name), getattr(args, name)
        if old != new:
            changed.append(f"--{name.replace('_', '-')} {old}, not {new}")
    if changed:
        raise UserError(f"{run_dir} was started with {', '.join(changed)}")
    if checkpoint["step"] >= args.total_timesteps:
        print(f"{run_dir} is finished; a larger --total-timesteps goes on with it")
    else:
        train(check(args), checkpoint)


def main() -> None:
    try:
        args = tyro.cli(Args, description=__doc__)
        if args.resume is not None:
            resume(args.resume)
        elif args.evaluate is not None:
            score_policy(check(args))
        else:
            train(check(args))
    except (UserError, RunError, OSError) as error:
        print(f"cup.py: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)


if __name__ == "__main__":
    main()
