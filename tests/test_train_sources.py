"""train_sources.py: trains, tests, ships, and starts nothing twice."""

import subprocess
import sys
from pathlib import Path

import pytest

import cup
import train_sources as script

ROOT = Path(__file__).parents[1]


def train_sources(directory: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "train_sources.py", "--test-episodes", "4"]
    command += ["--output-dir", "out", "--runs-dir", "runs", *arguments]
    options = {"cwd": directory, "capture_output": True, "text": True}
    return subprocess.run(command, timeout=300, check=False, **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """reach-v2, given up after a few updates."""
    directory = tmp_path_factory.mktemp("sources")
    flags = ["--env-ids", "reach-v2", "--total-timesteps", "8100"]
    result = train_sources(directory, *flags)
    assert result.returncode == 0, result.stderr
    assert "wrote out/reach-v2.pt: success" in result.stdout
    return directory


def test_the_file_says_where_it_comes_from(trained):
    actor = cup.load_policy(trained / "out/reach-v2.pt")
    assert actor.about["env_id"] == "reach-v2"
    assert actor.about["step"] == 8112  # whole steps of 16 environments
    assert actor.about["eval_episodes"] == 4
    assert actor.about["success_rate"] in (0, 0.25, 0.5, 0.75, 1)
    assert actor.about["sources"] == []
    assert actor.standardize.scale.min() == 0  # observations that reach-v2 leaves empty
    assert (trained / "runs/source__reach-v2__1/checkpoint.pt").exists()


def test_what_is_finished_is_skipped(trained):
    before = (trained / "out/reach-v2.pt").read_bytes()
    result = train_sources(trained, "--env-ids", "reach-v2")
    assert result.returncode == 0, result.stderr
    assert "finished: out/reach-v2.pt" in result.stdout
    assert (trained / "out/reach-v2.pt").read_bytes() == before


def test_a_policy_that_passes_by_luck_is_not_shipped(tmp_path, monkeypatch):
    """The first of many policies to pass a test is often a lucky one: it has a second."""
    directories = {"output_dir": tmp_path / "out", "runs_dir": tmp_path}
    task = script.Task(script.Args(target_success=0.9, **directories), "reach-v2")
    task.run_dir.mkdir()
    asked = []

    def score(actor, goals):
        asked.append(goals)
        return {"success_rate": results.pop(0), "sampled_success_rate": 0.0}

    def test_at(step):
        actor = cup.policy_file(cup.Actor(39, 4, (8,)), step=step)
        cup.save(actor, task.run_dir / "policy.pt")
        return task.test(last=False)

    monkeypatch.setattr(task, "score", score)
    results = [0.8]
    assert not test_at(100)
    results = [0.96, 0.88]
    assert not test_at(200)
    assert not task.policy.exists()
    results = [0.92, 0.94]
    assert test_at(300)
    assert asked == [100, 200, 250, 300, 350]  # 50 goals each, no goal twice
    assert cup.load_policy(task.policy).about["step"] == 300
    # of the second test: the first was passed to get there
    assert cup.load_policy(task.policy).about["success_rate"] == 0.94


def test_an_unknown_task_is_a_sentence(tmp_path):
    result = train_sources(tmp_path, "--env-ids", "rech-v2")
    assert result.returncode != 0
    assert "did you mean reach-v2" in result.stderr
    assert "Traceback" not in result.stderr
