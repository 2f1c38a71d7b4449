"""Source policies for CUP: trained by cup.py until they succeed, or cloned from a controller.

    python train_sources.py                              # reach-v2, push-v2, pick-place-v2
    python train_sources.py --env-ids push-wall-v2 --sources sources/push-v2.pt   # by CUP
    python train_sources.py --env-ids push-v2 --from-controller --output-dir cloned

Writes <env-id>.pt when a policy passes two tests or, after the last step, the best one tested.
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

import cup

INTERVAL = 48_000  # steps between tests; episodes of up to 3,000 steps fit in, 16 side by side
SETTINGS = f"--threads 1 --checkpoint-interval {INTERVAL} --eval-interval {INTERVAL}"
# SAC has to see much of the task, and steps cost less than updates: many environments, few and
# large updates. CUP guides in the updates: cup.py's defaults, four times as many, learn faster.
SAC = "--num-envs 16 --utd-ratio 0.0625 --batch-size 512 --learning-starts 8000"
SAC += " --policy-lr 5e-4 --q-lr 5e-4"


@dataclass
class Args:
    """Make source policies and write them to the output directory."""
    env_ids: tuple[str, ...] = ("reach-v2", "push-v2", "pick-place-v2")  # a file there is kept
    seed: int = 1  # seed of every run; try another one where a task is not learnt
    workers: int = 1  # tasks trained at once, one thread each; controllers are cloned one by one
    total_timesteps: int = 200 * INTERVAL  # environment steps after which the best policy is taken
    target_success: float = 0.95  # success rate, by the mean action, that passes a test
    test_episodes: int = 50  # episodes of a test, each with a goal of its own
    sources: tuple[str, ...] = ()  # policy files to learn from by CUP; none: SAC
    from_controller: bool = False  # no training: clone the controller that Meta-World ships
    output_dir: Path = cup.SOURCES  # where <env-id>.pt goes; the runs go to runs/


def score(actor: cup.Actor, env_id: str, episodes: int, seed: int, sample: bool = False):
    """Return and success, two arrays (episodes,), by the mean action or by sampled actions.

    Success is NaN in all episodes of a task that does not report it."""
    rng = torch.Generator().manual_seed(seed)  # the global one is shared by the workers

    def act(obs: torch.Tensor):  # evaluate takes the tanh of what comes first
        mean, log_std = actor(obs)
        return mean + sample * log_std.exp() * torch.randn(mean.shape, generator=rng), log_std

    returns, success = np.array(cup.evaluate(act, env_id, episodes, seed)).T
    # an episode that says nothing of success is a failure where another one says something
    return returns, success if np.isnan(success).all() else np.nan_to_num(success)


def test(args: Args, env_id: str, actor: cup.Actor, k: int, sample: bool = False):
    """Success rate and mean return of a policy on the k-th set of goals that it has not seen."""
    seed = cup.derive_seed(args.seed, 5, actor.about["step"], k)
    returns, success = score(actor, env_id, args.test_episodes, seed, sample)
    result = f"success {success.mean():.0%}, return {returns.mean():,.0f}"
    print(f"{env_id}, step {actor.about['step']:,}, test {k + 1}: {result}", flush=True)
    return success.mean().item(), returns.mean().item()


def write_source(args: Args, env_id: str, actor: cup.Actor) -> None:
    """Write a policy file, with scores on goals that had no part in choosing the policy."""
    about = {"env_id": env_id, "step": actor.about["step"], "eval_episodes": args.test_episodes}
    about["sources"] = [Path(source).stem for source in args.sources]
    about["success_rate"], about["return"] = test(args, env_id, actor, 2)
    about["sampled_success_rate"], _ = test(args, env_id, actor, 2, sample=True)
    path = args.output_dir / f"{env_id}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    cup.save(cup.policy_content(actor, **about), path)
    print(f"{env_id}: wrote {path}", flush=True)


def train(args: Args, env_id: str) -> None:
    """Run cup.py until a policy passes two tests or the steps are over."""
    run_dir = Path(f"runs/source__{env_id}__{'cup' if args.sources else 'sac'}__{args.seed}")
    policy, best, log = run_dir / "policy.pt", run_dir / "best.pt", Path(f"{run_dir}.log")
    run_dir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, cup.__file__, "--env-id", env_id, "--seed", str(args.seed)]
    command += ["--run-dir", run_dir, "--resume", *SETTINGS.split(), "--sources", *args.sources]
    command += [*([] if args.sources else SAC.split()), "--total-timesteps"]
    # go on with the interval of the last policy: its test may be missing
    last = cup.load_policy(policy).about["step"] if policy.exists() else 1
    step, passed = (min(last, args.total_timesteps) - 1) // INTERVAL * INTERVAL, False
    while step < args.total_timesteps and not passed:
        step = min(step + INTERVAL, args.total_timesteps)
        with open(log, "a") as out:
            code = subprocess.run([*command, str(step)], stdout=out, stderr=out).returncode
        if code != 0:
            last_line = log.read_text().splitlines()[-1]
            raise cup.UserError(f"{env_id}: exit code {code}, see {log}: {last_line}")
        actor = cup.load_policy(policy)
        rate, mean_return = test(args, env_id, actor, 0)
        if rate >= args.target_success:  # the first of many policies to pass is often a lucky one
            rate, mean_return = test(args, env_id, actor, 1)
            passed = rate >= args.target_success
        rank = [np.nan_to_num(rate).item(), mean_return]  # by return where success is unknown
        if passed or not best.exists() or rank > cup.load_policy(best).about["rank"]:
            cup.save(cup.policy_content(actor, step=actor.about["step"], rank=rank), best)
    write_source(args, env_id, cup.load_policy(best))


def clone_controller(args: Args, env_id: str, controller, episodes=100, updates=10_000) -> None:
    """Write a source that imitates a controller: obs (obs_dim,) -> action (action_dim,).

    The actions taken are noisy, so that states around the controller's path are seen. Those to
    learn are the controller's own, by their likelihood under the actor's Gaussian before the tanh.
    """
    torch.manual_seed(args.seed)
    observations, actions = [], []

    def watch(obs: torch.Tensor):  # evaluate takes the tanh of what comes first
        observations.append(obs)
        actions.append(torch.tensor(controller(obs[0].numpy())[None], dtype=torch.float32).clamp(-1, 1))
        if len(actions) % 5000 == 0: 
            print(...)
        noisy = actions[-1] + 0.3 * torch.randn_like(actions[-1])
        return noisy.clamp(-1, 1).atanh(), None

    cup.evaluate(watch, env_id, episodes, cup.derive_seed(args.seed, 5, 0, 0))
    obs, pre_tanh = torch.cat(observations).double(), torch.cat(actions).clamp(-0.98, 0.98).atanh()
    # a log-std below -1.5 is taken for -1.5 of a source: see query_sources
    actor = cup.Actor(obs.shape[1], pre_tanh.shape[1], (256, 256), log_std_min=-1.5)
    actor.standardize.fit(obs)
    optimizer = torch.optim.Adam(actor.parameters(), lr=5e-4, fused=True)
    for update in range(updates):
        index = torch.randint(len(obs), (256,))
        mean, log_std = actor(obs[index])
        loss = F.gaussian_nll_loss(mean, pre_tanh[index], (2 * log_std).exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (update + 1) % 1000 == 0:
            print(f"{env_id}: {update + 1:,} of {updates:,} updates, loss {loss:.2f}", flush=True)
    actor.about = {"step": len(obs)}
    write_source(args, env_id, actor)


def clone(args: Args, env_id: str) -> None:
    """`clone_controller` with the controller that Meta-World ships for a task."""
    from metaworld.policies import ENV_POLICY_MAP as controllers

    task = env_id.replace("-v2", "-v3")
    if task not in controllers:
        raise cup.UserError(f"Meta-World has no controller for {env_id}")
    clone_controller(args, env_id, controllers[task]().get_action)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    todo = [x for x in args.env_ids if not (args.output_dir / f"{x}.pt").exists()]
    print(f"not in {args.output_dir}:", *todo, flush=True)
    make, workers = (clone, 1) if args.from_controller else (train, args.workers)
    pool, code = ThreadPoolExecutor(workers), 0
    try:
        for task in as_completed([pool.submit(make, args, env_id) for env_id in todo]):
            try:
                task.result()
            except (cup.UserError, OSError) as error:
                print(f"train_sources.py: {error}", file=sys.stderr, flush=True)
                code = 2
    except KeyboardInterrupt:
        print("stopped: the same command", "clones from the start" if ... )
        os._exit(130)
    sys.exit(code)
