"""train_sources.py: trains, tests, ships, goes on, starts nothing twice; clones a controller."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import cup
import train_sources as script
from program import metrics

ROOT = Path(__file__).parents[1]
RUN = "runs/source__small:Task-v0__1"
SHORT = "--total-timesteps", "8100"  # a few updates
SMALL_TASK = """
import gymnasium as gym
import numpy as np

class Task(gym.Env):  # move to a goal, which the first of three numbers says; the second is 0
    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.obs = np.array([self.np_random.uniform(-1, 1), 0, 0], np.float32)
        return self.obs, {}

    def step(self, action):
        self.obs = np.append(self.obs[:2], np.clip(self.obs[2:] + action, -1, 1))
        distance = float(abs(self.obs[2] - self.obs[0]))
        return self.obs, 1 - distance, False, False, {"success": distance < 0.05}

gym.register("Task-v0", Task, max_episode_steps=20)
"""


def start(directory: Path, *flags: str) -> subprocess.Popen:
    """Start `python train_sources.py ...` as a shell would; later flags override earlier ones."""
    (directory / "small.py").write_text(SMALL_TASK)
    command = [sys.executable, ROOT / "train_sources.py", "--env-ids", "small:Task-v0"]
    command += ["--test-episodes", "4", "--runs-dir", directory / "runs", "--output-dir", "out"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True}
    options["env"] = os.environ | {"PYTHONPATH": str(directory), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *flags], cwd=directory, text=True, **options)


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
    """Wait until it has ended, and so have its runs: they write to the same pipes."""
    stdout, stderr = process.communicate(timeout=400)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def train_sources(directory: Path, *flags: str) -> subprocess.CompletedProcess:
    return finish(start(directory, *flags))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The small task, given up after a few updates."""
    directory = tmp_path_factory.mktemp("sources")
    result = train_sources(directory, *SHORT)
    assert result.returncode == 0, result.stderr
    assert "wrote out/small:Task-v0.pt: success" in result.stdout
    return directory


def test_the_file_says_where_it_comes_from(trained):
    actor = cup.load_policy(trained / "out/small:Task-v0.pt")
    assert actor.about["env_id"] == "small:Task-v0"
    assert actor.about["step"] == 8112  # whole steps of 16 environments
    assert actor.about["eval_episodes"] == 4
    assert actor.about["success_rate"] in (0, 0.25, 0.5, 0.75, 1)
    assert actor.about["sampled_success_rate"] in (0, 0.25, 0.5, 0.75, 1)
    assert actor.about["return"] > 0
    assert actor.about["sources"] == []
    assert actor.standardize.scale.tolist()[1] == 0  # observations that the task leaves empty
    assert (trained / RUN / "checkpoint.pt").exists()


def test_what_is_finished_is_skipped(trained):
    before = (trained / "out/small:Task-v0.pt").read_bytes()
    result = train_sources(trained)
    assert result.returncode == 0, result.stderr
    assert "finished: out/small:Task-v0.pt" in result.stdout
    assert (trained / "out/small:Task-v0.pt").read_bytes() == before


def test_a_source_that_is_deleted_comes_back_from_its_run(trained):
    before = cup.load_policy(trained / "out/small:Task-v0.pt")
    (trained / "out/small:Task-v0.pt").unlink()
    result = train_sources(trained, *SHORT)
    assert result.returncode == 0, result.stderr
    assert "is finished" in result.stdout  # said by cup.py
    after = cup.load_policy(trained / "out/small:Task-v0.pt")
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
    result = train_sources(tmp_path, *SHORT)
    assert result.returncode == 0, result.stderr
    assert metrics(tmp_path / RUN) == metrics(trained / RUN)


def test_an_unknown_task_is_a_sentence(tmp_path):
    for flags in (), ("--from-controller",):
        result = train_sources(tmp_path, "--env-ids", "rech-v2", *flags)
        assert result.returncode == 2
        assert "Traceback" not in result.stderr
        assert all("rech-v2" in line for line in result.stderr.splitlines())


