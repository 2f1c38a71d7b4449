"""CUP: Critic-Guided Policy Reuse (Zhang, Li, Zhang; NeurIPS 2022), in one file.

Frozen source policies, trained on other tasks, guide Soft Actor-Critic on a new one. At every state of
a minibatch the critic of the *new* task scores what each source would do; where a source beats the
target policy, the actor is pulled towards the best source. Nothing else is trained.

    python cup.py --env-id peg-insert-side-v2              # CUP with the shipped source policies
    python cup.py --env-id peg-insert-side-v2 --sources    # no sources: plain SAC, the baseline
    python cup.py --evaluate sources/reach-v2.pt           # success rate and return of a policy file

Equation numbers are the paper's. To learn the algorithm, read `expected_advantage` to `Agent.update`.
"""

import csv
import ctypes
import difflib
import fcntl
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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path

import gymnasium as gym
import metaworld
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

SHIPPED = [Path(__file__).parent / "sources" / f"{name}.pt" for name in ("reach-v2", "push-v2", "pick-place-v2")]


class UserError(Exception):
    """Something the user can put right: `main` prints it as one sentence and exits with code 2."""


class RunError(Exception):
    """A run that cannot go on: `main` prints it as one sentence and exits with code 1."""


@dataclass
class Args:
    """CUP trains a target policy with the guidance of source policies; without sources it is SAC."""

    env_id: str | None = None
    """environment: a Meta-World task (peg-insert-side-v2) or any Gymnasium id with Box spaces (Pendulum-v1)"""
    seed: int = 1
    """seed of everything random: networks, exploration, minibatches, goals"""
    total_timesteps: int = 1_000_000
    """environment steps, all environments together"""
    num_envs: int = 4
    """environments that step side by side while the gradient update runs"""
    buffer_size: int = 1_000_000
    """capacity of the replay buffer D, in transitions"""
    batch_size: int = 256
    """minibatch size of every gradient update"""
    learning_starts: int = 5_000
    """environment steps of uniformly random actions before the first update"""
    utd_ratio: float = 0.25
    """gradient updates per environment step"""
    gamma: float = 0.99
    """discount factor, gamma in Eq. 1"""
    tau: float = 0.005
    """weight of the online critic in the target critic's moving average, tau in Alg. 1"""
    policy_lr: float = 3e-4
    """learning rate of the actor, lambda_pi in Alg. 1"""
    q_lr: float = 3e-4
    """learning rate of the critics, lambda_theta in Alg. 1"""
    alpha_lr: float = 3e-4
    """learning rate of the entropy weight, lambda_alpha in Alg. 1"""
    init_alpha: float = 0.1
    """initial entropy weight alpha, Eq. 2; from 1 it rules the advantages for the first 10,000 updates"""
    hidden_sizes: tuple[int, ...] = (256, 256)
    """hidden layers of the actor and of each critic"""

    sources: tuple[str, ...] = field(default_factory=lambda: tuple(str(p) for p in SHIPPED if p.exists()))
    """policy files pi_1 ... pi_n to reuse; nothing after the flag means none, which is SAC"""
    num_random_sources: int = 0
    """untrained policies added to the sources (paper, Section 4.3.3)"""
    beta1: float = 1.0
    """weight of the guidance KL, beta_1 in Eq. 12"""
    beta2: float = 3e-3
    """cap on the advantage in that weight, as a fraction of |V|: beta_2 in Eq. 12"""
    num_guidance_samples: int = 1
    """actions sampled per candidate to estimate its expected advantage, Eq. 4"""
    soft_advantage: bool = True
    """include the entropy term in the expected advantage (Eq. 4); off: the paper's Appendix B.3"""
    source_mean_bound: float = 2.5
    """sources' pre-tanh means are clipped to plus or minus this, to keep the KL well-conditioned"""
    source_log_std_min: float = -1.5
    """sources' log standard deviations are raised to at least this, for the same reason"""
    guidance_starts: int = 5_000
    """environment steps before the guidance begins: a critic that knows nothing guides nowhere"""

    log_interval: int = 1_000
    """environment steps between rows of metrics.csv"""
    eval_interval: int = 20_000
    """environment steps between evaluations"""
    eval_episodes: int = 10
    """episodes per evaluation, each with a goal of its own (for --evaluate, 50 is a fair number)"""
    checkpoint_interval: int = 50_000
    """environment steps between checkpoints"""
    run_dir: str | None = None
    """where everything is written [runs/<env-id>__<cup or sac>__<seed>]"""
    resume: str | None = None
    """run directory to go on with, from its checkpoint"""
    evaluate: str | None = None
    """policy file to score instead of training, on --env-id or else on its own task"""
    capture_video: bool = False
    """with --evaluate: also write one episode as a GIF beside the policy file"""
    cuda: bool = torch.cuda.is_available()
    """train on the GPU"""
    threads: int = min(4, os.cpu_count() or 1)
    """CPU threads of the learner"""
    tensorboard: bool = False
    """also write TensorBoard logs into the run directory"""
    track: bool = False
    """also log to Weights & Biases"""


# ---------------------------------------------------------------------------------------------------
# Environment
# ---------------------------------------------------------------------------------------------------


class SeededEpisodes(gym.Wrapper):
    """Gives every episode a seed of its own, made from (seed, episode number), and sums the episode up.

    An episode is thus rebuilt from its number and its actions alone: set `resume_from` to both before
    `reset`, and the environment comes back as it was. That is how a resumed run equals an unbroken one.
    The last `info` of an episode holds `return` and `success` (NaN where the task has no such thing).
    """

    def __init__(self, env: gym.Env, seed: int):
        super().__init__(env)
        self.seed, self.episode = seed, 0
        self.resume_from: tuple[int, Sequence] | None = None  # (episode number, actions taken so far)

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
        self.success = np.fmax(self.success, float(info.get("success", np.nan)))  # any step of the episode counts
        done = terminated or truncated
        return obs, reward, terminated, truncated, {"return": self.episode_return, "success": self.success} if done else {}


