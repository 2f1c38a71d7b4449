"""The second look: rho against a plain loop, and on a problem where the truth is known."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import cup

BATCH, ACTION_DIM = 80, 2


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def q_of(obs: Tensor, action: Tensor) -> Tensor:
    """A critic that prefers actions near 0.5, with a term that depends on the state."""
    return obs.sum(dim=-1) - (action - 0.5).square().sum(dim=-1)


def slower_q_of(obs: Tensor, action: Tensor) -> Tensor:
    """Another one, to stand for the target critic."""
    return 0.9 * q_of(obs, action) + 0.1 * action.sum(dim=-1)


def candidates(*means: float) -> tuple[Tensor, Tensor]:
    """Means and log-stds (BATCH, candidates, ACTION_DIM), the same at every state."""
    shape = BATCH, len(means), ACTION_DIM
    return torch.tensor(means)[:, None].expand(shape), torch.full(shape, -1.0)


def first_look(means: Tensor, log_stds: Tensor, obs: Tensor, noise: Tensor, alpha: float) -> Tensor:
    action, log_prob = cup.squash(means, log_stds, noise.unsqueeze(2))
    q = q_of(obs.unsqueeze(1).expand(*action.shape[:3], -1), action)
    return cup.expected_advantage(q, log_prob, alpha)[0]


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("samples", [1, 3])
def test_rho_is_the_ratio_of_running_means(samples: int, alpha: float):
    """Two minibatches, one state and one candidate after the other."""
    means, log_stds = candidates(0.4, -0.3, 0.1)
    looks, seen, again = torch.zeros(2, 3), [0.0] * 3, [0.0] * 3
    for _ in range(2):
        obs, noise = torch.randn(BATCH, 4), torch.randn(samples, BATCH, ACTION_DIM)
        advantage = first_look(means, log_stds, obs, noise, alpha)
        rho = cup.second_look(slower_q_of, obs, means, log_stds, noise, alpha, advantage, looks)
        sums = {"seen": [0.0] * 3, "again": [0.0] * 3}
        for b in range(64):
            winner = max(range(3), key=lambda c: advantage[b, c].item())
            soft_q = []
            for c in (winner, 2):  # the target policy is the last
                total = 0.0
                for sample in range(samples):
                    other = noise[sample, b - 1]  # state 0 takes that of the last state
                    action, log_prob = cup.squash(means[b, c], log_stds[b, c], other)
                    total += slower_q_of(obs[b], action).item() - alpha * log_prob.item()
                soft_q.append(total / samples)
            sums["seen"][winner] += advantage[b, winner].item()
            sums["again"][winner] += soft_q[0] - soft_q[1]
        for c in range(3):
            seen[c] += 1e-3 * (sums["seen"][c] - seen[c])
            again[c] += 1e-3 * (sums["again"][c] - again[c])
    expected = [min(max(a / max(s, 1e-8), 0), 1) for a, s in zip(again, seen, strict=True)]
    torch.testing.assert_close(looks, torch.tensor([seen, again]), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(rho, torch.tensor(expected), rtol=1e-9, atol=1e-12)


def test_a_good_source_is_trusted_and_luck_is_not():
    """The target policy's mean is 0 before the tanh; the best action is 0.5.

    The first source is there. The second is the target policy itself with other luck, so that a
    critic whose errors differ by candidate is all that it can win by. The third is farther away.
    """
    means, log_stds = candidates(math.atanh(0.5), 0.0, -1.0, 0.0)
    looks = torch.zeros(2, 4)
    for _ in range(300):
        obs, noise = torch.randn(BATCH, 4), torch.randn(1, BATCH, ACTION_DIM)
        for one in (0, 1, 2):  # of the sources, each with the target policy alone
            error = 0.5 * torch.randn(BATCH, 2)
            pair = torch.tensor([one, 3])
            first = first_look(means[:, pair], log_stds[:, pair], obs, noise, 0.0) + error
            first = first - first[:, 1:]
            some = looks[:, pair]
            dists = means[:, pair], log_stds[:, pair]
            cup.second_look(q_of, obs, *dists, noise, 0.0, first, some)
            looks[:, pair] = some
    seen, confirmed = looks
    rho = (confirmed / seen.clamp(min=1e-8)).clamp(0, 1)
    assert rho[0] > 0.4
    assert rho[1] < 0.02
    assert rho[2] == 0


def test_without_error_the_good_source_has_all_of_its_advantage():
    means, log_stds = candidates(math.atanh(0.5), 0.0)
    looks = torch.zeros(2, 2)
    for _ in range(300):
        obs, noise = torch.randn(BATCH, 4), torch.randn(8, BATCH, ACTION_DIM)
        advantage = first_look(means, log_stds, obs, noise, 0.0)
        rho = cup.second_look(q_of, obs, means, log_stds, noise, 0.0, advantage, looks)
    assert rho[0] > 0.95


def guidance_loss(mean: Tensor, log_std: Tensor, looks: Tensor | None) -> tuple[Tensor, dict]:
    torch.manual_seed(1)
    obs, noise = torch.randn(BATCH, 4), torch.randn(1, BATCH, ACTION_DIM)
    action, log_prob = cup.squash(mean.detach(), log_std.detach(), noise)
    source = candidates(0.4, -0.3)
    q = q_of(obs.expand(1, -1, -1), action)
    about = noise, q, log_prob, 0.0, 2.0, 1e9  # no cap
    return cup.guidance_loss(q_of, obs, mean, log_std, *source, *about, slower_q_of, looks)


def test_eq_12_takes_rho_of_the_advantage_and_the_width_is_left_to_sac():
    mean = torch.zeros(BATCH, ACTION_DIM, requires_grad=True)
    log_std = torch.full((BATCH, ACTION_DIM), -0.5, requires_grad=True)
    looks = torch.zeros(2, 3)
    loss, states = guidance_loss(mean, log_std, looks)
    plain_loss, plain = guidance_loss(mean, log_std, None)
    assert torch.equal(states["guidance"], plain["guidance"])  # Eq. 7 is as it was
    assert torch.equal(plain["rho"], torch.ones(3))
    assert states["rho"][0] > 0 == states["rho"][1]
    for b, g in enumerate(states["guidance"].tolist()):
        expected = 2.0 * states["rho"][g] * states["advantage"][b, g]
        assert states["weight"][b].item() == pytest.approx(expected.item())
        assert plain["weight"][b].item() == pytest.approx(2.0 * plain["advantage"][b, g].item())
    by_mean, by_log_std = torch.autograd.grad(loss, [mean, log_std], allow_unused=True)
    assert by_log_std is None
    assert by_mean.abs().sum() > 0
    assert torch.autograd.grad(plain_loss, log_std)[0].abs().sum() > 0
