"""Source policies for CUP: trained by cup.py until they succeed, or cloned from a controller.

    python train_sources.py --output-dir mine --workers 2   # reach, push, pick-place: hours
    python train_sources.py --output-dir mine --env-ids push-v2 --from-controller   # minutes
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from scipy import stats

import cup

INTERVAL = 48_000  # steps between tests: six episodes of Meta-World in each of 16 environments
SETTINGS = f"--threads 1 --checkpoint-interval {INTERVAL} --eval-interval {INTERVAL}"
# SAC must see much of a task: many environments, few and large updates. CUP guides in the updates.
SAC = "--num-envs 16 --utd-ratio 0.0625 --batch-size 512 --learning-starts 8000"
SAC += " --policy-lr 5e-4 --q-lr 5e-4"


@dataclass
class Args:
    env_ids: tuple[str, ...] = ("reach-v2", "push-v2", "pick-place-v2")  # tasks; old files are kept
    seed: int = 1  # seed of every run; try another one where a task is not learnt
    workers: int = 1  # tasks trained at once, one thread each; controllers are cloned one by one
    total_timesteps: int = 200 * INTERVAL  # environment steps after which the best policy is taken
    target_success: float = 0.95  # success rate that a policy must reach in two tests
    test_episodes: int = 50  # episodes of a test, by the mean action and with new goals
    sources: tuple[str, ...] = ()  # policy files to learn from by CUP; none: SAC
    from_controller: bool = False  # no training: clone the controller that Meta-World ships
    output_dir: Path = cup.SOURCES  # where <env-id>.pt goes; the runs go to runs/


def score(actor, env_id: str, n: int, seeds: tuple, sample: bool = False) -> tuple[float, float]:
    """Success rate (NaN: not reported) and mean return of n episodes, and their 95 % intervals."""
    seed = cup.derive_seed(*seeds)
    rng = torch.Generator().manual_seed(seed)  # the global one is shared by the workers

    def act(obs: torch.Tensor):  # evaluate takes the tanh of the mean
        mean, log_std = actor(obs)
        return torch.normal(mean, sample * log_std.exp(), generator=rng), log_std
    returns, success = np.array(cup.evaluate(act, env_id, n, seed)).T
    text = f"return {returns.mean():,.1f} ± {stats.t.ppf(0.975, n - 1) * stats.sem(returns):,.1f}"
    if not np.isnan(success).all():
        success = np.nan_to_num(success)  # where an episode reports it, one that does not failed
        low, high = stats.binomtest(int(success.sum()), n).proportion_ci(method="wilson")
        text = f"success {success.mean():.2f} [{low:.2f}, {high:.2f}], {text}"
    print(f"{env_id}, {n} episodes, {'sampled' if sample else 'mean'} action: {text}")
    return success.mean().item(), returns.mean().item()


def write_source(args: Args, env_id: str, actor: cup.Actor, step: int) -> None:
    """Write a policy file, with scores on goals that had no part in choosing the policy."""
    task = actor, env_id, args.test_episodes, (args.seed, 5, step, 3)
    about = {"env_id": env_id, "step": step, "eval_episodes": args.test_episodes}
    about["sources"] = [Path(source).stem for source in args.sources]
    about["success_rate"], about["return"] = score(*task)
    about["sampled_success_rate"], _ = score(*task, sample=True)
    path = args.output_dir / f"{env_id}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    cup.save(cup.policy_content(actor, **about), path)
    print(f"{env_id}: wrote {path}")


def train(args: Args, env_id: str) -> None:
    """Run cup.py until a policy passes two tests or the steps are over."""
    run_dir = Path(f"runs/source__{env_id}__{'cup' if args.sources else 'sac'}__{args.seed}")
    policy, best, log = run_dir / "policy.pt", run_dir / "best.pt", Path(f"{run_dir}.log")
    run_dir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, cup.__file__, "--env-id", env_id, "--seed", str(args.seed)]
    command += ["--run-dir", run_dir, "--resume", *SETTINGS.split(), "--sources", *args.sources]
    command += [*([] if args.sources else SAC.split()), "--total-timesteps"]
    last = cup.load_policy(policy).about["step"] if policy.exists() else 1  # perhaps not tested
    step, passed = (min(last, args.total_timesteps) - 1) // INTERVAL * INTERVAL, False
    while step < args.total_timesteps and not passed:
        step = min(step + INTERVAL, args.total_timesteps)
        print(f"{env_id}: training to step {step:,}, see {log}")
        with open(log, "a") as out:
            if subprocess.run([*command, str(step)], stdout=out, stderr=out).returncode != 0:
                raise cup.UserError("".join(log.read_text().splitlines()[-1:]) + f" (see {log})")
        actor = cup.load_policy(policy)
        rate, mean_return = score(actor, env_id, args.test_episodes, (args.seed, 5, step, 1))
        if rate >= args.target_success:  # the first of many policies to pass is often a lucky one
            rate, mean_return = score(actor, env_id, args.test_episodes, (args.seed, 5, step, 2))
            passed = rate >= args.target_success
        rank = [np.nan_to_num(rate).item(), mean_return]  # by return where success is unknown
        if passed or not best.exists() or rank > cup.load_policy(best).about["rank"]:
            cup.save(cup.policy_content(actor, step=actor.about["step"], rank=rank), best)
    actor = cup.load_policy(best)
    write_source(args, env_id, actor, actor.about["step"])


def clone_controller(args: Args, env_id: str, controller=None, episodes=100, updates=10_000):
    """Imitate a controller, obs (obs_dim,) -> action (action_dim,), by default Meta-World's own."""
    from metaworld.policies import ENV_POLICY_MAP as shipped
    task, seen = env_id.replace("-v2", "-v3"), []
    if controller is None and task not in shipped:
        raise cup.UserError(f"Meta-World has no controller for {env_id}")
    controller = controller or shipped[task]().get_action

    def act(obs: torch.Tensor):  # evaluate takes the tanh of the mean
        action = torch.tensor(controller(obs[0].numpy())[None], dtype=torch.float32).clamp(-1, 1)
        seen.append((obs.double(), action.clamp(-0.98, 0.98).atanh()))  # infinite at -1 and 1
        if len(seen) % 5000 == 0:
            print(f"{env_id}: {len(seen):,} steps of {episodes} episodes of the controller")
        noisy = action + 0.3 * torch.randn(action.shape)  # shows states around the path, too
        return noisy.clamp(-1, 1).atanh(), None
    torch.manual_seed(args.seed)
    cup.evaluate(act, env_id, episodes, cup.derive_seed(args.seed, 5, 0, 0))
    obs, pre_tanh = map(torch.cat, zip(*seen))
    # a log-std below -1.5 is taken for -1.5 of a source: see query_sources
    actor = cup.Actor(obs.shape[1], pre_tanh.shape[1], (256, 256), log_std_min=-1.5)
    actor.standardize.fit(obs)
    optimizer = torch.optim.Adam(actor.parameters(), lr=5e-4, fused=True)
    for update in range(updates):
        index = torch.randint(len(obs), (256,))
        mean, log_std = actor(obs[index])
        loss = torch.nn.functional.gaussian_nll_loss(mean, pre_tanh[index], (2 * log_std).exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if update % 1000 == 0:
            print(f"{env_id}: {update:,} of {updates:,} updates, loss {loss:.2f}")
    write_source(args, env_id, actor, step=len(obs))


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    sys.stdout.reconfigure(line_buffering=True)
    todo = [x for x in args.env_ids if not (args.output_dir / f"{x}.pt").exists()]
    print(f"to make in {args.output_dir}:", *todo or ["nothing"])
    make, workers = (clone_controller, 1) if args.from_controller else (train, args.workers)
    pool = ThreadPoolExecutor(workers)
    tasks = {pool.submit(make, args, env_id): env_id for env_id in todo}
    try:
        for task in as_completed(tasks):
            if error := task.exception():  # the other tasks go on
                print(f"train_sources.py: {tasks[task]} failed: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped: the same command", "begins anew" if args.from_controller else "goes on")
        os._exit(130)  # the other threads would go on; no file is left half written
    sys.exit(2 if any(task.exception() for task in tasks) else 0)
