"""The tests of the GPU's code, and a record of what passed in each file.

    python benchmarks/gpu_tests.py --out benchmarks/results/h100 [--workers 8] [FILE ...]

On a card, or without one in Triton's interpreter and an emulator of CUDA's threads, as in CI. Some
need a card; the emulator's need none.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from mambapy.bench.machine import facts

FILES = (
    "tests/ops/gpu/test_cuda_scan.py",  # the longest first
    "tests/ops/gpu/test_gpu_step.py",
    "tests/ops/gpu/test_gpu_conv1d.py",
    "tests/ops/gpu/test_gpu_norm.py",
    "tests/ops/gpu/test_backend.py",
    "tests/ops/test_conv1d.py",
    "tests/ops/test_linear_cross_entropy.py",
    "tests/ops/test_norm.py",
    "tests/ops/test_selective_scan.py",
    "tests/test_fused.py",
    "tests/test_generation.py",
    "tests/test_recompute.py",
    "tests/test_residual.py",
    "tests/train/test_train_graph.py",
    "tests/train/test_train_update.py",
)


def tested(file: str) -> dict[str, Any]:
    """Run one file: its counts, why some were skipped, and pytest's words if it failed."""
    # The emulator runs CUDA C++ on tensors of the CPU, so only Triton's files are told.
    interpret = not torch.cuda.is_available() and "test_gpu_" in file
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report}"]
        run = subprocess.run(
            [sys.executable, "-m", "pytest", *options, file],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | ({"TRITON_INTERPRET": "1"} if interpret else {}),
        )
        if not report.exists():
            return {"passed": 0, "failed": 1, "output": run.stdout + run.stderr}
        suite = ET.parse(report).getroot().find("testsuite")
    assert suite is not None
    failed = sum(int(suite.attrib[kind]) for kind in ("failures", "errors"))
    skips = [one.attrib["message"] for one in suite.iter("skipped")]
    found: dict[str, Any] = {
        "passed": int(suite.attrib["tests"]) - failed - len(skips),
        "failed": failed,
        "skipped": {reason: skips.count(reason) for reason in sorted(set(skips))},
        "seconds": float(suite.attrib["time"]),
    }
    if run.returncode == 0:
        return found
    # No test in a file is a failure too.
    return {**found, "failed": max(1, failed), "output": run.stdout + run.stderr}


def main() -> int:
    """Run, print and write; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("files", nargs="*", default=FILES)
    parser.add_argument("--out", type=Path, required=True, help="folder for tests.json")
    parser.add_argument("--workers", type=int, default=8, help="files at once, on one card")
    args = parser.parse_args()
    with ThreadPoolExecutor(args.workers) as pool:
        found = dict(zip(args.files, pool.map(tested, args.files), strict=True))
    for file, result in found.items():
        sys.stdout.write(f"{file}: {result['passed']} passed, {result['failed']} failed\n")
        sys.stdout.write(result.get("output", ""))
    failed = int(any(result["failed"] for result in found.values()))
    if [*args.files] != [*FILES]:
        sys.stdout.write("not written: a record is of all files\n")
        return failed
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    record = {"machine": facts(None, card), "files": found}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "tests.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"written: {path}\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