def derive_seed(*numbers: int) -> int:
    """One seed from several numbers; other numbers give an unrelated seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def make_env(env_id: str, seed: int, render_mode: str | None = None) -> gym.Env:
    """One environment with actions in [-1, 1]; same seed, same sequence of episodes.

    Meta-World tasks, `-v2` or `-v3`, follow the paper's protocol: goal visible and drawn anew for every
    episode, the v2 reward, 500 steps and then truncated. Raises UserError for an id that cannot be used.
    """
    tasks = metaworld.ALL_V3_ENVIRONMENTS
    if (task := re.sub(r"-v[23]$", "-v3", env_id)) in tasks:
        env = tasks[task](render_mode=render_mode, reward_function_version="v2")
        env._partially_observable = False  # show the goal ...
        del env.sawyer_observation_space  # ... and forget the cached space, which would clip it to zero
        env._freeze_rand_vec, env.seeded_rand_vec, env._set_task_called = False, True, True  # new goal every episode
        return SeededEpisodes(env, seed)
    try:
        env = gym.make(env_id, render_mode=render_mode)
    except (gym.error.Error, ModuleNotFoundError) as error:
        names = [name[:-1] + digit for name in tasks for digit in "23"] + list(gym.registry)
        near = ", ".join(difflib.get_close_matches(env_id, names, cutoff=0.5)) or "see metaworld or gymnasium for names"
        raise UserError(f"environment {env_id!r} cannot be made ({error}); near it: {near}") from None
    for name, space in (("observations", env.observation_space), ("actions", env.action_space)):
        if not isinstance(space, gym.spaces.Box):
            raise UserError(f"environment {env_id!r} has {name} of type {space}, but CUP needs a Box: choose another")
    if not env.action_space.is_bounded():
        raise UserError(f"environment {env_id!r} has unbounded actions {env.action_space}, but CUP needs finite bounds")
    env = gym.wrappers.RescaleAction(gym.wrappers.FlattenObservation(env), np.float32(-1), np.float32(1))
    return SeededEpisodes(env, seed)


def make_vector_env(env_id: str, num_envs: int, *seed: int) -> gym.vector.AsyncVectorEnv:
    """`num_envs` environments in processes of their own. A finished one resets within the same step."""

    def make(index):
        if multiprocessing.parent_process():  # in a worker: the main process alone decides when to stop ...
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if sys.platform == "linux":  # ... and when it is killed, no worker stays behind (1 is PR_SET_PDEATHSIG)
                ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        return make_env(env_id, derive_seed(*seed, index))

    env_fns = [lambda index=index: make(index) for index in range(num_envs)]
    return gym.vector.AsyncVectorEnv(env_fns, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)


# ---------------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------------


def mlp(*sizes: int) -> nn.Sequential:
    layers = [layer for i, o in zip(sizes, sizes[1:]) for layer in (nn.Linear(i, o), nn.ReLU(inplace=True))]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """Tanh-Gaussian policy: obs (..., obs_dim) -> mean, log_std (..., action_dim), both before the tanh.

    Both are softly bounded. Without that, a mean far out in the tanh's flat part or a vanishing standard
    deviation leaves the action as it is but sends the KL to this policy, once it is a source, to infinity.
    """

    def __init__(self, obs_dim, action_dim, hidden_sizes, mean_bound=3.0, log_std_min=-5.0, log_std_max=2.0):
        super().__init__()
        self.net = mlp(obs_dim, *hidden_sizes, 2 * action_dim)
        self.mean_bound, self.log_std_min, self.log_std_max = mean_bound, log_std_min, log_std_max

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.net(obs).chunk(2, dim=-1)
        mean = self.mean_bound * torch.tanh(mean / self.mean_bound)
        log_std = self.log_std_min + 0.5 * (self.log_std_max - self.log_std_min) * (torch.tanh(log_std) + 1)
        return mean, log_std


class SoftQNetwork(nn.Module):
    """The twin critic: obs (..., obs_dim), action (..., action_dim) -> Q1 and Q2, stacked (2, ...)."""

    def __init__(self, obs_dim, action_dim, hidden_sizes):
        super().__init__()
        self.q1 = mlp(obs_dim + action_dim, *hidden_sizes, 1)
        self.q2 = mlp(obs_dim + action_dim, *hidden_sizes, 1)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([obs, action], dim=-1)
        return torch.stack([self.q1(x), self.q2(x)]).squeeze(-1)


def squash(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Sample a tanh-Gaussian with the given standard normal noise (reparameterised).

    Shapes broadcast: (..., action_dim) -> action (..., action_dim) in (-1, 1), log_prob (...).
    """
    pre_tanh = mean + log_std.exp() * noise
    log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    log_prob = log_prob - 2 * (math.log(2) - pre_tanh - F.softplus(-2 * pre_tanh))  # log(1 - tanh^2), without overflow
    return torch.tanh(pre_tanh), log_prob.sum(dim=-1)


# ---------------------------------------------------------------------------------------------------
# CUP: which source to follow at a state, and how strongly
# ---------------------------------------------------------------------------------------------------


