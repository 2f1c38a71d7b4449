"""Soft Actor-Critic, Eq. 3: CUP without guidance is nothing else."""

import copy
import math

import pytest
import torch
from by_hand import copies, random_batch, sac_parameters, same
from torch import Tensor, nn
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

import cup

OBS_DIM, ACTION_DIM, BATCH, UPDATES = 5, 3, 32, 20
GAMMA, TAU = 0.99, 0.005
SHIFT = 0.5  # how the networks see observations: this much larger
RATES = {"policy_lr": 1e-3, "q_lr": 3e-4, "alpha_lr": 1e-2}


def make_agent(num_sources: int = 0, **changes) -> cup.Agent:
    """An agent that learns from `make_batch`; its sources only have names."""
    torch.manual_seed(0)
    args = cup.Args(**{"env_id": "x", "hidden_sizes": (32, 32)} | RATES | changes)
    return cup.Agent(args, OBS_DIM, ACTION_DIM, {f"source-{n}": None for n in range(num_sources)})


def make_batch(seed: int, num_sources: int = 0) -> cup.Batch:
    return random_batch(BATCH, OBS_DIM, ACTION_DIM, num_sources, seed)


# ---- the update ----------------------------------------------------------------------------------
def minimise(loss: Tensor, optimizer: torch.optim.Adam) -> None:
    """One step of the optimizer's own parameters."""
    parameters = optimizer.param_groups[0]["params"]
    for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        p.grad = gradient
    optimizer.step()


def q(critic: cup.SoftQNetwork, obs: Tensor, action: Tensor) -> list[Tensor]:
    """Q1 and Q2 (batch,), one network after the other, a layer at a time."""
    values = []
    for which in (0, 1):
        x = torch.cat([obs + SHIFT, action], dim=1)
        for layer in critic.net:
            if isinstance(layer, cup.TwinLinear):
                x = x @ layer.weight[which] + layer.bias[which, 0]
            else:
                x = x.clamp(min=0)
        values.append(x.squeeze(1))
    assert not torch.equal(*values)  # they are not one and the same
    return values


