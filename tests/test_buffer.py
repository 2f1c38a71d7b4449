"""The replay buffer gives back what was stored, each row as it was put together."""

import pytest
import torch
from torch import Tensor

import cup

OBS_DIM, ACTION_DIM, NUM_SOURCES = 3, 2, 4


def transitions(first: int, count: int, num_sources: int = NUM_SOURCES):
    """Transitions numbered from `first`; each number in one says which, and where.

    The column c of part p in transition t holds t + p / 10 + c / 1000.
    """
    t = torch.arange(first, first + count, dtype=torch.float32)

    def part(p: int, *shape: int) -> Tensor:
        column = torch.arange(torch.Size(shape).numel()).view(shape) / 1000
        return t.view(-1, *[1] * len(shape)) + p / 10 + column

    return (
        part(0, OBS_DIM),
        part(1, OBS_DIM),
        part(2, ACTION_DIM),
        t + 0.3,
        t % 2,  # terminated
        part(5, num_sources, 2, ACTION_DIM),
    )


def stored(buffer: cup.ReplayBuffer) -> list[int]:
    """The numbers of the transitions that sampling can bring back."""
    obs, *_ = buffer.sample(100 * buffer.size)
    return sorted(set(obs[:, 0].round().int().tolist()))


def test_columns_come_back_as_stored():
    """In every sampled row all parts belong to one transition, sources included."""
    torch.manual_seed(0)
    buffer = cup.ReplayBuffer(10, OBS_DIM, ACTION_DIM, NUM_SOURCES)
    for first in range(0, 24, 6):  # more than it holds, so that rows are overwritten
        buffer.add(*transitions(first, 6))
    sample = buffer.sample(200)
    shapes = [tuple(part.shape[1:]) for part in sample]
    both = (NUM_SOURCES, ACTION_DIM)
    assert shapes == [(OBS_DIM,), (OBS_DIM,), (ACTION_DIM,), (), (), both, both]
    number = sample[0][:, 0].round().int().tolist()
    assert set(number) == set(range(14, 24))
    for row, t in enumerate(number):
        *expected, source_dist = (part[0] for part in transitions(t, 1))
        expected += [source_dist[:, 0], source_dist[:, 1]]  # means, log-stds
        for ours, theirs in zip(sample, expected, strict=True):
            assert torch.equal(ours[row], theirs)


def test_it_holds_the_latest_transitions():
    """Size grows to the capacity and stays; the oldest make room."""
    torch.manual_seed(0)
    buffer = cup.ReplayBuffer(7, OBS_DIM, ACTION_DIM, NUM_SOURCES)
    total = 0
    for count in (3, 1, 2, 4, 7, 1, 5, 3):
        buffer.add(*transitions(total, count))
        total += count
        assert buffer.size == min(total, 7)
        assert stored(buffer) == list(range(max(0, total - 7), total))


def test_a_batch_larger_than_the_rest_wraps_around():
    """Two rows are left at the end: two go there, three to the beginning."""
    buffer = cup.ReplayBuffer(6, OBS_DIM, ACTION_DIM, NUM_SOURCES)
    buffer.add(*transitions(0, 4))
    buffer.add(*transitions(4, 5))
    assert buffer.rows[:, 0].round().tolist() == [6, 7, 8, 3, 4, 5]
    assert (buffer.size, buffer.position) == (6, 3)


def test_it_never_samples_what_was_not_stored():
    """Rows beyond its size hold nothing yet."""
    torch.manual_seed(0)
    buffer = cup.ReplayBuffer(100, OBS_DIM, ACTION_DIM, NUM_SOURCES)
    buffer.rows.fill_(float("nan"))
    buffer.add(*transitions(0, 5))
    assert not any(part.isnan().any() for part in buffer.sample(1000))
    assert stored(buffer) == [0, 1, 2, 3, 4]


def test_sampling_is_uniform():
    torch.manual_seed(0)
    buffer = cup.ReplayBuffer(8, OBS_DIM, ACTION_DIM, 0)
    buffer.add(*transitions(0, 11, num_sources=0))
    obs, *_ = buffer.sample(80_000)
    _, counts = obs[:, 0].round().int().unique(return_counts=True)
    assert counts.tolist() == pytest.approx([10_000] * 8, abs=500)  # 5 sigma


def test_sampling_is_seeded():
    buffer = cup.ReplayBuffer(50, OBS_DIM, ACTION_DIM, 0)
    buffer.add(*transitions(0, 50, num_sources=0))
    torch.manual_seed(1)
    first, other = buffer.sample(20)[0], buffer.sample(20)[0]
    torch.manual_seed(1)
    assert torch.equal(first, buffer.sample(20)[0])
    assert not torch.equal(first, other)


def test_a_sample_is_a_copy():
    """A later transition in the same row does not reach into a minibatch."""
    buffer = cup.ReplayBuffer(1, OBS_DIM, ACTION_DIM, NUM_SOURCES)
    buffer.add(*transitions(0, 1))
    sample = buffer.sample(1)
    before = [part.clone() for part in sample]
    buffer.add(*transitions(1, 1))
    assert all(map(torch.equal, sample, before))


def test_without_sources_there_is_nothing_to_carry():
    """`query_sources` of no sources fits in, and the sample has zero sources."""
    args = cup.Args(sources=())
    buffer = cup.ReplayBuffer(10, OBS_DIM, ACTION_DIM, 0)
    *parts, _ = transitions(0, 10)
    buffer.add(*parts, cup.query_sources([], parts[0], args))
    assert buffer.rows.shape == (10, 2 * OBS_DIM + ACTION_DIM + 2)
    *_, source_mean, source_log_std = buffer.sample(4)
    assert source_mean.shape == source_log_std.shape == (4, 0, ACTION_DIM)


def test_source_distributions_are_those_of_the_state():
    """What comes out beside a state is what the sources say when asked again."""
    torch.manual_seed(0)
    args = cup.Args(sources=())
    sources = [cup.Actor(OBS_DIM, ACTION_DIM, (8,)) for _ in range(NUM_SOURCES)]
    buffer = cup.ReplayBuffer(20, OBS_DIM, ACTION_DIM, NUM_SOURCES)
    with torch.no_grad():
        for _ in range(5):
            obs, next_obs, rest = torch.randn(3, 6, OBS_DIM)
            dist = cup.query_sources(sources, obs, args)
            end = torch.zeros(6)
            buffer.add(obs, next_obs, rest[:, :ACTION_DIM], rest[:, 0], end, dist)
        obs, *_, source_mean, source_log_std = buffer.sample(32)
        for n, source in enumerate(sources):
            mean, log_std = source(obs)
            expected = mean.clamp(-2.5, 2.5), log_std.clamp(min=-1.5)
            torch.testing.assert_close(source_mean[:, n], expected[0])
            torch.testing.assert_close(source_log_std[:, n], expected[1])
