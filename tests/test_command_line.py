"""The command line, past the first gradient steps, and everything it writes and says."""

import json
import math
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from program import (
    CUP, PENDULUM, SMALL, call_cup, checkpoint_of, metrics, one_sentence, run_cup, same_policy,
    same_result, steps, succeed,
)

import cup

SHORT = [*SMALL, "--total-timesteps", 60, "--eval-interval", 60]


# ---- training runs -------------------------------------------------------------------------------
def test_metaworld_with_the_shipped_sources(tmp_path, monkeypatch):
    names = ["random-1", "reach-v2", "push-v2", "pick-place-v2", "target"]
    monkeypatch.chdir(tmp_path)  # the default --run-dir
    result = succeed("--env-id", "peg-insert-side-v2", "--num-random-sources", 1, *SHORT)
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name == "peg-insert-side-v2__cup__1"
    assert f"runs/{run_dir.name}/policy.pt" in result.stdout
    assert "success" in result.stdout

    assert steps(run_dir) == [20, 40, 60]
    first, *_, last = metrics(run_dir)
    columns = "loss/critic loss/actor loss/kl alpha entropy guidance/weight guidance/kl".split()
    columns += [f"guidance/{x}/{name}" for x in ("selected", "advantage") for name in names]
    columns += ["eval/return", "eval/success_rate"]
    assert last.keys() == {"step", *columns}
    for name in columns:
        assert first[name] == ""  # nothing was learned yet
        assert math.isfinite(float(last[name]))
    assert sum(float(last[f"guidance/selected/{source}"]) for source in names) == pytest.approx(1)
    assert float(last["guidance/advantage/target"]) == 0
    assert 0 <= float(last["eval/success_rate"]) <= 1
    assert 0 <= float(last["eval/return"]) <= 5000


def test_outputs_of_a_run(pendulum):
    run_dir, result = pendulum
    names = {path.name for path in run_dir.iterdir()}
    assert names == {"args.json", "metrics.csv", "policy.pt", "checkpoint.pt"}
    assert result.stderr == ""
    assert "finished 1,000 steps" in result.stdout
    assert "success" not in result.stdout  # Pendulum has no such thing

    about = json.loads((run_dir / "args.json").read_text())
    assert about["args"].keys() == cup.Args.__dataclass_fields__.keys()
    assert (about["args"]["env_id"], about["args"]["hidden_sizes"]) == ("Pendulum-v1", [16, 16])
    assert about["versions"]["torch"] in torch.__version__  # which may add +cu130
    assert {"metaworld", "mujoco", "gymnasium"} < about["versions"].keys()

    rows = metrics(run_dir)
    assert steps(run_dir) == list(range(20, 1001, 20))
    assert [int(row["step"]) for row in rows if row["eval/return"]] == [500, 1000]
    # two environments: their first episodes, of 200 steps each, end at step 400
    assert next(int(row["step"]) for row in rows if row["train/return"]) == 400
    assert "train/success_rate" not in rows[0]

    policy = torch.load(run_dir / "policy.pt", weights_only=True)
    assert (policy["env_id"], policy["step"]) == ("Pendulum-v1", 1000)
    assert str(policy["return"]) == rows[-1]["eval/return"]
    env = cup.make_env("Pendulum-v1", cup.derive_seed(1, 1, 0))  # the evaluation's stream of seed 1
    returns, _ = cup.evaluate(cup.load_policy(run_dir / "policy.pt"), env, 2, first_episode=1000)
    assert policy["return"] == pytest.approx(returns.mean())
    checkpoint = checkpoint_of(run_dir)["agent"]
    first_states = checkpoint["buffer._extra_state"]["columns"][0][:2]
    assert (first_states.numpy() == cup.make_envs("Pendulum-v1", 2, 1, 0).reset()[0]).all()
    assert checkpoint["critic_optimizer.steps.0"] == (1000 - 20) / 4  # updates, --utd-ratio 0.25
    mean, log_std = cup.load_policy(run_dir / "policy.pt")(torch.randn(5, 3))
    assert mean.shape == log_std.shape == (5, 1)


