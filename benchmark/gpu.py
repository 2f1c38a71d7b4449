"""How fast is cup.py on a GPU: eager against --compile, by environments and updates a step.

    python benchmark/gpu.py     # some three minutes on an H100; leave the machine alone meanwhile

A step is that of cup.py's training loop: act, update, step the environments, store. Each row of
gpu.csv is a mean over --steps of them. gpu_share is the part of the time in which kernels run.
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import cup
from benchmark.speed import make_agent
from benchmark.transfer import update_csv

COLUMNS = ["machine", "torch", "sources", "num_envs", "updates", "compiled", "steps_per_second",
           "updates_per_second", "gpu_share", "load"]


@dataclass
class Args:
    """Measure the speed of cup.py on a GPU."""

    env_id: str = "push-v2"  # the task
    num_envs: tuple[int, ...] = (1, 4, 16)  # environments that step side by side
    updates: tuple[int, ...] = (1, 2, 4)  # gradient updates per step of all environments
    num_sources: int = 3  # source policies, all random
    steps: int = 150  # steps of all environments of a measurement; a third before it is not counted
    cuda: bool = True  # without, it is the CPU's speed
    out: Path = ROOT / "benchmark"  # where gpu.csv goes


def run(agent: cup.Agent, envs, updates: int, steps: int) -> float:
    """Seconds of so many steps."""
    device = agent.log_alpha.device
    obs = torch.as_tensor(envs.reset()[0], device=device)
    start = time.perf_counter()
    for _ in range(steps):
        action = agent.act(obs, [len(env.actions) for env in envs.envs])
        for _ in range(updates):
            agent.update(agent.buffer.sample(256))
        next_obs, reward, terminated, truncated, _ = envs.step(action.cpu().numpy())
        stored = [torch.as_tensor(x, dtype=torch.float32, device=device)
                  for x in (next_obs, reward, terminated)]
        agent.store(obs, action, *stored)
        if truncated.any():  # all of them, after 500 steps
            next_obs, _ = envs.reset()
        obs = torch.as_tensor(next_obs, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def kernel_seconds(agent: cup.Agent, envs, updates: int, steps: int) -> float:
    """Seconds in which kernels run, in so many steps."""
    # CUDA alone: an operator on the CPU would count its kernels a second time
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(agent, envs, updates, steps)
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if args.cuda and not torch.cuda.is_available():
        print("gpu.py: PyTorch finds no CUDA device: use --no-cuda", file=sys.stderr)
        sys.exit(2)
    machine = torch.cuda.get_device_name() if args.cuda else "CPU"
    about = {"machine": f"{machine}, {os.cpu_count()} cores", "torch": torch.__version__}
    about["sources"] = args.num_sources
    envs = {count: cup.make_envs(args.env_id, count, 1) for count in args.num_envs}
    for compiled in (False, True):
        device = "cuda" if args.cuda else "cpu"
        agent = make_agent(args.num_sources, device, compile=compiled)
        for count in args.num_envs:
            for updates in args.updates:
                run(agent, envs[count], updates, args.steps // 3)
                seconds = run(agent, envs[count], updates, args.steps) / args.steps
                row = about | {"num_envs": count, "updates": updates, "compiled": compiled}
                row["steps_per_second"] = f"{count / seconds:.4g}"
                row["updates_per_second"] = f"{updates / seconds:.4g}"
                if args.cuda:
                    kernels = kernel_seconds(agent, envs[count], updates, 20) / 20
                    row["gpu_share"] = f"{kernels / seconds:.2f}"
                row["load"] = f"{os.getloadavg()[0]:.1f}"
                update_csv(args.out / "gpu.csv", COLUMNS, 6, [row])
                print(*row.values(), sep=", ", flush=True)


if __name__ == "__main__":
    main()
