"""Score a policy file on fresh goals, and film one episode.

    python benchmark/play.py sources/push-v2.pt
    MUJOCO_GL=egl python benchmark/play.py runs/push-wall-v2__cup__1/policy.pt --gif push-wall.gif

Prints the success rate with its Wilson interval and the mean return with its t interval, both at
95 %, by the mean action and by sampled actions. Their goals have a stream of seeds of their own,
so that no training and no evaluation has seen them.
"""

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw

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
    gif: Path | None = None  # where to write a film of the first episode by the mean action
    csv: Path | None = None  # where to add a row with the scores of the mean action
    seed: int = 1  # decides the goals and the sampled actions

    def __post_init__(self):  # tyro prints a ValueError as a usage error, with exit code 2
        if self.episodes < 2:
            raise ValueError("--episodes must be at least 2: an interval needs two")


def film(actor: cup.Actor, env_id: str, seed: int, caption: str) -> list[Image.Image]:
    """Every fourth step of an episode by the mean action, until 40 steps after its success."""
    env = cup.make_env(env_id, seed, render_mode="rgb_array")
    if env.unwrapped.spec is None:  # Meta-World's environments have none
        env.unwrapped.mujoco_renderer.default_cam_config = CAMERA
    obs, info, frames, step, after = env.reset(seed=seed)[0], {}, [], 0, 0
    while not info and after < 40:  # the last step of an episode has info
        if step % 4 == 0:
            frame = Image.fromarray(env.render())
            frame.thumbnail((320, 320))
            style = {"font_size": 13, "stroke_width": 1, "stroke_fill": "black"}
            ImageDraw.Draw(frame).text((6, 4), caption, "white", **style)
            frames.append(frame)
        mean, _ = actor(torch.as_tensor(obs))
        obs, _, _, _, info = env.step(torch.tanh(mean).numpy())
        step, after = step + 1, after + (env.success == 1)
    env.close()
    # one palette for all frames makes a small file, and an octree keeps the goal's rare colour
    palette = Image.fromarray(np.concatenate(frames)).quantize(128, Image.Quantize.FASTOCTREE)
    return [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]


def play(args: Args) -> None:
    if not args.policy.exists():
        hint = "a run of cup.py writes policy.pt at its first evaluation"
        raise cup.UserError(f"{args.policy} does not exist; {hint}")
    actor = cup.load_policy(args.policy)
    env_id = args.env_id or actor.about.get("env_id")
    if env_id is None:
        raise cup.UserError(f"{args.policy} names no task: choose one with --env-id")
    if ":" in env_id and args.env_id is None:  # the file cannot run code, but its module could
        raise cup.UserError(f"{args.policy} is for a task of your own: give --env-id {env_id}")
    env = cup.make_env(env_id, seed=0)
    theirs = (*env.observation_space.shape, *env.action_space.shape)
    ours = (actor.obs_dim, actor.action_dim)
    if theirs != ours:
        raise cup.UserError(f"{env_id} has observation, action sizes {theirs}, the policy {ours}")
    seeds = args.seed, 4, 0
    if args.gif:
        warnings.filterwarnings("ignore", module="glfw")  # the error says it
        caption = f"{env_id}, seed {args.seed}\n{'/'.join(args.policy.absolute().parts[-2:])}"
        try:
            frames = film(actor, env_id, cup.derive_seed(*seeds), caption)
        except Exception as error:  # OpenGL's libraries raise errors of many types
            hint = "without a display, set MUJOCO_GL=egl (needs libegl1) or osmesa (libosmesa6)"
            raise cup.UserError(f"cannot film {env_id}: {error!r}; {hint}") from error
        options = {"save_all": True, "append_images": frames[1:], "duration": 50, "loop": 0}
        frames[0].save(args.gif, "GIF", **options)
        print(f"wrote {args.gif}")
    success, mean_return = score(actor, env_id, args.episodes, seeds)
    score(actor, env_id, args.episodes, seeds, sample=True)
    if args.csv:
        with open(args.csv, "a", encoding="utf-8") as file:
            row = env_id, args.policy.stem, args.episodes, args.seed, mean_return, success
            print(*row, sep=",", file=file)


if __name__ == "__main__":
    try:
        play(tyro.cli(Args, description=__doc__))
    except (cup.UserError, OSError, ImportError) as error:
        print(f"play.py: {error}", file=sys.stderr)
        sys.exit(2)