def test_another_seed_another_result(pendulum, tmp_path):
    """The same seed, the same result: every test in test_faults.py that compares runs."""
    succeed(*PENDULUM, "--seed", "2", "--run-dir", tmp_path / "other")
    assert not same_result(pendulum[0], tmp_path / "other")


FROZEN = "--policy-lr 0 --q-lr 0 --alpha-lr 0"


@pytest.mark.parametrize("same", ["--beta1 0", "--guidance-starts 200", FROZEN, None])
def test_cup_begins_as_sac_does_and_without_guidance_is_sac(pendulum, tmp_path, same):
    """Bit for bit: same weights, random actions, goals, and every number that both log."""
    typed = ["--env-id", "Pendulum-v1", *SMALL, "--beta2", 1]
    typed += ["--total-timesteps", 200, "--eval-interval", 100, *(same or "").split()]
    guided = ["--sources", pendulum[0] / "policy.pt", "--num-random-sources", 1]
    rows, buffers = [], []
    for name, flags in {"cup": guided, "sac": ["--sources"]}.items():
        succeed(*typed, *flags, "--run-dir", tmp_path / name)
        columns = checkpoint_of(tmp_path / name)["agent"]["buffer._extra_state"]["columns"]
        buffers.append(torch.cat([x.flatten(1) for x in columns[:3]], dim=1))  # s, s', a
        rows.append(metrics(tmp_path / name))
    shared = [{name: ours[name] for name in theirs} for ours, theirs in zip(*rows, strict=True)]
    assert same_policy(tmp_path / "cup", tmp_path / "sac") == (same is not None)
    assert torch.equal(*buffers) == (same is not None)
    assert (shared == rows[1]) == (same is not None)
    assert torch.equal(*(buffer[:20] for buffer in buffers))  # the random steps, in any case


def test_sources_have_names_of_their_own(tmp_path):
    paths = "x-3.pt a/x.pt b/x.pt target.pt random-1.pt runs/a/policy.pt runs/b/policy.pt".split()
    actors = []
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        actors.append(cup.Actor(3, 1, [4]))
        cup.save(cup.policy_content(actors[-1]), tmp_path / path)
    files = tuple(str(tmp_path / path) for path in paths)
    sources = cup.load_sources(cup.Args("x", sources=files, num_random_sources=2), 3, 1)
    names = ["x-3", "x", "x-2", "target-2", "random-1-2", "a", "b"]
    assert sources.keys() == {*names, "random-1", "random-2"}
    random = [sources[f"random-{k}"].net[0].weight for k in (1, 2)]
    assert not torch.equal(*random)
    for actor, name in zip(actors, names):
        assert torch.equal(actor(torch.ones(3))[0], sources[name](torch.ones(3))[0])


def test_an_environment_without_a_time_limit_is_worth_a_warning(tmp_path, monkeypatch):
    """And the default run directory of a module's environment is a name for every system."""
    monkeypatch.chdir(tmp_path)
    typed = ["--env-id", "faulty_envs:Unlimited-v0", "--sources", *SHORT, "--num-envs", 3]
    result = succeed(*typed)
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert steps(run_dir) == [21, 42, 60]  # the first steps after multiples of 20
    assert re.fullmatch(r"[\w.-]+Unlimited-v0__sac__1", run_dir.name)
    assert re.fullmatch(r"[^\n]*no time limit[^\n]*TimeLimit[^\n]*\n", result.stderr)


