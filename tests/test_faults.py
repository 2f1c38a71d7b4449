"""Nothing lost, nothing let in: runs that are killed, starved or fed garbage.

These are the short versions; the long ones are in benchmark/torture.py, and shared.
"""

import os
import pickle
import re
import resource
import shutil

import numpy as np
import pytest
import torch
import tyro
from program import (
    PENDULUM,
    SMALL,
    all_gone,
    finish,
    processes_of,
    run_cup,
    same_result,
    started_run,
    steps,
)

import cup
from benchmark import torture


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happens to."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert run_cup(*PENDULUM, "--run-dir", run_dir).returncode == 0
    return run_dir


@pytest.fixture
def endless():
    """Arguments of a run that is still going when the test is done with it."""
    return [*PENDULUM, "--total-timesteps", "10000000"]


def resumable(run_dir):
    """The step of a checkpoint that is whole and loads."""
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)["step"]


# ---------------------------------------- killed ---------------------------------------


def test_killed_anywhere_nothing_is_lost(whole, tmp_path):
    for interrupted, outcome in torture.kills(tmp_path, 4, PENDULUM, span=0.3):
        assert outcome == "resumed", interrupted
    run_dir = tmp_path / "killed"
    assert same_result(whole, run_dir)
    assert steps(run_dir) == list(range(20, 1001, 20))
    assert not list(run_dir.glob("*.tmp"))
    assert all_gone(run_dir)


def test_two_runs_on_one_directory(tmp_path, endless):
    run_dir = tmp_path / "run"
    first = started_run(run_dir, *endless)
    assert len(processes_of(run_dir)) > 1  # it and its workers, for `all_gone` to see
    second = run_cup(*endless, "--run-dir", run_dir)
    third = run_cup("--resume", run_dir)
    assert first.poll() is None  # neither disturbed it
    first.terminate()
    assert finish(first).returncode == 0
    assert (second.returncode, third.returncode) == (2, 2)
    assert "already exists" in second.stderr
    assert f"another run writes to {run_dir}" in third.stderr
    assert steps(run_dir) == sorted(set(steps(run_dir)))
    assert all_gone(run_dir)


# --------------------------------- full disk, lost disk --------------------------------


def test_full_disk(tmp_path):
    """No file may exceed 60 kB: there is room for the first checkpoints only."""

    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    run_dir = tmp_path / "run"
    result = run_cup(*PENDULUM, "--run-dir", run_dir, preexec_fn=small_disk)
    assert result.returncode == 1
    sentence = rf"cup\.py: cannot write {run_dir}/checkpoint\.pt \(.+\); .+ intact\n"
    assert re.fullmatch(sentence, result.stderr), result.stderr
    assert 0 < resumable(run_dir) < 1000
    assert not list(run_dir.glob("*.tmp"))
    assert all_gone(run_dir)
    assert run_cup("--resume", run_dir).returncode == 0  # the user made room


def test_run_directory_removed(tmp_path, endless):
    run_dir = tmp_path / "run"
    process = started_run(run_dir, *endless)
    shutil.rmtree(run_dir)
    result = finish(process)
    assert result.returncode == 1
    assert re.fullmatch(r"cup\.py: cannot write [^\n]+\n", result.stderr), result.stderr
    assert all_gone(run_dir)


# ----------------------------- environments that go wrong ------------------------------


@pytest.mark.parametrize(
    ("env_id", "sentence"),
    [
        ("Raises-v0", r"step 60: RuntimeError: the gripper fell off"),
        ("RaisesAtReset-v0", r"step 80: RuntimeError: the table is missing"),
        ("Dies-v0", r"step 60: .*died"),
        (
            "NotANumber-v0",
            r"environment failed at step 60: it returned NaN or infinity",
        ),
    ],
)
def test_environment_faults_end_the_run_with_a_checkpoint(tmp_path, env_id, sentence):
    run_dir = tmp_path / "run"
    arguments = ["--env-id", f"faulty_envs:{env_id}", "--sources", *SMALL]
    result = run_cup(*arguments, "--run-dir", run_dir)
    assert result.returncode == 1
    assert re.fullmatch(rf"cup\.py: .*{sentence}[^\n]*\n", result.stderr), result.stderr
    assert resumable(run_dir) == int(re.search(r"step (\d+)", sentence)[1])
    assert all_gone(run_dir)


def test_environment_that_fails_in_the_evaluation(tmp_path):
    run_dir = tmp_path / "run"
    arguments = ["--env-id", "faulty_envs:RaisesLate-v0", "--sources", *SMALL]
    result = run_cup(*arguments, "--eval-interval", "40", "--run-dir", run_dir)
    assert result.returncode == 1
    assert re.fullmatch(r"cup\.py: [^\n]*the gripper fell off\n", result.stderr)
    assert resumable(run_dir) == 40
    assert all_gone(run_dir)


