"""Where a step of cup.py's training loop goes: ms of each of its parts, on a CPU.

    python benchmark/step.py      # two minutes; leave the machine alone meanwhile

One environment, one update of batch 256 a step, networks 256x256: eager and compiled, without
sources and with three. Writes step.csv.
"""

import csv
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import cup
from benchmark.speed import make_agent

PARTS = ["act", "sample", "update", "environment", "store"]


@dataclass
class Args:
    """Time the parts of a training step."""

    env_id: str = "push-v2"  # the task
    steps: int = 600  # steps that are timed, after a hundred that are not
    threads: int = os.cpu_count() or 1  # CPU threads
    out: Path = ROOT / "benchmark" / "step.csv"  # the file to write


def parts_of_a_step(args: Args, num_sources: int, compiled: bool) -> dict[str, float]:
    """Mean ms of each part."""
    envs = cup.make_envs(args.env_id, 1, 1)
    agent = make_agent(num_sources, compile=compiled)
    obs = torch.as_tensor(envs.reset()[0])
    seconds = Counter()
    for step in range(100 + args.steps):
        if step == 100:
            seconds.clear()
        times = [time.perf_counter()]
        action = agent.act(obs, [step])
        times.append(time.perf_counter())
        batch = agent.buffer.sample(256)
        times.append(time.perf_counter())
        agent.update(batch)
        times.append(time.perf_counter())
        next_obs, reward, terminated, truncated, _ = envs.step(action.numpy())
        times.append(time.perf_counter())
        stored = [torch.as_tensor(x, dtype=torch.float32) for x in (next_obs, reward, terminated)]
        agent.store(obs, action, *stored)
        obs = stored[0]
        times.append(time.perf_counter())
        for part, start, end in zip(PARTS, times, times[1:]):
            seconds[part] += end - start
        if truncated.any():  # after 500 steps
            obs = torch.as_tensor(envs.reset()[0])
    return {part: 1e3 * seconds[part] / args.steps for part in PARTS}


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # as in cup.py's train
    torch.empty(7_500_000)  # 30 MB, freed at once: now glibc keeps memory, as it does in training
    with open(args.out, "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["sources", "compiled", "threads", "torch", *(f"{x}_ms" for x in PARTS)])
        for compiled in (False, True):
            for num_sources in (0, 3):
                parts = parts_of_a_step(args, num_sources, compiled)
                about = [num_sources, compiled, args.threads, torch.__version__]
                rows.writerow(about + [f"{x:.2f}" for x in parts.values()])
                print(*about, {part: f"{x:.2f}" for part, x in parts.items()}, flush=True)


if __name__ == "__main__":
    main()
