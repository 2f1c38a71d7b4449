"""Soft Actor-Critic, Eq. 3: CUP without sources is nothing else, bit for bit."""

import copy
import math
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution
from torch.optim import Adam

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
    """Random transitions; few terminate."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=rng)

    obs, next_obs = normal(BATCH, OBS_DIM), normal(BATCH, OBS_DIM)
    action, reward = torch.tanh(normal(BATCH, ACTION_DIM)), normal(BATCH)
    terminated = (normal(BATCH) > 1).to(reward.dtype)
    source_mean = normal(BATCH, num_sources, ACTION_DIM)
    source_log_std = -1 + 0.1 * normal(BATCH, num_sources, ACTION_DIM)
    return cup.Batch(obs, next_obs, action, reward, terminated, source_mean, source_log_std)


def parameters(agent) -> list[Tensor]:
    """All that is learned."""
    modules = agent.actor, agent.critic, agent.target_critic
    learnt = [p for module in modules for p in module.parameters()] + [agent.log_alpha]
    return [p.detach().clone() for p in learnt]


def equal(left, right) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.fixture
def double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ---- plain SAC, twice ----------------------------------------------------------------------------
class PlainSAC:
    """SAC as everyone writes it, from the same networks, with no thought of sources."""

    def __init__(self, agent: cup.Agent, adam=partial(Adam, lr=LEARNING_RATE, fused=True)):
        self.actor, self.critic = copy.deepcopy(agent.actor), copy.deepcopy(agent.critic)
        self.target_critic = copy.deepcopy(agent.target_critic)
        self.log_alpha = nn.Parameter(agent.log_alpha.detach().clone())
        learnt = list(self.actor.parameters()), list(self.critic.parameters()), [self.log_alpha]
        self.actor_optimizer, self.critic_optimizer, self.alpha_optimizer = map(adam, learnt)

    def act(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.actor(obs)
        return cup.squash(mean, log_std, torch.randn(mean.shape))

    def update(self, batch: cup.Batch) -> None:
        obs, next_obs, action, reward, terminated, *_ = batch
        alpha = self.log_alpha.detach().exp()

        with torch.no_grad():
            next_action, next_log_prob = self.act(next_obs)
            q1, q2 = self.target_critic(next_obs, next_action)
            next_value = torch.min(q1, q2) - alpha * next_log_prob
            target = reward + GAMMA * (1 - terminated) * next_value
        q1, q2 = self.critic(obs, action)
        critic_loss = ((q1 - target) ** 2).mean() + ((q2 - target) ** 2).mean()
        self.critic_optimizer.zero_grad()
        critic_loss.backward()
        self.critic_optimizer.step()

        new_action, log_prob = self.act(obs)
        q1, q2 = self.critic(obs, new_action)
        actor_loss = (alpha * log_prob - torch.min(q1, q2)).mean()
        self.actor_optimizer.zero_grad()
        actor_loss.backward()
        self.actor_optimizer.step()

        alpha_loss = -(self.log_alpha.exp() * (log_prob.detach().mean() - ACTION_DIM))
        self.alpha_optimizer.zero_grad()
        alpha_loss.backward()
        self.alpha_optimizer.step()

        with torch.no_grad():
            networks = self.target_critic.parameters(), self.critic.parameters()
            for old, new in zip(*networks, strict=True):
                old.copy_(torch.lerp(old, new, TAU))


class TextbookSAC(PlainSAC):
    """The same with everything from elsewhere: torch.distributions, Adam by hand.

    It rounds differently, so it is compared in double precision.
    """

    def __init__(self, agent: cup.Agent):
        super().__init__(agent, AdamByHand)

    def act(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.actor.net(obs).split(ACTION_DIM, dim=1)
        std = torch.exp(-1.5 + 3.5 * torch.tanh(log_std / 3.5))
        base = Independent(Normal(3 * torch.tanh(mean / 3), std), 1)
        policy = TransformedDistribution(base, TanhTransform(cache_size=1))
        action = policy.rsample()
        return action, policy.log_prob(action)


class AdamByHand:
    """Adam (Kingma and Ba, 2015), Algorithm 1."""

    def __init__(self, parameters: list[nn.Parameter]):
        self.parameters, self.t = parameters, 0
        self.m, self.v = ([torch.zeros_like(p) for p in parameters] for _ in range(2))

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        self.t += 1
        for p, m, v in zip(self.parameters, self.m, self.v, strict=True):
            m.copy_(0.9 * m + 0.1 * p.grad)
            v.copy_(0.999 * v + 0.001 * p.grad**2)
            m_hat, v_hat = m / (1 - 0.9**self.t), v / (1 - 0.999**self.t)
            p -= LEARNING_RATE * m_hat / (v_hat.sqrt() + 1e-8)


# ---- CUP without sources is SAC ------------------------------------------------------------------
@pytest.mark.parametrize(
    ("num_sources", "beta1", "guide"), [(0, 1.0, True), (2, 1.0, False), (2, 0.0, True)]
)
def test_without_guidance_it_is_sac_bit_for_bit(num_sources: int, beta1: float, guide: bool):
    """No sources, sources that may not guide or do not weigh: not one parameter differs, ever."""
    agent = make_agent(num_sources, beta1=beta1)
    sac, before = PlainSAC(agent), parameters(agent)
    torch.manual_seed(1)
    for seed in range(UPDATES):
        agent.update(make_batch(seed, num_sources), guide)
    next_draw = torch.rand(1)
    torch.manual_seed(1)
    for seed in range(UPDATES):
        sac.update(make_batch(seed))
    assert equal(parameters(agent), parameters(sac))
    assert torch.equal(next_draw, torch.rand(1))  # and no extra random draws
    assert not any(map(torch.equal, before, parameters(agent)))


@pytest.mark.parametrize("soft", [True, False])
def test_guidance_makes_a_difference(soft: bool):
    """The test above can fail."""
    agent, sac = make_agent(2, beta2=1.0, soft_advantage=soft), make_agent()
    torch.manual_seed(1)
    agent.update(make_batch(0, num_sources=2))
    torch.manual_seed(1)
    sac.update(make_batch(0))
    assert not equal(agent.actor.parameters(), sac.actor.parameters())
    # in the first update at least, guidance concerns the actor and nothing else
    assert equal(agent.critic.parameters(), sac.critic.parameters())
    assert torch.equal(agent.log_alpha, sac.log_alpha)


@pytest.mark.usefixtures("double_precision")
def test_it_is_textbook_sac():
    """Against torch.distributions and Adam by hand: only rounding differs."""
    agent = make_agent()
    sac = TextbookSAC(agent)
    for seed in range(UPDATES):
        for learner in (agent, sac):
            torch.manual_seed(seed)
            learner.update(make_batch(seed))
    torch.testing.assert_close(parameters(agent), parameters(sac), rtol=1e-6, atol=1e-8)


# ---- shapes: no silent broadcast -----------------------------------------------------------------
def test_networks_keep_batch_shapes():
    """One squeeze, in the critic: Q is (2, ...) and never (..., 1)."""
    agent = make_agent()
    for shape in [(BATCH,), (4, BATCH), (4, BATCH, 2)]:
        obs, action = torch.randn(*shape, OBS_DIM), torch.randn(*shape, ACTION_DIM)
        mean, log_std = agent.actor(obs)
        assert mean.shape == log_std.shape == (*shape, ACTION_DIM)
        assert agent.critic(obs, action).shape == (2, *shape)


def half(critic: cup.SoftQNetwork, which: int, obs: Tensor, action: Tensor) -> float:
    """Q1 or Q2 of one state and action, a layer at a time."""
    x = torch.cat([obs, action])
    for layer in critic.net:
        if isinstance(layer, cup.TwinLinear):
            x = x @ layer.weight[which] + layer.bias[which, 0]
        else:
            x = x.clamp(min=0)
    return x.item()


def test_critic_is_two_networks_side_by_side():
    agent, obs, action = make_agent(), torch.randn(BATCH, OBS_DIM), torch.randn(BATCH, ACTION_DIM)
    q = agent.critic(obs, action)
    alone = [[half(agent.critic, i, obs[b], action[b]) for b in range(BATCH)] for i in (0, 1)]
    torch.testing.assert_close(q, torch.tensor(alone), rtol=0, atol=1e-5)
    assert (q[0] - q[1]).abs().min() > 1e-6  # they are not one and the same


def test_twin_layers_start_as_linear_layers_do():
    torch.manual_seed(1)
    layer, bound = cup.TwinLinear(100, 200), 100**-0.5
    for parameter in (layer.weight, layer.bias):
        assert parameter.abs().max() <= bound
        uniform = bound / math.sqrt(3)  # its standard deviation
        assert parameter.std().item() == pytest.approx(uniform, rel=0.1)


def test_losses_against_a_loop_over_the_batch():
    """A (B, 1) - (B,) broadcast would mix states: here every state is on its own."""
    agent = make_agent(q_lr=0.0)
    obs, next_obs, action, reward, terminated, *_ = batch = make_batch(0)
    alpha = agent.log_alpha.exp().item()
    torch.manual_seed(1)
    next_noise, noise = torch.randn(2, BATCH, ACTION_DIM)

    def act(state: Tensor, noise: Tensor) -> tuple[Tensor, float]:
        mean, log_std = (x.tolist() for x in agent.actor(state))
        actions, log_prob = [], 0.0
        for m, s, eps in zip(mean, log_std, noise.tolist(), strict=True):
            actions.append(math.tanh(m + math.exp(s) * eps))
            log_prob -= eps**2 / 2 + s + math.log(2 * math.pi) / 2
            log_prob -= math.log(1 - actions[-1] ** 2)
        return torch.tensor(actions), log_prob

    def q(critic: nn.Module, state: Tensor, action: Tensor) -> tuple[float, float]:
        return half(critic, 0, state, action), half(critic, 1, state, action)

    critic_loss = actor_loss = entropy = 0.0
    for b in range(BATCH):
        next_action, log_prob = act(next_obs[b], next_noise[b])
        target = reward[b].item()
        if not terminated[b]:
            next_q = min(q(agent.target_critic, next_obs[b], next_action))
            target += GAMMA * (next_q - alpha * log_prob)
        for value in q(agent.critic, obs[b], action[b]):
            critic_loss += (value - target) ** 2 / BATCH
        new_action, log_prob = act(obs[b], noise[b])
        actor_loss += (alpha * log_prob - min(q(agent.critic, obs[b], new_action))) / BATCH
        entropy -= log_prob / BATCH

    torch.manual_seed(1)
    info = agent.update(batch)
    assert info["loss/critic"].item() == pytest.approx(critic_loss, rel=1e-5)
    assert info["loss/actor"].item() == pytest.approx(actor_loss, rel=1e-5, abs=1e-5)
    assert info["alpha"].item() == pytest.approx(alpha)
    assert info["entropy"].item() == pytest.approx(entropy, rel=1e-5)
    assert all(value.shape == () for value in info.values())
    assert {*agent.metrics} == info.keys()


# ---- bootstrapping, alpha, Polyak ----------------------------------------------------------------
def test_termination_stops_bootstrapping_and_a_time_limit_does_not():
    """Terminated: the target is the reward, whatever comes next. Else not."""
    batch, losses = make_batch(0), {}
    for terminated in (0.0, 1.0):
        for scale in (1.0, 10.0):
            changes = {"next_obs": scale * batch.next_obs}
            changes["terminated"] = torch.full((BATCH,), terminated)
            torch.manual_seed(1)
            info = make_agent().update(batch._replace(**changes))
            losses[terminated, scale] = info["loss/critic"].item()
    q = make_agent().critic(batch.obs, batch.action)
    only_reward = (q - batch.reward).square().sum().item() / BATCH
    assert losses[1.0, 1.0] == losses[1.0, 10.0] == pytest.approx(only_reward)
    assert abs(losses[0.0, 1.0] - losses[0.0, 10.0]) > 0.01
    assert abs(losses[0.0, 1.0] - only_reward) > 0.01


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("log_std_bias", [-1.0, 0.0])
def test_alpha_moves_the_entropy_towards_minus_the_action_dimension(log_std_bias: float):
    """Too little entropy raises alpha, too much lowers it; the gradient is Eq. 3's."""
    agent = make_agent()
    assert agent.target_entropy == -ACTION_DIM
    with torch.no_grad():
        agent.actor.net[-1].bias[ACTION_DIM:] = log_std_bias
    alpha = agent.log_alpha.exp().item()
    torch.manual_seed(1)
    entropy = agent.update(make_batch(0))["entropy"].item()
    assert agent.log_alpha.grad.item() == pytest.approx(alpha * (entropy + ACTION_DIM))
    assert (agent.log_alpha.exp().item() > alpha) == (entropy < -ACTION_DIM)
    assert (entropy < -ACTION_DIM) == (log_std_bias < 0)


