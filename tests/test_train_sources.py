"""train_sources.py: trains, tests, ships, goes on, starts nothing twice; clones a controller."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cup
import train_sources as script
from program import finish, metrics, start_cup

TASK = "faulty_envs:Grasp-v0"
RUN, SOURCE = f"runs/source__{TASK}__1", f"out/{TASK}.pt"
SHORT = "--total-timesteps", "8100"  # a few updates


def start(directory: Path, *flags: str) -> subprocess.Popen:
    """Start `python train_sources.py ...` as a shell would; later flags override earlier ones."""
    typed = ["--env-ids", TASK, "--test-episodes", "4", "--runs-dir", directory / "runs"]
    options = {"script": script.__file__, "cwd": directory, "start_new_session": True}
    return start_cup(*typed, "--output-dir", "out", *flags, **options)


def train_sources(directory: Path, *flags: str) -> str:
    """What it prints."""
    result = finish(start(directory, *flags))
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The small task, given up after a few updates."""
    directory = tmp_path_factory.mktemp("sources")
    assert f"wrote {SOURCE}: success" in train_sources(directory, *SHORT)
    return directory


def test_the_file_says_where_it_comes_from(trained):
    actor = cup.load_policy(trained / SOURCE)
    assert actor.about["env_id"] == TASK
    assert actor.about["step"] == 8112  # whole steps of 16 environments
    assert actor.about["eval_episodes"] == 4
    assert 4 * actor.about["success_rate"] in range(5)
    assert 4 * actor.about["sampled_success_rate"] in range(5)
    assert actor.about["return"] == 40
    assert actor.about["sources"] == []
    assert actor.standardize.scale.tolist()[3] == 0  # an observation that the task leaves empty
    assert (trained / RUN / "checkpoint.pt").exists()


def test_what_is_finished_is_skipped_and_comes_back_if_deleted(trained):
    whole, before = (trained / SOURCE).read_bytes(), cup.load_policy(trained / SOURCE)
    assert f"finished: {SOURCE}" in train_sources(trained)
    assert (trained / SOURCE).read_bytes() == whole
    (trained / SOURCE).unlink()
    assert "finished 8,112 steps" in train_sources(trained, *SHORT)  # said by cup.py
    after = cup.load_policy(trained / SOURCE)
    assert after.about == before.about
    assert torch.equal(after.net[0].weight, before.net[0].weight)


def test_what_is_stopped_goes_on(tmp_path, trained):
    """Ctrl-C, which a shell sends to a group of processes, and SIGTERM, which one gets."""
    about = tmp_path / RUN / "args.json"  # written when the run starts or goes on
    for kill, number in (os.killpg, signal.SIGINT), (os.kill, signal.SIGTERM):
        about.unlink(missing_ok=True)
        process = start(tmp_path, *SHORT)
        while not about.exists() and process.poll() is None:
            time.sleep(0.1)
        kill(process.pid, number)
        stopped = finish(process)
        assert stopped.returncode == 130, stopped.stderr
        assert "the same command goes on" in stopped.stdout
        assert (tmp_path / RUN / "checkpoint.pt").exists()
        assert not (tmp_path / "out").exists()
    train_sources(tmp_path, *SHORT)
    assert metrics(tmp_path / RUN) == metrics(trained / RUN)


def test_a_task_without_a_controller_is_a_sentence(tmp_path):
    result = finish(start(tmp_path, "--env-ids", "rech-v2", "--from-controller"))
    assert result.returncode == 2
    assert re.fullmatch(r"train_sources\.py: [^\n]*rech-v2[^\n]*\n", result.stderr)


def test_a_task_that_fails_leaves_the_others_alone(tmp_path):
    result = finish(start(tmp_path, *SHORT, "--env-ids", "rech-v2", TASK, "--workers", "2"))
    assert result.returncode == 2
    assert "train_sources.py: rech-v2 stopped at step 0" in result.stderr
    assert all("rech-v2" in line for line in result.stderr.splitlines())  # and no traceback
    assert f"wrote {SOURCE}" in result.stdout


# ---- when a policy passes ------------------------------------------------------------------------
@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run whose policies and whose tests' results come from here."""
    args = script.Args(target_success=0.9, output_dir=tmp_path, runs_dir=tmp_path)
    run_dir, asked, results = tmp_path / "source__reach-v2__1", [], []
    run_dir.mkdir()

    def score(args, env_id, actor, first_episode):
        asked.append(first_episode)
        about = {"success_rate": results.pop(0), "sampled_success_rate": 0.5}
        return about | {"eval_episodes": 50}

    def evaluated(step, rate, *tests):
        """The run writes a policy, of this success, which goes on to have these in its tests."""
        with open(run_dir / "metrics.csv", "a") as file:
            file.write(f"{step},5.0,{rate}\n{step + 50},,\n")
        cup.save(cup.policy_content(cup.Actor(39, 4, (8,)), step=step), run_dir / "policy.pt")
        results[:] = tests

    (run_dir / "metrics.csv").write_text("step,eval/return,eval/success_rate\n")
    monkeypatch.setattr(script, "score", score)
    return SimpleNamespace(args=args, dir=run_dir, asked=asked, evaluated=evaluated)


