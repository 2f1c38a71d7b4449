"""Soft Actor-Critic in one script, as anybody may have it, with no thought of cup.py.

test_paste.py runs it as it is, then pastes CUP's guidance at the three marked places.
"""

import copy

import gymnasium as gym
import numpy as np
import torch
from torch import nn
from torch.distributions import Normal
from torch.nn import functional as F

# <imports>

TOTAL_TIMESTEPS, LEARNING_STARTS, BATCH_SIZE = 400, 100, 64
GAMMA, TAU, LEARNING_RATE = 0.99, 0.005, 1e-3


def mlp(inputs, outputs):
    layers = nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()
    return nn.Sequential(*layers, nn.Linear(64, outputs))


class Actor(nn.Module):
    def __init__(self, obs_dim, action_dim):
        super().__init__()
        self.net = mlp(obs_dim, 2 * action_dim)

    def sample(self, obs):
        mean, log_std = self.net(obs).chunk(2, dim=-1)
        log_std = log_std.clamp(-5, 2)
        noise = torch.randn_like(mean)
        x = mean + log_std.exp() * noise
        action = torch.tanh(x)
        log_prob = Normal(mean, log_std.exp()).log_prob(x) - torch.log(1 - action**2 + 1e-6)
        return action, log_prob.sum(dim=1), (mean, log_std, noise)


class Critic(nn.Module):
    def __init__(self, obs_dim, action_dim):
        super().__init__()
        self.net = mlp(obs_dim + action_dim, 1)

    def forward(self, obs, action):
        return self.net(torch.cat([obs, action], dim=-1)).squeeze(-1)


torch.manual_seed(1)
env = gym.make("Pendulum-v1")
obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
scale = float(env.action_space.high[0])

actor = Actor(obs_dim, action_dim)
critics = nn.ModuleList(Critic(obs_dim, action_dim) for _ in range(2))
targets = copy.deepcopy(critics)
log_alpha = torch.zeros(1, requires_grad=True)
actor_optimizer = torch.optim.Adam(actor.parameters(), lr=LEARNING_RATE)
critic_optimizer = torch.optim.Adam(critics.parameters(), lr=LEARNING_RATE)
alpha_optimizer = torch.optim.Adam([log_alpha], lr=LEARNING_RATE)


def min_q(obs, action, critics=critics):
    return torch.min(*(critic(obs, action) for critic in critics))


# <functions>

buffer, losses = [], []
obs, _ = env.reset(seed=1)
for step in range(TOTAL_TIMESTEPS):
    if step < LEARNING_STARTS:
        action = 2 * np.random.default_rng(step).random(action_dim, np.float32) - 1
    else:
        with torch.no_grad():
            action = actor.sample(torch.as_tensor(obs)[None])[0][0].numpy()
    next_obs, reward, terminated, truncated, _ = env.step(scale * action)
    buffer.append((obs, next_obs, action, np.float32(reward), np.float32(terminated)))
    obs = env.reset()[0] if terminated or truncated else next_obs
    if step < LEARNING_STARTS:
        continue

    rows = [buffer[i] for i in torch.randint(len(buffer), (BATCH_SIZE,))]
    b_obs, b_next_obs, b_action, b_reward, b_terminated = (
        torch.as_tensor(np.array(column)) for column in zip(*rows, strict=True)
    )
    alpha = log_alpha.exp().item()

    with torch.no_grad():
        next_action, next_log_prob, _ = actor.sample(b_next_obs)
        next_value = min_q(b_next_obs, next_action, targets) - alpha * next_log_prob
        td_target = b_reward + GAMMA * (1 - b_terminated) * next_value
    critic_loss = sum(F.mse_loss(critic(b_obs, b_action), td_target) for critic in critics)
    critic_optimizer.zero_grad()
    critic_loss.backward()
    critic_optimizer.step()

    pi, log_prob, (mean, log_std, noise) = actor.sample(b_obs)
    q = min_q(b_obs, pi)
    actor_loss = (alpha * log_prob - q).mean()
    # <guidance>
    actor_optimizer.zero_grad()
    actor_loss.backward()
    actor_optimizer.step()

    alpha_loss = -(log_alpha * (log_prob.detach() - action_dim)).mean()
    alpha_optimizer.zero_grad()
    alpha_loss.backward()
    alpha_optimizer.step()

    with torch.no_grad():
        for target, online in zip(targets.parameters(), critics.parameters(), strict=True):
            target.lerp_(online, TAU)
    losses.append((critic_loss.item(), actor_loss.item()))
