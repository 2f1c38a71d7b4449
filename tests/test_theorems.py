"""Theorems 1 and 2 of the paper, on random Markov decision processes, with cup.py's functions.

States and actions are few, so everything is exact: soft values solve a linear system, and a policy
is an urn. Per state it holds URN actions, one of which is drawn. The mean of cup.py's estimates
over all actions of the urn is then the expectation itself.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch

import cup

STATES, ACTIONS, SOURCES, URN = 5, 4, 3, 12


@dataclass
class MDP:
    reward: np.ndarray  # (states, actions)
    transition: np.ndarray  # (states, actions, next states)
    gamma: float
    alpha: float  # entropy weight; 0 makes all values "hard" (Appendix B.3)

    def values(self, policy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """V (states,) and Q (states, actions) of a policy, likewise; Eqs. 1 and 2."""
        reward = (policy * self.reward).sum(axis=1) + self.alpha * entropy(policy)
        transition = np.einsum("sa,sat->st", policy, self.transition)
        v = np.linalg.solve(np.eye(len(reward)) - self.gamma * transition, reward)
        return v, self.reward + self.gamma * self.transition @ v


def random_mdp(rng: np.random.Generator, alpha: float) -> MDP:
    reward = rng.uniform(-1, 1, (STATES, ACTIONS))
    transition = rng.dirichlet(np.full(STATES, 0.3), (STATES, ACTIONS))
    return MDP(reward, transition, rng.choice([0.5, 0.8, 0.95]), alpha)


def entropy(policy: np.ndarray) -> np.ndarray:
    """H(pi(.|s)), (states,)."""
    return -(policy * np.log(np.where(policy > 0, policy, 1))).sum(axis=1)


def advantage_in_cup(urns: np.ndarray, q: np.ndarray, policies: np.ndarray, alpha: float):
    """Eq. 4 for every state and candidate, by cup.py; (states, SOURCES + 1)."""
    state, candidate = np.arange(STATES)[:, None], np.arange(SOURCES + 1)
    log_prob = np.log(policies[state, candidate, urns])
    # (URN * states, candidates): every action of the urns once
    draws = (torch.tensor(draw).flatten(0, 1) for draw in (q[state, urns], log_prob))
    return cup.expected_advantage(*draws, alpha)[0].view(URN, STATES, -1).mean(dim=0)


@cache
def guided(seed: int, alpha: float, epsilon: float) -> tuple:
    """An MDP, V of the target policy, cup.py's guidance policy, the worst candidate at every state.

    Q is wrong by epsilon (Eq. 6): too high where the worst candidate is likelier than the target
    policy, else too low. The last item is the index of the guidance policy (states,)."""
    rng, state = np.random.default_rng(seed), np.arange(STATES)
    mdp, size = random_mdp(rng, alpha), (STATES, SOURCES + 1)
    # actions (URN, states, SOURCES + 1) of the sources and, last, of the target policy
    favourite, is_favourite = rng.integers(ACTIONS, size=size), rng.random((URN, *size)) < 0.5
    urns = np.where(is_favourite, favourite, rng.integers(ACTIONS, size=(URN, *size)))
    policies = (urns[..., None] == np.arange(ACTIONS)).mean(axis=0)  # pi(a|s), ACTIONS last
    v_target, q = mdp.values(policies[:, -1])
    worst = policies[state, advantage_in_cup(urns, q, policies, alpha).argmin(dim=1)]
    q = q + epsilon * np.sign(worst - policies[:, -1])
    advantage = advantage_in_cup(urns, q, policies, alpha)
    chosen = cup.guidance_policy(advantage).numpy()  # Eq. 7
    return mdp, v_target, policies[state, chosen], policies[state, advantage.argmin(dim=1)], chosen


def near(policy: np.ndarray, step: float, seed: int) -> np.ndarray:
    """A policy that is so far from `policy` in a random direction."""
    weight = policy * np.exp(step * np.random.default_rng(seed).normal(size=policy.shape))
    return weight / weight.sum(axis=1, keepdims=True)


def bound(mdp, v_target, new, guidance, reference, epsilon: float) -> np.ndarray:
    """Right-hand side of Eq. 10, (states,), with the entropy difference to `reference`.

    The paper's sqrt(2 ln 2 delta) has delta in bits; this KL is in nats, as cup.py's is."""
    ratio = np.divide(new, guidance, out=np.ones_like(new), where=new > 0)
    delta = (new * np.log(ratio)).sum(axis=1).max()  # Eq. 9
    r_max, h_max = np.abs(mdp.reward).max(), entropy(new).max()
    h_difference = np.abs(entropy(reference) - entropy(new)).max()
    far = math.sqrt(2 * max(delta, 0)) * (r_max + mdp.alpha * h_max)
    slack = 2 * epsilon + mdp.alpha * h_difference
    return v_target - far / (1 - mdp.gamma) ** 2 - slack / (1 - mdp.gamma) - 1e-9  # rounding


@pytest.mark.parametrize("step", [0.0, 0.01, 0.1, 1.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_theorems_1_and_2(alpha: float, epsilon: float, step: float):
    """A policy near the guidance policy keeps above Eq. 10; with step 0 that is Eq. 8.

    The bound can be missed: a policy near the worst candidate does, if step and epsilon are small.
    """
    improved, violated, all_chosen = 0, 0, set()
    for seed in range(50):
        mdp, v_target, policy, worst, chosen = guided(seed, alpha, epsilon)
        new, bad = near(policy, step, seed), near(worst, step, seed)
        v_new, v_bad = mdp.values(new)[0], mdp.values(bad)[0]
        assert (v_new >= bound(mdp, v_target, new, policy, policy, epsilon)).all()
        violated += (v_bad < bound(mdp, v_target, bad, worst, worst, epsilon)).any()
        improved += (v_new > v_target).all()
        all_chosen |= set(chosen)
    assert all_chosen == set(range(SOURCES + 1))
    assert improved >= 25 or step > 0
    assert violated >= 25 or epsilon > (0.05 if step == 0 else 0) or step > 0.01


def test_theorem_2_needs_the_entropy_of_the_guidance_policy():
    """In print, Eq. 10 has |H(old target) - H(new target)|; with that it can fail.

    One state, no future, two actions with rewards 1 and -1, alpha = 1.5. The old target policy
    takes the first, a new one the second. The guidance policy is a coin, ln 2 away from the new
    one: its soft value is 1.5 ln 2 = 1.04, the old target's 1. No target has any entropy, yet the
    new one loses more than Eq. 10 allows."""
    mdp = MDP(np.array([[1.0, -1.0]]), np.ones((1, 2, 1)), gamma=0.0, alpha=1.5)
    coin, old, new = (np.array([p]) for p in ([0.5, 0.5], [1.0, 0.0], [0.0, 1.0]))
    v_coin, v_old, v_new = (mdp.values(policy)[0] for policy in (coin, old, new))
    as_printed, as_proven = (bound(mdp, v_old, new, coin, h, 0.0) for h in (old, coin))
    assert v_coin > v_old and as_proven <= v_new < as_printed
