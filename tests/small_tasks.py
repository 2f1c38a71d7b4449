"""Two tasks of a point in the plane that are learnt in seconds, by any agent of cup.py's kind.

The point accelerates by thrusters of unknown directions and should come to rest at the origin,
without or with a wind.
"""

from collections.abc import Callable

import torch
from by_hand import sac_parameters
from torch import Tensor, nn

import cup

NUM_ENVS, EPISODE = 16, 40
LEARNING = {"gamma": 0.95, "policy_lr": 1e-3, "q_lr": 1e-3, "buffer_size": 20_000}
LEARNING |= {"num_envs": NUM_ENVS, "hidden_sizes": (64, 64)}
THRUST = torch.tensor([[0.9, -0.5, 0.3, -0.7], [0.2, 0.8, -0.9, -0.4]]) * 0.1

Policy = Callable[[Tensor], tuple[Tensor, Tensor]]  # obs -> mean, log_std before tanh
Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def first_states(num: int) -> Tensor:
    """Position and velocity, (num, 4): anywhere in the square, at rest."""
    return torch.cat([2 * torch.rand(num, 2) - 1, torch.zeros(num, 2)], dim=1)


def calm_step(state: Tensor, action: Tensor, wind: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Next state, reward and termination, of which there is none."""
    position, velocity = state.split(2, dim=1)
    velocity = 0.9 * velocity + action @ THRUST.T
    position = (position + velocity + wind).clamp(-2, 2)
    return torch.cat([position, velocity], dim=1), -position.norm(dim=1), torch.zeros(len(state))


def windy_step(state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return calm_step(state, action, wind=0.03)


class Pilot(nn.Module):
    """A hand-written controller that brakes and turns home, and knows of no wind."""

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        position, velocity = obs.split(2, dim=1)
        mean = -(0.1 * position + 0.6 * velocity) @ torch.linalg.pinv(THRUST).T
        return mean, torch.full_like(mean, -1.5)


pilot = Pilot()


def learn(
    agent: cup.Agent, updates: int, first_states=first_states, step: Step = calm_step,
    episode: int = EPISODE, guidance_starts: int = 0, standardize: bool = False,
) -> float:
    """An episode of random actions, then a step and an update in turn; the score after that."""
    for t in range(episode + updates):
        if t % episode == 0:
            obs = first_states(NUM_ENVS)
        if standardize and t == episode:
            agent.actor.standardize.fit(agent.buffer.columns[0][: agent.buffer.size])
        if t < episode:
            action = 2 * torch.rand(NUM_ENVS, agent.actor.action_dim) - 1
        else:
            action = agent.act(obs)
            agent.update(agent.buffer.sample(128), guide=t - episode >= guidance_starts)
        next_obs, reward, terminated = step(obs, action)
        agent.store(obs, action, next_obs, reward, terminated)
        obs = next_obs
    return score(agent.actor, first_states, step, episode)


def what_is_learnt(agent: cup.Agent, *arguments, **options) -> list[Tensor]:
    """All that SAC learns in `learn`, and the next random number."""
    torch.manual_seed(1)
    learn(agent, *arguments, **options)
    return [*sac_parameters(agent), torch.rand(1)]


@torch.no_grad()
def score(policy: Policy, first_states=first_states, step=calm_step, episode=EPISODE) -> float:
    """Mean reward per step of the mean action, from the same first states for all."""
    with torch.random.fork_rng():
        torch.manual_seed(1000)
        state, total = first_states(200), 0.0
    for _ in range(episode):
        state, reward, _ = step(state, torch.tanh(policy(state)[0]))
        total += reward.mean().item() / episode
    return total