@pytest.mark.parametrize("tau", [0.0, 0.005, 0.5, 1.0])
def test_polyak_step(tau: float):
    """target <- tau critic + (1 - tau) target, with the critic after its own step."""
    agent = make_agent(tau=tau, q_lr=0.01)
    for seed in range(2):
        before = [p.clone() for p in agent.target_critic.parameters()]
        agent.update(make_batch(seed))
        after, online = agent.target_critic.parameters(), agent.critic.parameters()
        for old, new, critic in zip(before, after, online, strict=True):
            torch.testing.assert_close(new, (tau * critic + (1 - tau) * old).detach())


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
    agent.standardize()
    for network in (agent.actor, agent.critic, agent.target_critic):
        seen = network.standardize(obs)
        assert (seen[:, :2].abs() < 1e-4).all()
        assert seen[:, 2:].mean(dim=0).abs().max() < 1e-4
        assert (seen[:, 2:].std(dim=0, correction=0) - 1).abs().max() < 1e-4
    seen = agent.actor.standardize(torch.tensor([[0.0] * OBS_DIM, [1.0] * OBS_DIM]))
    assert (seen[1, :2] - seen[0, :2]).tolist() == pytest.approx([1, 10], rel=1e-4)


def test_update_moves_every_network_and_only_by_its_own_optimiser():
    """A learning rate of zero freezes what it belongs to, and nothing else."""
    names = {"policy_lr": "actor.", "q_lr": "critic.", "alpha_lr": "log_alpha"}
    for frozen in names:
        agent = make_agent(**{frozen: 0.0})
        before = {name: p.detach().clone() for name, p in agent.named_parameters()}
        agent.update(make_batch(0))
        for learning_rate, name in names.items():
            old_new = [(before[k], p) for k, p in agent.named_parameters() if k.startswith(name)]
            assert all(torch.equal(*pair) for pair in old_new) == (learning_rate == frozen)


def test_state_dict_carries_everything_that_updates_change():
    """An agent loaded from it goes on exactly as the first one does."""
    first = make_agent()
    second = cup.Agent(first.args, OBS_DIM, ACTION_DIM, {})
    assert not equal(parameters(first), parameters(second))
    for seed in range(3):
        first.update(make_batch(seed))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for agent in (first, second):
        torch.manual_seed(1)
        for seed in range(3, 6):
            agent.update(make_batch(seed))
    assert equal(parameters(first), parameters(second))
