"""Theorems 1 and 2 of the paper, on random Markov decision processes, with cup.py's functions.

States and actions are few, so everything is exact: soft values solve a linear system, and a policy
is an urn. Per state it holds URN actions, one of which is drawn. The mean of cup.py's estimates
over all actions of the urn is then the expectation itself.
"""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

import cup

STATES, ACTIONS, SOURCES, URN = 5, 4, 3, 12
SEEDS = range(100)
ROUNDING = 1e-9


class MDP(NamedTuple):
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
    log = np.log(policy, out=np.zeros_like(policy), where=policy > 0)
    return -(policy * log).sum(axis=1)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p(.|s) || q(.|s)), (states,), in nats."""
    ratio = np.divide(p, q, out=np.ones_like(p), where=p > 0)
    return (p * np.log(ratio)).sum(axis=1)


def random_urns(rng: np.random.Generator) -> np.ndarray:
    """Candidate policies, the target policy last: actions (URN, states, SOURCES + 1).

    Every action is in every urn, so that no log-probability is infinite.
    """
    shape = URN - ACTIONS, STATES, SOURCES + 1
    favourite = rng.integers(ACTIONS, size=shape[1:])
    rest = np.where(rng.random(shape) < 0.7, favourite, rng.integers(ACTIONS, size=shape))
    each = np.broadcast_to(np.arange(ACTIONS)[:, None, None], (ACTIONS, *shape[1:]))
    return np.concatenate([each, rest])


def probabilities(urns: np.ndarray) -> np.ndarray:
    """pi(a|s) of every candidate, (states, candidates, actions)."""
    return (urns[..., None] == np.arange(ACTIONS)).mean(axis=0)


def advantage_in_cup(urns: np.ndarray, q: np.ndarray, alpha: float) -> torch.Tensor:
    """Eq. 4 for every state and candidate, by cup.py."""
    state, candidate = np.arange(STATES)[:, None], np.arange(SOURCES + 1)
    log_prob = torch.tensor(np.log(probabilities(urns))[state, candidate, urns])
    draws = zip(torch.tensor(q[state, urns]), log_prob)
    return torch.stack([cup.expected_advantage(*draw, alpha)[0] for draw in draws]).mean(dim=0)


class Guidance(NamedTuple):
    """An MDP, and what cup.py makes of it with a Q that is wrong by epsilon."""

    mdp: MDP
    v_target: np.ndarray
    chosen: np.ndarray  # index of the guidance policy, (states,)
    policy: np.ndarray  # the guidance policy, (states, actions)
    worst: np.ndarray  # the candidate with the smallest advantage at every state


def guidance(seed: int, alpha: float, epsilon: float, malicious: bool) -> Guidance:
    """The error of Q is nowhere larger than epsilon (Eq. 6).

    A malicious error raises Q where the worst candidate is likelier than the target policy.
    """
    rng, state = np.random.default_rng(seed), np.arange(STATES)
    mdp, urns = random_mdp(rng, alpha), random_urns(rng)
    candidates = probabilities(urns)  # (states, SOURCES + 1, actions)
    v_target, q = mdp.values(candidates[:, -1])
    error = rng.uniform(-epsilon, epsilon, q.shape)
    if malicious:
        worst = candidates[state, advantage_in_cup(urns, q, alpha).argmin(dim=1)]
        error = epsilon * np.sign(worst - candidates[:, -1])
    advantage = advantage_in_cup(urns, q + error, alpha)
    chosen = cup.guidance_policy(advantage).numpy()  # Eq. 7
    worst = candidates[state, advantage.argmin(dim=1)]
    return Guidance(mdp, v_target, chosen, candidates[state, chosen], worst)


@pytest.mark.parametrize("malicious", [False, True])
@pytest.mark.parametrize("epsilon", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_theorem_1(alpha: float, epsilon: float, malicious: bool):
    """Eq. 8: V of the guidance policy >= V of the target policy - 2 epsilon / (1 - gamma).

    The bound can be missed: the worst candidate misses it, if epsilon is small.
    """
    improved, violated, chosen = 0, 0, set()
    for seed in SEEDS:
        g = guidance(seed, alpha, epsilon, malicious)
        bound = g.v_target - 2 * epsilon / (1 - g.mdp.gamma) - ROUNDING
        v_guidance, _ = g.mdp.values(g.policy)
        assert (v_guidance >= bound).all()
        improved += (v_guidance > g.v_target).all()
        violated += (g.mdp.values(g.worst)[0] < bound).any()
        chosen |= set(g.chosen)
    assert chosen == set(range(SOURCES + 1))
    assert improved >= 50
    assert violated >= 50 or epsilon > 0.05


def near(policy: np.ndarray, delta: float, rng: np.random.Generator) -> np.ndarray:
    """A policy in a random direction from `policy`: delta nats away, or as far as that goes."""
    direction = rng.normal(size=policy.shape)

    def tilt(step: np.ndarray) -> np.ndarray:
        weight = policy * np.exp(step * direction)
        return weight / weight.sum(axis=1, keepdims=True)

    low, high = np.zeros((len(policy), 1)), np.full((len(policy), 1), 50.0)
    for _ in range(50):  # bisection
        step = (low + high) / 2
        too_far = kl(tilt(step), policy)[:, None] > delta
        low, high = np.where(too_far, low, step), np.where(too_far, step, high)
    return tilt(low)


def theorem_2_bound(mdp, v_target, new, reference, delta: float, epsilon: float) -> np.ndarray:
    """Right-hand side of Eq. 10, (states,), with the entropy difference to `reference`.

    The paper's sqrt(2 ln 2 delta) has delta in bits; cup.py's KL is in nats.
    """
    delta_bits = delta / math.log(2)
    r_max, h_max = np.abs(mdp.reward).max(), entropy(new).max()
    h_difference = np.abs(entropy(reference) - entropy(new)).max()
    far = math.sqrt(2 * math.log(2) * delta_bits) * (r_max + mdp.alpha * h_max)
    slack = 2 * epsilon + mdp.alpha * h_difference
    return v_target - far / (1 - mdp.gamma) ** 2 - slack / (1 - mdp.gamma)


@pytest.mark.parametrize("delta", [0.0, 1e-4, 1e-2, 0.5])
@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_theorem_2(alpha: float, epsilon: float, delta: float):
    """KL(new policy || guidance policy) <= delta keeps the new policy above Eq. 10.

    The entropy difference is that between the new and the guidance policy: see the last test.
    The bound can be missed: a policy near the worst candidate misses it, if delta is small.
    """
    violated = 0
    for seed in SEEDS:
        g = guidance(seed, alpha, epsilon, malicious=True)
        new = near(g.policy, delta, np.random.default_rng(seed))
        distance = kl(new, g.policy)
        assert (distance <= delta + ROUNDING).all()  # Eq. 9
        assert (distance >= 0.99 * delta - ROUNDING).any()
        bound = theorem_2_bound(g.mdp, g.v_target, new, g.policy, delta, epsilon)
        assert (g.mdp.values(new)[0] >= bound - ROUNDING).all()
        new = near(g.worst, delta, np.random.default_rng(seed))
        bound = theorem_2_bound(g.mdp, g.v_target, new, g.worst, delta, epsilon)
        violated += (g.mdp.values(new)[0] < bound).any()
    assert violated >= 50 or max(epsilon, delta) > 1e-4


def test_theorem_2_needs_the_entropy_of_the_guidance_policy():
    """In print, Eq. 10 has |H(old target) - H(new target)|; with that it can fail.

    One state, no future, two actions with rewards 1 and -1, alpha = 1.5. The old target policy
    always takes the first; the only source takes each with probability 1/2, and is the guidance
    policy because of its entropy. A new target that always takes the second is ln 2 away from it.
    Neither target has any entropy, yet the new one loses more than Eq. 10 allows. With
    |H(guidance) - H(new target)| the bound follows from Theorem 1 and Pinsker's inequality.
    """
    mdp = MDP(np.array([[1.0, -1.0]]), np.ones((1, 2, 1)), gamma=0.0, alpha=1.5)
    coin, old, new = (np.array([p]) for p in ([0.5, 0.5], [1.0, 0.0], [0.0, 1.0]))
    v_old, q = mdp.values(old)
    # one state twice: the source takes the first action, then the second; the target the first
    samples = torch.tensor(q[0])[torch.tensor([[0, 0], [1, 0]])]
    log_prob = torch.tensor([math.log(0.5), 0.0]).expand(2, 2)
    advantage, _ = cup.expected_advantage(samples, log_prob, mdp.alpha)
    assert cup.guidance_policy(advantage.mean(dim=0, keepdim=True)).item() == 0

    v_new, _ = mdp.values(new)
    delta = math.log(2)  # KL(new || coin), in nats
    as_printed = theorem_2_bound(mdp, v_old, new, old, delta, 0.0)
    as_proven = theorem_2_bound(mdp, v_old, new, coin, delta, 0.0)
    assert as_proven.item() <= v_new.item() < as_printed.item()
