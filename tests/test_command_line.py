"""The command line, past the first gradient steps, and everything it writes and says."""

import json
import math
import re
import shutil

import pytest
import torch
from program import (
    PENDULUM,
    SMALL,
    call_cup,
    checkpoint_of,
    metrics,
    one_sentence,
    run_cup,
    same_policy,
    steps,
    succeed,
)

import cup


def test_metaworld_with_the_shipped_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the default --run-dir
    typed = ["--env-id", "peg-insert-side-v2", "--num-random-sources", 1, *SMALL]
    succeed(*typed, "--total-timesteps", 60, "--eval-interval", 60)
    run_dir = tmp_path / "runs" / "peg-insert-side-v2__cup__1"
    assert steps(run_dir) == [40, 60]  # from the first update on
    first, last = metrics(run_dir)
    evaluation = {"eval/return", "eval/success_rate"}
    training = {"train/return", "train/success_rate"}  # no episode has ended
    assert {name for name in first if first[name] == ""} == training | evaluation
    assert {name for name in last if last[name] == ""} == training
    assert all(math.isfinite(float(last[name])) for name in last.keys() - training)
    names = ["random-1", "reach-v2", "push-v2", "pick-place-v2", "target"]
    assert sum(float(last[f"guidance/selected/{source}"]) for source in names) == pytest.approx(1)
    assert 0 <= float(last["eval/success_rate"]) <= 1
    assert 0 <= float(last["eval/return"]) <= 5000


def test_outputs_of_a_run(pendulum):
    run_dir, result = pendulum
    names = {path.name for path in run_dir.iterdir()}
    assert names == {"args.json", "metrics.csv", "policy.pt", "checkpoint.pt"}
    assert (result.stderr, "success" in result.stdout) == ("", False)  # Pendulum has no such thing
    about = json.loads((run_dir / "args.json").read_text())
    assert about["args"].keys() == cup.Args.__dataclass_fields__.keys()
    assert {"metaworld", "mujoco", "gymnasium", "torch"} < about["packages"].keys()

    rows = metrics(run_dir)
    assert steps(run_dir) == list(range(40, 1001, 20))
    assert [row["step"] for row in rows if row["eval/return"]] == ["500", "1000"]
    # two environments: their first episodes, of 200 steps each, end at step 400
    assert next(row["step"] for row in rows if row["train/return"]) == "400"
    policy = cup.load_policy(run_dir / "policy.pt")
    assert policy.about == {"env_id": "Pendulum-v1", "step": 1000}
    optimizers = checkpoint_of(run_dir)["agent"]["_extra_state"]["optimizers"]
    updates = {state["state"][0]["step"].item() for state in optimizers}
    assert updates == {(1000 - 20) / 4}  # --utd-ratio 0.25


def test_without_guidance_a_run_is_sac(pendulum, tmp_path):
    """Bit for bit: every number that both log; with --guidance-starts 300 those up to step 300."""
    typed = ["--env-id", "Pendulum-v1", *SMALL, "--beta2", 1, "--total-timesteps", 400]
    guided, rows = ["--sources", pendulum[0] / "policy.pt", "--num-random-sources", 1], {}
    for name, flags in {
        "sac": ["--sources"], "beta1 0": [*guided, "--beta1", 0],
        "later": [*guided, "--guidance-starts", 300], "seed 2": ["--sources", "--seed", 2],
    }.items():
        succeed(*typed, *flags, "--run-dir", tmp_path / name)
        columns = metrics(tmp_path / "sac")[0]
        rows[name] = [{key: row[key] for key in columns} for row in metrics(tmp_path / name)]
    assert rows["beta1 0"] == rows["sac"]
    assert same_policy(tmp_path / "beta1 0", tmp_path / "sac")
    number = steps(tmp_path / "sac").index(300) + 1
    assert rows["later"][:number] == rows["sac"][:number]
    assert rows["later"][number] != rows["sac"][number]
    stored = [checkpoint_of(tmp_path / name)["agent"]["_extra_state"]["rows"] for name in rows]
    sac, _, _, other = (columns[0][:20] for columns in stored)  # of the random steps
    assert not torch.isin(sac, other).any()