def python_that_runs(code: str, monkeypatch) -> subprocess.Popen:
    """Stands in for cup.py."""
    process = subprocess.Popen([sys.executable, "-c", code])
    monkeypatch.setattr(script.subprocess, "Popen", lambda *_, **__: process)
    return process


def test_training_ends_with_a_policy_that_passes_and_not_by_luck(run, monkeypatch):
    """The first of many policies to pass a test is often a lucky one: it has a second."""
    forever = python_that_runs("import time; time.sleep(600)", monkeypatch)
    task, source = script.train(run.args, "reach-v2"), run.args.output_dir / "reach-v2.pt"
    for step, rate in (100, 1.0), (200, 0.75), (300, 1.0):
        run.evaluated(step, rate)
        next(task)  # 1.0 alone, then 0.875 and 0.875 on average
    assert run.asked == []
    for step, rate, *tests in (400, 0.875, 0.8), (500, 1.0, 0.96, 0.88), (600, 1.0, 0.7):
        run.evaluated(step, rate, *tests)
        next(task)
        next(task)  # the same policy has no second try
    best = cup.load_policy(run.dir / "best.pt").about
    assert (best["step"], best["success_rate"]) == (500, 0.88)
    assert forever.poll() is None and not source.exists()
    run.evaluated(700, 1.0, 0.92, 0.94)
    assert next(task, "done") == "done"
    assert forever.poll() is not None
    best = cup.load_policy(source).about
    # of the second test: the first was passed to get there
    assert (best["step"], best["success_rate"]) == (700, 0.94)
    assert run.asked == [400, 500, 550, 600, 700, 750]  # 50 goals each, no goal twice


def test_when_the_target_is_lowered_the_policy_that_passes_is_the_source(run, monkeypatch):
    """Not the one that failed the old target with a better score in a single test."""
    python_that_runs("import time; time.sleep(600)", monkeypatch)
    task = script.train(run.args, "reach-v2")
    run.evaluated(100, 1.0)
    next(task)
    run.evaluated(200, 1.0, 0.89)
    next(task)
    run.args.target_success = 0.8
    run.evaluated(300, 1.0, 0.85, 0.82)
    assert next(task, "done") == "done"
    best = cup.load_policy(run.args.output_dir / "reach-v2.pt").about
    assert (best["step"], best["success_rate"]) == (300, 0.82)


def test_a_run_that_somebody_else_stops_is_not_given_up(run, monkeypatch):
    python_that_runs("", monkeypatch).wait()
    run.evaluated(9, 1.0)
    with pytest.raises(cup.UserError, match="stopped at step 9"):
        next(script.train(run.args, "reach-v2"))


# ---- controllers ---------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:Constant")  # Meta-World says that it clips actions
def test_a_controller_becomes_a_source(tmp_path):
    """For this task a fraction of the episodes and updates will do."""
    torch.manual_seed(1)
    args = script.Args(output_dir=tmp_path, test_episodes=4)
    controller = script.metaworld_controller("drawer-close-v2")
    script.clone_controller(args, "drawer-close-v2", controller, episodes=5, updates=1000)
    actor = cup.load_policy(tmp_path / "drawer-close-v2.pt")
    assert actor.about["env_id"] == "drawer-close-v2"
    assert actor.about["step"] == 5 * 500
    assert actor.about["success_rate"] == actor.about["sampled_success_rate"] == 1
    assert actor.about["return"] > 4000
    assert actor.standardize.scale.min() == 0  # observations that drawer-close-v2 leaves empty
    mean, log_std = actor(torch.randn(1000, 39))
    assert mean.abs().max() <= 3 and log_std.min() >= -1.5
    args = cup.Args("push-wall-v2", sources=(str(tmp_path / "drawer-close-v2.pt"),))
    assert list(cup.load_sources(args, 39, 4)) == ["drawer-close-v2"]


def test_an_episode_to_imitate_ends_where_the_task_does(tmp_path):
    """This task has no time limit, and terminates after 5 steps."""
    args = script.Args(output_dir=tmp_path, test_episodes=1)
    script.clone_controller(
        args, "faulty_envs:Unlimited-v0", lambda obs: 0 * obs[:1], episodes=3, updates=1
    )
    (written,) = tmp_path.glob("**/*.pt")
    assert cup.load_policy(written).about["step"] == 3 * 5
