"""Soft Actor-Critic, Eqs. 2 and 3: CUP without guidance is `plain_sac.py`."""

import runpy
from pathlib import Path

import pytest
import torch
from by_hand import copies, random_batch, sac_parameters, same

import cup

OBS_DIM, ACTION_DIM, UPDATES = 10, 2, 20
SHIFT, SCALE = 0.5, 2.0  # the networks of cup.py see SCALE * obs + SHIFT


def make_agent(num_sources: int = 0, **settings) -> cup.Agent:
    args = cup.Args("x", **{"hidden_sizes": (64, 64)} | settings)
    sources = {f"source-{k}": cup.Actor(OBS_DIM, ACTION_DIM, (8,)) for k in range(num_sources)}
    torch.manual_seed(0)
    return cup.Agent(args, OBS_DIM, ACTION_DIM, sources)


def make_batch(seed: int, num_sources: int = 0) -> cup.Batch:
    return random_batch(32, OBS_DIM, ACTION_DIM, num_sources, seed)


@pytest.mark.usefixtures("double_precision")
def test_without_guidance_it_is_textbook_sac():
    """Everything learnt and logged in 20 updates, without additional random numbers.

    Without sources, with guide=False and with beta_1 = 0 it is the same bit for bit.
    """
    host = runpy.run_path(str(Path(__file__).with_name("plain_sac.py")))
    actor, critics, log_alpha = host["actor"], host["critics"], host["log_alpha"]
    names = "gamma", "tau", "init_alpha", "policy_lr", "q_lr", "alpha_lr"
    settings, ours, logged = {name: host[name.upper()] for name in names}, [], []
    for num_sources, guide, beta1 in [(0, True, 1.0), (2, False, 1.0), (2, True, 0.0)]:
        agent = make_agent(num_sources, beta1=beta1, beta2=1.0, **settings)
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
        ours.append([*sac_parameters(agent), torch.rand(1)])

    before, expected_rows = copies(actor, critics), []
    torch.manual_seed(1)
    for seed in range(UPDATES):
        obs, next_obs, *rest = make_batch(seed)[:5]
        row = host["update"](SCALE * obs + SHIFT, SCALE * next_obs + SHIFT, *rest)
        expected_rows.append(row)
    expected = [*copies(actor, critics, host["targets"]), log_alpha.detach(), torch.rand(1)]
    assert not any(map(torch.equal, before, expected))
    torch.testing.assert_close(ours[0], expected, rtol=1e-6, atol=1e-8)
    for row, expected in zip(logged[0], expected_rows, strict=True):
        assert {name: value.item() for name, value in row.items()} == pytest.approx(expected)
    for k in (1, 2):
        assert all(map(torch.equal, ours[k], ours[0]))
        assert all(row | same_row == row for row, same_row in zip(logged[k], logged[0]))


def test_actions_in_the_environment_are_sampled_from_the_policy():
    agent, obs = make_agent(), torch.randn(1, OBS_DIM)
    pre_tanh = agent.act(obs.expand(20_000, -1)).atanh()
    mean, log_std = agent.actor(obs[0])
    torch.testing.assert_close(pre_tanh.mean(dim=0), mean.detach(), atol=0.01, rtol=0)
    torch.testing.assert_close(pre_tanh.std(dim=0), log_std.exp().detach(), atol=0, rtol=0.03)