def test_sources_have_names_of_their_own(tmp_path):
    paths = "x-3.pt a/x.pt b/x.pt target.pt random-1.pt runs/a/policy.pt runs/b/policy.pt".split()
    actors = [cup.Actor(3, 1, [4]) for _ in paths]
    for path, actor in zip(paths, actors):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        cup.save(cup.policy_content(actor), tmp_path / path)
    files = tuple(str(tmp_path / path) for path in paths)
    sources = cup.load_sources(cup.Args("x", sources=files, num_random_sources=2), 3, 1)
    names = ["x-3", "x", "x-2", "target-2", "random-1-2", "a", "b"]
    assert sources.keys() == {*names, "random-1", "random-2"}
    firsts = [sources[f"random-{k}"].net[0].weight for k in (1, 2)]
    assert not torch.equal(*firsts)
    for actor, name in zip(actors, names):
        assert torch.equal(actor(torch.ones(3))[0], sources[name](torch.ones(3))[0])


PEG = "--env-id peg-insert-side-v2 --sources"
RESUME = " ".join([*PENDULUM, "--resume --run-dir"])
# what was typed: what the one sentence must hold
BAD_INPUT = {
    "--env-id push-wall": ["'push-wall'", "push-wall-v2"],
    "--env-id Pendulun-v1": ["'Pendulun-v1'", "Pendulum"],
    "--env-id nothing_installed:Robot-v0": ["nothing_installed"],
    "--env-id CartPole-v1": ["CartPole-v1", "Discrete(2)", "Box"],
    "--env-id Pendulum-v1 --sources --checkpoint-interval 799": ["200", "--checkpoint-interval"],
    f"{PEG} --checkpoint-interval 1999": ["500", "--checkpoint-interval"],
    f"{PEG} nowhere.pt": ["nowhere.pt is not a policy file"],
    f"{PEG} finished/checkpoint.pt": ["checkpoint.pt is not a policy file"],
    f"{PEG} finished/policy.pt": ["policy.pt", "(3, 1)", "(39, 4)"],
    f"{PEG} --run-dir finished": ["finished exists", "--resume"],
    f"{PEG} --run-dir finished/policy.pt/run": ["policy.pt/run"],
    f"{RESUME} finished --seed 9 --tau 1": ["finished was begun with", "'seed': 1", "'tau': 0.005"],
    f"{RESUME} lost": ["lost has lost its checkpoint"],
}
BAD_USAGE = {  # the same, in tyro's words
    "": "--env-id",
    f"{PEG} --learning-starts 300 --total-timesteps 300": "--total-timesteps",
    "--env-id x --guidance-starts 300 --total-timesteps 300 --learning-starts 9": "--total",
    "--env-id x --total-timesteps 9 --learning-starts 1 --sources --num-random-sources 1": "5000",
}


@pytest.fixture(scope="module")
def runs(pendulum, tmp_path_factory):
    """A finished run, and one without its checkpoint."""
    directory = tmp_path_factory.mktemp("runs")
    shutil.copytree(pendulum[0], directory / "finished")
    shutil.copytree(pendulum[0], directory / "lost")
    (directory / "lost" / "checkpoint.pt").unlink()
    return directory


def contents(directory):
    return {path: path.is_file() and path.read_bytes() for path in directory.rglob("*")}


@pytest.mark.parametrize("typed", [*BAD_INPUT, *BAD_USAGE])
def test_bad_input_is_one_sentence_and_changes_nothing(typed, runs, monkeypatch):
    before = contents(runs)
    monkeypatch.chdir(runs)
    result = call_cup(*typed.split())
    assert (result.returncode, result.stdout) == (2, "")
    if typed in BAD_USAGE:
        assert BAD_USAGE[typed] in result.stderr
    else:
        assert one_sentence(result, *map(re.escape, BAD_INPUT[typed])), result.stderr
    assert contents(runs) == before


@pytest.mark.parametrize("total", [1000, 900])
def test_a_finished_run_is_left_alone(runs, monkeypatch, total):
    before = contents(runs)
    monkeypatch.chdir(runs)
    result = succeed(*RESUME.split(), "finished", "--total-timesteps", total)
    assert "1,000 steps" in result.stdout
    assert contents(runs) == before


def test_help_fits_a_terminal_of_100_columns():
    result = run_cup("--help", COLUMNS="100")
    assert max(map(len, result.stdout.splitlines())) <= 100
    for name in cup.Args.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in result.stdout
