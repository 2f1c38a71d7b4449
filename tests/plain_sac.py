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


torch.manual_seed(1)
env = gym.make("Pendulum-v1")
obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
scale = float(env.action_space.high[0])

actor = mlp(obs_dim, 2 * action_dim)
critics = nn.ModuleList(mlp(obs_dim + action_dim, 1) for _ in range(2))
targets = copy.deepcopy(critics)
log_alpha = torch.zeros(1, requires_grad=True)
learnt = actor.parameters(), critics.parameters(), [log_alpha]
actor_adam, critic_adam, alpha_adam = (torch.optim.Adam(x, lr=LEARNING_RATE) for x in learnt)


def act(obs):
    mean, log_std = actor(obs).chunk(2, dim=-1)
    log_std = log_std.clamp(-5, 2)
    noise = torch.randn_like(mean)
    x = mean + log_std.exp() * noise
    action = torch.tanh(x)
    log_prob = Normal(mean, log_std.exp()).log_prob(x) - torch.log(1 - action**2 + 1e-6)
    return action, log_prob.sum(dim=1), (mean, log_std, noise)


def twin_q(obs, action, critics=critics):
    x = torch.cat([obs, action], dim=-1)
    return [critic(x).squeeze(-1) for critic in critics]


def min_q(obs, action):
    return torch.min(*twin_q(obs, action))


def minimise(adam, loss):
    adam.zero_grad()
    loss.backward()
    adam.step()


# <functions>

buffer, losses = [], []
obs, _ = env.reset(seed=1)
for step in range(TOTAL_TIMESTEPS):
    if step < LEARNING_STARTS:
        action = 2 * np.random.default_rng(step).random(action_dim, np.float32) - 1
    else:
        with torch.no_grad():
            action = act(torch.as_tensor(obs)[None])[0][0].numpy()
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
        next_action, next_log_prob, _ = act(b_next_obs)
        next_value = torch.min(*twin_q(b_next_obs, next_action, targets)) - alpha * next_log_prob
        td_target = b_reward + GAMMA * (1 - b_terminated) * next_value
    critic_loss = sum(F.mse_loss(q, td_target) for q in twin_q(b_obs, b_action))
    minimise(critic_adam, critic_loss)

    pi, log_prob, (mean, log_std, noise) = act(b_obs)
    q = min_q(b_obs, pi)
    actor_loss = (alpha * log_prob - q).mean()
    # <guidance>
    minimise(actor_adam, actor_loss)
    minimise(alpha_adam, -(log_alpha * (log_prob.detach() - action_dim)).mean())

    with torch.no_grad():
        for target, online in zip(targets.parameters(), critics.parameters(), strict=True):
            target.lerp_(online, TAU)
    losses.append((critic_loss.item(), actor_loss.item()))
