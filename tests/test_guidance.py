"""The guidance, Eqs. 2, 4, 7, 9, 11 and 12, against calculations that share no code with cup.py.

Plain loops, integrals over one action dimension, autograd.
"""

import copy
import math

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
BETA1, BETA2 = 2.0, 0.5

pytestmark = pytest.mark.usefixtures("double_precision")


# ---- one tanh-Gaussian ---------------------------------------------------------------------------
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


@pytest.mark.parametrize(
    ("p", "q"),
    [((0.0, -0.5), (0.7, -0.2)), ((0.7, -0.2), (0.0, -0.5)), ((-0.4, -1.5), (0.4, -1.0)),
     ((1.5, -1.0), (1.5, -0.3))],
)
def test_kl_is_the_integral_over_the_squashed_action(p, q):
    """Eq. 9: the closed form before the tanh is KL(p || q) of the densities on (-1, 1)."""
    grid, width = action_grid()
    p_density, q_density = density(grid, *p), density(grid, *q)
    inside = p_density > 1e-300
    log_ratio = np.log(p_density[inside]) - np.log(q_density[inside])
    integral = (p_density[inside] * log_ratio).sum() * width
    closed = cup.kl_divergence(*torch.tensor([*p, *q]).unsqueeze(1))
    assert closed.item() == pytest.approx(integral, abs=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_expected_advantage_against_an_integral(alpha: float):
    """Eqs. 2 and 4: estimates average to the integrals over a of pi(a) (Q(a) - alpha log pi(a)).

    The noise takes the quantiles of the normal distribution, so the average is not random.
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
    action, log_prob = cup.squash(mean, log_std, torch.tensor(quantiles).view(-1, 1, 1))
    estimates = cup.expected_advantage(torch.cos(3 * action.squeeze(-1)), log_prob, alpha)
    advantage, value = (estimate.mean(dim=0) for estimate in estimates)
    assert value.item() == pytest.approx(integrals[-1], abs=1e-3)
    assert advantage.tolist() == pytest.approx([v - integrals[-1] for v in integrals], abs=1e-3)


def test_guidance_policy_against_a_loop():
    """Eq. 7, on a coarse grid of advantages, full of ties."""
    torch.manual_seed(0)
    advantage = torch.randint(-1, 2, (500, 4)).double()
    guidance = cup.guidance_policy(advantage)
    assert guidance.shape == (500,)
    for row, chosen in zip(advantage.tolist(), guidance.tolist(), strict=True):
        assert row[chosen] == max(row)
        assert row[-1] < max(row) or chosen == 3  # a tie goes to the target policy
    assert set(guidance.tolist()) == {0, 1, 2, 3}


# ---- guidance_loss, Eq. 11 -----------------------------------------------------------------------
def make_arguments(alpha: float = 0.0) -> dict:
    """Arguments of `guidance_loss`, with a critic by which every candidate wins somewhere."""
    torch.manual_seed(1)
    batch = random_batch(BATCH, OBS_DIM, ACTION_DIM, NUM_SOURCES)
    critic = cup.TwinCritic(OBS_DIM, ACTION_DIM, (16,), cup.Standardize(OBS_DIM))
    for network in (critic.q1, critic.q2):
        network[-1].weight.data *= 4
    mean, log_std, noise = torch.randn(3, BATCH, ACTION_DIM)
    log_std -= 1
    pre_tanh = mean + log_std.exp() * noise
    log_prob = Normal(mean, log_std.exp()).log_prob(pre_tanh) - torch.log(1 - pre_tanh.tanh() ** 2)
    return {
        "critic": critic.min_q, "obs": batch.obs, "noise": noise, "alpha": alpha,
        "mean": mean.requires_grad_(), "log_std": log_std.requires_grad_(),
        "source_mean": batch.source_mean, "source_log_std": batch.source_log_std,
        "q": critic.min_q(batch.obs, pre_tanh.tanh()), "log_prob": log_prob.sum(dim=1),
        "beta1": BETA1, "beta2": BETA2,
    }


@torch.no_grad()
def by_hand(arguments: dict) -> dict[str, list]:
    """Eqs. 4, 7, 11 and 12 at each state in turn, in plain Python numbers."""
    found = {name: [] for name in ("advantage", "guidance", "weight", "kl", "capped")}
    for b in range(BATCH):
        mean, log_std, noise = (arguments[x][b].tolist() for x in ("mean", "log_std", "noise"))
        means = [*arguments["source_mean"][b].tolist(), mean]
        log_stds = [*arguments["source_log_std"][b].tolist(), log_std]
        soft_q = []
        for m, s in zip(means, log_stds, strict=True):
            action, log_prob = act(m, s, noise)
            q = arguments["critic"](arguments["obs"][b], action).item()
            soft_q.append(q - arguments["alpha"] * log_prob)
        value = soft_q[-1]
        advantage = [v - value for v in soft_q]
        g = NUM_SOURCES
        for c in range(NUM_SOURCES):
            if advantage[c] > advantage[g]:
                g = c
        kl = 0.0
        for d in range(ACTION_DIM):
            variance, variance_g = math.exp(2 * log_std[d]), math.exp(2 * log_stds[g][d])
            square = (mean[d] - means[g][d]) ** 2
            kl += (variance + square) / (2 * variance_g) - 0.5 + log_stds[g][d] - log_std[d]
        cap = BETA2 * abs(value)
        row = advantage, g, BETA1 * min(advantage[g], cap), kl, advantage[g] > cap
        for name, number in zip(found, row, strict=True):
            found[name].append(number)
    return found


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_guidance_loss_against_a_loop_over_states(alpha: float):
    arguments = make_arguments(alpha)
    loss, per_state = cup.guidance_loss(**arguments)
    hand = by_hand(arguments)
    assert set(hand["guidance"]) == {0, 1, 2, NUM_SOURCES}
    capped, target_wins = sum(hand.pop("capped")), hand["guidance"].count(NUM_SOURCES)
    assert 0 < capped < BATCH - target_wins  # both sides of the minimum in Eq. 12
    assert per_state.keys() == hand.keys()
    for name, expected in hand.items():
        expected = torch.tensor(expected)
        assert per_state[name].shape == expected.shape and not per_state[name].requires_grad
        torch.testing.assert_close(per_state[name], expected, rtol=1e-9, atol=1e-12)
    own = per_state["guidance"] == NUM_SOURCES
    assert torch.equal(per_state["weight"] == 0, own) and torch.equal(per_state["kl"] == 0, own)
    expected = sum(b * kl for b, kl in zip(hand["weight"], hand["kl"], strict=True)) / BATCH
    assert loss.item() == pytest.approx(expected)


def test_beta_and_the_choice_get_no_gradient():
    """The gradient is that of Eq. 11 with beta_s and the guidance policy as constants."""
    arguments = make_arguments(alpha=0.3)
    loss, per_state = cup.guidance_loss(**arguments)
    inputs = [arguments[name] for name in ("mean", "log_std")]
    gradients = torch.autograd.grad(loss, inputs, retain_graph=True)
    expected = 0.0
    for b in range(BATCH):
        g = per_state["guidance"][b].item()
        if g < NUM_SOURCES:
            target = Normal(inputs[0][b], inputs[1][b].exp())
            source = Normal(arguments["source_mean"][b, g], arguments["source_log_std"][b, g].exp())
            kl = torch_kl(target, source).sum()
            expected = expected + per_state["weight"][b].item() * kl / BATCH
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, inputs))
    assert max(gradient.abs().max() for gradient in gradients) > 0.01
    weights = list(arguments["critic"].__self__.parameters())
    assert not any(torch.autograd.grad(loss, weights, allow_unused=True))  # none at all


ARGUMENTS = ["obs", "mean", "log_std", "source_mean", "source_log_std", "noise", "q", "log_prob"]


@pytest.mark.parametrize("name", [*ARGUMENTS, "alpha", "critic"])
def test_a_wrong_shape_is_a_sentence_that_names_it(name: str):
    """A row less, a dimension less, a dimension more."""
    arguments = make_arguments()
    if name == "alpha":
        wrong = [torch.zeros(BATCH), torch.zeros(BATCH, 1)]
    elif name == "critic":
        right = arguments["critic"]
        wrong = [lambda *x: right(*x).unsqueeze(-1), lambda *x: torch.stack([right(*x)] * 2)]
    else:
        value = arguments[name]
        wrong = [value[:-1], value[..., 0], value.unsqueeze(1), value.unsqueeze(-1)]
    for value in wrong:
        with pytest.raises(ValueError) as error:
            cup.guidance_loss(**arguments | {name: value})
        message = str(error.value)
        assert name in message.split() and "\n" not in message and len(message) < 150


# ---- the update ----------------------------------------------------------------------------------
@pytest.mark.parametrize("soft", [False, True])
def test_update_gives_guidance_loss_what_it_needs_and_minimises_it(monkeypatch, soft: bool):
    """By a spy in its place, which makes sure of the arguments and returns a loss of its own."""
    torch.manual_seed(0)
    args = cup.Args("x", hidden_sizes=(16,), soft_advantage=soft, beta1=BETA1, beta2=BETA2)
    sources = {name: cup.Actor(OBS_DIM, ACTION_DIM, (8,)) for name in "abc"}
    agent = cup.Agent(args, OBS_DIM, ACTION_DIM, sources)
    batch = random_batch(BATCH, OBS_DIM, ACTION_DIM, NUM_SOURCES)
    first_critic = agent.critic.q1[0].weight.clone()
    alpha, policy = agent.log_alpha.exp().item(), agent.actor(batch.obs)
    told = {
        "advantage": torch.randn(BATCH, 4), "guidance": torch.arange(BATCH) % 3 + 1,
        "weight": torch.rand(BATCH), "kl": torch.rand(BATCH),
    }
    factor = 0.0

    def spy(*, critic, obs, mean, log_std, source_mean, source_log_std, noise, q, log_prob, **rest):
        assert critic == agent.critic.min_q
        assert obs is batch.obs
        assert source_mean is batch.source_mean and source_log_std is batch.source_log_std
        assert torch.equal(mean, policy[0]) and torch.equal(log_std, policy[1])
        action, same_log_prob = cup.squash(mean, log_std, noise)
        assert torch.equal(log_prob, same_log_prob)
        assert not torch.equal(first_critic, agent.critic.q1[0].weight)  # after the critic's step
        assert torch.equal(q, critic(obs, action))
        expected = {"alpha": alpha if soft else 0.0, "beta1": BETA1, "beta2": BETA2}
        assert rest == pytest.approx(expected)
        return factor * mean.sum(), told

    monkeypatch.setattr(cup, "guidance_loss", spy)
    start, gradients = copy.deepcopy(agent), []
    for factor in (0.0, 3.0):
        agent = copy.deepcopy(start)
        torch.manual_seed(3)
        info = agent.update(batch)
        state = agent.actor_optimizer.state.values()
        gradients.append([moments["exp_avg"] / 0.1 for moments in state])  # Adam's first step
    expected = torch.autograd.grad(3.0 * start.actor(batch.obs)[0].sum(), start.actor.parameters())
    for sac, guided, difference in zip(*gradients, expected, strict=True):
        torch.testing.assert_close(guided - sac, difference)

    logged = {"guidance/weight": told["weight"].mean(), "guidance/kl": told["kl"].mean()}
    for k, name in enumerate([*"abc", "target"]):
        logged[f"guidance/advantage/{name}"] = told["advantage"][:, k].mean()
        logged[f"guidance/selected/{name}"] = told["guidance"].tolist().count(k) / BATCH
    logged["loss/kl"] = 3.0 * policy[0].sum()
    assert info.keys() == logged.keys() | {"loss/critic", "loss/actor", "alpha", "entropy"}
    for name, value in logged.items():
        assert info[name].item() == pytest.approx(float(value)), name
