"""The command line in a process whose clock runs FAST times as fast, if its RANK is FAST_RANK."""

from __future__ import annotations

import os
import time

import tunesmith.training.run  # so that libraries have taken the clock as it was
from tunesmith import cli

if os.environ["RANK"] == os.environ["FAST_RANK"]:
    clock, began = time.monotonic, time.monotonic()
    time.monotonic = lambda: began + (clock() - began) * float(os.environ["FAST"])

assert tunesmith.training
cli.main()
