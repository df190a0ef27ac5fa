"""Lets every process that finds this folder on its path first run on the hollow device: ranks are started as they are.

``HOLLOW_CUDA_LIBRARIES`` is the folder of the libraries. Checks of the driver are left out: the hollow one answers no
questions.
"""

import os
import sys
from pathlib import Path

if any("distributed.worker" in argument for argument in sys.orig_argv):
    os.environ.pop("HOLLOW_CUDA_LOG", None)  # the log is that of the process that starts the ranks
sys.path.insert(0, str(Path(__file__).parents[1]))
from worker import load_libraries

load_libraries(Path(os.environ["HOLLOW_CUDA_LIBRARIES"]))
from herdgraph.runtimes.distributed import cuda_rank  # noqa: E402
from herdgraph.runtimes.executors.ort.cuda import load  # noqa: E402

load.require_gpu = cuda_rank.require_gpu = lambda _place, _options: None
