"""Learning on a small task: a good source helps, useless sources do little harm.

A point in the plane accelerates by thrusters of unknown directions. It should come to rest at the
origin. Everything runs through `cup.Agent` and its replay buffer.
"""

from collections.abc import Callable
from statistics import mean

import pytest
import torch
from torch import Tensor

import cup

OBS_DIM, ACTION_DIM, NUM_ENVS, EPISODE = 4, 4, 16, 40
RANDOM_STEPS, UPDATES = 40, 400
SEEDS = range(3)

Policy = Callable[[Tensor], tuple[Tensor, Tensor]]  # obs -> mean, log_std before tanh

THRUST = torch.tensor([[0.9, -0.5, 0.3, -0.7], [0.2, 0.8, -0.9, -0.4]]) * 0.1


def first_states(num: int) -> Tensor:
    """Position and velocity, (num, 4): anywhere in the square, at rest."""
    return torch.cat([2 * torch.rand(num, 2) - 1, torch.zeros(num, 2)], dim=1)


def step(state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """Next state and reward; the task never terminates, there is only a time limit."""
    position, velocity = state.split(2, dim=1)
    velocity = 0.9 * velocity + action @ THRUST.T
    position = (position + velocity).clamp(-2, 2)
    return torch.cat([position, velocity], dim=1), -position.norm(dim=1)


def pilot(obs: Tensor) -> tuple[Tensor, Tensor]:
    """A good source: a hand-written controller that brakes and turns home."""
    position, velocity = obs.split(2, dim=1)
    mu = -(0.1 * position + 0.6 * velocity) @ torch.linalg.pinv(THRUST).T
    return mu, torch.full_like(mu, -1.5)


def learn(seed: int, **sources: Policy) -> float:
    """Mean reward per step of the policy after UPDATES updates, without its noise."""
    torch.manual_seed(seed)
    # the advantage of Eq. 4, and no cap: on so small a task beta2's would be too low
    guidance = {"beta1": 10.0, "beta2": 1.0, "soft_advantage": True}
    learning = {"gamma": 0.95, "policy_lr": 1e-3, "q_lr": 1e-3, "buffer_size": 20_000}
    args = cup.Args(env_id="point", hidden_sizes=(64, 64), **guidance, **learning)
    agent = cup.Agent(args, OBS_DIM, ACTION_DIM, sources)
    for t in range(RANDOM_STEPS + UPDATES):
        if t % EPISODE == 0:
            obs = first_states(NUM_ENVS)
        action = agent.act(obs, [t % EPISODE] * NUM_ENVS)
        if t < RANDOM_STEPS:
            action = 2 * torch.rand_like(action) - 1
        next_obs, reward = step(obs, action)
        agent.store(obs, action, next_obs, reward, torch.zeros(NUM_ENVS))
        obs = next_obs
        if t >= RANDOM_STEPS:
            agent.update(agent.buffer.sample(128))
    return evaluate(agent.actor)


@torch.no_grad()
def evaluate(policy: Policy) -> float:
    torch.manual_seed(1000)  # the same first states for all
    state, total = first_states(200), 0.0
    for _ in range(EPISODE):
        state, reward = step(state, torch.tanh(policy(state)[0]))
        total += reward.mean().item()
    return total / EPISODE


@pytest.fixture(scope="module")
def sac() -> list[float]:
    return [learn(seed) for seed in SEEDS]


def test_a_good_source_beats_sac(sac: list[float]):
    """At the same step, for every seed, and by a third of what SAC has left to gain."""
    guided = [learn(seed, pilot=pilot) for seed in SEEDS]
    assert all(ours > theirs for ours, theirs in zip(guided, sac, strict=True))
    best = evaluate(pilot)
    assert best - mean(guided) < 2 / 3 * (best - mean(sac))


def test_useless_sources_do_little_harm(sac: list[float]):
    """With untrained sources alone, CUP learns nearly as well as SAC."""
    torch.manual_seed(9)
    untrained = {name: cup.Actor(OBS_DIM, ACTION_DIM, (64, 64)) for name in "ab"}
    adrift = evaluate(lambda obs: (torch.zeros(len(obs), ACTION_DIM),) * 2)
    misled = [learn(seed, **untrained) for seed in SEEDS]
    learnt = mean(sac) - adrift
    assert learnt > 0.3
    assert mean(misled) > mean(sac) - learnt / 4
