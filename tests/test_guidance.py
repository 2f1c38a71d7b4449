"""The guidance, Eqs. 4 to 12, against calculations that share no code with cup.py.

Plain loops, integrals over one action dimension, autograd.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from by_hand import act, random_batch
from scipy.stats import norm
from torch import Tensor
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_kl

import cup

OBS_DIM, ACTION_DIM, NUM_SOURCES, BATCH = 3, 2, 3, 16

pytestmark = pytest.mark.usefixtures("double_precision")


# ---- one tanh-Gaussian: squash -------------------------------------------------------------------
def action_grid(points: int = 400_000) -> tuple[np.ndarray, float]:
    """Midpoints of equal cells of (-1, 1), and the width of a cell."""
    width = 2 / points
    return -1 + width * (np.arange(points) + 0.5), width


def density(action: np.ndarray, mean: float, log_std: float) -> np.ndarray:
    """Of tanh(x) with x normal, by the change of variables."""
    return norm.pdf(np.arctanh(action), mean, math.exp(log_std)) / (1 - action**2)


@pytest.mark.parametrize(("mean", "log_std"), [(0.0, -0.5), (0.8, -1.5), (-1.2, 0.0)])
def test_squash_log_prob_is_a_density(mean: float, log_std: float):
    """log_prob is the log-density of the action; over (-1, 1) it integrates to one."""
    grid, width = action_grid()
    noise = torch.tensor((np.arctanh(grid) - mean) / math.exp(log_std)).unsqueeze(1)
    action, log_prob = cup.squash(torch.tensor([mean]), torch.tensor([log_std]), noise)
    np.testing.assert_allclose(action.squeeze(1), grid, atol=1e-9)
    np.testing.assert_allclose(log_prob.exp(), density(grid, mean, log_std), atol=1e-9)
    assert log_prob.exp().sum() * width == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("pre_tanh", [-50.0, -12.0, 12.0, 50.0])
def test_squash_survives_saturation(pre_tanh: float):
    """In float32 too, where 1 - tanh(x)^2 is zero; its log is 2 log 2 - 2|x|."""
    mean, zero = torch.tensor([[pre_tanh], [0.0]], dtype=torch.float32)
    _, log_prob = cup.squash(mean, zero, zero)
    expected = -0.5 * math.log(2 * math.pi) - 2 * math.log(2) + 2 * abs(pre_tanh)
    assert log_prob.item() == pytest.approx(expected, rel=1e-6)


# ---- KL divergence, Eq. 9 ------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("p", "q"),
    [((0.0, -0.5), (0.7, -0.2)), ((0.7, -0.2), (0.0, -0.5)), ((-0.4, -1.5), (0.4, -1.0)),
     ((1.5, -1.0), (1.5, -0.3))],
)
def test_kl_is_the_integral_over_the_squashed_action(p, q):
    """The closed form before the tanh is KL(p || q) of the densities on (-1, 1)."""
    grid, width = action_grid()
    p_density, q_density = density(grid, *p), density(grid, *q)
    inside = p_density > 1e-300
    log_ratio = np.log(p_density[inside]) - np.log(q_density[inside])
    integral = (p_density[inside] * log_ratio).sum() * width
    closed = cup.kl_divergence(*torch.tensor([*p, *q]).unsqueeze(1))
    assert closed.item() == pytest.approx(integral, abs=1e-5)


# ---- expected advantage, Eqs. 2 and 4 ------------------------------------------------------------
@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_expected_advantage_against_an_integral(alpha: float):
    """Many samples come to the integrals over a of pi(a) (Q(a) - alpha log pi(a)).

    The samples are the quantiles of the noise, so this is no matter of luck.
    """
    candidates = [(1.0, -1.0), (-0.6, -0.3), (0.2, 0.0)]  # mean, log_std; target last
    grid, width = action_grid()
    integrals = []
    for mean, log_std in candidates:
        p = density(grid, mean, log_std)
        soft_q = np.cos(3 * grid) - alpha * np.log(np.maximum(p, 1e-300))
        integrals.append((p * soft_q).sum() * width)

    quantiles = norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    mean, log_std = torch.tensor(candidates).unsqueeze(-1).unbind(1)  # (3, 1) each
    action, log_prob = cup.squash(mean, log_std, torch.tensor(quantiles).view(-1, 1, 1, 1))
    q = torch.cos(3 * action.squeeze(-1))  # (samples, 1, 3)
    advantage, value = cup.expected_advantage(q, log_prob, alpha)
    assert value.item() == pytest.approx(integrals[-1], abs=1e-3)
    assert advantage[0].tolist() == pytest.approx([v - integrals[-1] for v in integrals], abs=1e-3)


# ---- the guidance policy, Eq. 7 ------------------------------------------------------------------
def test_guidance_policy_against_a_loop():
    """On a coarse grid of advantages, full of ties."""
    torch.manual_seed(0)
    advantage = torch.randint(-1, 2, (500, 4)).double()
    guidance = cup.guidance_policy(advantage)
    assert guidance.shape == (500,)
    for row, chosen in zip(advantage.tolist(), guidance.tolist(), strict=True):
        assert row[chosen] == max(row)
        assert row[-1] < max(row) or chosen == 3  # a tie goes to the target policy
    assert set(guidance.tolist()) == {0, 1, 2, 3}


# ---- guidance inside the update ------------------------------------------------------------------
def frozen_agent(**changes) -> cup.Agent:
    """An agent whose update computes everything and moves nothing."""
    still = dict.fromkeys(("policy_lr", "q_lr", "alpha_lr", "tau"), 0.0)
    torch.manual_seed(1)
    args = cup.Args(env_id="x", hidden_sizes=(16,), beta1=2.0, beta2=0.5, **still, **changes)
    agent = cup.Agent(args, OBS_DIM, ACTION_DIM, dict.fromkeys("abc"))
    with torch.no_grad():  # an opinionated critic: each candidate wins somewhere
        agent.critic.net[-1].weight *= 4
    return agent


def make_batch() -> cup.Batch:
    return random_batch(BATCH, OBS_DIM, ACTION_DIM, NUM_SOURCES)


def run_update(agent: cup.Agent, batch: cup.Batch) -> dict[str, Tensor]:
    """What `update` returns, and with it what it was told of every state, by `guidance_loss`."""
    told, guidance_loss = {}, cup.guidance_loss

    def spy(*arguments, **options):
        loss, states = guidance_loss(*arguments, **options)
        told.update(states)
        return loss, states

    torch.manual_seed(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cup, "guidance_loss", spy)
        return agent.update(batch) | told


def noise_of_update(samples: int) -> Tensor:
    """The actor's noise in `run_update`, which comes after that of the TD target."""
    torch.manual_seed(3)
    torch.randn(BATCH, ACTION_DIM)
    return torch.randn(samples, BATCH, ACTION_DIM)


