"""The replay buffer gives back what was stored, each row as it was put together."""

import copy
import math

import pytest
import torch
from torch import Tensor

import cup

OBS_DIM, ACTION_DIM, NUM_SOURCES = 3, 2, 4


def make_buffer(capacity: int, num_sources: int = NUM_SOURCES) -> cup.ReplayBuffer:
    torch.manual_seed(0)
    return cup.ReplayBuffer(capacity, OBS_DIM, ACTION_DIM, num_sources)


def transitions(first: int, count: int, num_sources: int = NUM_SOURCES) -> tuple[Tensor, ...]:
    """Transitions numbered from `first`; each number in one says which, and where.

    The column c of part p in transition t holds t + p / 10 + c / 1000.
    """
    t = torch.arange(first, first + count, dtype=torch.float32)

    def part(p: int, *shape: int) -> Tensor:
        column = torch.arange(torch.Size(shape).numel()).view(shape) / 1000
        return t.view(-1, *[1] * len(shape)) + p / 10 + column

    parts = part(0, OBS_DIM), part(1, OBS_DIM), part(2, ACTION_DIM), t + 0.3, t % 2
    return *parts, part(5, num_sources, 2, ACTION_DIM)


def numbers(obs: Tensor) -> list[int]:
    return obs[:, 0].round().int().tolist()


def test_columns_come_back_as_stored():
    """In every sampled row all parts belong to one transition, sources included."""
    buffer = make_buffer(10)
    for first in range(0, 24, 6):  # more than it holds, so that rows are overwritten
        buffer.add(*transitions(first, 6))
    sample = buffer.sample(200)
    both = (NUM_SOURCES, ACTION_DIM)
    shapes = [tuple(part.shape[1:]) for part in sample]
    assert shapes == [(OBS_DIM,), (OBS_DIM,), (ACTION_DIM,), (), (), both, both]
    assert set(numbers(sample.obs)) == set(range(14, 24))
    for row, t in enumerate(numbers(sample.obs)):
        *expected, source_dist = (part[0] for part in transitions(t, 1))
        expected += source_dist.unbind(1)  # means, log-stds
        assert all(torch.equal(ours[row], x) for ours, x in zip(sample, expected, strict=True))


def test_it_holds_the_latest_transitions():
    """Size grows to the capacity and stays; the oldest make room; the rest is never sampled."""
    buffer, total = make_buffer(7), 0
    buffer.rows.fill_(math.nan)
    for count in (3, 1, 2, 4, 7, 1, 5, 3):
        buffer.add(*transitions(total, count))
        total += count
        latest = list(range(max(0, total - 7), total))
        sample = buffer.sample(700)
        assert not any(part.isnan().any() for part in sample)
        assert (buffer.size, sorted(set(numbers(sample.obs)))) == (min(total, 7), latest)
        assert sorted(numbers(buffer.obs())) == latest


def test_sampling_is_uniform():
    buffer = make_buffer(8, num_sources=0)
    buffer.add(*transitions(0, 11, num_sources=0))
    _, counts = buffer.sample(80_000).obs[:, 0].round().int().unique(return_counts=True)
    assert counts.tolist() == pytest.approx([10_000] * 8, abs=500)  # 5 sigma


def test_a_sample_is_a_copy():
    """A later transition in the same row does not reach into a minibatch."""
    buffer = make_buffer(1)
    buffer.add(*transitions(0, 1))
    sample = buffer.sample(1)
    before = copy.deepcopy(sample)
    buffer.add(*transitions(1, 1))
    assert all(map(torch.equal, sample, before))


@pytest.mark.parametrize("count", [4, 17])
def test_its_state_is_the_used_rows_and_where_it_goes_on(count: int):
    buffer, other = make_buffer(10), make_buffer(10)
    buffer.add(*transitions(0, count))
    state = buffer.state_dict()
    assert len(state["rows"]) == min(count, 10)
    other.load_state_dict(copy.deepcopy(state))
    for one in (buffer, other):
        one.add(*transitions(count, 3))
    assert (other.size, other.position) == (buffer.size, buffer.position)
    assert torch.equal(other.rows[: other.size], buffer.rows[: buffer.size])


def test_without_sources_there_is_nothing_to_carry():
    """`query_sources` of no sources fits in, and the sample has zero sources."""
    buffer = make_buffer(10, num_sources=0)
    *parts, _ = transitions(0, 10)
    buffer.add(*parts, cup.query_sources([], parts[0], cup.Args(env_id="x")))
    assert buffer.rows.shape == (10, 2 * OBS_DIM + ACTION_DIM + 2)
    sample = buffer.sample(4)
    assert sample.source_mean.shape == sample.source_log_std.shape == (4, 0, ACTION_DIM)


def test_source_distributions_are_those_of_the_state():
    """What comes out beside a state is what the sources say when asked again."""
    torch.manual_seed(0)
    sources = {str(n): cup.Actor(OBS_DIM, ACTION_DIM, (8,)) for n in range(NUM_SOURCES)}
    args = cup.Args(env_id="x", hidden_sizes=(8,), buffer_size=256)
    agent = cup.Agent(args, OBS_DIM, ACTION_DIM, sources)
    with torch.no_grad():
        for _ in range(5):
            obs, next_obs, rest = torch.randn(3, 6, OBS_DIM)
            agent.store(obs, rest[:, :ACTION_DIM], next_obs, rest[:, 0], torch.zeros(6))
        sample = agent.buffer.sample(32)
        for n, source in enumerate(sources.values()):
            mean, log_std = source(sample.obs)
            torch.testing.assert_close(sample.source_mean[:, n], mean.clamp(-2.5, 2.5))
            torch.testing.assert_close(sample.source_log_std[:, n], log_std.clamp(min=-1.5))
