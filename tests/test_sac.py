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
    args = cup.Args("x", **{"hidden_sizes": (64,)} | settings)
    sources = {f"source-{k}": cup.Actor(OBS_DIM, ACTION_DIM, (8,)) for k in range(num_sources)}
    torch.manual_seed(0)
    return cup.Agent(args, OBS_DIM, ACTION_DIM, sources)


def make_batches(num_sources: int = 0) -> list[cup.Batch]:
    return [random_batch(32, OBS_DIM, ACTION_DIM, num_sources, seed) for seed in range(UPDATES)]


@pytest.mark.usefixtures("double_precision")
def test_without_guidance_it_is_textbook_sac():
    """Everything learnt and logged in 20 updates, without additional random numbers.

    Without sources, with guide=False and with beta_1 = 0 it is the same bit for bit."""
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
        logged.append([agent.update(batch, guide) for batch in make_batches(num_sources)])
        networks = agent.actor, agent.critic, agent.target_critic
        ours.append([*copies(*networks), agent.log_alpha.detach(), torch.rand(1)])

    before, expected_rows = copies(actor, critics), []
    torch.manual_seed(1)
    for obs, next_obs, *rest, _, _ in make_batches():
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
    agent, obs = make_agent(), torch.randn(20_000, OBS_DIM)
    mean, log_std = agent.actor(obs)
    noise = (agent.act(obs).atanh() - mean) / log_std.exp()
    assert [noise.mean().item(), noise.std().item()] == pytest.approx([0, 1], abs=0.02)


def test_the_buffer_holds_the_latest_transitions_and_samples_them_uniformly():
    """In every row of a sample all parts belong to one transition."""
    torch.manual_seed(0)
    stored, buffer, total = random_batch(50, 3, 2, num_sources=4), cup.ReplayBuffer(7), 0
    stored.reward.copy_(torch.arange(50))
    for count in (3, 1, 2, 4, 7, 1, 5, 3):
        buffer.add(cup.Batch(*(column[total : total + count] for column in stored)))
        total += count
        latest, sample = list(range(max(0, total - 7), total)), buffer.sample(7_000)
        numbers = sample.reward.int().tolist()
        assert (buffer.size, sorted(set(numbers))) == (min(total, 7), latest)
        assert all(torch.equal(ours, column[numbers]) for ours, column in zip(sample, stored))
    assert [numbers.count(t) for t in latest] == pytest.approx([1000] * 7, abs=150)  # 5 sigma


def test_sources_are_stored_as_they_are_at_the_state_and_bounded():
    agent = make_agent(num_sources=3)
    for source in agent.sources:
        source.net[-1].weight.data *= 20  # so that the bounds are reached, on both sides
    obs, next_obs = torch.randn(2, 30, OBS_DIM, dtype=torch.float64)
    agent.store(obs, torch.rand(30, ACTION_DIM), next_obs, torch.rand(30), torch.zeros(30))
    sample = agent.buffer.sample(32)
    for k, source in enumerate(agent.sources):
        mean, log_std = source(sample.obs)
        assert mean.min() < -2.5 and mean.max() > 2.5 and log_std.min() < -1.5
        torch.testing.assert_close(sample.source_mean[:, k], mean.clamp(-2.5, 2.5))
        torch.testing.assert_close(sample.source_log_std[:, k], log_std.clamp(min=-1.5))


def assert_seen(columns: list[Tensor], *expected: Tensor) -> cup.Standardize:
    """Fitted to these columns, the module shows the networks the expected ones."""
    standardize, obs = cup.Standardize(len(columns)), torch.stack(columns, dim=1)
    standardize.fit(obs)
    expected = torch.stack(expected, dim=1).float()  # another dtype is not close
    torch.testing.assert_close(standardize(obs), expected, atol=1e-5, rtol=0)
    return standardize


def test_networks_see_standardised_observations():
    """Columns far from zero as if counted from there; what hardly moves is enlarged tenfold.

    If all columns move little, the one that moves most has a standard deviation of 1."""
    torch.manual_seed(0)
    noise, clock = torch.randn(500).double(), torch.arange(500.0).double()
    x, t = ((column - column.mean()) / column.std(correction=0) for column in (noise, clock))
    columns = [5 * x + 3, 1.7e9 + clock, 5.5e6 + x]  # a Unix time, a coordinate in metres
    columns += [0.001 * x, 0 * x + 7, 0 * x]
    standardize = assert_seen(columns, x, t, x, 0.01 * x, 0 * x, 0 * x)
    later = torch.tensor([0.0, 0, 0, 0, 0, 2])
    assert standardize(later)[-1] == 0  # a policy ignores what its task has never shown ...
    standardize.notice(later.unsqueeze(0))
    assert standardize(later)[-1] == 2  # ... until then
    assert_seen([1e-4 * x, 1e-6 * x], x, 0.01 * x)
