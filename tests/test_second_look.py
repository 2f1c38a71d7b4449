"""The second look: rho against a plain loop, and on a problem where the truth is known."""

import math

import pytest
import torch
from by_hand import random_batch
from torch import Tensor

import cup

BATCH, ACTION_DIM = 80, 2

pytestmark = pytest.mark.usefixtures("double_precision")


def q_of(obs: Tensor, action: Tensor) -> Tensor:
    """A critic that prefers actions near 0.5, with a term that depends on the state."""
    return obs.sum(dim=-1) - (action - 0.5).square().sum(dim=-1)


def slower_q_of(obs: Tensor, action: Tensor) -> Tensor:
    """Another one, to stand for the target critic."""
    return 0.9 * q_of(obs, action) + 0.1 * action.sum(dim=-1)


def dists(*means: float) -> tuple[Tensor, Tensor]:
    """Means and log-stds (BATCH, policies, ACTION_DIM), the same at every state."""
    shape = BATCH, len(means), ACTION_DIM
    return torch.tensor(means)[:, None].expand(shape), torch.full(shape, -1.0)


def first_look(critic, sources, target, obs, noise, alpha=0.0, rho=None) -> tuple[Tensor, dict]:
    """`guidance_loss` with beta1 = 2 and no cap."""
    action, log_prob = cup.squash(*(x.detach() for x in target), noise)
    q = critic(obs.expand(len(noise), -1, -1), action)
    about = noise, q, log_prob, alpha, 2.0, 1e9, rho
    return cup.guidance_loss(critic, obs, *target, *sources, *about)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("samples", [1, 3])
def test_rho_is_the_ratio_of_running_means(samples: int, alpha: float):
    """Two minibatches, every fourth state of each in turn."""
    torch.manual_seed(0)
    sources, target = dists(0.4, -0.3), [x.squeeze(1) for x in dists(0.1)]
    means, log_stds = (torch.cat([s, t[:, None]], dim=1) for s, t in zip(sources, target))
    looks, first, again = torch.zeros(2, 3), [0.0] * 3, [0.0] * 3
    for _ in range(2):
        obs, noise = torch.randn(BATCH, 4), torch.randn(samples, BATCH, ACTION_DIM)
        _, states = first_look(q_of, sources, target, obs, noise, alpha)
        rho = cup.second_look(slower_q_of, obs, *target, noise, alpha, states, looks)
        sums = [0.0] * 3, [0.0] * 3
        for b in range(0, BATCH, 4):
            winner = states["guidance"][b].item()
            soft_q = []
            for c in (winner, 2):  # the target policy is the last
                total = 0.0
                for sample in range(samples):
                    other = noise[sample, b - 1]  # state 0 takes that of the last state
                    action, log_prob = cup.squash(means[b, c], log_stds[b, c], other)
                    total += slower_q_of(obs[b], action).item() - alpha * log_prob.item()
                soft_q.append(total / samples)
            sums[0][winner] += soft_q[0] - soft_q[1]
            sums[1][winner] += states["advantage"][b, winner].item()
        again = [0.999 * mean + 0.001 * new for mean, new in zip(again, sums[0], strict=True)]
        first = [0.999 * mean + 0.001 * new for mean, new in zip(first, sums[1], strict=True)]
    torch.testing.assert_close(looks, torch.tensor([again, first]), rtol=1e-9, atol=1e-12)
    ratios = [min(max(a / max(f, 1e-8), 0), 1) for a, f in zip(again, first, strict=True)]
    expected = [ratio if ratio > 0.1 else 0.0 for ratio in ratios]
    assert 0 in expected and max(expected) > 0.1
    torch.testing.assert_close(rho, torch.tensor(expected), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("mean", "low", "high"), [(0.55, 0.8, 1.0), (0.0, 0.0, 0.05), (-0.2, 0, 0)])
def test_a_good_source_is_trusted_and_luck_is_not(mean: float, low: float, high: float):
    """The best action is 0.5, and the target policy's mean 0 before the tanh.

    The first source is nearly there. The second is the target policy itself, which can win by
    errors of the critic alone; the third is worse, and wins by them now and then.
    """
    torch.manual_seed(0)
    sources, target = dists(mean), [x.squeeze(1) for x in dists(0.0)]
    looks = torch.zeros(2, 2)

    def erring_q(obs: Tensor, action: Tensor) -> Tensor:
        return q_of(obs, action) + 0.1 * torch.randn(action.shape[:-1])

    for _ in range(300):
        obs, noise = torch.randn(BATCH, 4), torch.randn(1, BATCH, ACTION_DIM)
        _, states = first_look(erring_q, sources, target, obs, noise)
        rho = cup.second_look(q_of, obs, *target, noise, 0.0, states, looks)
    assert (states["guidance"] == 0).sum() > 2  # it is selected all the same, Eq. 7
    assert low <= rho[0] <= high


def test_eq_12_takes_rho_of_the_advantage():
    torch.manual_seed(0)
    sources, target = dists(0.7, 0.4), [x.squeeze(1) for x in dists(0.55)]
    obs, noise = torch.randn(BATCH, 4), torch.randn(1, BATCH, ACTION_DIM)
    rho = torch.tensor([0.25, 0.5, 0.0])
    _, states = first_look(q_of, sources, target, obs, noise, rho=rho)
    assert set(states["guidance"].tolist()) == {0, 1, 2}
    for b, g in enumerate(states["guidance"].tolist()):
        expected = 2.0 * rho[g].item() * states["advantage"][b, g].item()
        assert states["weight"][b].item() == pytest.approx(expected)


def gradient_of_the_last_bias(beta1: float, second_look: bool, source_log_std: float) -> Tensor:
    """In the actor's loss, (2, ACTION_DIM), of its means and of its log-stds, after one update."""
    torch.manual_seed(0)
    args = cup.Args("x", hidden_sizes=(16,), beta1=beta1, beta2=1.0, second_look=second_look)
    agent = cup.Agent(args, 3, ACTION_DIM, dict.fromkeys("ab"))
    agent.rho.fill_(1.0)
    batch = random_batch(64, 3, ACTION_DIM, num_sources=2)
    width = torch.full_like(batch.source_log_std, source_log_std)
    agent.update(batch._replace(source_log_std=width))
    return agent.actor_optimizer.exp_avg[-1].view(2, ACTION_DIM)  # a tenth of the gradient


@pytest.mark.parametrize(("source_log_std", "widens"), [(0.0, True), (-4.0, False)])
def test_the_kl_may_narrow_the_policy_and_not_widen_it(source_log_std: float, widens: bool):
    """With the second look; as Eq. 11 has it, the KL pulls the width either way."""
    sac = gradient_of_the_last_bias(0.0, True, source_log_std)
    ours = gradient_of_the_last_bias(10.0, True, source_log_std)
    plain = gradient_of_the_last_bias(10.0, False, source_log_std)
    assert ((plain - sac)[1].abs() > 1e-3).all()
    torch.testing.assert_close(ours[0], plain[0])
    torch.testing.assert_close(ours[1], sac[1] if widens else plain[1])
