"""SAC, Eqs. 2 and 3: CUP without guidance is `plain_sac.py`; the buffer; what the networks see."""

import runpy
from pathlib import Path

import pytest
import torch
from by_hand import copies, random_batch, same
from torch import Tensor

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
        networks = agent.actor, agent.critic, agent.target_critic
        ours.append([*copies(*networks), agent.log_alpha.detach(), torch.rand(1)])

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


def test_the_buffer_holds_the_latest_transitions_and_samples_them_uniformly():
    """In every row of a sample all parts belong to one transition."""
    torch.manual_seed(0)
    stored, buffer, total = random_batch(50, 3, 2, num_sources=4), cup.ReplayBuffer(7), 0
    stored.reward.copy_(torch.arange(50))
    for count in (3, 1, 2, 4, 7, 1, 5, 3):
        buffer.add(cup.Batch(*(column[total : total + count] for column in stored)))
        total += count
        latest, sample = list(range(max(0, total - 7), total)), buffer.sample(700)
        numbers = sample.reward.int().tolist()
        assert (buffer.size, sorted(set(numbers))) == (min(total, 7), latest)
        assert all(torch.equal(ours, column[numbers]) for ours, column in zip(sample, stored))
    numbers = buffer.sample(70_000).reward.int().tolist()
    assert [numbers.count(t) for t in latest] == pytest.approx([10_000] * 7, abs=500)  # 5 sigma


@pytest.mark.parametrize("num_sources", [0, 3])
def test_sources_are_stored_as_they_are_at_the_state_and_bounded(num_sources: int):
    agent = make_agent(num_sources)
    for source in agent.sources:
        source.net[-1].weight.data *= 20  # so that the bounds are reached, on both sides
    obs, next_obs = torch.randn(2, 30, OBS_DIM, dtype=torch.float64)
    agent.store(obs, torch.rand(30, ACTION_DIM), next_obs, torch.rand(30), torch.zeros(30))
    sample = agent.buffer.sample(32)
    assert sample.source_mean.shape == sample.source_log_std.shape == (32, num_sources, ACTION_DIM)
    for k, source in enumerate(agent.sources):
        mean, log_std = source(sample.obs)
        assert mean.min() < -2.5 and mean.max() > 2.5 and log_std.min() < -1.5
        torch.testing.assert_close(sample.source_mean[:, k], mean.clamp(-2.5, 2.5))
        torch.testing.assert_close(sample.source_log_std[:, k], log_std.clamp(min=-1.5))


def fitted(*columns: Tensor) -> tuple[cup.Standardize, Tensor]:
    """The module, fitted to these columns, and what the networks see of them (columns, n)."""
    standardize = cup.Standardize(len(columns))
    standardize.fit(torch.stack(columns, dim=1))
    return standardize, standardize(torch.stack(columns, dim=1)).T


def test_networks_see_standardised_observations():
    """Columns far from zero as if counted from there; what hardly moves is enlarged tenfold.

    If all columns move little, the one that moves most has a standard deviation of 1.
    """
    torch.manual_seed(0)
    noise, clock = torch.randn(500).double(), torch.arange(500.0).double()
    noise, seen_clock = ((x - x.mean()) / x.std(correction=0) for x in (noise, clock))
    moving = 5 * noise + 3, 1.7e9 + clock, 5.5e6 + noise  # a Unix time, a coordinate in metres
    standardize, seen = fitted(*moving, 0.001 * noise, 0 * noise + 7, 0 * noise)
    assert seen.dtype == torch.float32
    expected = noise, seen_clock, noise, 0.01 * noise, 0 * noise, 0 * noise
    torch.testing.assert_close(seen.double(), torch.stack(expected), atol=1e-5, rtol=0)
    later = torch.tensor([0.0, 0, 0, 0, 0, 2])
    assert standardize(later)[-1] == 0  # a policy ignores what its task has never shown ...
    standardize.notice(later.unsqueeze(0))
    assert standardize(later)[-1] == 2  # ... until then

    _, seen = fitted(1e-4 * noise, 1e-6 * noise)
    expected = torch.stack([noise, 0.01 * noise])
    torch.testing.assert_close(seen.double(), expected, atol=1e-5, rtol=0)
