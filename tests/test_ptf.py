"""PTF: the equations of its options, its clock, what is SAC and what is not."""

import pytest
import torch
from by_hand import assert_follows, copies, random_batch
from torch.distributions import Normal, kl_divergence

import cup
from baselines import ptf

OBS_DIM, ACTION_DIM, BATCH, N = 4, 4, 16, 3


def make_agent(**changes) -> ptf.PTF:
    torch.manual_seed(7)
    sources = {f"source-{k}": cup.Actor(OBS_DIM, ACTION_DIM, (16, 16)) for k in range(N)}
    settings = {"num_envs": 2, "total_timesteps": 100_000, "buffer_size": 5_000} | changes
    args = ptf.Args(env_id="none", hidden_sizes=(16, 16), **settings)
    torch.manual_seed(0)
    return ptf.PTF(args, OBS_DIM, ACTION_DIM, sources)


def test_target_of_the_option_values():
    """Against a plain loop: the online network chooses, the target network scores."""
    torch.manual_seed(1)
    online, slow, beta, reward = *torch.randn(2, 6, N), torch.rand(6, N), torch.randn(6)
    target = ptf.option_target(reward, torch.eye(6)[5], online, slow, beta, 0.9)  # the last ends
    for i in range(6):
        best = slow[i, max(range(N), key=lambda option: online[i, option])]
        for o in range(N):
            follow = (1 - beta[i, o]) * slow[i, o] + beta[i, o] * best
            torch.testing.assert_close(target[i, o], reward[i] + (0.9 * follow if i < 5 else 0))


def test_advantage_of_going_on():
    """Q_o - max Q + xi, where xi is 0.8 of the gap between the two best; no gap, no xi."""
    value = torch.tensor([[3.0, 5.0, 1.0]])
    adaptive, fixed = (ptf.termination_advantage(value, xi)[0].tolist() for xi in (None, 0.001))
    assert adaptive == pytest.approx([-0.4, 1.6, -2.4])
    assert fixed == pytest.approx([-1.999, 0.001, -3.999], abs=1e-6)
    assert (ptf.termination_advantage(torch.randn(5, 1), None) == 0).all()


def test_a_source_is_compatible_with_a_fifth_of_its_own_actions():
    """0.683^4 = 0.217 with four dimensions; the action's tanh changes nothing."""
    torch.manual_seed(0)
    mean, log_std = torch.randn(2, 20_000, 1, 4) - 1
    action, _ = cup.squash(mean[:, 0], log_std[:, 0], torch.randn(20_000, 4))
    share = ptf.is_compatible(action, mean, log_std).float().mean()
    assert share.item() == pytest.approx(0.683**4, abs=0.01)
    assert ptf.is_compatible(torch.tanh(mean[:, 0]), mean, log_std).all()


def test_active_options_last_until_they_end():
    """beta = 0: from the beginning of the episode to the next; beta = 1: they end every time. The
    replay buffer has the option of every environment, none while the actions are random."""
    agent, active = make_agent(num_envs=200), []
    states = torch.randn(6, 200, OBS_DIM, dtype=torch.float64)
    for t in range(5):
        agent.options.net[-1].bias.data[N:] = 999.0 if t == 4 else -999.0  # beta is 1 or 0
        obs = states[t].clone()
        obs[:50] += t == 3  # a quarter begins an episode, and after a termination another
        if t > 0:
            agent.act(obs)
        ended = torch.zeros(200).index_fill(0, torch.arange(50, 100), float(t == 2))
        agent.store(obs, torch.zeros(200, ACTION_DIM), states[t + 1], torch.zeros(200), ended)
        active.append(agent.active.clone())
    assert (active[0] == -1).all() and (active[1] >= 0).all()
    lasts = [[torch.equal(active[t][part], active[t + 1][part]) for t in (1, 2, 3)]
             for part in (slice(50), slice(50, 100), slice(100, 200))]
    assert lasts == [[True, False, False], [True, False, False], [True, True, False]]
    assert torch.equal(agent.buffer.columns[-1][:1000], torch.cat(active))
    assert agent.steps == 1000  # the clock: every transition stored is a step


