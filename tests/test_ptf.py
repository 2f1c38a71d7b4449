"""PTF: the equations of its options, what is SAC and what is not, and two small tasks."""

import pytest
import torch
from by_hand import copies, random_batch, same
from small_tasks import LEARNING, NUM_ENVS, learn, pilot, score, what_is_learnt
from torch.distributions import Independent, Normal, kl_divergence

import cup
from baselines import ptf

OBS_DIM, ACTION_DIM, BATCH, GAMMA = 4, 4, 16, 0.9


def make_args(**changes) -> ptf.Args:
    settings = {"env_id": "none", "hidden_sizes": (16, 16), "buffer_size": 5_000, "num_envs": 2}
    return ptf.Args(**(settings | changes))


def make_sources(num: int = 3) -> dict[str, cup.Actor]:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        actors = [cup.Actor(OBS_DIM, ACTION_DIM, (16, 16)) for _ in range(num)]
    return {f"source-{k}": actor.requires_grad_(False) for k, actor in enumerate(actors)}


def make_agent(num_sources: int = 3, **changes) -> ptf.PTF:
    torch.manual_seed(0)
    return ptf.PTF(make_args(**changes), OBS_DIM, ACTION_DIM, make_sources(num_sources))


def make_batch(agent: ptf.PTF, active: float = -1.0) -> ptf.OptionBatch:
    """Random transitions with the same option active in all."""
    batch = random_batch(BATCH, OBS_DIM, ACTION_DIM)
    dists = cup.query_sources(agent.sources, batch.obs, ACTION_DIM)
    return ptf.OptionBatch(*batch[:5], *dists, torch.full((BATCH,), active))


def set_termination(agent: ptf.PTF, logit: float) -> None:
    """Make beta_o the same everywhere: 0 for a very small logit, 1 for a very large one."""
    layer, num_options = agent.options.net[-1], len(agent.sources)
    with torch.no_grad():
        layer.weight[num_options:] = 0
        layer.bias[num_options:] = logit


# ---- the options ---------------------------------------------------------------------------------
@pytest.mark.parametrize("termination", [0.0, 0.3, 1.0])
def test_target_of_the_option_values(termination: float):
    """Against a plain loop: the online network chooses, the target network scores."""
    torch.manual_seed(1)
    online, slow, reward = torch.randn(6, 3), torch.randn(6, 3), torch.randn(6)
    terminated = torch.tensor([0.0, 0, 0, 0, 0, 1])
    beta = torch.full((6, 3), termination)
    target = ptf.option_target(reward, terminated, online, slow, beta, GAMMA)
    for i in range(6):
        best = slow[i, max(range(3), key=lambda option: online[i, option])]
        for option in range(3):
            follow = (1 - termination) * slow[i, option] + termination * best
            y = reward[i] + (GAMMA * follow if i < 5 else 0)
            torch.testing.assert_close(target[i, option], y)


def test_advantage_of_going_on():
    """Q_o - max Q + xi, where xi is 0.8 of the gap between the two best; no gap, no xi."""
    value = torch.tensor([[3.0, 5.0, 1.0]])
    adaptive = ptf.termination_advantage(value, None)
    torch.testing.assert_close(adaptive, torch.tensor([[-0.4, 1.6, -2.4]]))
    fixed = ptf.termination_advantage(value, 0.001)
    torch.testing.assert_close(fixed, torch.tensor([[-1.999, 0.001, -3.999]]))
    assert (ptf.termination_advantage(torch.randn(5, 1), None) == 0).all()


def test_a_source_is_compatible_with_a_fifth_of_its_own_actions():
    """0.683^4 = 0.217 with four dimensions; the action's tanh changes nothing."""
    torch.manual_seed(0)
    mean, log_std = torch.randn(20_000, 1, 4), torch.randn(20_000, 1, 4) - 1
    action, _ = cup.squash(mean[:, 0], log_std[:, 0], torch.randn(20_000, 4))
    share = ptf.is_compatible(action, mean, log_std).float().mean()
    assert share.item() == pytest.approx(0.683**4, abs=0.01)
    assert ptf.is_compatible(torch.tanh(mean[:, 0]), mean, log_std).all()


