"""Lets the tests import cup.py from the repository root, and use one core."""

import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(1)
# a shell starts what a script puts in the background with SIGINT ignored, and the
# programs that the tests interrupt would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
