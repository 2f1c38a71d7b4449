"""HAAR: the equations of its two levels, its segments, and a task for two skills."""

import torch
from by_hand import copies, same
from small_tasks import learn, score
from torch import Tensor

import cup
from baselines import haar

OBS_DIM, ACTION_DIM, BATCH, NUM_ENVS = 5, 2, 32, 2


def make_args(**changes) -> haar.Args:
    settings = {"env_id": "none", "hidden_sizes": (16, 16), "buffer_size": 5_000, "k": 3}
    return haar.Args(**(settings | {"num_envs": NUM_ENVS} | changes))


def make_agent(num_skills: int = 3, **changes) -> haar.HAAR:
    torch.manual_seed(0)
    actors = [cup.Actor(OBS_DIM, ACTION_DIM, (16, 8 + k)) for k in range(num_skills)]
    sources = {f"skill-{k}": actor.requires_grad_(False) for k, actor in enumerate(actors)}
    return haar.HAAR(make_args(**changes), OBS_DIM, ACTION_DIM, sources)


def make_steps(num_skills: int = 3) -> haar.Steps:
    """Random steps of random segments; some are last, some segments terminate."""
    obs, next_obs, first, last = torch.randn(4, BATCH, OBS_DIM)
    action, reward = torch.rand(BATCH, ACTION_DIM) * 2 - 1, torch.randn(BATCH)
    terminated, is_last = (torch.rand(2, BATCH) < 0.3).float()
    z = torch.randint(num_skills, (BATCH,)).float()
    return haar.Steps(obs, next_obs, action, reward, terminated, first, last, z, is_last)


# ---- equations -----------------------------------------------------------------------------------
def test_advantages_telescope():
    """gamma_h = 1: over an episode the A_h sum to return + k V(end) - k V(start)."""
    torch.manual_seed(0)
    k, rewards, value = 5, torch.randn(8, 5), torch.randn(9)
    for end in (0.0, 1.0):  # after a termination V(end) = 0
        terminated = end * torch.eye(8)[-1]
        low = haar.low_reward(rewards.mean(dim=1), terminated, value[:-1], value[1:], 1.0)
        expected = rewards.sum() + k * ((1 - end) * value[-1] - value[0])
        torch.testing.assert_close(k * low.sum(), expected)


def test_losses_of_the_high_level():
    """Against loops: y_h = R / k + gamma_h (1 - d) V_h(s_k), and SAC's loss of a categorical."""
    agent = make_agent(gamma_h=0.8)
    steps = make_steps()
    with torch.no_grad():
        for parameter in agent.high_target.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # another than the critic
        q = agent.high_critic(steps.first.expand(2, -1, -1))
        next_q = agent.high_target(steps.last.expand(2, -1, -1))
        log_prob, next_log_prob = map(agent.actor.high_log_prob, (steps.first, steps.last))
    critic_loss = actor_loss = 0.0
    for i in range(BATCH):
        value = sum(next_log_prob[i, z].exp() * next_q[:, i, z].min() for z in range(3))
        y = steps.mean_reward[i] + 0.8 * (1 - steps.terminated[i]) * value
        critic_loss += ((q[:, i, int(steps.z[i])] - y) ** 2).sum() / BATCH
        for z in range(3):  # alpha_h is 1
            loss = log_prob[i, z] - q[:, i, z].min()
            actor_loss += log_prob[i, z].exp() * loss / BATCH
    info = agent.update(steps)
    torch.testing.assert_close(info["loss/high_critic"], critic_loss)
    torch.testing.assert_close(info["loss/high_actor"], actor_loss)
    names = "loss/critic loss/actor alpha entropy loss/high_critic loss/high_actor high/alpha "
    names += "high/entropy high/value low/reward"
    assert info.keys() == {*names.split(), *(f"skill/selected/skill-{k}" for k in range(3))}


def test_the_low_level_is_sac_on_states_with_skills(monkeypatch):
    """What cup.Agent's update gets: reward A_h / k, the same z next, or pi_h's after the last."""
    agent = make_agent(gamma_h=0.8)
    with torch.no_grad():
        agent.actor.net[-1].weight.zero_()
        agent.actor.net[-1].bias.copy_(torch.tensor([-99.0, 99.0, -99.0]))  # pi_h picks 1
    steps = make_steps()
    with torch.no_grad():
        first, last = (agent.high_critic(x.expand(2, -1, -1))[:, :, 1].amin(dim=0)
                       for x in (steps.first, steps.last))
    given = []
    monkeypatch.setattr(cup.Agent, "update", lambda self, batch, guide: given.append(batch) or {})
    agent.update(steps)
    (batch,) = given
    for i in range(BATCH):
        reward = steps.mean_reward[i] + 0.8 * (1 - steps.terminated[i]) * last[i] - first[i]
        torch.testing.assert_close(batch.reward[i], reward)
        assert batch.terminated[i] == (steps.is_last[i] and steps.terminated[i])
        next_z = 1 if steps.is_last[i] else int(steps.z[i])
        assert torch.equal(batch.obs[i], torch.cat([steps.obs[i], torch.eye(3)[int(steps.z[i])]]))
        assert torch.equal(batch.next_obs[i], torch.cat([steps.next_obs[i], torch.eye(3)[next_z]]))


