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
    obs, next_obs = torch.randn(2, size, obs_dim, generator=rng, dtype=torch.float64)
    action = torch.randn(size, action_dim, generator=rng).tanh()
    reward, end = torch.randn(2, size, generator=rng)
    mean, log_std = torch.randn(2, size, num_sources, action_dim, generator=rng)
    terminated, log_std = (end > 1).to(end.dtype), log_std.clamp(-1.5, 0)
    return cup.Batch(obs, next_obs, action, reward, terminated, mean, log_std)


def act(mean: list[float], log_std: list[float], noise: list[float]) -> tuple[Tensor, float]:
    """The action and its log-density."""
    action, log_prob = [], 0.0
    for m, s, eps in zip(mean, log_std, noise, strict=True):
        action.append(math.tanh(m + math.exp(s) * eps))
        log_prob -= eps**2 / 2 + s + math.log(2 * math.pi) / 2
        log_prob -= math.log(1 - action[-1] ** 2)
    return torch.tensor(action), log_prob


def copies(*modules: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for module in modules for p in module.parameters()]


def same(before: list[Tensor], *modules: nn.Module) -> bool:
    return all(map(torch.equal, before, copies(*modules)))


def assert_follows(target: nn.Module, before: list[Tensor], online: nn.Module, tau: float) -> None:
    """From the parameters before, it has gone a step of tau towards the online network's."""
    expected = [old.lerp(new, tau) for old, new in zip(before, copies(online))]
    torch.testing.assert_close(copies(target), expected)
