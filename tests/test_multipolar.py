"""MULTIPOLAR: what its policy is made of, what learns in it, and that it helps where it should."""

import pytest
import torch
from by_hand import copies, random_batch
from small_tasks import LEARNING, learn, pilot, score, windy_step
from torch import Tensor

import cup
from baselines.multipolar import Aggregate, Args, Multipolar

OBS_DIM, ACTION_DIM, BATCH, K = 5, 2, 16, 3
SETTINGS = {"env_id": "none", "hidden_sizes": (32, 32), "buffer_size": 100}


def make_sources(num: int = K) -> dict[str, cup.Actor]:
    """Untrained sources that are far apart."""
    torch.manual_seed(9)
    sources = {f"source-{k}": cup.Actor(OBS_DIM, ACTION_DIM, (16,)) for k in range(num)}
    for k, actor in enumerate(sources.values()):
        actor.net[-1].bias.data[:ACTION_DIM] += k - 1
    return sources


def make_agent(sources: dict) -> Multipolar:
    torch.manual_seed(0)
    return Multipolar(Args(**SETTINGS), OBS_DIM, ACTION_DIM, sources)


def make_actor(sources: dict, theta: Tensor, residual: bool = False) -> Aggregate:
    """The policy of an agent, with this theta, and F = 0 unless `residual`."""
    actor = make_agent(sources).actor.requires_grad_(False)
    actor.theta.copy_(theta)
    if not residual:
        actor.net[-1].weight[:ACTION_DIM] = 0
        actor.net[-1].bias[:ACTION_DIM] = 0
    return actor


@pytest.mark.parametrize("k", range(K))
def test_one_hot_theta_without_residual_is_a_source_to_the_last_bit(k: int):
    sources, obs = make_sources(), torch.randn(1000, OBS_DIM)
    theta = torch.zeros(K, ACTION_DIM)
    theta[k] = K
    means = list(sources.values())[k](obs)[0]
    assert means.abs().max() < 2.5  # where clipping changes nothing
    assert torch.equal(make_actor(sources, theta)(obs)[0], means)


def test_source_means_are_clipped_as_in_cup():
    source = cup.Actor(OBS_DIM, ACTION_DIM, (16,))
    source.net[-1].bias.data[:ACTION_DIM] = torch.tensor([100.0, -100.0])
    actor = make_actor({"far": source}, torch.ones(1, ACTION_DIM))
    action = actor(torch.randn(BATCH, OBS_DIM))[0]
    assert torch.equal(action, torch.tensor([2.5, -2.5]).expand(BATCH, 2))


def test_theta_zero_is_sacs_actor_bit_for_bit():
    """F and the log-std start with the weights that SAC has with the same seed."""
    sources, obs = make_sources(), torch.randn(BATCH, OBS_DIM)
    torch.manual_seed(0)
    sac = cup.Agent(cup.Args(**SETTINGS), OBS_DIM, ACTION_DIM, {})
    after_sac = torch.rand(1)
    agent = make_agent(sources)
    assert torch.equal(torch.rand(1), after_sac)  # no draws of its own
    assert all(map(torch.equal, agent.critic.parameters(), sac.critic.parameters()))
    ours = make_actor(sources, torch.zeros(K, ACTION_DIM), residual=True)
    assert all(map(torch.equal, ours(obs), sac.actor(obs)))


def test_the_mean_against_a_loop_over_sources_and_dimensions():
    sources, obs = make_sources(), torch.randn(BATCH, OBS_DIM)
    theta = torch.randn(K, ACTION_DIM)
    residual = make_actor(sources, torch.zeros(K, ACTION_DIM), residual=True)(obs)[0]
    ours = make_actor(sources, theta, residual=True)(obs)[0]
    for b in range(BATCH):
        for d in range(ACTION_DIM):
            expected = residual[b, d].item()
            for k, source in enumerate(sources.values()):
                expected += theta[k, d].item() * source(obs[b])[0][d].item() / K
            assert ours[b, d].item() == pytest.approx(expected, abs=1e-5)


def test_sources_get_no_gradient_and_theta_learns_at_the_rate_of_the_policy():
    sources = make_sources()  # their weights would take gradients
    agent = make_agent(sources)
    before = copies(agent.actor)
    batch = random_batch(BATCH, OBS_DIM, ACTION_DIM)
    info = agent.update(batch)
    weights = [p for source in sources.values() for p in source.parameters()]
    mean, _ = agent.actor(batch.obs)
    assert set(torch.autograd.grad(mean.sum(), weights, allow_unused=True)) == {None}
    assert not any(map(torch.equal, before, agent.actor.parameters()))
    steps = (agent.actor.theta - 1).abs()  # from ones; Adam's first step is its learning rate
    rate = torch.full_like(steps, agent.args.policy_lr)
    torch.testing.assert_close(steps, rate, rtol=1e-3, atol=0)
    assert info["theta/source-2/1"] == agent.actor.theta[2, 1]
    thetas = {f"theta/{name}/{i}" for name in sources for i in range(ACTION_DIM)}
    assert info.keys() == {"loss/critic", "loss/actor", "alpha", "entropy"} | thetas


def learn_from(seed: int, sources: dict) -> float:
    """The score in a wind that the pilot does not know of: it rests beside the origin."""
    torch.manual_seed(seed)
    agent_class = Multipolar if sources else cup.Agent
    return learn(agent_class(Args(env_id="none", **LEARNING), 4, 4, sources), 400, step=windy_step)


def test_a_source_that_is_nearly_right_helps():
    """Better than SAC for every seed, and better than the source, whose error F mends."""
    sac = [learn_from(seed, {}) for seed in range(2)]
    ours = [learn_from(seed, {"pilot": pilot}) for seed in range(2)]
    assert all(a > b for a, b in zip(ours, sac, strict=True))
    assert sum(ours) > 0.8 * sum(sac)  # rewards are negative: nearer by a fifth
    assert min(ours) > 2 / 3 * score(pilot, step=windy_step)
