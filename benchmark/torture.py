"""Torture: what it takes to lose a run, or to crash the program with what it is fed.

    python benchmark/torture.py kills         # kill -9, 50 times, each then resumed
    python benchmark/torture.py corruptions   # 1,000 damaged policy files
    python benchmark/torture.py arguments     # 300 command lines, written by hypothesis
    python benchmark/torture.py numerics      # 2,000 updates with impossible numbers
    python benchmark/torture.py checkpoint    # one with a full buffer of a million
    python benchmark/torture.py longrun       # 200,000 steps: memory, files, speed

Each prints a table and appends a row to benchmark/torture.csv. tests/test_faults.py has
a short version of each. Linux; needs what tests/requirements.txt names.
"""

import argparse
import contextlib
import csv
import io
import math
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from program import (
    PENDULUM,
    all_gone,
    finish,
    run_cup,
    same_result,
    start_cup,
    started_run,
    steps,
)

import cup

# ---------------------------------------- kills ----------------------------------------


def kills(directory: Path, number: int, arguments: list, span: float, seed: int = 0):
    """Kill a run, resume it, kill that, ... and let the last one finish.

    Every second kill falls into the writing of a checkpoint; the others come up to `span`
    seconds after the run is under way. Yields what each kill interrupted and what became
    of it, in words; anything but "resumed" is a failure.
    """
    rng = np.random.default_rng(seed)
    run_dir = directory / "killed"
    temporary, checkpoint = run_dir / "checkpoint.tmp", run_dir / "checkpoint.pt"
    process = started_run(run_dir, *arguments)
    for kill in range(number):
        if kill % 2:
            while not temporary.exists() and process.poll() is None:
                time.sleep(0)
        else:
            time.sleep(rng.uniform(0, span))
        process.kill()
        code = finish(process).returncode
        interrupted = "checkpoint" if temporary.exists() else "step"
        if code == 0:
            interrupted = "nothing: it had finished"
        rows = steps(run_dir)
        problems = [] if rows == sorted(set(rows)) else ["rows twice or out of order"]
        problems += [] if all_gone(run_dir) else ["workers left behind"]
        before = checkpoint.stat().st_mtime_ns
        process = start_cup("--resume", run_dir)
        # it is under way as soon as it writes its next checkpoint, or has ended
        while checkpoint.stat().st_mtime_ns == before and process.poll() is None:
            time.sleep(0)
        if process.poll():
            problems.append(finish(process).stderr)
        yield interrupted, "; ".join(problems) or "resumed"
    finish(process)


# ------------------------------------- corruptions -------------------------------------


def peak_memory(reset: bool = False) -> float:
    """The most memory this process has used, in MB, since it was last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def rewritten(policy: bytes, change) -> bytes:
    """The file with `change` made to its content, as a stranger's torch.save has it."""
    content = torch.load(io.BytesIO(policy), weights_only=True)
    change(content)
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def repacked(policy: bytes, rng: np.random.Generator) -> bytes:
    """The file with damage inside, but with checksums that are right."""
    target, old = io.BytesIO(), zipfile.ZipFile(io.BytesIO(policy))
    with zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = bytearray(old.read(name))
            if name.endswith("data.pkl"):
                for position in rng.integers(len(data), size=rng.integers(1, 4)):
                    data[position] = rng.integers(256)
            new.writestr(name, bytes(data))
    return target.getvalue()