class TextbookSAC:
    """SAC with torch.distributions and torch.optim, from the same networks."""

    def __init__(self, agent: cup.Agent):
        self.actor, self.critic = copy.deepcopy(agent.actor), copy.deepcopy(agent.critic)
        self.target_critic = copy.deepcopy(agent.target_critic)
        self.log_alpha = nn.Parameter(agent.log_alpha.detach().clone())
        self.actor_adam = torch.optim.Adam(self.actor.parameters(), RATES["policy_lr"])
        self.critic_adam = torch.optim.Adam(self.critic.parameters(), RATES["q_lr"])
        self.alpha_adam = torch.optim.Adam([self.log_alpha], RATES["alpha_lr"])

    def act(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.actor.net(obs + SHIFT).split(ACTION_DIM, dim=1)
        std = torch.exp(-1.5 + 3.5 * torch.tanh(log_std / 3.5))
        base = Independent(Normal(3 * torch.tanh(mean / 3), std), 1)
        policy = TransformedDistribution(base, TanhTransform(cache_size=1))
        action = policy.rsample()
        return action, policy.log_prob(action)

    def update(self, batch: cup.Batch) -> dict[str, Tensor]:
        obs, next_obs, action, reward, terminated, *_ = batch
        alpha = self.log_alpha.detach().exp()
        with torch.no_grad():
            next_action, next_log_prob = self.act(next_obs)
            next_value = torch.min(*q(self.target_critic, next_obs, next_action))
            next_value = next_value - alpha * next_log_prob
            target = reward + GAMMA * (1 - terminated) * next_value
        q1, q2 = q(self.critic, obs, action)
        assert q1.shape == target.shape == (BATCH,)  # a broadcast would mix states
        critic_loss = ((q1 - target) ** 2).mean() + ((q2 - target) ** 2).mean()
        minimise(critic_loss, self.critic_adam)
        new_action, log_prob = self.act(obs)
        actor_loss = (alpha * log_prob - torch.min(*q(self.critic, obs, new_action))).mean()
        minimise(actor_loss, self.actor_adam)
        entropy = -log_prob.detach().mean()
        minimise(self.log_alpha.exp() * (entropy + ACTION_DIM), self.alpha_adam)
        with torch.no_grad():
            networks = self.target_critic.parameters(), self.critic.parameters()
            for old, new in zip(*networks, strict=True):
                old.copy_((1 - TAU) * old + TAU * new)
        losses = {"loss/critic": critic_loss.detach(), "loss/actor": actor_loss.detach()}
        return losses | {"alpha": alpha, "entropy": entropy}


@pytest.mark.usefixtures("double_precision")
def test_without_sources_it_is_textbook_sac():
    """In what is learnt and what is logged only rounding differs; no extra random draws."""
    agent = make_agent(init_alpha=0.3)
    assert same(copies(agent.critic), agent.target_critic)
    assert agent.log_alpha.exp().item() == pytest.approx(0.3)
    for network in (agent.actor, agent.critic, agent.target_critic):
        network.standardize.shift.fill_(SHIFT)
    sac, before = TextbookSAC(agent), sac_parameters(agent)
    logged, draws = [], []
    for learner in (agent, sac):
        torch.manual_seed(1)
        logged.append([learner.update(make_batch(seed)) for seed in range(UPDATES)])
        draws.append(torch.rand(1))
    torch.testing.assert_close(sac_parameters(agent), sac_parameters(sac), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(*logged, rtol=1e-6, atol=1e-8)  # the same names, the same numbers
    assert torch.equal(*draws)
    assert not any(map(torch.equal, before, sac_parameters(agent)))


def test_actions_in_the_environment_are_sampled_from_the_policy():
    agent, obs = make_agent(), torch.randn(1, OBS_DIM)
    pre_tanh = agent.act(obs.expand(20_000, -1), [0] * 20_000).atanh()
    mean, log_std = agent.actor(obs[0])
    torch.testing.assert_close(pre_tanh.mean(dim=0), mean.detach(), atol=0.01, rtol=0)
    torch.testing.assert_close(pre_tanh.std(dim=0), log_std.exp().detach(), atol=0, rtol=0.03)


def test_guidance_concerns_the_actor_alone():
    agents = make_agent(2, beta2=1.0), make_agent()
    for agent, num_sources in zip(agents, (2, 0)):
        torch.manual_seed(1)
        agent.update(make_batch(0, num_sources))
    guided, sac = (sac_parameters(agent) for agent in agents)
    in_actor = len(list(agents[0].actor.parameters()))
    assert not any(map(torch.equal, guided[:in_actor], sac[:in_actor]))
    assert all(map(torch.equal, guided[in_actor:], sac[in_actor:]))


# ---- networks ------------------------------------------------------------------------------------
def test_twin_layers_start_as_linear_layers_do():
    torch.manual_seed(1)
    layer, bound = cup.TwinLinear(100, 200), 100**-0.5
    for parameter in (layer.weight, layer.bias):
        assert parameter.abs().max() <= bound
        uniform = bound / math.sqrt(3)  # its standard deviation
        assert parameter.std().item() == pytest.approx(uniform, rel=0.1)


def test_networks_see_standardised_observations():
    """Mean 0 and standard deviation 1, at most tenfold; what was always 0 comes as it is."""
    agent = make_agent(buffer_size=500)
    obs = torch.randn(500, OBS_DIM) * torch.linspace(0.5, 5, OBS_DIM) + 3
    obs[:, 0], obs[:, 1] = 0, 7.0  # not seen yet, and something that never moves
    agent.store(obs, torch.zeros(500, ACTION_DIM), obs, torch.zeros(500), torch.zeros(500))
    agent.fit_standardization()
    for network in (agent.actor, agent.critic, agent.target_critic):
        seen = network.standardize(obs)
        assert (seen[:, :2].abs() < 1e-4).all()
        assert seen[:, 2:].mean(dim=0).abs().max() < 1e-4
        assert (seen[:, 2:].std(dim=0, correction=0) - 1).abs().max() < 1e-4
        zero, one = network.standardize(torch.tensor([[0.0] * OBS_DIM, [1.0] * OBS_DIM]))
        assert (one - zero)[:2].tolist() == pytest.approx([1, 10], rel=1e-4)