class TestRun:
    """A run whose policies come from the test."""

    @pytest.fixture(autouse=True)
    def run(self, tmp_path, monkeypatch):
        self.args = script.Args(target_success=0.9, output_dir=tmp_path, runs_dir=tmp_path)
        self.run_dir = tmp_path / "source__reach-v2__1"
        self.run_dir.mkdir()
        self.asked, self.results = [], []
        monkeypatch.setattr(script, "score", self.score)

    def score(self, args, env_id, actor, first_episode):
        self.asked.append(first_episode)
        about = {"success_rate": self.results.pop(0), "sampled_success_rate": 0.5}
        return about | {"eval_episodes": 50}

    def write_policy(self, step):
        content = cup.policy_content(cup.Actor(39, 4, (8,)), step=step)
        cup.save(content, self.run_dir / "policy.pt")

    def test_a_policy_that_passes_by_luck_is_not_shipped(self):
        """The first of many policies to pass a test is often a lucky one: it has a second."""

        def passes(step, *results):
            self.write_policy(step)
            self.results = list(results)
            return script.test(self.args, "reach-v2", self.run_dir)

        assert not passes(100, 0.8)
        assert not passes(200, 0.96, 0.88)
        assert not passes(300, 0.7)
        best = cup.load_policy(self.run_dir / "best.pt")
        assert (best.about["step"], best.about["success_rate"]) == (200, 0.88)
        assert passes(400, 0.92, 0.94)
        assert self.asked == [100, 200, 250, 300, 400, 450]  # 50 goals each, no goal twice
        best = cup.load_policy(self.run_dir / "best.pt")
        # of the second test: the first was passed to get there
        assert (best.about["step"], best.about["success_rate"]) == (400, 0.94)

    def test_training_ends_with_the_policy_that_passes(self, monkeypatch):
        forever = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        monkeypatch.setattr(script.subprocess, "Popen", lambda *_, **__: forever)
        task = script.train(self.args, "reach-v2")
        rows = "step,eval/return,eval/success_rate\n"
        source = self.args.output_dir / "reach-v2.pt"
        # (success of an evaluation, results of the tests that follow)
        for k, (rate, results) in enumerate([(1.0, []), (0.75, []), (1.0, [])]):
            rows += f"{k + 1}00,5.0,{rate}\n{k + 1}50,,\n"
            (self.run_dir / "metrics.csv").write_text(rows)
            self.write_policy((k + 1) * 100)
            next(task)  # 1.0 alone, then 0.875 and 0.875 on average
        assert self.asked == [] and forever.poll() is None
        rows += "400,5.0,0.875\n"
        (self.run_dir / "metrics.csv").write_text(rows)
        self.write_policy(400)
        self.results = [0.88]
        next(task)
        next(task)  # the same policy has no second try
        assert self.asked == [400] and not source.exists()
        rows += "500,5.0,1.0\n"
        (self.run_dir / "metrics.csv").write_text(rows)
        self.write_policy(500)
        self.results = [0.92, 0.9]
        assert next(task, "done") == "done"
        assert forever.poll() is not None
        assert cup.load_policy(source).about["step"] == 500

    def test_a_run_that_somebody_else_stops_is_not_given_up(self, monkeypatch):
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        monkeypatch.setattr(script.subprocess, "Popen", lambda *_, **__: ended)
        (self.run_dir / "metrics.csv").write_text("step,eval/return,eval/success_rate\n9,5.0,1\n")
        with pytest.raises(cup.UserError, match="stopped at step 9"):
            next(script.train(self.args, "reach-v2"))


@pytest.mark.filterwarnings("ignore:Constant")  # Meta-World says that it clips actions
def test_a_controller_becomes_a_source(tmp_path):
    """For this task a fraction of the episodes and updates will do."""
    torch.manual_seed(1)
    args = script.Args(output_dir=tmp_path, test_episodes=4)
    script.clone_controller(args, "drawer-close-v2", episodes=5, updates=1000)
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