def expected_advantage(q: Tensor, log_prob: Tensor, alpha: Tensor | float) -> tuple[Tensor, Tensor]:
    """Soft expected advantage of every candidate over the target policy, Eq. 4, by Monte Carlo.

    q, log_prob: (samples, batch, n + 1): each candidate's own actions under the target's critic and under
    the candidate itself; the n sources come first and the target policy last. alpha = 0 gives the "hard"
    advantage of Appendix B.3. Returns the advantages (batch, n + 1), the last of them zero, and the
    target's soft value V (batch,), Eq. 2.
    """
    soft_q = (q - alpha * log_prob).mean(dim=0)  # (batch, n + 1)
    value = soft_q[:, -1]  # Eq. 2
    return soft_q - value.unsqueeze(1), value  # Eq. 4


def guidance_policy(advantage: Tensor) -> Tensor:
    """Eq. 7: the candidate with the largest advantage; (batch, n + 1) -> index (batch,). A tie is the target's."""
    best, source = advantage[:, :-1].max(dim=1)
    target = advantage.shape[1] - 1
    return torch.where(best > advantage[:, target], source, target)


def guidance_weight(advantage: Tensor, value: Tensor, beta1: float, beta2: float) -> Tensor:
    """Eq. 12: beta_s, from the guidance policy's advantage and V, both (batch,). Zero where the target guides."""
    return beta1 * torch.minimum(advantage, beta2 * value.abs())


def kl_divergence(mean_p: Tensor, log_std_p: Tensor, mean_q: Tensor, log_std_q: Tensor) -> Tensor:
    """KL(p || q) of two tanh-Gaussians in nats (Eqs. 9, 11); (batch, action_dim) -> (batch,).

    The tanh is a bijection, and no bijection changes a KL: it is that of the Gaussians before the tanh.
    """
    variance_ratio = (2 * (log_std_p - log_std_q)).exp()
    distance = ((mean_p - mean_q) / log_std_q.exp()).square()
    return 0.5 * (variance_ratio + distance - 1 - variance_ratio.log()).sum(dim=-1)


def query_sources(sources: Sequence[Actor], obs: Tensor, args: Args) -> Tensor:
    """What every source would do at obs (batch, obs_dim): its mean and log-std, (batch, n_sources, 2, action_dim).

    Bounded, because a source that is certain (log_std far down) or saturated (mean far out) puts nearly no
    mass on the target's actions: the KL to it grows without limit and drowns every other term of the loss.
    """
    dists = []
    for actor in sources:
        mean, log_std = actor(obs)
        mean = mean.clamp(-args.source_mean_bound, args.source_mean_bound)
        dists.append(torch.stack([mean, log_std.clamp(min=args.source_log_std_min)], dim=1))
    return torch.stack(dists, dim=1) if dists else torch.empty(len(obs), 0, device=obs.device)


class ReplayBuffer:
    """One preallocated row per transition. With the state goes what each source would do there: the sources
    are frozen, so their distributions are computed once, on arrival, and not at every gradient update.
    """

    def __init__(self, capacity, obs_dim, action_dim, num_sources, device="cpu"):
        self.source_shape = (num_sources, 2, action_dim)
        self.widths = [obs_dim, obs_dim, action_dim, 1, 1, math.prod(self.source_shape)]
        self.rows = torch.empty(capacity, sum(self.widths), device=device)
        self.size = self.position = 0

    def add(self, obs, next_obs, action, reward, terminated, source_dist):
        """Store n transitions; reward and terminated (n,), source_dist (n, n_sources, 2, action_dim)."""
        columns = [obs, next_obs, action, reward.unsqueeze(1), terminated.unsqueeze(1), source_dist.flatten(1)]
        index = (self.position + torch.arange(len(obs))) % len(self.rows)
        self.rows[index] = torch.cat(columns, dim=1)
        self.position = (self.position + len(obs)) % len(self.rows)
        self.size = min(self.size + len(obs), len(self.rows))

    def sample(self, batch_size: int) -> tuple[Tensor, ...]:
        """A uniform minibatch: obs, next_obs, action, reward, terminated, source means, source log-stds."""
        rows = self.rows[torch.randint(self.size, (batch_size,), device=self.rows.device)]
        obs, next_obs, action, reward, terminated, source_dist = rows.split(self.widths, dim=1)
        source_mean, source_log_std = source_dist.unflatten(1, self.source_shape).unbind(2)  # (batch, n, action_dim)
        return obs, next_obs, action, reward.squeeze(1), terminated.squeeze(1), source_mean, source_log_std


# ---------------------------------------------------------------------------------------------------
# The update (Alg. 1)
# ---------------------------------------------------------------------------------------------------


