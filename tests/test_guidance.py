"""The guidance, Eqs. 2, 4, 7, 9, 11 and 12, against loops, integrals over one action, autograd."""

import math

import numpy as np
import pytest
import torch
from by_hand import act, copies, random_batch, same
from scipy.stats import norm
from torch import Tensor
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_kl

import cup

OBS_DIM, ACTION_DIM, NUM_SOURCES, BATCH = 3, 2, 3, 16
BETA1, BETA2 = 2.0, 0.5
SHAPED = "obs mean log_std source_mean source_log_std noise q log_prob critic".split()
WIDTH = 5e-6
GRID = np.arange(-1 + WIDTH / 2, 1, WIDTH)  # the midpoints of equal cells of (-1, 1)

pytestmark = pytest.mark.usefixtures("double_precision")


def density(mean: float, log_std: float) -> np.ndarray:
    """On GRID, of tanh(x) with x normal, by the change of variables."""
    return norm.pdf(np.arctanh(GRID), mean, math.exp(log_std)) / (1 - GRID**2)


def test_squash_survives_saturation():
    """In float32 too, where 1 - tanh(x)^2 is zero; its log is 2 log 2 - 2|x|."""
    mean = torch.tensor([[-50.0], [-12.0], [12.0], [50.0]], dtype=torch.float32)
    _, log_prob = cup.squash(mean, torch.zeros_like(mean), torch.zeros_like(mean))
    expected = -0.5 * math.log(2 * math.pi) - 2 * math.log(2) + 2 * mean.abs().squeeze(1)
    torch.testing.assert_close(log_prob, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("p", "q"), [((0.0, -0.5), (0.7, -0.2)), ((-0.4, -1.5), (0.4, -1.0))])
def test_kl_is_the_integral_over_the_squashed_action(p, q):
    """Eq. 9: the closed form before the tanh is KL(p || q) of the densities on (-1, 1)."""
    inside = density(*p) > 1e-300
    p_density, q_density = density(*p)[inside], density(*q)[inside]
    integral = (p_density * (np.log(p_density) - np.log(q_density))).sum() * WIDTH
    closed = cup.kl_divergence(*torch.tensor([*p, *q]).unsqueeze(1))
    assert closed.item() == pytest.approx(integral, abs=1e-5)


def test_guidance_policy_against_a_loop():
    """Eq. 7, on a coarse grid of advantages, full of ties."""
    torch.manual_seed(0)
    advantage = torch.randint(-1, 2, (500, 4)).double()
    guidance = cup.guidance_policy(advantage).tolist()
    for row, chosen in zip(advantage.tolist(), guidance, strict=True):
        assert row[chosen] == max(row)
        assert row[-1] < max(row) or chosen == 3  # a tie goes to the target policy
    assert set(guidance) == {0, 1, 2, 3}


def make_arguments(alpha: float = 0.0) -> dict:
    """Arguments of `guidance_loss`, with a critic by which every candidate wins somewhere."""
    batch = random_batch(BATCH, OBS_DIM, ACTION_DIM, NUM_SOURCES)
    torch.manual_seed(1)
    critic = cup.TwinCritic(OBS_DIM, ACTION_DIM, (16,), cup.Standardize(OBS_DIM))
    for network in (critic.q1, critic.q2):
        network[-1].weight.data *= 4
    mean, log_std, noise = torch.randn(3, BATCH, ACTION_DIM)
    action, log_prob = zip(*map(act, *(x.tolist() for x in (mean, log_std, noise))))
    return {
        "critic": critic.min_q, "obs": batch.obs, "noise": noise, "alpha": alpha,
        "mean": mean.requires_grad_(), "log_std": log_std.requires_grad_(),
        "source_mean": batch.source_mean, "source_log_std": batch.source_log_std,
        "q": critic.min_q(batch.obs, torch.stack(action)), "log_prob": torch.tensor(log_prob),
        "beta1": BETA1, "beta2": BETA2,
    }