# ---- the actor -----------------------------------------------------------------------------------
def test_skills_begin_as_the_sources():
    """Also after `standardize`, which shows them what the sources ignored (scale 0)."""
    torch.manual_seed(0)
    source = cup.Actor(OBS_DIM, ACTION_DIM, (16, 16)).requires_grad_(False)
    source.standardize.scale[2:4] = 0
    source.standardize.shift[0] = 0.5
    agent = haar.HAAR(make_args(), OBS_DIM, ACTION_DIM, {"a": source, "b": source})
    obs, states = torch.randn(50, OBS_DIM), torch.randn(BATCH, OBS_DIM)
    for z in (0, 1):
        skill = agent.actor(agent.actor.with_skill(obs, torch.full((50,), z)))
        assert all(map(torch.equal, skill, source(obs)))
    agent.buffer.add(make_steps(num_skills=2)._replace(obs=states))
    agent.fit_standardization()
    assert all(map(torch.allclose, agent.actor(obs), source(obs)))
    skill = agent.actor.skills[0]
    assert (skill.standardize.scale != 0).all() and skill.standardize.shift[0] == 0.5
    agent.update(make_steps(num_skills=2))
    assert (skill.net[0].weight[:, 2:4] != 0).any()  # and it learns to look
    assert (source.net[0].weight != skill.net[0].weight).any()  # the source is as it was


def test_the_policy_takes_the_most_probable_skill():
    agent = make_agent()
    obs = torch.randn(40, OBS_DIM)
    best = agent.actor.high_log_prob(obs).argmax(dim=1)
    mean, log_std = agent.actor(obs)
    for i in range(40):
        expected = agent.actor.skills[best[i]](obs[i : i + 1])
        torch.testing.assert_close((mean[i : i + 1], log_std[i : i + 1]), expected)


def test_the_low_level_does_not_teach_the_high_level():
    """Whether skills learn or not, V_h and pi_h learn the same."""
    agents = make_agent(), make_agent(freeze_skills=True)
    steps = make_steps()
    before = copies(agents[0].actor.skills)
    for agent in agents:
        agent.update(steps)
    high = [copies(agent.high_critic, agent.high_target, agent.actor.net) for agent in agents]
    assert all(map(torch.equal, *high))
    assert torch.equal(agents[0].log_high_alpha, agents[1].log_high_alpha)
    assert not same(before, agents[0].actor.skills)
    assert same(before, agents[1].actor.skills)


def test_skills_wait_for_their_critic():
    """Before --guidance-starts the low critic learns, the skills and their alpha do not."""
    agent = make_agent()
    skills, critic = copies(agent.actor.skills), copies(agent.critic)
    alpha = agent.log_alpha.detach().clone()
    agent.update(make_steps(), guide=False)
    assert same(skills, agent.actor.skills) and not same(critic, agent.critic)
    assert torch.equal(agent.log_alpha, alpha)
    agent.update(make_steps(), guide=True)
    assert not same(skills, agent.actor.skills)
    assert not torch.equal(agent.log_alpha, alpha)


def test_a_skill_lasts_k_steps():
    agent = make_agent(num_envs=100, k=3)
    obs, chosen = torch.randn(100, OBS_DIM), []
    for t in range(6):
        agent.act(obs, [t] * 100)
        chosen.append(agent.z.clone())
    assert torch.equal(chosen[0], chosen[1]) and torch.equal(chosen[0], chosen[2])
    assert not torch.equal(chosen[2], chosen[3])
    assert torch.equal(chosen[3], chosen[5])
    agent.act(obs, [6] * 50 + [7] * 50)  # half are not at a boundary
    assert torch.equal(agent.z[50:], chosen[5][50:])