def test_only_compatible_and_active_options_learn():
    """Nothing fits and nothing is active: nothing changes. Else the heads of those options do."""
    agent = make_agent(option_lr=1e-2)
    batch = make_batch(agent)  # none is active
    alien = batch._replace(source_mean=batch.source_mean + 9)  # no action is near that
    before = copies(agent.options)
    agent.update(alien)
    assert same(before, agent.options)

    # option 1 is active: its value and its termination learn
    agent.update(alien._replace(option=torch.ones(BATCH)))
    changed = (agent.options.net[-1].bias != before[-1]).tolist()
    assert changed == [False, True, False, False, True, False]

    agent = make_agent(option_lr=1e-2)
    fits = torch.stack([alien.source_mean[:, 0], alien.source_mean[:, 1],
                        torch.atanh(batch.action)], dim=1)
    agent.update(batch._replace(source_mean=fits))  # option 2 is compatible: its value
    changed = (agent.options.net[-1].bias != before[-1]).tolist()
    assert changed == [False, False, True, False, False, False]


def test_active_options_last_until_they_end():
    """beta = 0: from the beginning of the episode to the next; beta = 1: they end every time."""
    agent = make_agent(num_envs=200)
    obs = torch.randn(200, OBS_DIM)
    assert (agent.active == -1).all()  # while the actions are random
    set_termination(agent, -99.0)
    agent.act(obs, [3] * 200)  # the first choice, in the middle of an episode
    first = agent.active.clone()
    assert (first >= 0).all()
    agent.act(obs, [4] * 200)
    assert torch.equal(agent.active, first)
    agent.act(obs, [0] * 100 + [5] * 100)  # half begin an episode
    assert not torch.equal(agent.active[:100], first[:100])
    assert torch.equal(agent.active[100:], first[100:])
    assert agent.episodes == 100
    set_termination(agent, 99.0)
    before = agent.active.clone()
    agent.act(obs, [6] * 200)
    assert not torch.equal(agent.active[100:], before[100:])


@pytest.mark.parametrize("episodes, share", [(0, 0.0), (1_000, 0.5), (10_000, 0.9)])
def test_options_are_chosen_greedily_ever_more_often(episodes: int, share: float):
    agent = make_agent(num_envs=4_000)
    agent.episodes += episodes - 4_000  # as many begin now
    obs = torch.randn(4_000, OBS_DIM)
    agent.act(obs, [0] * 4_000)
    best = agent.options(obs)[0].argmax(dim=1)
    expected = share + (1 - share) / 3  # a random choice may be the best
    assert (agent.active == best).float().mean().item() == pytest.approx(expected, abs=0.03)


# ---- the policy ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("c", "guidance_starts", "is_sac"), [(0.0, 0, True), (1.0, 10, True), (1.0, 0, False)]
)
def test_without_imitation_it_is_sac_bit_for_bit(c: float, guidance_starts: int, is_sac: bool):
    torch.manual_seed(0)
    args = make_args(sources=("none",), num_envs=NUM_ENVS)
    sac, agent = cup.Agent(args, OBS_DIM, ACTION_DIM, {}), make_agent(c=c, num_envs=NUM_ENVS)
    before = copies(agent.options)
    learnt = what_is_learnt(agent, updates=10, guidance_starts=guidance_starts)
    assert all(map(torch.equal, learnt, what_is_learnt(sac, updates=10))) == is_sac
    assert not any(map(torch.equal, before, agent.options.parameters()))  # they learn anyway