def by_hand(arguments: dict) -> tuple[Tensor, dict[str, Tensor]]:
    """Eqs. 2, 4, 7, 9, 11 and 12 at each state in turn; beta_s and the guidance are constants."""
    loss, rows = 0.0, []
    for b in range(BATCH):
        means = [*arguments["source_mean"][b], arguments["mean"][b]]
        log_stds = [*arguments["source_log_std"][b], arguments["log_std"][b]]
        soft_q = []
        for mean, log_std in zip(means, log_stds, strict=True):
            action, log_prob = act(mean.tolist(), log_std.tolist(), arguments["noise"][b].tolist())
            q = arguments["critic"](arguments["obs"][b], action).item()
            soft_q.append(q - arguments["alpha"] * log_prob)
        value = soft_q[-1]
        advantage = [v - value for v in soft_q]
        g = advantage.index(max(advantage))
        weight = BETA1 * min(advantage[g], BETA2 * abs(value))
        target, guidance = (Normal(means[c], log_stds[c].exp()) for c in (NUM_SOURCES, g))
        kl = torch_kl(target, guidance).sum()
        loss = loss + weight * kl / BATCH
        rows.append((advantage, g, weight, kl.item()))
    return loss, dict(zip(("advantage", "guidance", "weight", "kl"), map(torch.tensor, zip(*rows))))


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_guidance_loss_and_its_gradient_against_a_loop_over_states(alpha: float):
    arguments = make_arguments(alpha)
    loss, per_state = cup.guidance_loss(**arguments)
    expected, hand = by_hand(arguments)
    own = hand["guidance"] == NUM_SOURCES
    capped = hand["weight"] < BETA1 * hand["advantage"].amax(dim=1)
    assert set(hand["guidance"].tolist()) == {0, 1, 2, NUM_SOURCES}
    assert 0 < capped.sum() < BATCH - own.sum()
    torch.testing.assert_close(per_state, hand, rtol=1e-9, atol=1e-12)
    assert not any(x.requires_grad for x in per_state.values())
    assert torch.equal(per_state["weight"] == 0, own) and torch.equal(per_state["kl"] == 0, own)
    torch.testing.assert_close(loss, expected)
    variables = arguments["mean"], arguments["log_std"]
    gradients = torch.autograd.grad(loss, variables, retain_graph=True)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, variables))
    critic = arguments["critic"].__self__
    assert not any(torch.autograd.grad(loss, critic.parameters(), allow_unused=True))  # all None


@pytest.mark.parametrize("name", SHAPED)
def test_a_wrong_shape_is_a_sentence_that_names_it(name: str):
    """A row less, a dimension less, a dimension more."""
    arguments = make_arguments()
    right, wrong = arguments[name], [lambda *of: right(*of).unsqueeze(-1)]
    if name != "critic":
        wrong = [right[:-1], right[..., 0], right.unsqueeze(1), right.unsqueeze(-1)]
    for value in wrong:
        with pytest.raises(ValueError, match=rf"\A.*\b{name}\b.*\Z"):
            cup.guidance_loss(**arguments | {name: value})


@pytest.mark.parametrize("soft", [False, True])
def test_update_gives_guidance_loss_what_it_needs_and_minimises_it(monkeypatch, soft: bool):
    """By a spy in its place, which checks the arguments and returns a loss of its own."""
    torch.manual_seed(0)
    args = cup.Args("x", hidden_sizes=(16,), soft_advantage=soft, beta1=BETA1, beta2=BETA2)
    sources = {name: cup.Actor(OBS_DIM, ACTION_DIM, (8,)) for name in "abc"}
    agent = cup.Agent(args, OBS_DIM, ACTION_DIM, sources)
    batch = random_batch(BATCH, OBS_DIM, ACTION_DIM, NUM_SOURCES)
    policy, critic_before = agent.actor(batch.obs), copies(agent.critic)
    alpha = agent.log_alpha.exp().item() * soft
    told = {"advantage": torch.randn(BATCH, 4), "guidance": torch.arange(BATCH) % 3 + 1}
    told |= {"weight": torch.rand(BATCH), "kl": torch.rand(BATCH)}

    def spy(*, critic, obs, mean, log_std, source_mean, source_log_std, noise, q, log_prob, **rest):
        assert critic == agent.critic.min_q and not same(critic_before, agent.critic)  # learnt
        assert (obs, source_mean, source_log_std) == (batch.obs, *batch[5:])
        assert all(map(torch.equal, policy, (mean, log_std)))
        action, expected_log_prob = cup.squash(mean, log_std, noise)
        assert torch.equal(log_prob, expected_log_prob) and torch.equal(q, critic(obs, action))
        assert rest == pytest.approx({"alpha": alpha, "beta1": BETA1, "beta2": BETA2})
        return 3 * mean.sum(), told

    losses, minimize = {}, agent.minimize
    agent.minimize = lambda *of: losses.update({of[1]: of[0].item()}) or minimize(*of)
    monkeypatch.setattr(cup, "guidance_loss", spy)
    info = {name: value.item() for name, value in agent.update(batch).items()}
    logged = {"loss/kl": 3 * policy[0].sum().item()}
    assert losses[agent.critic_optimizer] == info["loss/critic"]
    assert losses[agent.actor_optimizer] == pytest.approx(info["loss/actor"] + logged["loss/kl"])
    logged |= {f"guidance/{name}": told[name].mean().item() for name in ("weight", "kl")}
    for k, name in enumerate([*"abc", "target"]):
        logged[f"guidance/advantage/{name}"] = told["advantage"][:, k].mean().item()
        logged[f"guidance/selected/{name}"] = told["guidance"].tolist().count(k) / BATCH
    assert info.keys() == logged.keys() | {"loss/critic", "loss/actor", "alpha", "entropy"}
    assert {name: info[name] for name in logged} == pytest.approx(logged)
