"""benchmark/play.py: scores, their intervals, films, and a sentence for every mistake."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cup

ROOT = Path(__file__).parents[1]
TASK = """
import gymnasium as gym, numpy as np
class Task(gym.Env):
    observation_space = action_space = gym.spaces.Box(-1, 1, (1,))
    metadata, render_mode = {"render_modes": ["rgb_array"]}, "rgb_array"
    def __init__(self, render_mode=None): pass
    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.goal = 0, self.np_random.integers(2)
        return np.ones(1, np.float32), {}
    def step(self, action):
        self.time += 1
        info = {"success": self.goal == 0 and self.time == 21}
        return np.ones(1, np.float32), float(self.goal), False, False, info
    def render(self): return np.full((480, 640, 3), 2 * self.time, np.uint8)
gym.register("Task-v0", Task, max_episode_steps=100)
"""


@pytest.fixture
def play(tmp_path, monkeypatch):
    """Run play.py beside that module and a policy file, and without a display."""
    (tmp_path / "my.py").write_text(TASK)
    cup.save(cup.policy_content(cup.Actor(1, 1, (8,)), env_id="my:Task-v0"), tmp_path / "my.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name, value in ("MUJOCO_GL", "glfw"), ("DISPLAY", ""), ("WAYLAND_DISPLAY", ""):
        monkeypatch.setenv(name, value)
    def run(typed: str):
        monkeypatch.setattr(sys, "argv", ["play.py", *typed.split()])
        runpy.run_path(str(ROOT / "benchmark" / "play.py"), run_name="__main__")
    return run


def test_scores_and_film(play, capsys):
    play("my.pt --env-id my:Task-v0 --seed 3 --episodes 20 --gif my.gif")
    returns = 100.0 * np.random.default_rng(cup.derive_seed(3, 4, 0)).integers(2, size=20)
    rate, z, t = np.mean(returns == 0), 1.959964, 2.093024  # of the normal, of t with 19 degrees
    middle, half = rate + z**2 / 40, z * np.sqrt(rate * (1 - rate) / 20 + z**2 / 1600)
    low, high = (middle - half) / (1 + z**2 / 20), (middle + half) / (1 + z**2 / 20)
    error = t * returns.std(ddof=1) / np.sqrt(20)
    text = f"success {rate:.2f} [{low:.2f}, {high:.2f}], return {returns.mean():.1f} ± {error:.1f}"
    assert capsys.readouterr().out.count(text) == 2  # by the mean and by sampled actions
    assert Image.open("my.gif").n_frames == 15  # to 40 steps after the success


@pytest.mark.parametrize("typed, sentence", [
    ("missing/policy.pt", "missing/policy.pt does not exist; .* first evaluation"),
    ("my.pt", "give --env-id my:Task-v0"),
    (f"{ROOT}/sources/reach-v2.pt --env-id my:Task-v0", r"sizes \(1, 1\), .* \(39, 4\)"),
    (f"{ROOT}/sources/reach-v2.pt --gif reach.gif", "MUJOCO_GL=egl"),
])
def test_a_mistake_is_a_sentence(play, capsys, typed, sentence):
    with pytest.raises(SystemExit, match="2"):
        play(typed)
    assert re.fullmatch(rf"play\.py: [^\n]*{sentence}[^\n]*\n", capsys.readouterr().err)
