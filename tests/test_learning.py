"""Learning on a small task: a good source helps, useless sources do little harm.

A point in the plane accelerates by thrusters of unknown directions and should come to rest at the
origin. CUP and SAC learn it in seconds.
"""

from statistics import mean

import torch
from torch import Tensor, nn

import cup

NUM_ENVS, EPISODE, UPDATES = 16, 40, 400
LEARNING = {"gamma": 0.95, "policy_lr": 1e-3, "q_lr": 1e-3, "buffer_size": 20_000}
LEARNING |= {"hidden_sizes": (64, 64), "beta2": 1.0}  # beta_2's default is low for this task
THRUST = torch.tensor([[0.9, -0.5, 0.3, -0.7], [0.2, 0.8, -0.9, -0.4]]) * 0.1


def first_states(num: int) -> Tensor:
    """Position and velocity, (num, 4): anywhere in the square, at rest."""
    return torch.cat([2 * torch.rand(num, 2) - 1, torch.zeros(num, 2)], dim=1)


def step(state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    position, velocity = state.split(2, dim=1)
    velocity = 0.9 * velocity + action @ THRUST.T
    position = (position + velocity).clamp(-2, 2)
    return torch.cat([position, velocity], dim=1), -position.norm(dim=1)


def pilot(obs: Tensor) -> tuple[Tensor, Tensor]:
    """A hand-written controller that brakes and turns home."""
    position, velocity = obs.split(2, dim=1)
    mean = -(0.1 * position + 0.6 * velocity) @ torch.linalg.pinv(THRUST).T
    return mean, torch.full_like(mean, -1.5)


@torch.no_grad()
def score(policy) -> float:
    """Mean reward per step of the mean action, from the same first states for all policies."""
    with torch.random.fork_rng():
        torch.manual_seed(1000)
        state, total = first_states(200), 0.0
    for _ in range(EPISODE):
        state, reward = step(state, torch.tanh(policy(state)[0]))
        total += reward.mean().item() / EPISODE
    return total


def learn(sources: dict, seed: int) -> float:
    """The score after an episode of random actions, and then UPDATES times a step and an update."""
    torch.manual_seed(seed)
    agent = cup.Agent(cup.Args("x", **LEARNING), 4, 4, sources)
    for t in range(EPISODE + UPDATES):
        if t % EPISODE == 0:
            obs = first_states(NUM_ENVS)
        action = 2 * torch.rand(NUM_ENVS, 4) - 1
        if t >= EPISODE:
            action = agent.act(obs)
            agent.update(agent.buffer.sample(128))
        next_obs, reward = step(obs, action)
        agent.store(obs, action, next_obs, reward, torch.zeros(NUM_ENVS))
        obs = next_obs
    return score(agent.actor)


def test_a_good_source_beats_sac_and_useless_ones_do_little_harm():
    """At the same step; the good one by a third of what SAC has left to gain."""
    source = nn.Module()
    source.forward = pilot
    torch.manual_seed(9)
    untrained = {name: cup.Actor(4, 4, (64, 64)) for name in "ab"}
    sac, guided, misled = (
        [learn(sources, seed) for seed in (0, 1)] for sources in ({}, {"p": source}, untrained)
    )
    assert all(ours > theirs for ours, theirs in zip(guided, sac, strict=True))
    best = max(score(pilot), *guided)
    assert best - mean(guided) < 2 / 3 * (best - mean(sac))
    gained = mean(sac) - score(lambda obs: (torch.zeros(len(obs), 4),) * 2)
    assert gained > 0.3 and mean(misled) > mean(sac) - gained / 4