@torch.no_grad()
def guidance_by_hand(agent: cup.Agent, batch: cup.Batch, noise: Tensor) -> SimpleNamespace:
    """Eqs. 4, 7, 11, 12 at each state in turn, in plain Python numbers; a list of each."""
    args, rows = agent.args, []
    alpha = math.exp(agent.log_alpha.item()) if args.soft_advantage else 0.0
    for b in range(BATCH):
        mean, log_std = (x.tolist() for x in agent.actor(batch.obs[b]))
        means = [*batch.source_mean[b].tolist(), mean]
        log_stds = [*batch.source_log_std[b].tolist(), log_std]
        soft_values = []
        for m, s in zip(means, log_stds, strict=True):
            total = 0.0
            for eps in noise[:, b].tolist():
                action, log_prob = act(m, s, eps)
                total += min(agent.critic(batch.obs[b], action).tolist()) - alpha * log_prob
            soft_values.append(total / len(noise))
        value = soft_values[-1]
        advantage = [v - value for v in soft_values]
        g = NUM_SOURCES
        for c in range(NUM_SOURCES):
            if advantage[c] > advantage[g]:
                g = c
        kl = 0.0
        for d in range(ACTION_DIM):
            variance, variance_g = math.exp(2 * log_std[d]), math.exp(2 * log_stds[g][d])
            square = (mean[d] - means[g][d]) ** 2
            kl += (variance + square) / (2 * variance_g) - 0.5 + log_stds[g][d] - log_std[d]
        cap = args.beta2 * abs(value)
        weight = args.beta1 * min(advantage[g], cap)
        rows.append((advantage, g, weight, advantage[g] > cap, kl, means[g], log_stds[g]))
    names = "advantage guidance weight capped kl guidance_mean guidance_log_std".split()
    return SimpleNamespace(**dict(zip(names, map(list, zip(*rows)))))


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("samples", [1, 3])
def test_update_guides_as_a_loop_over_states_does(samples: int, soft: bool):
    """Advantage, choice, weight and KL of every state; their means are what is logged."""
    agent, batch = frozen_agent(num_guidance_samples=samples, soft_advantage=soft), make_batch()
    info = run_update(agent, batch)
    hand = guidance_by_hand(agent, batch, noise_of_update(samples))
    assert len(set(hand.guidance)) > 2 and NUM_SOURCES in hand.guidance  # all kinds win
    assert 0 < sum(hand.capped) < BATCH - hand.guidance.count(NUM_SOURCES)  # and both of Eq. 12
    assert info["guidance"].tolist() == hand.guidance
    target_wins = info["guidance"] == NUM_SOURCES  # no pull there, exactly
    assert ((info["weight"] == 0) == target_wins).all()
    assert ((info["kl"] == 0) == target_wins).all()
    for name in ("advantage", "weight", "kl"):
        expected = torch.tensor(getattr(hand, name))
        assert info[name].shape == expected.shape
        torch.testing.assert_close(info[name], expected, rtol=1e-7, atol=1e-9)

    loss = sum(b * k for b, k in zip(hand.weight, hand.kl, strict=True))
    logged = {"loss/kl": loss, "guidance/weight": sum(hand.weight), "guidance/kl": sum(hand.kl)}
    for c, name in enumerate([*"abc", "target"]):
        logged[f"guidance/selected/{name}"] = hand.guidance.count(c)
        logged[f"guidance/advantage/{name}"] = sum(row[c] for row in hand.advantage)
    for name, total in logged.items():
        assert info[name].item() == pytest.approx(total / BATCH, rel=1e-6), name
    scalars = info.keys() - {"advantage", "guidance", "weight", "kl"}  # those are of every state
    assert scalars == logged.keys() | {"loss/critic", "loss/actor", "alpha", "entropy"}
    assert all(info[name].shape == () for name in scalars)


