"""Training speed of cup.py, of its compiled version, and of SAC in two other libraries.

    pip install -r benchmark/requirements.txt                     # the other libraries
    python benchmark/speed.py                                     # prints a table
    python benchmark/speed.py --out benchmark/results/speed.csv   # and writes every measurement

- sac, cup: cup.py without sources, and with the three shipped ones
- sac-compiled, cup-compiled: the same in benchmark/compiled.py
- sb3, sbx: SAC of Stable-Baselines3 (PyTorch) and of SBX (JAX)

All have one environment, one update per step, batches of 256 and two hidden layers of 256 units.
Each measurement is a process of its own, bound to as many cores as it has threads (Linux only).
The programs take turns, so that a change of the machine's speed concerns all of them. Leave the
machine alone meanwhile. Start, random steps, compilation and evaluation are not measured.
"""

import csv
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {"sac": ["cup.py", "--sources"], "cup": ["cup.py"]}
SCRIPTS |= {"sac-compiled": ["benchmark/compiled.py", "--sources"]}
SCRIPTS |= {"cup-compiled": ["benchmark/compiled.py"]}
PEERS = {"sb3": "stable_baselines3", "sbx": "sbx"}  # the module to import
PACKAGES = {"sb3": "stable-baselines3", "sbx": "sbx-rl"}
RANDOM_STEPS, WARM_UP = 500, 600  # steps before learning begins, and before the clock starts
CORES = os.sched_getaffinity(0)


@dataclass
class Args:
    """Measure environment steps per second."""
    programs: tuple[Literal[*SCRIPTS, *PEERS], ...] = (*SCRIPTS, *PEERS)  # see above
    threads: tuple[int, ...] = (1, 2)  # CPU threads of a program
    rounds: int = 5  # measurements of each program; the table has their median
    steps: int = 2_000  # environment steps of a measurement, a multiple of 100
    env_id: str = "push-wall-v2"
    out: Path | None = None  # csv file to write
    peer: str | None = None  # measure this library in this process (the script calls itself so)


def run(command: list[str], threads: int) -> str:
    """Run a Python script on as many cores as threads. Returns what it prints."""
    os.sched_setaffinity(0, sorted(CORES)[:threads])  # JAX takes all the cores that it may use
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, *command], env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(done.returncode)  # the script has said why
    return done.stdout


def measure_script(name: str, args: Args, threads: int) -> float:
    """Steps/s of cup.py or compiled.py, by the times in metrics.csv."""
    end = WARM_UP + args.steps
    script, *flags = SCRIPTS[name]
    flags += ["--env-id", args.env_id, "--num-envs", "1", "--utd-ratio", "1"]
    flags += ["--learning-starts", str(RANDOM_STEPS), "--guidance-starts", str(RANDOM_STEPS)]
    # the time of the last row includes an evaluation: one row more than is measured
    flags += ["--total-timesteps", str(end + 100), "--log-interval", "100"]
    flags += ["--eval-interval", "1000000", "--checkpoint-interval", "1000000"]
    flags += ["--eval-episodes", "1", "--buffer-size", "100000", "--threads", str(threads)]
    with tempfile.TemporaryDirectory() as run_dir:
        run([str(ROOT / script), *flags, "--run-dir", run_dir], threads)
        with open(Path(run_dir, "metrics.csv"), encoding="utf-8") as file:
            seconds = {int(row["step"]): float(row["time/seconds"]) for row in csv.DictReader(file)}
    return args.steps / (seconds[end] - seconds[WARM_UP])


def measure_peer(args: Args) -> float:
    """Steps/s of another library's SAC, in this process."""
    sys.path.insert(0, str(ROOT))
    import cup

    times = []

    def note_time(*_) -> bool:
        times.append(time.perf_counter())
        return True  # go on

    sac = importlib.import_module(PEERS[args.peer]).SAC(
        "MlpPolicy", cup.make_env(args.env_id, seed=1), learning_starts=RANDOM_STEPS,
        batch_size=256, buffer_size=100_000, policy_kwargs={"net_arch": [256, 256]},
        train_freq=1, gradient_steps=1, device="cpu",
    )
    sac.learn(WARM_UP + args.steps, callback=note_time)
    return args.steps / (times[-1] - times[-1 - args.steps])


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if args.peer:
        return print(measure_peer(args))
    missing = [name for name, module in PEERS.items() if not importlib.util.find_spec(module)]
    programs = [name for name in args.programs if name not in missing]
    for name in set(args.programs) - set(programs):
        print(f"{name} is left out: {PACKAGES[name]} is not installed")
    packages = ["torch", *(PACKAGES[name] for name in programs if name in PEERS)]
    versions = " ".join(f"{package}=={version(package)}" for package in packages)
    rows = [["program", "threads", "round", "steps_per_second", "packages"]]
    for number, threads, name in product(range(1, args.rounds + 1), args.threads, programs):
        if name in PEERS:
            speed = float(run([__file__, *sys.argv[1:], "--peer", name], threads).split()[-1])
        else:
            speed = measure_script(name, args, threads)
        rows.append([name, threads, number, round(speed, 1), versions])
        print(f"round {number}, {threads} threads, {name}: {speed:.1f} steps/s", flush=True)
    print("| program | threads | steps/s |\n| --- | --- | --- |")
    for threads, name in product(args.threads, programs):
        values = [row[3] for row in rows if row[:2] == [name, threads]]
        print(f"| {name} | {threads} | {statistics.median(values):.0f} |")
    if args.out:
        with open(args.out, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    main()
