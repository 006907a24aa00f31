"""Interleaved timing, peak memory of a step, and the machine that they were measured on."""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from liplayers.bundles.saving import cpu_model
from liplayers.certification.report import environment

Step = Callable[[], object]

LEAST_SECONDS = 0.02  # one measurement repeats a step until it lasts about this long …
MOST_CALLS = 50  # … but not more often than this


def measured(step: Step, calls: int, device: torch.device) -> float:
    """Milliseconds for each of `calls` calls of a step; on CUDA between two events, the device idle before and after.

    >>> measured(lambda: time.sleep(0.002), 2, torch.device("cpu")) >= 2
    True
    """
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        begin.record()
        for _ in range(calls):
            step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / calls
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return 1000 * (time.perf_counter() - start) / calls


def interleaved(
    steps: Sequence[Step], rounds: int, device: torch.device, after_round: Callable[[], object] = lambda: None
) -> list[list[float]]:
    """Milliseconds of each step in each round; every round runs all the steps in their order.

    What disturbs the machine for longer than a round falls on all steps alike, and cancels in ratios within a round.
    A warm-up round comes first; its second call of each step says how many calls make one measurement.
    """
    calls = []
    for step in steps:
        step()
        calls.append(min(MOST_CALLS, math.ceil(1000 * LEAST_SECONDS / max(measured(step, 1, device), 1e-3))))
    after_round()
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds):
        for step, count, row in zip(steps, calls, times, strict=True):
            row.append(measured(step, count, device))
        after_round()
    return times


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile.

    >>> quartiles([1.0, 2.0, 3.0, 4.0, 5.0])
    (2.0, 3.0, 4.0)
    """
    low, middle, high = np.percentile(np.asarray(values, dtype=float), (25, 50, 75)).tolist()
    return low, middle, high


def peak_memory(step: Step, device: torch.device) -> int | None:
    """The most bytes that a step holds at one time beyond what was allocated before it.

    Counted is what torch's own allocator of the device hands out: results, what autograd saves, gradients, temporary
    tensors, and those workspaces of libraries that torch allocates for them. Not counted are parameters, input and
    output gradient, which are there before, and what a library takes from the system by itself. On CUDA it is
    `torch.cuda.max_memory_allocated`; on CPU the profiler's record of every allocation. None where the profiler of
    this build of torch records none. The step runs once before, so that what it keeps for good is there already.

    >>> def step():
    ...     a = torch.empty(1000)
    ...     b = torch.empty(2000)
    ...     del a
    ...     return torch.empty(500)
    >>> peak_memory(step, torch.device("cpu"))
    12000
    """
    step()
    if device.type != "cuda":
        return _peak_on_cpu(step)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_on_cpu(step: Step) -> int | None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it complains about GPUs that are not there
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        record.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    events = [e for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == 0]
    if not events:
        return None
    first, *_ = (e["args"] for e in sorted(events, key=lambda e: e["ts"]))
    before = first["Total Allocated"] - first["Bytes"]
    return max(e["args"]["Total Allocated"] for e in events) - before


def machine(device: torch.device) -> dict[str, Any]:
    """What a timing depends on: processor, cores, threads, device, versions, precision of products, date, load."""
    found: dict[str, Any] = {
        **environment(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
        found["cudnn_allow_tf32"] = torch.backends.cudnn.allow_tf32
        found["cudnn_benchmark"] = torch.backends.cudnn.benchmark
    else:
        found["device"] = "cpu"
    return found