# ---- what gets a gradient ------------------------------------------------------------------------
def actor_gradient_by_hand(agent, batch, noise: Tensor, hand: SimpleNamespace) -> list[Tensor]:
    """Of L_CUP, Eq. 11, with everything about the guidance policy a given constant."""
    std = torch.tensor(hand.guidance_log_std).exp()
    guidance, alpha = Normal(torch.tensor(hand.guidance_mean), std), agent.log_alpha.exp().item()
    mean, log_std = agent.actor(batch.obs)
    target = Normal(mean, log_std.exp())
    loss = (torch.tensor(hand.weight) * torch_kl(target, guidance).sum(dim=1)).mean()
    for eps in noise:
        pre_tanh = mean + log_std.exp() * eps
        action = torch.tanh(pre_tanh)
        log_prob = (target.log_prob(pre_tanh) - torch.log(1 - action**2)).sum(dim=1)
        q1, q2 = agent.critic(batch.obs, action)
        loss = loss + (alpha * log_prob - torch.minimum(q1, q2)).mean() / len(noise)
    return list(torch.autograd.grad(loss, list(agent.actor.parameters())))


@pytest.mark.parametrize("samples", [1, 3])
def test_actor_gradient_takes_beta_and_guidance_as_constants(samples: int):
    """The actor's gradient is that of Eq. 11 with beta_s a number."""
    agent, batch = frozen_agent(num_guidance_samples=samples), make_batch()
    run_update(agent, batch)
    # Adam's running mean of the gradients starts at zero and moves a tenth of the way
    gradient = [mean / 0.1 for mean in agent.actor_optimizer.exp_avg]
    noise = noise_of_update(samples)
    hand = guidance_by_hand(agent, batch, noise)
    expected = actor_gradient_by_hand(agent, batch, noise, hand)
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-9)
    hand.weight = [0.0] * BATCH
    without = actor_gradient_by_hand(agent, batch, noise, hand)
    differences = [(a - b).abs().max() for a, b in zip(gradient, without, strict=True)]
    assert max(differences) > 0.01  # the guidance is no small part of it