def corrupted(policy: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """What was done to the policy file, and the result."""
    data = bytearray(policy)
    kinds = "flip truncate overwrite insert repack config huge tensor nan extra type"
    kind = str(rng.choice(kinds.split()))
    if kind == "flip":
        for position in rng.integers(len(data), size=rng.choice([1, 2, 20])):
            data[position] ^= 1 << rng.integers(8)
    elif kind == "truncate":
        data = data[: rng.integers(len(data))]
    elif kind == "overwrite":
        start = rng.integers(len(data))
        data[start : start + 100] = rng.bytes(100)
    elif kind == "insert":
        start = rng.integers(len(data))
        data[start:start] = rng.bytes(rng.integers(1, 1000))
    elif kind == "repack":
        data = repacked(policy, rng)
    else:
        data = rewritten(policy, lambda content: CHANGES[kind](content, rng))
    return kind, bytes(data)


def change_config(content: dict, rng: np.random.Generator) -> None:
    name = rng.choice(list(content["actor"]))
    values = [0, -1, 3, 1e300, math.nan, math.inf, -math.inf, None, "x", [], [0], True]
    content["actor"][name] = values[rng.integers(len(values))]


def change_to_huge(content: dict, rng: np.random.Generator) -> None:
    """Sizes beyond any memory, in what the file says or in tensors that repeat a number."""
    config, weights = content["actor"], content["weights"]
    size = int(rng.choice([2**24, 2**31, 2**40]))
    name = str(rng.choice(list(weights)))
    which = rng.integers(5)
    if which == 0:
        config["obs_dim"] = size
    elif which == 1:
        config["hidden_sizes"] = [size, size]
    elif which == 2:
        config["hidden_sizes"] = [1] * 100_000
    elif which == 3:
        weights[name] = torch.zeros(1).expand(size)
    else:
        weights["more"] = torch.zeros(1, 1).expand(size, 1000)


def change_tensor(content: dict, rng: np.random.Generator) -> None:
    weights = content["weights"]
    name = str(rng.choice(list(weights)))
    old = weights.pop(name)
    new = [
        old.double(), old.half(), old.int(), old.to_sparse(), old.unsqueeze(0), old[:-1],
        old.flatten(), old.to(torch.complex64), torch.empty(0), 1.0, None,
        old.to("meta"), old.bool(), old.flip(0),
    ]  # fmt: skip
    if which := rng.integers(len(new) + 1):
        weights[name] = new[which - 1]


def change_to_nan(content: dict, rng: np.random.Generator) -> None:
    weights = content["weights"]
    tensor = weights[str(rng.choice(list(weights)))].clone()
    tensor.view(-1)[rng.integers(tensor.numel())] = rng.choice([np.nan, np.inf, 3e38])
    weights[next(n for n, w in weights.items() if w.shape == tensor.shape)] = tensor


def add_more(content: dict, rng: np.random.Generator) -> None:
    where = [content, content["actor"], content["weights"]][rng.integers(3)]
    values = [1, "text", [[]], {"a": {}}, torch.randn(5), None]
    where[f"extra{rng.integers(9)}"] = values[rng.integers(len(values))]


def change_type(content: dict, rng: np.random.Generator) -> None:
    values = [1, "text", [], {}, (), None, torch.randn(5), {"net": torch.randn(5)}]
    name = str(rng.choice(list(content)))
    content[name] = values[rng.integers(len(values))]


CHANGES = {
    "config": change_config,
    "huge": change_to_huge,
    "tensor": change_tensor,
    "nan": change_to_nan,
    "extra": add_more,
    "type": change_type,
}


def sound(actor: cup.Actor) -> bool:
    """Whether the policy does what a policy does, on any observations."""
    mean, log_std = actor(10 * torch.randn(64, actor.obs_dim))
    return bool(
        mean.shape == log_std.shape == (64, actor.action_dim)
        and (mean.abs() <= actor.mean_bound).all()
        and (log_std >= actor.log_std_min).all()
        and (log_std <= actor.log_std_max).all()
    )


def corruptions(directory: Path, number: int, seed: int = 0):
    """Load damaged policy files. Yields kind, outcome, seconds and MB of each.

    The outcome "refused" or "valid" is right; any other is a failure, in words.
    """
    torch.manual_seed(seed)
    rng, path = np.random.default_rng(seed), directory / "policy.pt"
    torch.save(cup.policy_file(cup.Actor(39, 4, [32, 32]), env_id="reach-v2"), path)
    policy = path.read_bytes()
    for _ in range(number):
        kind, data = corrupted(policy, rng)
        path.write_bytes(data)
        before, start = peak_memory(reset=True), time.perf_counter()
        try:
            actor = cup.load_policy(path)
            outcome = "valid" if sound(actor) else "let in, but it is no policy"
        except cup.UserError as error:
            outcome = "refused" if len(str(error).splitlines()) == 1 else str(error)
        except Exception as error:  # noqa: BLE001, that it is none is what we test
            outcome = f"{type(error).__name__}: {error}"
        seconds, memory = time.perf_counter() - start, peak_memory() - before
        if seconds > 5 or memory > 1000:
            outcome = f"{seconds:.1f} s, {memory:.0f} MB"
        yield kind, outcome, seconds, memory


# -------------------------------------- arguments --------------------------------------

# A run of 12 steps with 2 updates, to which the fuzz adds flags that overrule these.
TINY = "--env-id Pendulum-v1 --sources --num-random-sources 1 --total-timesteps 12"
TINY += " --num-envs 2 --batch-size 4 --buffer-size 50 --learning-starts 4"
TINY += " --guidance-starts 4 --hidden-sizes 8 --log-interval 4 --eval-interval 12"
TINY += " --eval-episodes 1 --threads 1 --no-cuda"
FLAGS = "seed total-timesteps num-envs buffer-size batch-size learning-starts utd-ratio"
FLAGS += " gamma tau policy-lr q-lr alpha-lr init-alpha hidden-sizes beta1 beta2 env-id"
FLAGS += " num-random-sources num-guidance-samples source-mean-bound guidance-starts"
FLAGS += " source-log-std-min log-interval eval-interval eval-episodes sources threads"
FLAGS += " checkpoint-interval run-dir resume evaluate"
FLAGS = FLAGS.split()
# these decide how long a run takes, so that large values would prove patience only
SMALL_ONLY = {"total-timesteps", "utd-ratio", "num-envs", "eval-episodes", "threads"}
# ... and these let a run start more often than not, however it then ends
SENSIBLE = {flag: ["1", "3", "0.9"] for flag in FLAGS}
SENSIBLE |= {
    flag: ["1e-3", "0.5"] for flag in ("policy-lr", "q-lr", "alpha-lr", "beta2", "tau")
}
SENSIBLE |= {flag: ["1", "3", "4", "5"] for flag in ("num-envs", "learning-starts")}
SENSIBLE |= {"total-timesteps": ["13", "16"], "hidden-sizes": ["4", "16"]}
SENSIBLE |= {"source-log-std-min": ["-3", "0.5"], "gamma": ["0", "0.9", "1"]}
SENSIBLE |= {"env-id": ["Pendulum-v1", "MountainCarContinuous-v0"]}
WORDS = "0 1 2 7 -1 -7 0.0 0.5 1.0 2.5 1e-300 nan inf -inf 1_0 0x7 True None x . / é"
WORDS = ["", " ", "a b", "..", "Pendulum-v1", "reach-v2", "CartPole-v1", *WORDS.split()]
LARGE = ["1e9", "1e30", "-1e30", "1000000000", str(2**31), str(2**64), str(10**30)]


def answer(arguments: list[str]) -> tuple[int, str]:
    """Exit code and last words of `python cup.py ...`, without the start of a process."""
    stderr, before = io.StringIO(), sys.argv
    sys.argv, code = ["cup.py", *arguments], 0
    try:
        with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(stderr):
            cup.main()
    except SystemExit as stop:
        code = stop.code or 0
    except Exception as error:  # noqa: BLE001, that it is none is what we test
        code = -1
        place = error.__traceback__
        while (
            place.tb_next and place.tb_next.tb_frame.f_code.co_filename == cup.__file__
        ):
            place = place.tb_next
        print(f"line {place.tb_lineno}, {type(error).__name__}: {error}", file=stderr)
    finally:
        sys.argv = before
    return code, stderr.getvalue().strip().split("\n")[-1]


def accepted(code: int, words: str) -> bool:
    """Success, a sentence of refusal, or a run that stopped at numbers it cannot bear."""
    diverged = "stopped; " in words or "NaN or infinity" in words
    return code in (0, 2) or (code == 1 and diverged)


def arguments_of(draw) -> list[str]:
    """One to three flags with values. `draw(list)` chooses an element."""
    typed = []
    for _ in range(draw([1, 1, 2, 3])):
        flag = draw(FLAGS)
        strange = WORDS if flag in SMALL_ONLY else WORDS + LARGE
        values = [draw(draw([SENSIBLE[flag], SENSIBLE[flag], strange]))]
        values += [draw(WORDS)] * draw([0, 0, 0, 1]) if flag == "hidden-sizes" else []
        typed += [f"--{flag}", *values]
    return typed


def arguments(directory: Path, number: int):
    """Runs with command lines that hypothesis wrote. Yields what was typed, and became."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    free = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
    number_text = st.one_of(st.integers(-9, 9), st.floats(-9, 9)).map(str)
    found = []

    @settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data):
        def draw(choices):
            value = data.draw(st.sampled_from(choices))
            if choices is WORDS and data.draw(st.booleans()):
                value = data.draw(st.one_of(free, number_text))
            return value

        typed = arguments_of(draw)
        run_dir = directory / "run"
        shutil.rmtree(run_dir, ignore_errors=True)
        code, words = answer([*TINY.split(), "--run-dir", str(run_dir), *typed])
        found.append((typed, code, words))

    limit = 16 << 30  # what asks for more memory is refused, here as on a small machine
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    here = Path.cwd()
    os.chdir(directory)
    run()
    os.chdir(here)
    for which, handler in handlers.items():
        signal.signal(which, handler)
    return found


# --------------------------------------- numerics --------------------------------------


def saturated(mean_bound: float, log_std_min: float, log_std_max: float, sign: int):
    """A source far out: every output of its network is `sign` times a lot."""
    bounds = {"log_std_min": log_std_min, "log_std_max": log_std_max}
    actor = cup.Actor(6, 2, [8], mean_bound=mean_bound, **bounds)
    actor.net[-1].bias.data.fill_(sign * 1e4)
    return actor.requires_grad_(False)


# what is wrong: reward, observation scale, sources
IMPOSSIBLE = {
    "reward 1e8": (1e8, 1, []),
    "reward -1e8": (-1e8, 1, []),
    "reward 0": (0.0, 1, []),
    "reward 1e30": (1e30, 1, []),
    "reward infinite": (math.inf, 1, []),
    "observations times 1e4": (1.0, 1e4, []),
    "sources saturated": (1.0, 1, [(100, -5, 2, 1), (100, -5, 2, -1)]),
    "sources nearly deterministic": (1.0, 1, [(3, -20, -19, -1)]),
    "sources at the largest log-std": (1.0, 1, [(3, -20, 20, 1)]),
    "everything at once": (-1e8, 1e4, [(100, -20, 20, 1), (100, -20, 20, -1)]),
}


def numerics(updates: int, **settings):
    """Train on such numbers. Yields the case and how it ended, in words, and whether right.

    Right is: every loss and weight stays finite, or the run's own check stops it.
    """
    run = SimpleNamespace(dir="runs/numerics")
    for case, (reward, scale, kinds) in IMPOSSIBLE.items():
        torch.manual_seed(0)
        args = cup.Args(hidden_sizes=(32, 32), batch_size=32, cuda=False, **settings)
        agent = cup.Agent(args, 6, 2)
        sources = [saturated(*kind) for kind in kinds]
        buffer = cup.ReplayBuffer(1000, 6, 2, len(sources))
        obs, next_obs = scale * torch.randn(2, 1000, 6)
        action, terminated = 2 * torch.rand(1000, 2) - 1, torch.zeros(1000)
        outcome = torch.full((1000,), reward), terminated
        dist = cup.query_sources(sources, obs, args)
        buffer.add(obs, next_obs, action, *outcome, dist)
        ended, right = "finite", True
        try:
            for update in range(updates):
                info = agent.update(buffer.sample(args.batch_size))
                cup.Run.check_losses(run, update, info)
            weights = [*agent.actor.parameters(), *agent.critic.parameters()]
            right = all(w.isfinite().all() for w in weights)
            ended = "finite" if right else "weights are not finite, unnoticed"
        except cup.RunError as error:
            ended = str(error)
        yield case, ended, right


# --------------------------------- checkpoint, long run --------------------------------


def checkpoint(directory: Path, capacity: int) -> dict:
    """Write a checkpoint with a full buffer and three sources, as `train` does."""
    args = cup.check(
        cup.Args(env_id="reach-v2", run_dir=str(directory / "run"), cuda=False)
    )
    agent = cup.Agent(args, 39, 4)
    sources = {f"source-{k}": cup.Actor(39, 4, args.hidden_sizes) for k in range(3)}
    run = cup.Run(args, sources, None)
    buffer = cup.ReplayBuffer(capacity, 39, 4, len(sources))
    buffer.rows.normal_()
    buffer.size = capacity
    size = buffer.rows.nbytes / 2**20
    before, start = peak_memory(reset=True), time.perf_counter()
    run.save_checkpoint(
        step=capacity,
        agent=agent.state_dict(),
        buffer=torch.from_numpy(buffer.rows.cpu().numpy()[: buffer.size]),
        buffer_position=buffer.position,
        sources={name: cup.policy_file(actor) for name, actor in sources.items()},
        rng_state=torch.get_rng_state(),
    )
    seconds = time.perf_counter() - start
    # the buffer itself, and what writing it took on top
    share = (size + peak_memory() - before) / size
    return {"seconds": seconds, "buffer MB": size, "peak / buffer": share}


def longrun(directory: Path, total: int, env_id: str) -> dict:
    """Watch a run from outside. The buffer is full after a tenth of the steps."""
    run_dir = directory / "run"
    arguments = ["--env-id", env_id, "--sources", "--num-random-sources", "3"]
    arguments += ["--num-envs", "4", "--utd-ratio", "0.25", "--batch-size", "256"]
    arguments += ["--total-timesteps", total, "--buffer-size", total // 10]
    arguments += ["--log-interval", total // 200, "--eval-interval", total // 10]
    arguments += ["--learning-starts", min(5000, total // 20), "--threads", "1"]
    options = {"stdout": None, "stderr": None}
    process = started_run(run_dir, *arguments, "--no-cuda", **options)
    seen = []  # step, MB of memory, open files
    while process.poll() is None:
        with contextlib.suppress(OSError, IndexError):
            status = Path(f"/proc/{process.pid}/status").read_text()
            memory = int(status.split("VmRSS:")[1].split()[0]) / 1024
            files = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
            seen.append((steps(run_dir)[-1], memory, files))
        time.sleep(1)
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    clock = {int(row["step"]): float(row["time/seconds"]) for row in rows}

    def speed(tenth):  # steps per second in the tenth that begins there
        start, end = total * tenth // 10, total * (tenth + 1) // 10
        inside = [(s, t) for s, t in clock.items() if start <= s <= end]
        (s0, t0), (s1, t1) = inside[0], inside[-1]
        return (s1 - s0) / (t1 - t0)

    # not the last step: there the program may already be closing its files
    full = [row for row in seen if 1.2 * total / 10 < row[0] < total]
    return {
        "MB in the second tenth": np.mean([m for s, m, _ in full if s < 0.2 * total]),
        "MB in the last tenth": np.mean([m for s, m, _ in full if s > 0.9 * total]),
        "open files": sorted({f for *_, f in full}),
        "steps/s in the second tenth": speed(1),
        "steps/s in the last tenth": speed(9),
    }


# ------------------------------------- command line ------------------------------------


def record(what: str, tried: int, survived: int, seconds: float) -> None:
    """Append a row to torture.csv, and say it."""
    path = Path(__file__).with_suffix(".csv")
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["what", "tried", "survived", "seconds"])
        writer.writerow([what, tried, survived, round(seconds, 1)])
    print(f"\n{what}: {survived} of {tried} survived, {seconds:.1f} s")


def table(rows) -> None:
    """Print how often each row was there."""
    counts: dict[tuple, int] = {}
    for row in rows:
        counts[row] = counts.get(row, 0) + 1
    for row, count in sorted(counts.items(), key=lambda item: str(item[0])):
        print(f"{count:6}  " + " | ".join(str(cell) for cell in row))


def main_kills(directory: Path, number: int) -> tuple[int, int]:
    """Chains of ten kills, each chain on one run, until there are enough."""
    arguments = [*PENDULUM, "--total-timesteps", "4000", "--hidden-sizes", "128", "128"]
    whole = directory / "whole"
    assert run_cup(*arguments, "--run-dir", whole).returncode == 0
    rows, survived = [], 0
    for chain in range(math.ceil(number / 10)):
        place = directory / str(chain)
        place.mkdir()
        some = min(10, number - len(rows))
        found = list(kills(place, some, arguments, span=1.0, seed=chain))
        same = same_result(whole, place / "killed") and all_gone(place / "killed")
        last = "result identical" if same else "result differs"
        rows += [(*row, last) for row in found]
        survived += sum(row[1] == "resumed" for row in found) if same else 0
    table(rows)
    return len(rows), survived


def main() -> None:
    numbers = {"kills": 50, "corruptions": 1000, "arguments": 300, "numerics": 2000}
    numbers |= {"checkpoint": 1_000_000, "longrun": 200_000}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=numbers)
    parser.add_argument("--number", type=int, help="fewer or more of it")
    parser.add_argument("--env-id", default="reach-v2", help="of the long run")
    options = parser.parse_args()
    number, what = options.number or numbers[options.what], options.what
    torch.set_num_threads(1)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if what == "kills":
            tried, survived = main_kills(directory, number)
        elif what == "corruptions":
            rows = list(corruptions(directory, number))
            table([row[:2] for row in rows])
            print(f"longest {max(row[2] for row in rows):.2f} s, ", end="")
            print(f"largest {max(row[3] for row in rows):.0f} MB")
            tried = len(rows)
            survived = sum(row[1] in ("refused", "valid") for row in rows)
        elif what == "arguments":
            rows = arguments(directory, number)
            table([("exit code", code) for _, code, _ in rows])
            failed = [row for row in rows if not accepted(*row[1:])]
            table([(words, " ".join(typed)) for typed, _, words in failed])
            tried, survived = len(rows), len(rows) - len(failed)
        elif what == "numerics":
            rows = list(numerics(number))
            table(rows)
            tried, survived = len(rows), sum(row[2] for row in rows)
        elif what == "checkpoint":
            found = checkpoint(directory, number)
            table([(key, f"{value:.2f}") for key, value in found.items()])
            good = found["seconds"] < 3 and found["peak / buffer"] < 1.3
            tried, survived = 1, int(good)
        else:
            found = longrun(directory, number, options.env_id)
            table([(key, str(value)) for key, value in found.items()])
            early, late = (
                found[f"steps/s in the {w} tenth"] for w in ("second", "last")
            )
            before, after = (found[f"MB in the {w} tenth"] for w in ("second", "last"))
            good = late > 0.9 * early and after < 1.05 * before
            tried, survived = 1, int(good and len(found["open files"]) == 1)
    record(what, tried, survived, time.perf_counter() - start)


if __name__ == "__main__":
    main()
