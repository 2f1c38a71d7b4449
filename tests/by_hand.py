"""Random transitions, what a tanh-Gaussian policy does in plain numbers, what has been learnt."""

import math

import torch
from torch import Tensor, nn

import cup


def random_batch(
    size: int, obs_dim: int, action_dim: int, num_sources: int = 0, seed: int = 0
) -> cup.Batch:
    """Transitions, few of which terminate, and random distributions of the sources."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(size, *shape, generator=rng)

    obs, next_obs, action = normal(obs_dim).double(), normal(obs_dim).double(), normal(action_dim)
    reward, terminated = normal(), (normal() > 1).to(action.dtype)
    mean, log_std = normal(num_sources, action_dim), normal(num_sources, action_dim).clamp(-1.5, 0)
    return cup.Batch(obs, next_obs, action.tanh(), reward, terminated, mean, log_std)


def act(mean: list[float], log_std: list[float], noise: list[float]) -> tuple[Tensor, float]:
    """The action and its log-density."""
    action, log_prob = [], 0.0
    for m, s, eps in zip(mean, log_std, noise, strict=True):
        action.append(math.tanh(m + math.exp(s) * eps))
        log_prob -= eps**2 / 2 + s + math.log(2 * math.pi) / 2
        log_prob -= math.log(1 - action[-1] ** 2)
    return torch.tensor(action), log_prob


def copies(*modules: nn.Module) -> list[Tensor]:
    """The parameters as they are now."""
    return [p.detach().clone() for module in modules for p in module.parameters()]


def same(before: list[Tensor], *modules: nn.Module) -> bool:
    """Whether none of them has changed."""
    return all(map(torch.equal, before, copies(*modules)))
