"""What processes of the warm pool have done before they are forked: imports, and what torch makes on its first trace.

No thread may run afterwards: a fork takes only the thread that forks.
"""

from __future__ import annotations

import gc
import os

import hypothesis  # noqa: F401
import numpy as np  # noqa: F401
import pytest  # noqa: F401
import torch
import torch.distributed

import dist_export.cli
import dist_export.config.loader
import dist_export.dense
import dist_export.pipeline.steps
import dist_export.verify.verify  # noqa: F401
from tests.support import first_trace, shortcuts

torch.set_num_threads(1)
shortcuts.take()
first_trace.trace_once()
shortcuts.remember_no_fakes()
assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not be forked"
gc.collect()
gc.freeze()  # else the first collection of each child copies the pages of all objects
