"""Learning on a small task: a good source helps, useless sources do little harm."""

from statistics import mean

import pytest
import torch
from small_tasks import LEARNING, Policy, learn, pilot, score

import cup

SEEDS = range(3)


def learn_from(seed: int, **sources: Policy) -> float:
    """The score after 400 updates; with beta2's default the cap is too low for so small a task."""
    torch.manual_seed(seed)
    args = cup.Args(env_id="x", beta1=10.0, beta2=1.0, soft_advantage=True, **LEARNING)
    return learn(cup.Agent(args, 4, 4, sources), 400)


@pytest.fixture(scope="module")
def sac() -> list[float]:
    return [learn_from(seed) for seed in SEEDS]


def test_a_good_source_beats_sac(sac: list[float]):
    """At the same step, for every seed, and by a third of what SAC has left to gain."""
    guided = [learn_from(seed, pilot=pilot) for seed in SEEDS]
    assert all(ours > theirs for ours, theirs in zip(guided, sac, strict=True))
    best = max(score(pilot), *guided)
    assert best - mean(guided) < 2 / 3 * (best - mean(sac))


def test_useless_sources_do_little_harm(sac: list[float]):
    """With untrained sources alone, CUP learns nearly as well as SAC."""
    torch.manual_seed(9)
    untrained = {name: cup.Actor(4, 4, (64, 64)) for name in "ab"}
    adrift = score(lambda obs: (torch.zeros(len(obs), 4),) * 2)
    misled = [learn_from(seed, **untrained) for seed in SEEDS]
    learnt = mean(sac) - adrift
    assert learnt > 0.3
    assert mean(misled) > mean(sac) - learnt / 4
