"""Score a policy file on fresh goals, and film one episode.

    python benchmark/play.py sources/push-v2.pt
    MUJOCO_GL=egl python benchmark/play.py runs/push-wall-v2__cup__1/policy.pt --gif push-wall.gif

Prints the success rate with its Wilson interval and the mean return with its t interval, both at
95 %, by the mean action and by sampled actions. The seeds of the goals are a stream of their own
(4), which no training and no evaluation uses.
"""

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1]))
import cup
from train_sources import score

# a view of Meta-World's table that shows a goal behind a wall and one inside a shelf
CAMERA = {"lookat": np.array([0, 0.65, 0.15]), "distance": 1.5, "azimuth": 155, "elevation": -40}


@dataclass
class Args:
    """Score a policy on fresh goals, and film one episode."""
    policy: tyro.conf.Positional[Path]  # policy file
    env_id: str | None = None  # task; by default the one that the file names
    episodes: int = 50  # episodes by the mean action, and as many by sampled actions
    gif: Path | None = None  # where to write the film of the first episode by the mean action
    seed: int = 1  # decides the goals and the sampled actions

    def __post_init__(self):  # tyro prints a ValueError as a usage error, with exit code 2
        if self.episodes < 2:
            raise ValueError("--episodes must be at least 2: an interval needs two")


def make_env(env_id: str, actor: cup.Actor, seed: int, **options):
    """cup.make_env, and a cup.UserError for a policy whose sizes are not the task's."""
    env = cup.make_env(env_id, seed, **options)
    torch.set_default_dtype(torch.float32)  # whatever the environment's module has set
    sizes = (*env.observation_space.shape, *env.action_space.shape)
    if sizes != (actor.obs_dim, actor.action_dim):
        ours = (actor.obs_dim, actor.action_dim)
        raise cup.UserError(f"the policy has observation and action sizes {ours}, the task {sizes}")
    return env


def film(actor: cup.Actor, env_id: str, seed: int, caption: str) -> list[Image.Image]:
    """One episode by the mean action, every fourth step of it."""
    frames, info, step = [], {}, 0
    env = make_env(env_id, actor, seed, render_mode="rgb_array")
    if env.unwrapped.spec is None:  # Meta-World's tasks have none
        env.unwrapped.mujoco_renderer.default_cam_config = CAMERA
    obs, _ = env.reset(seed=seed)
    while not info:  # the last step of an episode has it
        if step % 4 == 0:
            frame = Image.fromarray(env.render())
            frame.thumbnail((320, 320))
            style = {"font_size": 13, "stroke_width": 1, "stroke_fill": "black"}
            ImageDraw.Draw(frame).text((6, 4), caption, "white", **style)
            frames.append(frame)
        mean, _ = actor(torch.as_tensor(obs))
        obs, _, _, _, info = env.step(torch.tanh(mean).numpy())
        step += 1
    env.close()
    return frames


def summary(returns: np.ndarray, success: np.ndarray) -> str:
    """Success rate and mean return of episodes (n,), with 95 % intervals."""
    n = len(returns)
    half_width = stats.t.ppf(0.975, n - 1) * returns.std(ddof=1) / np.sqrt(n)
    text = f"return {returns.mean():,.1f} ± {half_width:,.1f}"
    if np.isnan(success).any():  # the task does not report success
        return text
    low, high = stats.binomtest(int(success.sum()), n).proportion_ci(method="wilson")
    return f"success {success.mean():.2f} [{low:.2f}, {high:.2f}], {text}"


def play(args: Args) -> None:
    if not args.policy.exists():
        hint = "a run of cup.py writes policy.pt at its first evaluation"
        raise cup.UserError(f"{args.policy} does not exist; {hint}")
    actor = cup.load_policy(args.policy)
    env_id = args.env_id or actor.about.get("env_id", ":")
    if args.env_id is None and ":" in env_id:  # a policy file cannot run code, its task's module can
        raise cup.UserError(f"say which task: --env-id {env_id.strip(':') or 'ID'}")
    seed = cup.derive_seed(args.seed, 4, 0)
    if args.gif:
        name = "/".join(args.policy.absolute().parts[-2:])
        warnings.filterwarnings("ignore", module="glfw")  # the error says it, too
        try:
            frames = film(actor, env_id, seed, f"{env_id}, seed {args.seed}\n{name}")
        except cup.UserError:
            raise
        except Exception as error:  # those of the OpenGL libraries are of many types
            hint = "without a display, set MUJOCO_GL=egl (needs libegl1) or osmesa (libosmesa6)"
            raise cup.UserError(f"cannot film {env_id}: {error!r}; {hint}") from error
        options = {"save_all": True, "append_images": frames[1:], "duration": 50, "loop": 0}
        frames[0].save(args.gif, "GIF", **options)
    make_env(env_id, actor, seed).close()
    print(f"{args.policy} on {env_id}, {args.episodes} episodes each, seed {args.seed}", flush=True)
    for name, sample in ("mean action", False), ("sampled actions", True):
        print(f"{name}: {summary(*score(actor, env_id, args.episodes, seed, sample))}", flush=True)


if __name__ == "__main__":
    try:
        play(tyro.cli(Args, description=__doc__))
    except (cup.UserError, OSError, ImportError) as error:
        print(f"play.py: {error}", file=sys.stderr)
        sys.exit(2)
