"""Soft Actor-Critic, Eqs. 2 and 3: CUP without guidance is `plain_sac.py`."""

import runpy
from pathlib import Path

import pytest
import torch
from by_hand import copies, random_batch, sac_parameters, same

import cup

OBS_DIM, ACTION_DIM, UPDATES = 10, 2, 20
SHIFT, SCALE = 0.5, 2.0  # the networks of cup.py see SCALE * obs + SHIFT


def make_agent(num_sources: int = 0, hidden_sizes=(64, 64), **changes) -> cup.Agent:
    args = cup.Args("x", hidden_sizes=hidden_sizes, **changes)
    sources = {f"source-{k}": cup.Actor(OBS_DIM, ACTION_DIM, (8,)) for k in range(num_sources)}
    torch.manual_seed(0)
    return cup.Agent(args, OBS_DIM, ACTION_DIM, sources)


def make_batch(seed: int, num_sources: int = 0) -> cup.Batch:
    return random_batch(32, OBS_DIM, ACTION_DIM, num_sources, seed)


@pytest.mark.usefixtures("double_precision")
def test_without_guidance_it_is_textbook_sac():
    """Everything learnt and logged in 20 updates; no additional random numbers.

    Without sources, with guide=False and with beta_1 = 0 it is the same bit for bit.
    """
    host = runpy.run_path(str(Path(__file__).with_name("plain_sac.py")))
    settings = {"gamma": host["GAMMA"], "tau": host["TAU"], "init_alpha": host["INIT_ALPHA"]}
    settings |= {name: host[name.upper()] for name in ("policy_lr", "q_lr", "alpha_lr")}
    actor, critics, log_alpha = host["actor"], host["critics"], host["log_alpha"]
    cases = [(0, True, {}), (2, False, {"beta2": 1.0}), (2, True, {"beta1": 0.0})]
    logged, learnt = [], []
    for num_sources, guide, changes in cases:
        agent = make_agent(num_sources, **settings | changes)
        assert same(copies(agent.critic), agent.target_critic)
        agent.actor.standardize.shift.fill_(SHIFT)
        agent.actor.standardize.scale.fill_(SCALE)
        agent.actor.net.load_state_dict(actor.state_dict())
        for critic in (agent.critic, agent.target_critic):
            critic.q1.load_state_dict(critics[0].state_dict())
            critic.q2.load_state_dict(critics[1].state_dict())
        torch.manual_seed(1)
        batches = [make_batch(seed, num_sources) for seed in range(UPDATES)]
        logged.append([agent.update(batch, guide) for batch in batches])
        learnt.append([*sac_parameters(agent), torch.rand(1)])

    before, rows = copies(actor, critics), []
    torch.manual_seed(1)
    for seed in range(UPDATES):
        obs, next_obs, *rest = make_batch(seed)[:5]
        rows.append(host["update"](SCALE * obs + SHIFT, SCALE * next_obs + SHIFT, *rest))
    expected = [*copies(actor, critics, host["targets"]), log_alpha.detach()[0], torch.rand(1)]
    torch.testing.assert_close(learnt[0], expected, rtol=1e-6, atol=1e-8)
    for ours, theirs in zip(logged[0], rows, strict=True):
        assert {name: value.item() for name, value in ours.items()} == pytest.approx(theirs)
    assert not any(map(torch.equal, before, expected))
    for other, guided_rows in zip(learnt[1:], logged[1:], strict=True):
        assert all(map(torch.equal, learnt[0], other))
        assert all(row[name] == ours[name] for row, ours in zip(guided_rows, logged[0]) for name in ours)


def test_guidance_changes_the_actor_alone():
    guided, sac = make_agent(2, beta2=1.0), make_agent()
    for agent, num_sources in ((guided, 2), (sac, 0)):
        torch.manual_seed(1)
        agent.update(make_batch(0, num_sources))
    assert not same(copies(guided.actor), sac.actor)
    assert same(copies(guided.critic, guided.target_critic), sac.critic, sac.target_critic)
    assert torch.equal(guided.log_alpha, sac.log_alpha)


def test_actions_in_the_environment_are_sampled_from_the_policy():
    agent, obs = make_agent(), torch.randn(1, OBS_DIM)
    pre_tanh = agent.act(obs.expand(20_000, -1)).atanh()
    mean, log_std = agent.actor(obs[0])
    torch.testing.assert_close(pre_tanh.mean(dim=0), mean.detach(), atol=0.01, rtol=0)
    torch.testing.assert_close(pre_tanh.std(dim=0), log_std.exp().detach(), atol=0, rtol=0.03)
