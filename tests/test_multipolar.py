"""MULTIPOLAR: what its policy is made of, and what learns in it."""

import torch
from by_hand import copies, random_batch, same

import cup
from baselines.multipolar import Args, Multipolar

OBS_DIM, ACTION_DIM, BATCH, K = 5, 2, 16, 3
SETTINGS = {"env_id": "none", "hidden_sizes": (32, 32), "buffer_size": 100}


def make_agent() -> tuple[Multipolar, dict[str, cup.Actor]]:
    """An agent and its untrained sources, which are far apart, but not where clipping begins."""
    torch.manual_seed(9)
    sources = {f"source-{k}": cup.Actor(OBS_DIM, ACTION_DIM, (16,)) for k in range(K)}
    for k, actor in enumerate(sources.values()):
        actor.net[-1].bias.data[:ACTION_DIM] += k - 1
    torch.manual_seed(0)
    return Multipolar(Args(**SETTINGS), OBS_DIM, ACTION_DIM, sources), sources


def test_theta_zero_is_sacs_actor_bit_for_bit():
    """All networks start with SAC's weights, and see what SAC's see after `fit`."""
    (agent, _), obs = make_agent(), torch.randn(BATCH, OBS_DIM)
    torch.manual_seed(0)
    sac = cup.Agent(cup.Args(**SETTINGS), OBS_DIM, ACTION_DIM, {})
    agent.actor.theta.data.zero_()
    for each in agent, sac:
        each.actor.standardize.fit(3 * obs.double() + 1)
    assert all(map(torch.equal, agent.actor(obs), sac.actor(obs)))
    for critic in ("critic", "target_critic"):
        q, expected = (getattr(x, critic)(obs, obs[:, :ACTION_DIM]) for x in (agent, sac))
        assert torch.equal(q, expected)


def test_the_mean_against_a_loop_over_the_sources():
    (agent, sources), obs = make_agent(), torch.randn(BATCH, OBS_DIM)
    theta = agent.actor.theta.data.normal_()
    list(sources.values())[-1].net[-1].bias.data[0] = 100  # clipped as in CUP
    expected = agent.actor.residual(obs)[0]
    for k, source in enumerate(sources.values()):
        expected = expected + theta[k] * source(obs)[0].clamp(-2.5, 2.5) / K
    torch.testing.assert_close(agent.actor(obs)[0], expected)


def test_all_but_the_sources_learns_and_theta_at_the_rate_of_the_policy():
    agent, sources = make_agent()
    actor, batch = agent.actor, random_batch(BATCH, OBS_DIM, ACTION_DIM)
    frozen, learnt = copies(*sources.values()), [actor.theta, *actor.residual.parameters()]
    before = [p.detach().clone() for p in learnt]
    info = agent.update(batch)
    assert same(frozen, *sources.values(), actor.sources)
    assert not any(p.requires_grad for p in actor.sources.parameters())
    assert not any(map(torch.equal, before, learnt))
    steps = (actor.theta.detach() - 1).abs()  # Adam's first step is its learning rate
    rate = torch.full_like(steps, agent.args.policy_lr)
    torch.testing.assert_close(steps, rate, rtol=1e-3, atol=0)
    assert info["theta/source-2/1"] == actor.theta[2, 1]
