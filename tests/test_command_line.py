"""The command line, past the first gradient steps, and everything it writes and says."""

import json
import math
import shutil

import pytest
import torch
from program import PENDULUM, SMALL, call_cup, checkpoint_of, metrics, one_sentence, succeed

import cup


def test_metaworld_with_the_shipped_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the default --run-dir
    typed = ["--env-id", "peg-insert-side-v2", "--num-random-sources", 1, *SMALL]
    succeed(*typed, "--total-timesteps", 60, "--eval-interval", 60, "--eval-episodes", 1)
    first, last = metrics(tmp_path / "runs" / "peg-insert-side-v2__cup__1")
    assert (first["step"], last["step"]) == ("40", "60")  # from the first update on
    training = {"train/return", "train/success_rate"}  # no episode has ended
    empty = [{name for name in row if row[name] == ""} for row in (first, last)]
    assert empty == [training | {"eval/return", "eval/success_rate"}, training]
    assert all(math.isfinite(float(last[name])) for name in last.keys() - training)
    names = ["random-1", "reach-v2", "push-v2", "pick-place-v2", "target"]
    assert sum(float(last[f"guidance/selected/{source}"]) for source in names) == pytest.approx(1)


def test_outputs_of_a_run(pendulum):
    run_dir, result = pendulum
    names = ["args.json", "checkpoint.pt", "metrics.csv", "policy.pt"]
    assert sorted(path.name for path in run_dir.iterdir()) == names
    assert (result.stderr, "success" in result.stdout) == ("", False)  # Pendulum has no such thing
    about = json.loads((run_dir / "args.json").read_text())
    assert about["args"].keys() == cup.Args.__dataclass_fields__.keys()
    assert {"metaworld", "mujoco", "gymnasium", "torch"} < about["packages"].keys()
    rows = metrics(run_dir)
    assert [int(row["step"]) for row in rows] == list(range(40, 1001, 20))
    assert [row["step"] for row in rows if row["eval/return"]] == ["500", "1000"]
    # two environments: their first episodes, of 200 steps each, end at step 400
    assert next(row["step"] for row in rows if row["train/return"]) == "400"
    policy = cup.load_policy(run_dir / "policy.pt")
    assert policy.about == {"env_id": "Pendulum-v1", "step": 1000}
    for optimizer in checkpoint_of(run_dir)["agent"]["_extra_state"]["optimizers"]:
        assert optimizer["state"][0]["step"] == (1000 - 20) / 4  # --utd-ratio 0.25


def test_without_guidance_a_run_is_sac(pendulum, tmp_path):
    """Bit for bit: every number that both log; with --guidance-starts 300 those up to step 300."""
    typed = ["--env-id", "Pendulum-v1", *SMALL, "--beta2", 1, "--total-timesteps", 400]
    guided = ["--sources", pendulum[0] / "policy.pt", "--num-random-sources", 1]
    flags = {"sac": ["--sources"], "zero": [*guided, "--beta1", 0]}
    flags |= {"later": [*guided, "--guidance-starts", 300], "seed 2": ["--sources", "--seed", 2]}
    rows, obs = {}, {}
    for name, more in flags.items():
        succeed(*typed, *more, "--run-dir", tmp_path / name)
        rows[name] = metrics(tmp_path / name)
        obs[name] = checkpoint_of(tmp_path / name)["agent"]["_extra_state"]["rows"][0]
    in_sac = {name: [{key: x[key] for key in rows["sac"][0]} for x in rows[name]] for name in rows}
    assert in_sac["zero"] == rows["sac"] and rows["sac"][13]["step"] == "300"
    assert in_sac["later"][:14] == rows["sac"][:14]
    assert in_sac["later"][14] != rows["sac"][14]
    assert not torch.isin(obs["seed 2"][:20], obs["sac"]).any()  # while the actions are random


def test_sources_have_names_of_their_own(tmp_path):
    names = {"a/x.pt": "x", "b/x.pt": "x-2", "runs/a/policy.pt": "a", "runs/b/policy.pt": "b"}
    names |= {"x/target.pt": "target-2", "x/random-1.pt": "random-1-2"}
    for path in names:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        cup.save(cup.policy_content(cup.Actor(3, 1, [4]), path=path), tmp_path / path)
    args = cup.Args("x", sources=[tmp_path / path for path in names], num_random_sources=2)
    sources = cup.load_sources(args, 3, 1)
    untrained = [sources.pop(f"random-{k}").net[0].weight for k in (1, 2)]
    assert not torch.equal(*untrained)
    assert {source.about["path"]: name for name, source in sources.items()} == names


PEG = "--env-id peg-insert-side-v2 --sources"
RESUME = " ".join([*PENDULUM, "--resume --run-dir"])
BAD_INPUT = {  # what was typed: what the one sentence must hold
    "--env-id push-wall": ["'push-wall'", "push-wall-v2"],
    "--env-id CartPole-v1": ["CartPole-v1", "Discrete(2)", "Box"],
    f"{PEG} --checkpoint-interval 1999": ["500", "--checkpoint-interval"],
    f"{PEG} nowhere.pt": ["nowhere.pt is not a policy file"],
    f"{PEG} finished/policy.pt": ["policy.pt", "(3, 1)", "(39, 4)"],
    f"{PEG} --run-dir finished": ["finished exists", "--resume"],
    f"{PEG} --run-dir finished/policy.pt/run": ["policy.pt/run"],
    f"{RESUME} finished --seed 9 --tau 1": ["finished was begun with", "'seed': 1", "'tau': 0.005"],
    f"{RESUME} lost": ["lost has lost checkpoint.pt"],
    f"{RESUME} cut": ["cut has lost checkpoint.pt or metrics.csv"],
    "--sources": ["--env-id"],
    f"{PEG} --learning-starts 300 --total-timesteps 300": ["--total-timesteps", "300"],
    f"{PEG} --num-random-sources 1 --total-timesteps 9 --learning-starts 1": ["5000"],
}


@pytest.fixture(scope="module")
def runs(pendulum, tmp_path_factory):
    """A finished run, one without its checkpoint, and one without its metrics."""
    directory = tmp_path_factory.mktemp("runs")
    for name in ("finished", "lost", "cut"):
        shutil.copytree(pendulum[0], directory / name)
    (directory / "lost" / "checkpoint.pt").unlink()
    (directory / "cut" / "metrics.csv").write_text("step")
    return directory


def contents(directory):
    return {path: path.is_file() and path.read_bytes() for path in directory.rglob("*")}


@pytest.mark.parametrize("typed", BAD_INPUT)
def test_bad_input_is_one_sentence_and_changes_nothing(typed, runs, monkeypatch):
    before = contents(runs)
    monkeypatch.chdir(runs)
    result = call_cup(*typed.split())
    assert (result.returncode, result.stdout) == (2, "")
    assert all(part in result.stderr for part in BAD_INPUT[typed]), result.stderr
    assert one_sentence(result) or "--help" in result.stderr
    assert contents(runs) == before


def test_a_finished_run_is_left_alone(runs, monkeypatch):
    before = contents(runs)
    monkeypatch.chdir(runs)
    result = succeed(*RESUME.split(), "finished", "--total-timesteps", 900)
    assert "1,000 steps" in result.stdout and contents(runs) == before