@pytest.mark.parametrize("steps, share", [(0, 0.0), (2_500, 0.5), (4_750, 0.95), (90_000, 0.95)])
def test_options_are_chosen_greedily_ever_more_often(steps: int, share: float):
    """By 0.001 in each 20,000th of the run, of 100,000 steps, up to 0.95."""
    agent, obs = make_agent(num_envs=4_000), torch.randn(4_000, OBS_DIM)
    agent.steps += steps
    agent.act(obs)
    best = agent.options(obs)[0].argmax(dim=1)
    expected = share + (1 - share) / N  # a random choice may be the best
    assert (agent.active == best).float().mean().item() == pytest.approx(expected, abs=0.03)


def test_the_losses():
    """c f(x) (1 - beta_o(s)) KL(pi_o || pi), o the option of the largest value at s.

    f(x) = (1 + tanh(3 - mu x)) / 2 is 1/2 at x = 3 / mu, and 0.731 at x = 0.25 with mu = 10."""
    agent = make_agent(c=20.0, policy_lr=1e-2)
    agent.steps += 25_000  # of 100,000
    assert ptf.fade(0.3, 10.0) == pytest.approx(ptf.fade(0.6, 5.0)) == pytest.approx(0.5)
    batch = random_batch(BATCH, OBS_DIM, ACTION_DIM, N)
    batch.source_mean[:5, 2] = batch.action[:5].atanh()  # with option 1 active, and 2 compatible
    batch = ptf.OptionBatch(*batch, torch.full((BATCH,), 1))
    with torch.no_grad():
        agent.target_options.net[-1].bias += torch.randn(2 * N)
        value, beta = agent.options(batch.obs)
        next_value, next_beta = agent.options(batch.next_obs)
        next_slow_value, _ = agent.target_options(batch.next_obs)
        mean, log_std = agent.actor(batch.obs)
    loss = 0.0
    for i in range(BATCH):
        best = value[i].argmax()
        source = Normal(batch.source_mean[i, best], batch.source_log_std[i, best].exp())
        kl = kl_divergence(source, Normal(mean[i], log_std[i].exp())).sum()
        loss += 20.0 * 0.7310586 * (1 - beta[i, best]) * kl / BATCH
    losses, minimize = {}, agent.minimize
    agent.minimize = lambda *of: losses.update({of[1]: of[0].detach()}) or minimize(*of)
    slow, info = copies(agent.target_options), agent.update(batch)
    torch.testing.assert_close(info["loss/kl"], loss)
    gap = value.amax(dim=1) - value.median(dim=1).values  # of three, the median is the second
    torch.testing.assert_close(info["option/gap"], gap.mean())

    # of the options: those that match or are active have values, the active ones may end
    end = batch.terminated
    y = ptf.option_target(batch.reward, end, next_value, next_slow_value, next_beta, gamma=0.99)
    learns = ptf.is_compatible(batch.action, batch.source_mean, batch.source_log_std)
    learns[:, 1] = True
    assert learns.all(dim=0).tolist() == [False, True, False] and learns[:5, 2].all()
    ending = (1 - end) * next_beta[:, 1] * ptf.termination_advantage(next_value, None)[:, 1]
    torch.testing.assert_close(info["loss/option"], (learns * (value - y) ** 2).sum() / BATCH)
    torch.testing.assert_close(info["loss/termination"], ending.mean())
    total = info["loss/option"] + info["loss/termination"]
    torch.testing.assert_close(losses[agent.option_optimizer], total)
    assert_follows(agent.target_options, slow, agent.options, 0.005)
    assert agent.update(batch)["guidance/kl"] < info["guidance/kl"]
    assert [info[f"option/active/source-{k}"].item() for k in range(N)] == [0, 1, 0]
    shares = [info[f"guidance/selected/source-{k}"].item() for k in range(N)]
    assert shares == [(value.argmax(dim=1) == k).float().mean().item() for k in range(N)]
