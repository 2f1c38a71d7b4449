"""Soft Actor-Critic, Eq. 3: CUP without guidance is nothing else."""

import copy
import math

import pytest
import torch
from by_hand import sac_parameters, random_batch
from torch import Tensor, nn
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

import cup

OBS_DIM, ACTION_DIM, BATCH, UPDATES = 5, 3, 32, 20
GAMMA, TAU, LEARNING_RATE = 0.99, 0.005, 3e-4


def make_agent(num_sources: int = 0, **changes) -> cup.Agent:
    """An agent that learns from `make_batch`; its sources only have names."""
    torch.manual_seed(0)
    rates = dict.fromkeys(("policy_lr", "q_lr", "alpha_lr"), LEARNING_RATE)
    args = cup.Args(**{"env_id": "x", "hidden_sizes": (32, 32)} | rates | changes)
    return cup.Agent(args, OBS_DIM, ACTION_DIM, {f"source-{n}": None for n in range(num_sources)})


def make_batch(seed: int, num_sources: int = 0) -> cup.Batch:
    return random_batch(BATCH, OBS_DIM, ACTION_DIM, num_sources, seed)


# ---- the update ----------------------------------------------------------------------------------
class AdamByHand:
    """Adam (Kingma and Ba, 2015), Algorithm 1."""

    def __init__(self, parameters: list[nn.Parameter]):
        self.parameters, self.t = parameters, 0
        self.m, self.v = ([torch.zeros_like(p) for p in parameters] for _ in range(2))

    def minimise(self, loss: Tensor) -> None:
        gradients = torch.autograd.grad(loss, self.parameters)
        self.t += 1
        with torch.no_grad():
            for p, m, v, g in zip(self.parameters, self.m, self.v, gradients, strict=True):
                m.copy_(0.9 * m + 0.1 * g)
                v.copy_(0.999 * v + 0.001 * g**2)
                m_hat, v_hat = m / (1 - 0.9**self.t), v / (1 - 0.999**self.t)
                p -= LEARNING_RATE * m_hat / (v_hat.sqrt() + 1e-8)


def q(critic: cup.SoftQNetwork, obs: Tensor, action: Tensor) -> list[Tensor]:
    """Q1 and Q2 (batch,), one network after the other, a layer at a time."""
    values = []
    for which in (0, 1):
        x = torch.cat([obs, action], dim=1)
        for layer in critic.net:
            if isinstance(layer, cup.TwinLinear):
                x = x @ layer.weight[which] + layer.bias[which, 0]
            else:
                x = x.clamp(min=0)
        values.append(x.squeeze(1))
    assert not torch.equal(*values)  # they are not one and the same
    return values


class TextbookSAC:
    """SAC with torch.distributions and Adam by hand, from the same networks."""

    def __init__(self, agent: cup.Agent):
        self.actor, self.critic = copy.deepcopy(agent.actor), copy.deepcopy(agent.critic)
        self.target_critic = copy.deepcopy(agent.target_critic)
        self.log_alpha = nn.Parameter(agent.log_alpha.detach().clone())
        learnt = list(self.actor.parameters()), list(self.critic.parameters()), [self.log_alpha]
        self.actor_adam, self.critic_adam, self.alpha_adam = map(AdamByHand, learnt)

    def act(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.actor.net(obs).split(ACTION_DIM, dim=1)
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
        self.critic_adam.minimise(critic_loss)
        new_action, log_prob = self.act(obs)
        actor_loss = (alpha * log_prob - torch.min(*q(self.critic, obs, new_action))).mean()
        self.actor_adam.minimise(actor_loss)
        entropy = -log_prob.detach().mean()
        self.alpha_adam.minimise(self.log_alpha.exp() * (entropy + ACTION_DIM))
        with torch.no_grad():
            networks = self.target_critic.parameters(), self.critic.parameters()
            for old, new in zip(*networks, strict=True):
                old.copy_((1 - TAU) * old + TAU * new)
        losses = {"loss/critic": critic_loss.detach(), "loss/actor": actor_loss.detach()}
        return losses | {"alpha": alpha, "entropy": entropy}


@pytest.mark.usefixtures("double_precision")
def test_without_sources_it_is_textbook_sac():
    """In what is learnt and what is logged only rounding differs; no extra random draws."""
    agent = make_agent()
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


def test_guidance_concerns_the_actor_alone():
    agents = make_agent(2, beta2=1.0), make_agent()
    for agent, num_sources in zip(agents, (2, 0)):
        torch.manual_seed(1)
        agent.update(make_batch(0, num_sources))
    guided, sac = (sac_parameters(agent) for agent in agents)
    in_actor = len(list(agents[0].actor.parameters()))
    assert not any(map(torch.equal, guided[:in_actor], sac[:in_actor]))
    assert all(map(torch.equal, guided[in_actor:], sac[in_actor:]))


@pytest.mark.parametrize("log_std_bias", [-1.0, 0.0])
def test_alpha_moves_the_entropy_towards_minus_the_action_dimension(log_std_bias: float):
    """Too little entropy raises alpha, too much lowers it."""
    agent = make_agent()
    with torch.no_grad():
        agent.actor.net[-1].bias[ACTION_DIM:] = log_std_bias
    alpha = agent.log_alpha.exp().item()
    entropy = agent.update(make_batch(0))["entropy"].item()
    assert (entropy < -ACTION_DIM) == (log_std_bias < 0)
    assert (agent.log_alpha.exp().item() > alpha) == (entropy < -ACTION_DIM)


def test_a_learning_rate_of_zero_freezes_its_network_alone():
    names = {"policy_lr": "actor.", "q_lr": "critic.", "alpha_lr": "log_alpha"}
    for frozen in names:
        agent = make_agent(**{frozen: 0.0})
        before = {name: p.detach().clone() for name, p in agent.named_parameters()}
        agent.update(make_batch(0))
        for learning_rate, name in names.items():
            old_new = [(before[k], p) for k, p in agent.named_parameters() if k.startswith(name)]
            assert all(torch.equal(*pair) for pair in old_new) == (learning_rate == frozen)


# ---- networks ------------------------------------------------------------------------------------
def test_twin_layers_start_as_linear_layers_do():
    torch.manual_seed(1)
    layer, bound = cup.TwinLinear(100, 200), 100**-0.5
    for parameter in (layer.weight, layer.bias):
        assert parameter.abs().max() <= bound
        uniform = bound / math.sqrt(3)  # its standard deviation
        assert parameter.std().item() == pytest.approx(uniform, rel=0.1)


def test_actor_bounds_are_soft():
    """Mean in (-3, 3), log-std in (-5, 2), and neither ever stops the gradient."""
    actor, obs = make_agent().actor, torch.randn(64, OBS_DIM)
    with torch.no_grad():
        actor.net[-1].weight *= 20
    mean, log_std = actor(obs)
    assert 2.5 < mean.abs().max() <= 3
    assert -5 <= log_std.min() < -4
    assert 1.5 < log_std.max() <= 2
    (mean.sum() + log_std.sum()).backward()
    assert (actor.net[-1].bias.grad != 0).all()


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
