"""Latency of a model's deployed forms beside eager, by turns: ``python scripts/benchmark_deployment.py glattn_small``.

All are folded and checked against the model before they are timed. Medians of interleaved rounds; the ratio is that of
eager's time to theirs, round by round, so that what slows the machine slows both.
"""

import argparse
import csv
import importlib.util
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch
from timm.utils import reparameterize_model
from torch import Tensor

import glattn  # noqa: F401 (registers the family)
from glattn.benchmark.machine import describe
from glattn.export import export
from glattn.files import one_line, replacing
from glattn.memory import keep_freed_memory

Run = Callable[[Tensor], Tensor]
REPEATS = 3  # in a turn
ROW = ("model", "runtime", "batch", "height", "width", "milliseconds", "times_eager", "difference")


def eager(model: torch.nn.Module, folder: Path, threads: int) -> Run:
    """Return the folded model, in NHWC memory."""
    folded = reparameterize_model(model).to(memory_format=torch.channels_last)
    return lambda x: folded(x.contiguous(memory_format=torch.channels_last))


def torch_export(model: torch.nn.Module, folder: Path, threads: int) -> Run:
    """Return the program that `glattn export` writes."""
    return torch.export.load(export(model, "torch-export", folder / "model.pt2").path).module()


def aot_inductor(model: torch.nn.Module, folder: Path, threads: int) -> Run:
    """Return that program compiled ahead of time."""
    if shutil.which("g++") is None:
        raise ImportError("g++ is missing")
    program = torch.export.load(export(model, "torch-export", folder / "model.pt2").path)
    program.example_inputs = ((torch.randn(2, 3, 224, 256),), {})  # left out of the file, for its size
    return torch._inductor.aoti_load_package(
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "compiled.pt2"))
    )


def onnx_runtime(model: torch.nn.Module, folder: Path, threads: int) -> Run:
    """Return the ONNX file in onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    path = str(export(model, "onnx", folder / "model.onnx").path)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"image": x.numpy()})[0])


def open_vino(model: torch.nn.Module, folder: Path, threads: int) -> Run:
    """Return the OpenVINO file, in fp32 as all others."""
    import openvino

    path = export(model, "openvino", folder / "model.xml").path
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(path, "CPU", options)
    return lambda x: torch.from_numpy(compiled(x.numpy())[0].copy())


RUNTIMES: dict[str, tuple[Callable[[torch.nn.Module, Path, int], Run], tuple[str, ...]]] = {
    "eager": (eager, ()),
    "torch.export": (torch_export, ()),
    "AOTInductor": (aot_inductor, ()),
    "onnxruntime": (onnx_runtime, ("onnx", "onnxscript", "onnxruntime")),
    "OpenVINO": (open_vino, ("openvino",)),
}


def measure(runs: dict[str, Run], x: Tensor, rounds: int) -> dict[str, list[float]]:
    """Return seconds of each run, round by round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run(x)  # untimed: threads of the runtime before may still be spinning
            start = time.perf_counter()
            for _ in range(REPEATS):
                run(x)
            seconds[name].append((time.perf_counter() - start) / REPEATS)
    return seconds


def count(text: str) -> int:
    """Return a number of one or more."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def size(text: str) -> tuple[int, int]:
    """Return (height, width) from ``224`` or ``192x320``."""
    height, _, width = text.partition("x")
    return count(height), count(width or height)


def main() -> int:
    """Export, check, time, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="+", help="names, by timm")
    parser.add_argument("--batches", type=count, nargs="+", default=[1, 8], help="images a step")
    parser.add_argument("--sizes", type=size, nargs="+", default=[(224, 224)], help="such as 224 or 192x320")
    parser.add_argument("--runtimes", nargs="+", choices=tuple(RUNTIMES)[1:], default=tuple(RUNTIMES)[1:])
    parser.add_argument("--rounds", type=count, default=15, help="turns of each (%(default)s)")
    parser.add_argument("--threads", type=count, default=torch.get_num_threads(), help="threads of each (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/deployment.csv"), help="CSV to write (%(default)s)")
    args = parser.parse_args()
    if unknown := [name for name in args.models if ":" not in name and not timm.is_model(name)]:
        parser.error(f"timm knows no model {unknown[0]!r}")
    torch.set_num_threads(args.threads)
    failed, rows, place = False, [], describe(torch.device("cpu"), kept=keep_freed_memory())
    for name in args.models:
        torch.manual_seed(0)
        model = timm.create_model(name).eval()
        runs: dict[str, Run] = {}
        with TemporaryDirectory() as folder, torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for runtime in ("eager", *args.runtimes):
                make, needs = RUNTIMES[runtime]
                if missing := [n for n in needs if importlib.util.find_spec(n) is None]:
                    print(f"{runtime} is left out: {', '.join(missing)} missing", file=sys.stderr)
                    continue
                try:
                    runs[runtime] = make(model, Path(folder), args.threads)
                except (ImportError, RuntimeError, ValueError) as error:
                    failed |= not isinstance(error, ImportError)
                    print(f"{name}: {runtime} is left out: {one_line(error)[:300]}", file=sys.stderr)
            for batch in args.batches:
                for height, width in args.sizes:
                    x = torch.randn(batch, 3, height, width)
                    wanted = model(x)
                    off = {n: ((run(x) - wanted).abs().max() / wanted.abs().max()).item() for n, run in runs.items()}
                    seconds = measure(runs, x, args.rounds)
                    for runtime, times in seconds.items():
                        ratio = statistics.median(e / t for e, t in zip(seconds["eager"], times, strict=True))
                        milliseconds = statistics.median(times) * 1000
                        row = (name, runtime, batch, height, width, f"{milliseconds:.2f}", f"{ratio:.2f}")
                        rows.append((*row, f"{off[runtime]:.1e}"))
                        print("  ".join(f"{value!s:>12}" for value in rows[-1]), flush=True)
                    with replacing(args.output) as temporary, temporary.open("w", newline="") as file:
                        csv.writer(file).writerows([(*ROW, *place), *((*row, *place.values()) for row in rows)])
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