def test_environment_that_never_starts(tmp_path):
    run_dir = tmp_path / "run"
    arguments = ["--env-id", "faulty_envs:RaisesAtOnce-v0", "--sources", *SMALL]
    result = run_cup(*arguments, "--run-dir", run_dir)
    assert result.returncode in (1, 2)
    assert re.fullmatch(r"cup\.py: [^\n]*no licence found\n", result.stderr)
    assert all_gone(run_dir)


def test_early_terminations_and_large_rewards_are_no_faults(tmp_path):
    for env_id in ("Terminates-v0", "Large-v0"):
        arguments = ["--env-id", f"faulty_envs:{env_id}", "--sources", *SMALL]
        length = ["--total-timesteps", "200"]
        result = run_cup(*arguments, *length, "--run-dir", tmp_path / env_id)
        assert result.returncode == 0, result.stderr


# ------------------------------ policy files from strangers ----------------------------


def test_corrupted_policy_files(tmp_path):
    for kind, outcome, _, _ in torture.corruptions(tmp_path, 100):
        assert outcome in ("refused", "valid"), kind


def test_tensors_that_claim_to_be_huge(tmp_path):
    """A tensor may repeat one stored number: this file of 2 kB asks for 4 GB."""
    content = cup.policy_file(cup.Actor(39, 4, [8]))
    content["weights"]["more"] = torch.zeros(1).expand(2**32)
    torch.save(content, tmp_path / "policy.pt")
    before = torture.peak_memory(reset=True)
    with pytest.raises(cup.UserError):
        cup.load_policy(tmp_path / "policy.pt")
    assert torture.peak_memory() - before < 1000


@pytest.mark.parametrize("env_id", [5, ["reach-v2"], "os:Robot-v0", ""])
def test_a_policy_file_cannot_choose_what_is_imported(tmp_path, env_id):
    """--evaluate takes the task from the file: a name, and not a module to import."""
    path = tmp_path / "policy.pt"
    torch.save(cup.policy_file(cup.Actor(3, 1, [8]), env_id=env_id), path)
    result = torture.answer(["--evaluate", str(path), "--no-cuda"])
    assert result[0] == 2, result
    assert str(path) in result[1]


class Touch:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("place", ["actor", "weights", "env_id"])
def test_code_in_a_policy_file_is_not_run(tmp_path, place):
    marker, path = tmp_path / "executed", tmp_path / "policy.pt"
    content = cup.policy_file(cup.Actor(39, 4, [8]))
    torch.save(content | {place: Touch(marker)}, path)
    with pytest.raises(cup.UserError):
        cup.load_policy(path)
    path.write_bytes(pickle.dumps(Touch(marker)))
    with pytest.raises(cup.UserError):
        cup.load_policy(path)
    assert not marker.exists()


# --------------------------------- arguments and numbers -------------------------------


def test_random_arguments_are_checked(capsys):
    """Parsing and checking never fail but with exit code 2 or a UserError."""
    rng = np.random.default_rng(0)

    def draw(choices):
        return choices[rng.integers(len(choices))]

    for _ in range(60):
        typed = torture.arguments_of(draw)
        try:
            cup.check(tyro.cli(cup.Args, args=[*torture.TINY.split(), *typed]))
        except SystemExit as stop:
            assert stop.code == 2, typed
        except cup.UserError as error:
            assert "\n" not in str(error), typed


@pytest.mark.parametrize(
    "typed",
    [
        "--seed 100000000000000000000000000000",
        "--hidden-sizes 10000000000",
        "--buffer-size 1000000000000000",
        "--threads 100000000000",
        "--num-envs 2 --seed 7 --gamma 1.0 --tau 0",
    ],
)
def test_extreme_arguments(tmp_path, typed):
    run_dir = tmp_path / "run"
    result = run_cup(*torture.TINY.split(), "--run-dir", run_dir, *typed.split())
    assert result.returncode in (0, 2), result.stderr
    if result.returncode:
        assert re.fullmatch(r"cup\.py: [^\n]+\n", result.stderr), result.stderr
        assert not run_dir.exists()


@pytest.mark.parametrize("samples", [1, 3])
def test_impossible_numbers(samples):
    for case, ended, right in torture.numerics(300, num_guidance_samples=samples):
        assert right, (case, ended)
        if case in ("reward 1e30", "reward infinite"):
            assert re.match(r"loss/\w+ is (inf|nan) at step \d+: stopped", ended)
        else:
            assert ended == "finite", case


# --------------------------------------- checkpoints -----------------------------------


def test_a_checkpoint_costs_no_second_buffer(tmp_path):
    found = torture.checkpoint(tmp_path, 200_000)
    assert found["peak / buffer"] < 1.3