# ---- segments ------------------------------------------------------------------------------------
def test_segments_of_two_environments():
    """k = 3. The first is cut by a time limit after four steps, the second terminates after two."""
    agent = make_agent(k=3, num_envs=2)
    states = torch.arange(24.0).reshape(12, 2, 1).expand(-1, -1, OBS_DIM)
    obs, written = states[0], []
    for t in range(7):
        next_obs = states[t + 1]
        terminated = torch.tensor([0.0, t == 1])
        agent.act(obs, [t % 4, t if t < 2 else t - 2])
        written.append((obs, next_obs, agent.z.clone()))
        reward = torch.full((2,), float(t))
        agent.store(obs, torch.full((2, ACTION_DIM), t / 10), next_obs, reward, terminated)
        obs = next_obs.clone()
        if t == 3:
            obs[0] = -50.0  # the first environment begins another episode
        if t == 1:
            obs[1] = -60.0  # and so does the second
    buffer = agent.buffer
    rows = haar.Steps(*(column[: buffer.size] for column in buffer.columns))
    segments = [(0, [0, 1, 2]), (0, [3]), (0, [4, 5, 6]), (1, [0, 1]), (1, [2, 3, 4])]
    assert buffer.size == sum(len(steps) for _, steps in segments)
    for env, steps in segments:
        for t in steps:
            obs, next_obs, z = written[t]
            (i,) = (rows.obs == obs[env]).all(dim=1).nonzero().flatten()
            assert torch.equal(rows.next_obs[i], next_obs[env])
            assert torch.equal(rows.action[i], torch.full((ACTION_DIM,), t / 10))
            assert torch.equal(rows.first[i], written[steps[0]][0][env])
            assert torch.equal(rows.last[i], written[steps[-1]][1][env])
            assert rows.mean_reward[i] == sum(steps) / len(steps)
            assert rows.z[i] == z[env]
            assert rows.is_last[i] == (t == steps[-1])
            assert rows.terminated[i] == (env == 1 and steps == [0, 1])


# ---- a small task --------------------------------------------------------------------------------

# A point in the plane fetches a key on the right, then opens a door on the left; the state is
# where it is and whether it has the key. One source goes to the key, one to the door.
KEY, DOOR = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.0])


def near_the_middle(number: int) -> Tensor:
    return torch.cat([0.6 * torch.rand(number, 2) - 0.3, torch.zeros(number, 1)], dim=1)


def move(state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The next state, the reward (how far the next aim is, less 2 without the key), no end."""
    position = state[:, :2] + 0.1 * action
    to_key, to_door = (position - KEY).norm(dim=1), (position - DOOR).norm(dim=1)
    has_key = (state[:, 2] == 1) | (to_key < 0.3)
    reward = torch.where(has_key, -to_door, -2 - to_key)
    state = torch.cat([position, has_key.float().unsqueeze(1)], dim=1)
    return state, reward, torch.zeros(len(state))


def go_to(aim: Tensor, speed: float) -> cup.Actor:
    """A network whose mean is speed * (aim - position): ReLUs of the state and of its negative."""
    actor, weight = cup.Actor(3, 2, (6,)), torch.zeros(4, 3)
    weight[0, 0] = weight[1, 1] = -speed
    weights = {"0.weight": torch.cat([torch.eye(3), -torch.eye(3)]), "0.bias": torch.zeros(6)}
    weights["2.weight"] = torch.cat([weight, -weight], dim=1)
    weights["2.bias"] = torch.cat([speed * aim, torch.zeros(2)])
    actor.net.load_state_dict(weights)
    return actor.requires_grad_(False)


def test_two_skills_do_what_neither_does_alone():
    """Most of what the better one leaves to gain, whether the skills learn or are frozen.

    SAC, in as many updates, is behind the better source.
    """
    sources = {"key": go_to(KEY, 3.0), "door": go_to(DOOR, 3.0)}

    def both(state: Tensor):
        choice = zip(sources["key"](state), sources["door"](state), strict=True)
        return [torch.where(state[:, 2:] == 1, door, key) for key, door in choice]

    task = {"first_states": near_the_middle, "step": move}
    alone = max(score(source, **task) for source in sources.values())
    rates = {"policy_lr": 3e-3, "q_lr": 3e-3, "tau": 0.02, "gamma": 0.95, "gamma_h": 0.8}
    sizes = {"k": 5, "num_envs": 16, "buffer_size": 20_000, "hidden_sizes": (32, 32)}
    task |= {"updates": 250, "guidance_starts": 150, "standardize": True}
    for freeze_skills in (True, False):
        torch.manual_seed(1)
        args = make_args(freeze_skills=freeze_skills, **rates, **sizes)
        learnt = learn(haar.HAAR(args, 3, 2, sources), **task)
        assert learnt > alone + (score(both, near_the_middle, move) - alone) / 2
    torch.manual_seed(1)
    assert learn(cup.Agent(args, 3, 2, {}), **task) < alone
