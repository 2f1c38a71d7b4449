"""The replay buffer gives back what was stored, each row as it was put together."""

import copy
import math

import pytest
import torch
from torch import Tensor

import cup

OBS_DIM, ACTION_DIM, NUM_SOURCES = 3, 2, 4
BOTH = NUM_SOURCES, ACTION_DIM
SHAPES = cup.Batch((OBS_DIM,), (OBS_DIM,), (ACTION_DIM,), (), (), BOTH, BOTH)


def make_buffer(capacity: int) -> cup.ReplayBuffer:
    torch.manual_seed(0)
    buffer = cup.ReplayBuffer(capacity, SHAPES)
    for column in buffer.columns:
        column.fill_(math.nan)
    return buffer


def transitions(first: int, count: int) -> cup.Batch:
    """Transitions numbered from `first`; each number in one says which, and where.

    The column c of part p in transition t holds t + p / 10 + c / 1000.
    """
    t = torch.arange(first, first + count, dtype=torch.float32)

    def part(p: int, *shape: int) -> Tensor:
        column = torch.arange(torch.Size(shape).numel()).view(shape) / 1000
        return t.view(-1, *[1] * len(shape)) + p / 10 + column

    return cup.Batch(*(part(p, *shape) for p, shape in enumerate(SHAPES)))


def numbers(obs: Tensor) -> list[int]:
    return obs[:, 0].round().int().tolist()


def test_it_holds_the_latest_transitions_and_samples_them_uniformly():
    """Size grows to the capacity and stays; the oldest make room; the rest is never sampled.

    In every sampled row all parts belong to one transition, sources included.
    """
    buffer, total = make_buffer(7), 0
    for count in (3, 1, 2, 4, 7, 1, 5, 3):
        buffer.add(transitions(total, count))
        total += count
        latest = list(range(max(0, total - 7), total))
        sample = buffer.sample(700)
        sampled = numbers(sample.obs)
        assert (buffer.size, sorted(set(sampled))) == (min(total, 7), latest)
        assert sorted(numbers(buffer.obs())) == latest
        for ours, stored in zip(sample, transitions(0, total), strict=True):
            assert torch.equal(ours, stored[sampled])
    sampled = numbers(buffer.sample(70_000).obs)
    assert [sampled.count(t) for t in latest] == pytest.approx([10_000] * 7, abs=500)  # 5 sigma


@pytest.mark.parametrize("count", [4, 17])
def test_its_state_is_the_used_rows_and_where_it_goes_on(count: int):
    buffer, other = make_buffer(10), make_buffer(10)
    buffer.add(transitions(0, count))
    state = buffer.get_extra_state()
    assert [len(column) for column in state["columns"]] == [min(count, 10)] * len(SHAPES)
    other.set_extra_state(copy.deepcopy(state))
    for one in (buffer, other):
        one.add(transitions(count, 3))
    assert (other.size, other.position) == (buffer.size, buffer.position)
    for ours, theirs in zip(buffer.columns, other.columns, strict=True):
        assert torch.equal(ours[: buffer.size], theirs[: buffer.size])


@pytest.mark.parametrize("num_sources", [0, NUM_SOURCES])
def test_source_distributions_are_those_of_the_state(num_sources: int):
    """What comes out beside a state is what the sources say when asked again, bounded."""
    torch.manual_seed(0)
    sources = {str(n): cup.Actor(OBS_DIM, ACTION_DIM, (8,)) for n in range(num_sources)}
    for source in sources.values():
        source.net[-1].weight.data *= 20  # so that bounds are reached, on both sides
    args = cup.Args(env_id="x", hidden_sizes=(8,), buffer_size=256)
    agent = cup.Agent(args, OBS_DIM, ACTION_DIM, sources)
    for _ in range(5):
        obs, next_obs, rest = torch.randn(3, 6, OBS_DIM)
        agent.store(obs, rest[:, :ACTION_DIM], next_obs, rest[:, 0], torch.zeros(6))
    sample = agent.buffer.sample(32)
    assert sample.source_mean.shape == sample.source_log_std.shape == (32, num_sources, ACTION_DIM)
    for n, source in enumerate(sources.values()):
        mean, log_std = source(sample.obs)
        assert mean.min() < -2.5 and mean.max() > 2.5 and log_std.min() < -1.5
        torch.testing.assert_close(sample.source_mean[:, n], mean.clamp(-2.5, 2.5))
        torch.testing.assert_close(sample.source_log_std[:, n], log_std.clamp(min=-1.5))
