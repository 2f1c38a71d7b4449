"""benchmark/compiled.py: the updates of cup.py, exact resume, a sentence without a compiler."""

import shutil

import pytest
import torch
from by_hand import random_batch
from program import PENDULUM, one_sentence, run_cup, same_result, succeed

import cup
from benchmark import compiled

# one layer, one source and the sizes of Pendulum everywhere: then there is less to compile
RUN = [*PENDULUM, "--hidden-sizes", 16, "--num-random-sources", 1, "--beta1", 3, "--beta2", 0.3]
RUN += ["--eval-interval", 200]
needs_a_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")


def after_updates(agent_class: type[cup.Agent], updates: int) -> tuple:
    """What every update returned; then the actor's weights and what the critics say."""
    torch.manual_seed(1)
    settings = {"hidden_sizes": (16,), "buffer_size": 500, "beta1": 3.0, "beta2": 0.3}
    args = cup.Args("x", sources=(), num_random_sources=1, **settings)
    agent = agent_class(args, 3, 1, cup.load_sources(args, 3, 1))
    batch = random_batch(500, 3, 1, num_sources=1)
    agent.buffer.add(batch)
    rows = [agent.update(agent.buffer.sample(8)) for _ in range(updates)]
    critics = [critic(batch.obs, batch.action) for critic in (agent.critic, agent.target_critic)]
    return rows, [*agent.actor.parameters(), *critics]


@needs_a_compiler
def test_twenty_updates_are_those_of_cup():
    """In single precision: then the compiled code serves the runs of the next test, too."""
    ours, eager = after_updates(compiled.Agent, 20), after_updates(cup.Agent, 20)
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)


@needs_a_compiler
def test_a_resumed_run_equals_an_unbroken_one(tmp_path):
    for name, end in [("unbroken", 600), ("resumed", 400), ("resumed", 600)]:
        run = [*RUN, "--run-dir", tmp_path / name, "--resume", "--total-timesteps", end]
        succeed(*run, script=compiled.__file__)
    assert same_result(tmp_path / "unbroken", tmp_path / "resumed")


def test_without_a_compiler_it_is_a_sentence(tmp_path):
    result = run_cup(*RUN, "--run-dir", tmp_path, script=compiled.__file__, PATH="", CXX="")
    assert one_sentence(result, "C\\+\\+ compiler"), result.stderr
