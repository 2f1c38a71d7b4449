"""The replay buffer, what the agent stores in it, and standardisation."""

import copy

import pytest
import torch
from by_hand import random_batch, sac_parameters
from test_sac import ACTION_DIM, OBS_DIM, make_agent
from torch import Tensor

import cup


def test_it_holds_the_latest_transitions_and_samples_them_uniformly():
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


def store(agent: cup.Agent, size: int) -> None:
    obs, next_obs = torch.randn(2, size, OBS_DIM, dtype=torch.float64)
    agent.store(obs, torch.rand(size, ACTION_DIM), next_obs, torch.rand(size), torch.zeros(size))


def learn(agent: cup.Agent, steps: int) -> None:
    for _ in range(steps):
        store(agent, 5)
        agent.update(agent.buffer.sample(8))


@pytest.mark.parametrize("steps", [2, 9])
def test_a_restored_agent_goes_on_as_the_first_one_does(steps: int):
    """Its state holds only the used rows of the buffer."""
    agent, other = (make_agent(2, buffer_size=30, beta2=1.0) for _ in range(2))
    agent.actor.standardize.fit(torch.randn(9, OBS_DIM))
    learn(agent, steps)
    state = copy.deepcopy(agent.state_dict())
    assert [len(rows) for rows in state["_extra_state"]["rows"]] == [min(30, 5 * steps)] * 7
    other.load_state_dict(state)
    for one in (agent, other):
        torch.manual_seed(1)
        learn(one, 3)
    assert all(map(torch.equal, sac_parameters(agent), sac_parameters(other)))
    assert torch.equal(agent.actor(torch.ones(OBS_DIM))[0], other.actor(torch.ones(OBS_DIM))[0])


@pytest.mark.parametrize("num_sources", [0, 3])
def test_sources_are_stored_as_they_are_at_the_state_and_bounded(num_sources: int):
    agent = make_agent(num_sources)
    for source in agent.sources:
        source.net[-1].weight.data *= 20  # so that the bounds are reached, on both sides
    store(agent, 30)
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