class Agent:
    """Actor, critics, entropy weight and their optimisers; `update` is one gradient step of Alg. 1."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device | str = "cpu"):
        self.args, self.action_dim, self.target_entropy = args, action_dim, -float(action_dim)
        self.actor = Actor(obs_dim, action_dim, args.hidden_sizes).to(device)
        self.critic = SoftQNetwork(obs_dim, action_dim, args.hidden_sizes).to(device)
        self.target_critic = SoftQNetwork(obs_dim, action_dim, args.hidden_sizes).to(device).requires_grad_(False)
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.init_alpha), device=device))
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=args.policy_lr, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=args.q_lr, fused=True)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], lr=args.alpha_lr, fused=True)

    def update(self, batch: tuple[Tensor, ...], guide: bool = True) -> dict[str, Tensor]:
        """One update of critic, actor, alpha and target critic. Without sources, or with guide=False, it is SAC.

        Returns tensors to log, on the device: losses (scalars), `advantage` (batch, n + 1), `guidance`
        (batch,), `weight` (batch,), `kl` (batch,).
        """
        args = self.args
        obs, next_obs, action, reward, terminated, source_mean, source_log_std = batch
        alpha = self.log_alpha.detach().exp()

        # ---- critic: L_critic in Eq. 3 ------------------------------------------------------------
        with torch.no_grad():
            next_mean, next_log_std = self.actor(next_obs)
            next_action, next_log_prob = squash(next_mean, next_log_std, torch.randn_like(next_mean))
            next_value = self.target_critic(next_obs, next_action).amin(dim=0) - alpha * next_log_prob
            # `terminated`, not `truncated`: a time limit does not end the value of a state.
            td_target = reward + args.gamma * (1 - terminated) * next_value  # (batch,)
        q = self.critic(obs, action)  # (2, batch)
        critic_loss = (q - td_target).square().mean(dim=1).sum()
        self.critic_optimizer.zero_grad()
        critic_loss.backward()
        self.critic_optimizer.step()

        # ---- actor: L_actor in Eq. 3 --------------------------------------------------------------
        mean, log_std = self.actor(obs)
        guide = guide and source_mean.shape[1] > 0
        noise = torch.randn(args.num_guidance_samples if guide else 1, *mean.shape, device=mean.device)
        action, log_prob = squash(mean, log_std, noise)  # (samples, batch, action_dim), (samples, batch)
        q = self.critic(obs.expand(len(noise), -1, -1), action).amin(dim=0)  # (samples, batch)
        actor_loss = (alpha * log_prob - q).mean()
        info = {"loss/critic": critic_loss, "loss/actor": actor_loss, "alpha": alpha}

        # ---- guidance: Eqs. 4, 7, 11, 12 ----------------------------------------------------------
        if guide:
            with torch.no_grad():
                # Every source acts on the same noise as the target: only the policies differ, not the luck.
                source_action, source_log_prob = squash(source_mean, source_log_std, noise.unsqueeze(2))
                source_obs = obs.unsqueeze(1).expand(*source_action.shape[:3], -1)  # (samples, batch, n, obs_dim)
                source_q = self.critic(source_obs, source_action).amin(dim=0)  # (samples, batch, n)
                candidate_q = torch.cat([source_q, q.unsqueeze(2)], dim=2)
                candidate_log_prob = torch.cat([source_log_prob, log_prob.unsqueeze(2)], dim=2)
                entropy_weight = alpha if args.soft_advantage else 0.0
                advantage, value = expected_advantage(candidate_q, candidate_log_prob, entropy_weight)  # Eq. 4
                guidance = guidance_policy(advantage)  # Eq. 7, (batch,)
                row = torch.arange(len(obs), device=obs.device)
                beta = guidance_weight(advantage[row, guidance], value, args.beta1, args.beta2)  # Eq. 12, (batch,)
                guidance_mean = torch.cat([source_mean, mean.unsqueeze(1)], dim=1)[row, guidance]
                guidance_log_std = torch.cat([source_log_std, log_std.unsqueeze(1)], dim=1)[row, guidance]
            kl = kl_divergence(mean, log_std, guidance_mean, guidance_log_std)  # (batch,)
            kl_loss = (beta * kl).mean()
            actor_loss = actor_loss + kl_loss  # Eq. 11
            info |= {"loss/kl": kl_loss, "advantage": advantage, "guidance": guidance, "weight": beta, "kl": kl}
        self.actor_optimizer.zero_grad()
        actor_loss.backward(inputs=list(self.actor.parameters()))  # the critic's gradients are not needed here
        self.actor_optimizer.step()

        # ---- entropy weight: L_entropy in Eq. 3 ---------------------------------------------------
        alpha_loss = -self.log_alpha.exp() * (log_prob.detach().mean() + self.target_entropy)
        self.alpha_optimizer.zero_grad()
        alpha_loss.backward()
        self.alpha_optimizer.step()

        # ---- target critic ------------------------------------------------------------------------
        with torch.no_grad():
            for target, online in zip(self.target_critic.parameters(), self.critic.parameters()):
                target.lerp_(online, args.tau)
        return info

    def state_dict(self) -> dict:
        parts = {k: v for k, v in vars(self).items() if isinstance(v, nn.Module | torch.optim.Optimizer)}
        return {name: part.state_dict() for name, part in parts.items()} | {"log_alpha": self.log_alpha.data}

    def load_state_dict(self, state: dict) -> None:
        for name, part_state in state.items():
            if name == "log_alpha":
                self.log_alpha.data.copy_(part_state)
            else:
                getattr(self, name).load_state_dict(part_state)


# ---------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------


def save(content: dict, path: Path) -> None:
    """torch.save to a temporary name, then rename: `path` holds the old content or the new, never half of it."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        raise RunError(f"{path} could not be written ({error}); what it held before is untouched") from None


def policy_file(actor: Actor, **about) -> dict:
    """The content of a policy file: the weights and all that is needed to use and to judge them."""
    weights = {name: tensor.detach().cpu() for name, tensor in actor.state_dict().items()}
    sizes = [layer.in_features for layer in actor.net if isinstance(layer, nn.Linear)]
    return {
        "obs_dim": sizes[0],
        "action_dim": len(weights[max(weights)]) // 2,
        "hidden_sizes": sizes[1:],
        "mean_bound": actor.mean_bound,
        "log_std_min": actor.log_std_min,
        "log_std_max": actor.log_std_max,
        **about,
        "weights": weights,
    }


