"""Film an episode of a policy file on a Meta-World task, as a GIF beside the file.

    python benchmark/film.py runs/push-wall-v2__cup__1/policy.pt

Needs an OpenGL library: where no display is, `apt-get install libosmesa6` (or libegl1) and
MUJOCO_GL=osmesa (or egl).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import imageio
import numpy as np
import torch
import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import cup


@dataclass
class Args:
    """Film an episode of a policy."""

    policy: tyro.conf.Positional[str]  # policy file
    env_id: str | None = None  # task; by default the one that the file names
    seed: int = 1  # decides the goal
    camera: str = "corner2"  # MuJoCo camera of the scene
    size: int = 240  # width and height in pixels
    output: str | None = None  # the GIF; by default beside the policy


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    actor = cup.load_policy(args.policy)
    env_id = args.env_id or actor.about.get("env_id")
    if not str(env_id).endswith(("-v2", "-v3")):
        raise cup.UserError(f"{args.policy} names no Meta-World task: choose one with --env-id")
    env = cup.make_env(env_id, args.seed, render_mode="rgb_array")
    env.unwrapped.mujoco_renderer.camera_id = env.unwrapped.model.camera(args.camera).id
    obs, _ = env.reset()
    frames, steps, after_success, done = [], 0, 0, False
    # forty steps, half a second, after the success the rest of the episode shows nothing new
    while not done and after_success < 40:
        if steps % 4 == 0:
            picture = env.render()
            if args.camera.startswith("corner"):  # these cameras hang upside down
                picture = np.ascontiguousarray(picture[::-1, ::-1])
            frames.append(Image.fromarray(picture).resize((args.size, args.size)))
        mean, _ = actor(torch.as_tensor(obs))
        obs, _, terminated, truncated, _ = env.step(torch.tanh(mean).numpy())
        done, steps = terminated or truncated, steps + 1
        after_success += int(env.success == 1)
    output = args.output or Path(args.policy).with_suffix(".gif")
    imageio.mimsave(output, frames, fps=20, loop=0)
    print(f"{output}: {steps} steps, success {env.success:.0f}, return {env.episode_return:.0f}")


if __name__ == "__main__":
    try:
        main()
    except cup.UserError as error:
        print(f"film.py: {error}", file=sys.stderr)
        sys.exit(2)