def test_the_losses():
    """c f(t) (1 - beta_o(s)) KL(pi_o || pi), o the option of the largest value at s."""
    agent = make_agent(c=2.0, mu=1e-2)
    agent.episodes += 250  # f = (1 + tanh(0.5)) / 2
    batch = make_batch(agent, active=1)
    with torch.no_grad():
        for p in agent.target_options.parameters():
            p += 0.1
        slow = copies(agent.target_options)
        value, beta = agent.options(batch.obs)
        next_value, next_beta = agent.options(batch.next_obs)
        next_slow_value, _ = agent.target_options(batch.next_obs)
        mean, log_std = agent.actor(batch.obs)
    loss = 0.0
    for i in range(BATCH):
        best = value[i].argmax()
        source = Normal(batch.source_mean[i, best], batch.source_log_std[i, best].exp())
        target = Normal(mean[i], log_std[i].exp())
        kl = kl_divergence(Independent(source, 1), Independent(target, 1))
        loss += 2.0 * 0.7310586 * (1 - beta[i, best]) * kl / BATCH
    info = agent.update(batch)
    torch.testing.assert_close(info["loss/kl"], loss)

    # of the options: those that match or are active have values, the active ones may end
    gamma = agent.args.gamma
    y = ptf.option_target(
        batch.reward, batch.terminated, next_value, next_slow_value, next_beta, gamma
    )
    learns = ptf.is_compatible(batch.action, batch.source_mean, batch.source_log_std)
    learns[:, 1] = True
    advantage = ptf.termination_advantage(next_value, None)
    ending = (1 - batch.terminated) * next_beta[:, 1] * advantage[:, 1]
    torch.testing.assert_close(info["loss/option"], (learns * (value - y) ** 2).sum() / BATCH)
    torch.testing.assert_close(info["loss/termination"], ending.mean())
    assert not same(slow, agent.target_options)
    names = "loss/critic loss/actor loss/kl loss/option loss/termination alpha entropy "
    names = {*(names + "guidance/weight guidance/kl option/termination").split()}
    for k in range(3):
        names |= {f"guidance/selected/source-{k}", f"option/match/source-{k}"}
    assert info.keys() == names
    shares = [info[f"guidance/selected/source-{k}"].item() for k in range(3)]
    assert sum(shares) == pytest.approx(1)


def test_the_policy_does_not_teach_the_options():
    """However strong the imitation, the option network and the critic learn the same."""
    agents = make_agent(c=0.0), make_agent(c=50.0)
    for agent in agents:
        torch.manual_seed(3)
        agent.update(make_batch(agent, active=1))
    learnt = [copies(agent.options, agent.target_options, agent.critic) for agent in agents]
    assert all(map(torch.equal, *learnt))
    assert not same(copies(agents[0].actor), agents[1].actor)


# ---- small tasks ---------------------------------------------------------------------------------
def test_options_learn_which_source_is_good():
    """On a line with its goal in the middle, from random actions: one source goes home, one away.

    With one dimension many actions are compatible.
    """

    def going(slope: float):
        return lambda obs: (slope * obs, torch.full_like(obs, -1.0))

    torch.manual_seed(0)
    learning = {"gamma": GAMMA, "option_lr": 5e-3, "tau": 0.05, "hidden_sizes": (32, 32)}
    args = make_args(c=0.0, num_envs=1_000, **learning)
    agent = ptf.PTF(args, 1, 1, {"away": going(2.0), "home": going(-2.0)})
    obs, action = 2 * torch.rand(2, 1_000, 1) - 1
    next_obs = obs + 0.2 * action
    agent.store(obs, action, next_obs, -next_obs.abs().squeeze(1), torch.zeros(1_000))
    for _ in range(120):
        agent.update(agent.buffer.sample(64))
    value, _ = agent.options(torch.tensor([[-1.0], [-0.5], [0.5], [1.0]]))
    assert (value[:, 1] > value[:, 0] + 0.1).all()


def learn_from_pilot(seed: int, c: float) -> float:
    torch.manual_seed(seed)
    agent = ptf.PTF(ptf.Args(env_id="none", c=c, seed=seed, **LEARNING), 4, 4, {"pilot": pilot})
    return learn(agent, updates=160)


def test_a_good_source_helps():
    """By more than half of what is left to gain without imitation."""
    best = score(pilot)
    for seed in range(2):
        without = best - learn_from_pilot(seed, c=0.0)
        assert best - learn_from_pilot(seed, c=1.0) < without / 2