def load_policy(path: str | Path) -> Actor:
    """The frozen actor of a policy file; call it on a batch of observations: `mean, log_std = actor(obs)`.

    What the file says about itself is in `actor.about`. Raises UserError, in one sentence, for anything
    that is not a whole and finite policy. Nothing in the file is executed.
    """
    try:
        if bad := zipfile.ZipFile(path).testzip():  # torch.load does not verify checksums
            raise ValueError(f"{bad} in it is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True)
        weights = content["weights"]
        # Before anything is built from them: no sizes beyond what the file can hold.
        if sum(t.untyped_storage().nbytes() for t in weights.values()) > os.path.getsize(path):
            raise ValueError("its tensors are larger than the file")
        sizes = [content["obs_dim"], *content["hidden_sizes"], 2 * content["action_dim"]]
        if sum(i * o for i, o in zip(sizes, sizes[1:])) * 4 > os.path.getsize(path) or min(sizes) < 1:
            raise ValueError(f"its layer sizes {sizes} do not fit the file")
        bounds = {name: float(content[name]) for name in ("mean_bound", "log_std_min", "log_std_max")}
        if not (0 < bounds["mean_bound"] < 1e3 and -20 <= bounds["log_std_min"] < bounds["log_std_max"] <= 20):
            raise ValueError(f"its bounds {bounds} make no sense")
        actor = build_actor(content)
        if not all(t.dtype == torch.float32 and t.isfinite().all() for t in weights.values()):
            raise ValueError("its weights are not all finite")
    except FileNotFoundError:
        raise UserError(f"policy file {path} does not exist: give the path of a .pt file, see sources/") from None
    except Exception as error:  # whatever a stranger's file can cause
        reason = str(error).split("\n")[0][:150]
        raise UserError(f"{path} is not a policy file of cup.py ({type(error).__name__}: {reason})") from None
    return actor


def build_actor(content: dict) -> Actor:
    """The frozen actor that `policy_file` described."""
    bounds = [content[name] for name in ("mean_bound", "log_std_min", "log_std_max")]
    actor = Actor(content["obs_dim"], content["action_dim"], content["hidden_sizes"], *bounds)
    actor.load_state_dict(content["weights"])
    actor.about = {name: value for name, value in content.items() if name != "weights"}
    return actor.requires_grad_(False)


def load_sources(args: Args, obs_dim: int, action_dim: int) -> dict[str, Actor]:
    """The source policies by name. Raises UserError where one does not fit the environment."""
    sources = {}
    for path in args.sources:
        actor = load_policy(path)
        theirs = actor.about["obs_dim"], actor.about["action_dim"]
        if theirs != (obs_dim, action_dim):
            raise UserError(
                f"source {path} has observation and action sizes {theirs}, but {args.env_id} has "
                f"{(obs_dim, action_dim)}: name sources that fit, or --sources with nothing after it for none"
            )
        name = Path(path).stem
        sources[name if name not in sources else f"{name}-{len(sources)}"] = actor
    for k in range(args.num_random_sources):
        sources[f"random-{k + 1}"] = Actor(obs_dim, action_dim, args.hidden_sizes).requires_grad_(False)
    return sources


# ---------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(actor: Actor, envs, episodes: int, first_episode: int = 0, sample: bool = False) -> dict[str, np.ndarray]:
    """Play `episodes` episodes with the mean action, or sampled ones; `return` and `success`, each (episodes,).

    `first_episode` chooses the goals. Every environment plays a fixed share of the episodes, so that short
    ones are not counted more often than long ones.
    """
    share = [len(range(index, episodes, envs.num_envs)) for index in range(envs.num_envs)]
    played = [[] for _ in range(envs.num_envs)]
    envs.set_attr("resume_from", [(first_episode, ())] * envs.num_envs)
    obs, _ = envs.reset()
    device = next(actor.parameters()).device
    while any(len(p) < s for p, s in zip(played, share)):
        mean, log_std = actor(torch.as_tensor(obs, dtype=torch.float32, device=device))
        action = torch.tanh(mean + log_std.exp() * torch.randn_like(mean) if sample else mean)
        obs, _, terminated, truncated, infos = envs.step(action.cpu().numpy())
        for index in np.flatnonzero(terminated | truncated):
            if len(played[index]) < share[index]:
                info = infos["final_info"]
                played[index].append((info["return"][index], info["success"][index]))
    returns, successes = np.array([result for p in played for result in p]).T
    return {"return": returns, "success": successes}


# ---------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------


class Run:
    """What a run leaves behind: args.json, metrics.csv, policy.pt, checkpoint.pt, and a line on the terminal."""

    def __init__(self, args: Args, sources: dict[str, Actor], checkpoint: dict | None):
        self.args, self.dir, self.names = args, Path(args.run_dir), [*sources, "target"] if sources else []
        self.start = time.time() - (checkpoint["seconds"] if checkpoint else 0.0)
        self.last = (time.time(), checkpoint["step"] if checkpoint else 0)
        self.columns = ["step", "time/seconds", "time/steps_per_second", "train/return", "train/success_rate"]
        self.columns += ["eval/return", "eval/success_rate", "loss/critic", "loss/actor", "loss/kl", "alpha"]
        if sources:
            self.columns += [f"guidance/{what}/{name}" for what in ("selected", "advantage") for name in self.names]
            self.columns += ["guidance/weight", "guidance/kl"]
        writer = self.tensorboard = self.wandb = None
        if args.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter as writer
            except ImportError:
                raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard") from None
        if args.track:
            try:
                import wandb
            except ImportError:
                raise UserError("--track needs the package wandb: pip install wandb") from None
        if not checkpoint:
            try:
                self.dir.mkdir(parents=True)
            except FileExistsError:
                hint = f"go on with it (--resume {self.dir}) or choose another --run-dir"
                raise UserError(f"run directory {self.dir} already exists: {hint}") from None
            except OSError as error:
                raise UserError(f"run directory {self.dir} cannot be created ({error.strerror}): choose another --run-dir") from None
        self.metrics = open(self.dir / "metrics.csv", "a", newline="")
        try:
            fcntl.lockf(self.metrics, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when this process ends, however it ends
        except OSError:
            raise UserError(f"another run is writing to {self.dir}: wait for it, or choose another --run-dir") from None
        if checkpoint:  # forget the rows written after the checkpoint: they will be written again
            self.metrics.truncate(min(self.metrics.tell(), checkpoint["metrics_bytes"]))
            self.metrics.seek(0, os.SEEK_END)
        packages = ("torch", "numpy", "gymnasium", "metaworld", "mujoco", "tyro")
        about = {"args": asdict(args), "python": platform.python_version(), "versions": {p: version(p) for p in packages}}
        (self.dir / "args.json").write_text(json.dumps(about, indent=2) + "\n")
        self.writer = csv.DictWriter(self.metrics, self.columns, restval="")
        if self.metrics.tell() == 0:
            self.writer.writeheader()
        if writer:
            self.tensorboard = writer(str(self.dir), purge_step=checkpoint["step"] if checkpoint else None)
        if args.track:
            self.wandb = wandb.init(project="cup", name=self.dir.name, id=self.dir.name, resume="allow", config=asdict(args))

    def log(self, step: int, recent: deque, info: dict[str, Tensor], evaluation: dict[str, float]) -> None:
        """Write one row; `info` is what `Agent.update` returned last. Raises RunError for a loss that is not finite."""
        now = time.time()
        rate = (step - self.last[1]) / max(now - self.last[0], 1e-9)
        self.last = (now, step)
        row = {"step": step, "time/seconds": round(now - self.start, 1), "time/steps_per_second": round(rate, 1)}
        row |= {k: v.item() for k, v in info.items() if v.dim() == 0}
        for name in ("loss/critic", "loss/actor", "loss/kl"):
            if not math.isfinite(row.get(name, 0.0)):
                raise RunError(f"{name} is {row[name]} at step {step}: the run stops, {self.dir}/checkpoint.pt is from before")
        if "guidance" in info:
            selected = torch.bincount(info["guidance"], minlength=len(self.names)) / len(info["guidance"])
            row |= {f"guidance/selected/{name}": share for name, share in zip(self.names, selected.tolist())}
            advantage = info["advantage"].mean(dim=0).tolist()
            row |= {f"guidance/advantage/{name}": mean for name, mean in zip(self.names, advantage)}
            row |= {"guidance/weight": info["weight"].mean().item(), "guidance/kl": info["kl"].mean().item()}
        if recent:
            row["train/return"], row["train/success_rate"] = np.mean(recent, axis=0).tolist()
        row |= {f"eval/{name}": value for name, value in evaluation.items()}
        row = {name: value for name, value in row.items() if not (isinstance(value, float) and math.isnan(value))}
        self.writer.writerow(row)
        self.metrics.flush()
        for name, value in row.items():
            if self.tensorboard and name != "step":
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(row, step=step)
        self.show(row, keep=bool(evaluation))

    def show(self, row: dict, keep: bool) -> None:
        """One line that is overwritten on a terminal; elsewhere only the lines to keep, those with an evaluation."""
        step, total, rate = row["step"], self.args.total_timesteps, row["time/steps_per_second"]
        left = time.strftime("%H:%M:%S", time.gmtime(max(total - step, 0) / max(rate, 1e-9)))
        parts = [f"{self.args.env_id} {step:,}/{total:,}", f"{rate:.0f} steps/s", f"{left} left"]
        for kind in ("train", "eval"):
            if f"{kind}/return" in row:
                success = f", success {row[f'{kind}/success_rate']:.0%}" if f"{kind}/success_rate" in row else ""
                parts.append(f"{kind} return {row[f'{kind}/return']:.1f}{success}")
        if shares := [f"{n} {row[k]:.0%}" for n in self.names if (k := f"guidance/selected/{n}") in row]:
            parts.append("guidance: " + ", ".join(shares))
        line = " | ".join(parts)
        if sys.stdout.isatty():
            width = os.get_terminal_size().columns
            print("\r" + (line.ljust(width - 1) + "\n" if keep else line[: width - 1].ljust(width - 1)), end="", flush=True)
        elif keep:
            print(line, flush=True)

    def save_checkpoint(self, **state) -> None:
        args, seconds = asdict(self.args), time.time() - self.start
        state |= {"args": args, "seconds": seconds, "metrics_bytes": self.metrics.tell()}
        save(state, self.dir / "checkpoint.pt")

    def close(self) -> None:
        self.metrics.close()
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def train(args: Args, checkpoint: dict | None = None) -> None:
    """Alg. 1, with logging, evaluation and checkpoints around it; goes on from `checkpoint` where given."""
    device = torch.device("cuda" if args.cuda else "cpu")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    stop_signals: list[int] = []  # a signal lets the current step finish; the second one does not
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: sys.exit(128 + n) if stop_signals else stop_signals.append(n))

    # Streams 0 and 1 of the run's seed: no evaluation goal is ever a training goal.
    envs = make_vector_env(args.env_id, args.num_envs, args.seed, 0)
    eval_envs = make_vector_env(args.env_id, min(args.num_envs, args.eval_episodes), args.seed, 1)
    try:
        (obs_dim,), (action_dim,) = envs.single_observation_space.shape, envs.single_action_space.shape
        agent = Agent(args, obs_dim, action_dim, device)
        if checkpoint:
            sources = {name: build_actor(content) for name, content in checkpoint["sources"].items()}
        else:
            sources = load_sources(args, obs_dim, action_dim)
        run = Run(args, sources, checkpoint)
        sources = {name: actor.to(device) for name, actor in sources.items()}
        buffer = ReplayBuffer(args.buffer_size, obs_dim, action_dim, len(sources), device)
        step, episode_actions, recent = 0, [[] for _ in range(args.num_envs)], deque(maxlen=20)
        episodes = [0] * args.num_envs
        if checkpoint:
            step, episodes, recent = checkpoint["step"], checkpoint["episodes"], deque(checkpoint["recent"], maxlen=20)
            episode_actions = [list(actions.numpy()) for actions in checkpoint["episode_actions"]]
            agent.load_state_dict(checkpoint["agent"])
            buffer.size, buffer.position = len(checkpoint["buffer"]), checkpoint["buffer_position"]
            buffer.rows[: buffer.size] = checkpoint["buffer"]
            envs.set_attr("resume_from", list(zip(episodes, episode_actions)))
            torch.set_rng_state(checkpoint["rng_state"])
            if args.cuda:
                torch.cuda.set_rng_state(checkpoint["cuda_rng_state"])

        def save_checkpoint():
            run.save_checkpoint(
                step=step,
                agent=agent.state_dict(),
                # from_numpy: a torch view would be saved with all of the memory behind it
                buffer=torch.from_numpy(buffer.rows.cpu().numpy()[: buffer.size]),
                buffer_position=buffer.position,
                episodes=episodes,
                episode_actions=[torch.from_numpy(np.array(a, np.float32).reshape(-1, action_dim)) for a in episode_actions],
                recent=list(recent),
                sources={name: policy_file(actor) for name, actor in sources.items()},
                rng_state=torch.get_rng_state(),
                **({"cuda_rng_state": torch.cuda.get_rng_state()} if args.cuda else {}),
            )

        def due(interval):  # is a multiple of `interval` among the steps just taken?
            return step // interval > (step - args.num_envs) // interval

        obs = torch.as_tensor(envs.reset()[0], dtype=torch.float32, device=device)
        info = {}
        while step < args.total_timesteps and not stop_signals:
            with torch.no_grad():
                if step < args.learning_starts:
                    action = 2 * torch.rand(args.num_envs, action_dim, device=device) - 1
                else:
                    mean, log_std = agent.actor(obs)
                    action, _ = squash(mean, log_std, torch.randn_like(mean))
            numpy_action = action.cpu().numpy()
            envs.step_async(numpy_action)  # the environments step while the networks learn
            updates_done = int(max(step - args.learning_starts, 0) * args.utd_ratio)
            step += args.num_envs
            for _ in range(int(max(step - args.learning_starts, 0) * args.utd_ratio) - updates_done):
                info = agent.update(buffer.sample(args.batch_size), guide=step > args.guidance_starts)
            with torch.no_grad():
                source_dist = query_sources(sources.values(), obs, args)
            try:
                next_obs, reward, terminated, truncated, infos = envs.step_wait()
            except Exception as error:
                save_checkpoint()
                raise RunError(f"the environment failed at step {step}: {type(error).__name__}: {error}") from None

            done = terminated | truncated
            final_obs = next_obs.copy()  # where an episode ended, next_obs is already the next one's first
            for index in range(args.num_envs):
                episode_actions[index].append(numpy_action[index])
                if done[index]:
                    final_obs[index] = infos["final_obs"][index]
                    recent.append([infos["final_info"][name][index].item() for name in ("return", "success")])
                    episodes[index] += 1
                    episode_actions[index].clear()
            if not (np.isfinite(final_obs).all() and np.isfinite(next_obs).all() and np.isfinite(reward).all()):
                save_checkpoint()
                raise RunError(f"the environment returned an observation or reward that is not finite at step {step}")
            columns = [torch.as_tensor(x, dtype=torch.float32, device=device) for x in (final_obs, reward, terminated)]
            buffer.add(obs, columns[0], action, *columns[1:], source_dist)
            obs = torch.as_tensor(next_obs, dtype=torch.float32, device=device)

            if due(args.log_interval) or due(args.eval_interval) or step >= args.total_timesteps:
                evaluation = {}
                if due(args.eval_interval) or step >= args.total_timesteps:
                    results = evaluate(agent.actor, eval_envs, args.eval_episodes, first_episode=step)
                    evaluation = {"return": results["return"].mean(), "success_rate": results["success"].mean()}
                run.log(step, recent, info, evaluation)
                info = {}
                if evaluation:
                    about = {"env_id": args.env_id, "step": step, "eval_episodes": args.eval_episodes, **evaluation}
                    about = {name: value.item() if isinstance(value, np.floating) else value for name, value in about.items()}
                    save(policy_file(agent.actor, **about), run.dir / "policy.pt")
            if due(args.checkpoint_interval):
                save_checkpoint()
        save_checkpoint()
        run.close()
        if stop_signals:
            print(f"\nstopped at step {step:,}; go on with: python cup.py --resume {run.dir}")
        else:
            success = f"success {about['success_rate']:.0%} and " if not math.isnan(about["success_rate"]) else ""
            print(f"\nfinished {step:,} steps: {success}return {about['return']:.1f} over {args.eval_episodes} episodes")
            print(f"policy: {run.dir}/policy.pt, curves: {run.dir}/metrics.csv, to go on: --resume {run.dir} --total-timesteps N")
    finally:
        envs.close()
        eval_envs.close()


def score(args: Args) -> None:
    """--evaluate: print how a policy file does with its mean action and with sampled ones, on fresh goals."""
    from scipy.stats import binomtest, sem  # metaworld brings scipy

    actor = load_policy(args.evaluate)
    env_id = args.env_id or actor.about.get("env_id")
    if env_id is None:
        raise UserError(f"{args.evaluate} does not say what it was trained on: name the environment with --env-id")
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    # Stream 2 of the seed: neither a training goal nor an evaluation goal of a training run.
    envs = make_vector_env(env_id, min(args.num_envs, args.eval_episodes), args.seed, 2)
    try:
        theirs, ours = envs.single_observation_space.shape[0], actor.about["obs_dim"]
        if theirs != ours or envs.single_action_space.shape[0] != actor.about["action_dim"]:
            raise UserError(f"{args.evaluate} takes {ours} observations, but {env_id} has {theirs}: choose another --env-id")
        print(f"{args.evaluate} on {env_id}, {args.eval_episodes} episodes, seed {args.seed}")
        for name, sample in (("mean action", False), ("sampled action", True)):
            results = evaluate(actor, envs, args.eval_episodes, sample=sample)
            returns, wins = results["return"], results["success"]
            line = f"return {returns.mean():.1f} ± {1.96 * sem(returns):.1f}"
            if not np.isnan(wins).any():
                low, high = binomtest(int(wins.sum()), len(wins)).proportion_ci(method="wilson")
                line = f"success {wins.mean():.2f} [{low:.2f}, {high:.2f}] ({int(wins.sum())}/{len(wins)}), " + line
            print(f"{name + ':':16}{line}")
    finally:
        envs.close()
    if args.capture_video:
        capture_video(actor, env_id, derive_seed(args.seed, 2, 0), Path(args.evaluate).with_suffix(".gif"))


@torch.no_grad()
def capture_video(actor: Actor, env_id: str, seed: int, path: Path) -> None:
    import imageio  # gymnasium[mujoco] brings it

    try:
        env = make_env(env_id, seed, render_mode="rgb_array")
        obs, done, frames = env.reset()[0], False, []
        while not done:
            obs, _, terminated, truncated, _ = env.step(torch.tanh(actor(torch.as_tensor(obs, dtype=torch.float32))[0]).numpy())
            done = terminated or truncated
            frames.append(env.render())
    except Exception as error:
        hint = "install an OpenGL library (Debian: libegl1 or libosmesa6) and set MUJOCO_GL=egl or MUJOCO_GL=osmesa"
        raise UserError(f"rendering failed ({type(error).__name__}: {error}): {hint}") from None
    imageio.mimsave(path, frames[::4], fps=20, loop=0)
    print(f"video: {path}")


def check(args: Args) -> Args:
    """The arguments with the defaults that depend on others filled in; UserError where they make no sense."""
    at_least = {"total_timesteps": 1, "num_envs": 1, "buffer_size": 1, "batch_size": 1, "learning_starts": 1, "utd_ratio": 0}
    at_least |= {"log_interval": 1, "eval_interval": 1, "eval_episodes": 1, "checkpoint_interval": 1, "threads": 1, "seed": 0}
    at_least |= {"beta1": 0, "beta2": 0, "num_guidance_samples": 1, "num_random_sources": 0, "guidance_starts": 0}
    for name, bound in at_least.items():
        if not bound <= getattr(args, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}, but must be at least {bound}")
    for name in ("policy_lr", "q_lr", "alpha_lr", "init_alpha", "source_mean_bound"):
        if not 0 < getattr(args, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}, but must be positive")
    for name in ("gamma", "tau"):
        if not 0 <= getattr(args, name) <= 1:
            raise UserError(f"--{name} is {getattr(args, name)}, but must be between 0 and 1")
    if not args.hidden_sizes or min(args.hidden_sizes) < 1:
        raise UserError(f"--hidden-sizes are {args.hidden_sizes}, but must be one or more positive numbers")
    if args.batch_size > args.buffer_size:
        raise UserError(f"--batch-size {args.batch_size} is larger than --buffer-size {args.buffer_size}: lower the one or raise the other")
    if args.cuda and not torch.cuda.is_available():
        raise UserError("--cuda was given, but PyTorch finds no CUDA device here: use --no-cuda")
    if args.evaluate:
        return args
    if args.capture_video:
        raise UserError("--capture-video films a finished policy: give it together with --evaluate POLICY")
    if args.env_id is None:
        raise UserError("no environment was named: give one, for example --env-id peg-insert-side-v2")
    if args.learning_starts >= args.total_timesteps:
        raise UserError(f"--learning-starts {args.learning_starts} is not before the end, --total-timesteps {args.total_timesteps}")
    method = "cup" if args.sources or args.num_random_sources else "sac"
    return replace(args, run_dir=args.run_dir or f"runs/{args.env_id.replace('/', '-')}__{method}__{args.seed}")


def load_checkpoint(run_dir: str) -> dict:
    path = Path(run_dir) / "checkpoint.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError(f"--resume {run_dir}: there is no checkpoint.pt in it; name the directory of an earlier run") from None
    except Exception as error:
        raise UserError(f"{path} is not a checkpoint of cup.py ({type(error).__name__})") from None


def main() -> None:
    try:
        args = tyro.cli(Args, description=__doc__)
        if args.evaluate:
            score(check(args))
        elif args.resume:
            checkpoint = load_checkpoint(args.resume)
            before = Args(**checkpoint["args"])
            args = replace(tyro.cli(Args, default=before), resume=None, run_dir=args.resume)
            may_differ = {"run_dir", "total_timesteps", "checkpoint_interval", "tensorboard", "track"}
            for name in {f.name for f in fields(Args)} - may_differ:
                if getattr(args, name) != getattr(before, name):
                    raise UserError(
                        f"--resume {args.run_dir} cannot change --{name.replace('_', '-')} from {getattr(before, name)} "
                        f"to {getattr(args, name)}: leave it out, or start a new run"
                    )
            if checkpoint["step"] >= args.total_timesteps:
                print(f"{args.run_dir} is finished: {checkpoint['step']:,} steps; --total-timesteps with more goes on")
            else:
                train(check(args), checkpoint)
        else:
            train(check(args))
    except (UserError, RunError, OSError) as error:
        print(f"cup.py: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)


if __name__ == "__main__":
    main()
