"""Soft Actor-Critic in one script, written without cup.py.

test_sac.py compares the updates. test_paste.py pastes CUP's guidance at the three marked places.
"""

import copy

import gymnasium as gym
import numpy as np
import torch
from torch import nn
from torch.distributions import Normal, TanhTransform
from torch.nn import functional as F

# <imports>

TOTAL_TIMESTEPS, LEARNING_STARTS, BATCH_SIZE = 200, 60, 64
HIDDEN, GAMMA, TAU, INIT_ALPHA = 64, 0.98, 0.01, 0.3
POLICY_LR, Q_LR, ALPHA_LR = 1e-3, 5e-4, 1e-2


def mlp(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, outputs))


torch.manual_seed(1)
env = gym.make("Reacher-v5")  # actions in [-1, 1]
obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
actor = mlp(obs_dim, 2 * action_dim)
critics = nn.ModuleList(mlp(obs_dim + action_dim, 1) for _ in range(2))
targets = copy.deepcopy(critics)
log_alpha = nn.Parameter(torch.tensor(INIT_ALPHA).log())
actor_adam = torch.optim.Adam(actor.parameters(), lr=POLICY_LR)
critic_adam = torch.optim.Adam(critics.parameters(), lr=Q_LR)
alpha_adam = torch.optim.Adam([log_alpha], lr=ALPHA_LR)


def act(obs):
    mean, log_std = actor(obs).chunk(2, dim=-1)
    mean, log_std = 3 * torch.tanh(mean / 3), 3.5 * torch.tanh(log_std / 3.5) - 1.5
    noise = torch.randn_like(mean)
    x = mean + log_std.exp() * noise
    log_prob = Normal(mean, log_std.exp()).log_prob(x) - TanhTransform().log_abs_det_jacobian(x, x)
    return torch.tanh(x), log_prob.sum(dim=-1), (mean, log_std, noise)


def twin_q(obs, action, critics=critics):
    return [critic(torch.cat([obs, action], dim=-1)).squeeze(-1) for critic in critics]


def min_q(obs, action):
    return torch.min(*twin_q(obs, action))


def minimise(adam, loss):
    adam.zero_grad()
    loss.backward()
    adam.step()


# <functions>


def update(obs, next_obs, action, reward, terminated):
    """One step of gradient descent; returns what a run would log."""
    alpha = log_alpha.exp().item()
    with torch.no_grad():
        next_action, next_log_prob, _ = act(next_obs)
        next_value = torch.min(*twin_q(next_obs, next_action, targets)) - alpha * next_log_prob
        td_target = reward + GAMMA * (1 - terminated) * next_value
    critic_loss = sum(F.mse_loss(q, td_target) for q in twin_q(obs, action))
    minimise(critic_adam, critic_loss)
    pi, log_prob, (mean, log_std, noise) = act(obs)
    q = min_q(obs, pi)
    actor_loss = (alpha * log_prob - q).mean()
    logged = {"loss/critic": critic_loss.item(), "loss/actor": actor_loss.item()}
    # <guidance>
    minimise(actor_adam, actor_loss)
    entropy = -log_prob.mean().item()
    minimise(alpha_adam, log_alpha.exp() * (entropy + action_dim))
    with torch.no_grad():
        for target, online in zip(targets.parameters(), critics.parameters()):
            target.copy_((1 - TAU) * target + TAU * online)
    return logged | {"alpha": alpha, "entropy": entropy}


if __name__ == "__main__":
    buffer, logs = [], []
    obs, _ = env.reset(seed=1)
    for step in range(TOTAL_TIMESTEPS):
        action = 2 * torch.rand(action_dim) - 1
        if step >= LEARNING_STARTS:
            action = act(torch.as_tensor(obs, dtype=torch.float32))[0].detach()
        next_obs, reward, terminated, truncated, _ = env.step(action.numpy())
        buffer.append((obs, next_obs, action, reward, terminated))
        obs = env.reset()[0] if terminated or truncated else next_obs
        if step >= LEARNING_STARTS:
            rows = [buffer[i] for i in torch.randint(len(buffer), (BATCH_SIZE,))]
            columns = (np.array(column, dtype=np.float32) for column in zip(*rows))
            logs.append(update(*map(torch.as_tensor, columns)))