def test_a_run_on_pendulum_does_not_import_metaworld(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys, cup\ncup.main()\nsys.exit('metaworld' in sys.modules)\n")
    typed = ["--env-id", "Pendulum-v1", "--sources", *SHORT, "--run-dir", tmp_path / "run"]
    result = run_cup(*typed, script=script, environment={"PYTHONPATH": str(CUP.parent)})
    assert result.returncode == 0, result.stderr


# ---- TensorBoard, Weights & Biases ---------------------------------------------------------------
@pytest.fixture
def loggers(monkeypatch):
    """Stands in for both packages, and keeps what it was told."""
    told = SimpleNamespace(run=SimpleNamespace(id=None), inits=[], writers=[], scalars=[])

    def init(**options):
        told.run.id = options["id"] or f"made-{len(told.inits)}"
        told.inits.append(options)

    def writer(*place, **options):
        told.writers.append(options)
        return SimpleNamespace(add_scalar=lambda *row: told.scalars.append(row))

    told.init, told.SummaryWriter = init, writer
    monkeypatch.setitem(sys.modules, "wandb", told)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", told)
    return told


def test_a_run_keeps_its_identity_at_weights_and_biases(tmp_path, loggers):
    for name, total in [("a/x", 60), ("b/x", 60), ("a/x", 80)]:
        typed = ["--env-id", "Pendulum-v1", "--sources", *SHORT, "--track", "--resume"]
        succeed(*typed, "--total-timesteps", total, "--run-dir", tmp_path / name)
    assert [options["id"] for options in loggers.inits] == [None, None, "made-0"]
    assert loggers.writers[-1]["purge_step"] in (60, 61)  # what came after 60 comes again
    logged = {(name, step): value for name, value, step in loggers.scalars}
    for row in metrics(tmp_path / "a" / "x"):
        for name, value in row.items():
            if value and name != "step":
                assert logged[name, int(row["step"])] == float(value)


@pytest.mark.parametrize("missing", ["wandb", "tensorboard"])
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, loggers, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "tensorboard":
        monkeypatch.delitem(sys.modules, "torch.utils.tensorboard")
    monkeypatch.chdir(tmp_path)
    typed = ["--env-id", "Pendulum-v1", "--sources", *SHORT, "--run-dir", "run"]
    result = call_cup(*typed, "--track", "--tensorboard")
    assert one_sentence(result, missing), result.stderr
    assert ("wandb" in result.stderr) == (missing == "wandb")
    assert not loggers.inits
    assert not list(tmp_path.iterdir())  # the command works when the package is there


# ---- --evaluate ----------------------------------------------------------------------------------
def test_evaluate_names_success_with_its_interval(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    typed = ["--evaluate", cup.SHIPPED[0], "--eval-episodes", 2, "--num-envs", 2, "--threads", 1]
    result = succeed(*typed)
    assert f"{cup.SHIPPED[0]} on reach-v2" in result.stdout
    for kind in ("mean", "sampled"):
        pattern = rf"{kind} action: return \d.*, success ([\d.]+) \[([\d.]+), ([\d.]+)\]"
        rate, low, high = map(float, re.search(pattern, result.stdout).groups())
        assert 0 <= low <= rate <= high <= 1
        assert high - low > 0.3  # two episodes prove little
    assert not list(tmp_path.iterdir())  # it only looks


def test_evaluate_without_success_in_plain_ascii(pendulum):
    ascii_only = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    typed = ["--evaluate", pendulum[0] / "policy.pt", "--eval-episodes", 2]
    result = run_cup(*typed, environment=ascii_only)
    assert (result.returncode, result.stderr) == (0, "")
    assert "success" not in result.stdout
    mean, half_width = re.search(r"mean action: return (\S+) \+- (\S+)\n", result.stdout).groups()
    env = cup.make_env("Pendulum-v1", cup.derive_seed(1, 2, 0))
    one, other = cup.evaluate(cup.load_policy(pendulum[0] / "policy.pt"), env, 2)[0]
    assert float(mean) == pytest.approx((one + other) / 2, abs=0.1)
    # Student's t with one degree of freedom is Cauchy's distribution, its quantile a tangent
    t = math.tan(math.pi * (0.975 - 0.5))
    assert float(half_width) == pytest.approx(t * abs(one - other) / 2, abs=0.1)


# ---- bad input -----------------------------------------------------------------------------------
PEG = "--env-id peg-insert-side-v2 --sources"
FAULTY = "--env-id faulty_envs:"
FINISHED = " ".join([*PENDULUM, "--resume --run-dir finished"])
# what was typed: what the one sentence must hold
BAD_INPUT = {
    "--env-id peg-insert-sid-v2": ["'peg-insert-sid-v2'"],
    "--env-id Pendulun-v1": ["'Pendulun-v1'", "Pendulum"],
    "--env-id nothing_installed:Robot-v0": ["nothing_installed"],
    "--env-id CartPole-v1": ["CartPole-v1", "Discrete(2)", "Box"],
    f"{FAULTY}NoBounds-v0": ["bounded"],
    f"{FAULTY}Integers-v0": ["(1,), int64)"],
    f"{FAULTY}CannotBeMade-v0": ["RuntimeError", "it fails in making"],
    f"{FAULTY}NotANumberAtOnce-v0 --sources": ["NaN or infinity", "episode 0"],
    f"{PEG} nowhere.pt": ["no policy file nowhere.pt"],
    f"{PEG} text.pt": ["text.pt is not a policy file"],
    f"{PEG} finished/checkpoint.pt": ["checkpoint.pt is not a policy file"],
    f"{PEG} pendulum.pt": ["pendulum.pt", "(3, 1)", "(39, 4)"],
    "--evaluate pendulum.pt --env-id reach-v2": ["(3, 1)", "reach-v2", "(39, 4)"],
    f"{PEG} --run-dir finished": ["finished exists", "--resume"],
    f"{PEG} --run-dir text.pt/run": ["text.pt/run"],
    f"{PEG} --resume --run-dir broken": ["broken/checkpoint.pt is"],
    f"{FINISHED} --gamma 0.5": ["finished was started with", "gamma", "0.99, not 0.5"],
    f"{FINISHED} --seed 9": ["finished was started with", "seed", "1, not 9"],
}
# the same, in tyro's words
BAD_USAGE = {
    "": "no task is named",
    f"{PEG} --batch-size 0": "--batch-size is out of range: 0",
    f"{PEG} --seed one": "--seed",
    f"{PEG} --cuda": "--no-cuda",
}
if torch.cuda.is_available():
    del BAD_USAGE[f"{PEG} --cuda"]


@pytest.fixture(scope="module")
def bad_files(pendulum, tmp_path_factory):
    """What the cases above name."""
    directory = tmp_path_factory.mktemp("bad-input")
    policy = (pendulum[0] / "policy.pt").read_bytes()
    (directory / "pendulum.pt").write_bytes(policy)
    (directory / "text.pt").write_text("these are not weights\n")
    shutil.copytree(pendulum[0], directory / "finished")
    (directory / "broken").mkdir()
    (directory / "broken" / "checkpoint.pt").write_bytes(policy[:99])
    return directory


def contents(directory):
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*")}


@pytest.mark.parametrize("typed", [*BAD_INPUT, *BAD_USAGE])
def test_bad_input_is_one_sentence_and_changes_nothing(typed, bad_files, monkeypatch):
    before = contents(bad_files)
    monkeypatch.chdir(bad_files)
    result = call_cup(*typed.split())
    assert (result.returncode, result.stdout) == (2, "")
    if typed in BAD_USAGE:
        assert BAD_USAGE[typed] in result.stderr
    else:
        assert one_sentence(result, *map(re.escape, BAD_INPUT[typed])), result.stderr
    assert contents(bad_files) == before


def test_a_copy_of_cup_without_sources_does_not_turn_into_sac(tmp_path):
    script = shutil.copy(CUP, tmp_path)
    result = run_cup("--env-id", "Pendulum-v1", script=script, cwd=tmp_path)
    assert one_sentence(result, r"sources/reach-v2\.pt"), result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["cup.py"]


POSITIVE = "total_timesteps num_envs buffer_size batch_size learning_starts num_guidance_samples"
POSITIVE += " log_interval eval_interval eval_episodes checkpoint_interval threads init_alpha"
NOT_NEGATIVE = "seed utd_ratio gamma tau policy_lr q_lr alpha_lr beta1 beta2 num_random_sources"
NOT_NEGATIVE += " guidance_starts"


@pytest.mark.parametrize(
    ("name", "values"),
    [(name, [0, -1, math.nan, math.inf]) for name in POSITIVE.split()]
    + [(name, [-1, math.nan, math.inf]) for name in NOT_NEGATIVE.split()]
    + [("gamma", [1.1]), ("tau", [1.1]), ("hidden_sizes", [(0,), (8, -8)])]
    + [("num_envs", [5000]), ("total_timesteps", [5000])],
)
def test_numbers_that_make_no_sense(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')}"):
            cup.Args(env_id="reach-v2", cuda=False, **{name: value})
