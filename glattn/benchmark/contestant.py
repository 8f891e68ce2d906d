"""A model made ready for one case: folded where it can fold, in each memory format, with its step."""

from __future__ import annotations

import ast
import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glattn.benchmark.cost import count_bytes, count_macs
from glattn.benchmark.folding import fold
from glattn.benchmark.timing import Step

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


@dataclass(frozen=True)
class Case:
    """What is measured of every model.

    Args:
        task: infer, or train: forward, backward and an AdamW step.
        precision: fp32, or bf16: weights and all when inferring, autocast over fp32 weights when training.
        engine: eager; graph: the same calls, captured in a CUDA graph; or compile: ``torch.compile`` with its defaults.
        batch: Images of a step.
        pixels: Side of the images.
    """

    task: str
    precision: str
    engine: str
    batch: int
    pixels: int

    def __str__(self) -> str:
        return f"{self.task} {self.precision} {self.engine} batch {self.batch} at {self.pixels}"


@dataclass(frozen=True)
class Contestant:
    """A model that is ready, in one memory format.

    Args:
        step: Runs the case once.
        parameters: Of the model as it is trained.
        macs: Multiply-adds of one image, of the model as it runs; training counts as three forward passes.
        held: Tells bytes that stay between steps: all of them once a step was taken.
        folded: How far it was folded.
        memory_format: Of weights and images.
    """

    step: Step
    parameters: int
    macs: int
    held: Callable[[], int]
    folded: str
    memory_format: str


def split_options(name: str) -> tuple[str, dict[str, Any]]:
    """Return name and options of ``"glattn_tiny(layout='full', depths=(2, 2, 8, 2))"``; a bare name has none.

    Raises:
        ValueError: It is not written so.
    """
    if "(" not in name:
        return name, {}
    wrong = f"{name!r} is no model; write options as in \"glattn_tiny(layout='full')\""
    try:
        call = ast.parse(name, mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError(wrong)
        options = {str(option.arg): ast.literal_eval(option.value) for option in call.keywords}
    except (SyntaxError, ValueError):
        raise ValueError(wrong) from None
    if "None" in options or "num_classes" in options:  # `**options`; and all have the same classes
        raise ValueError(wrong)
    return call.func.id, options


def join_options(name: str, options: Mapping[str, Any]) -> str:
    """Return name and options as one, the way that `split_options` reads."""
    inside = ", ".join(f"{key}={value!r}" for key, value in options.items())
    return f"{name}({inside})" if inside else name


def create(name: str, pixels: int) -> nn.Module:
    """Return a model of timm's registry with random weights, made for images of that size where it must be."""
    name, options = split_options(name)
    if timm.get_pretrained_cfg_value(name, "fixed_input_size"):
        options.setdefault("img_size", pixels)
    return timm.create_model(name, num_classes=1000, **options)  # some are of ImageNet-22k by default


def prepare(
    name: str, case: Case, device: torch.device, formats: Iterable[str] = tuple(FORMATS)
) -> Iterator[Contestant]:
    """Yield a model ready for a case, in one memory format after the other.

    What it cannot do is raised, unless it can be made ready in another format.
    """
    torch.manual_seed(0)
    training = case.task == "train"
    image = torch.randn(case.batch, 3, case.pixels, case.pixels)
    model, folded = create(name, case.pixels), ""
    parameters = sum(p.numel() for p in model.parameters())
    if not training:
        model, folded = fold(model, image[:1])
    macs = count_macs(model.eval(), (1, *image.shape[1:])) * (3 if training else 1)
    model = model.to(device, DTYPES["fp32"] if training else DTYPES[case.precision])
    made, failure = False, None
    for memory_format in formats:
        try:
            trial = copy.deepcopy(model).to(memory_format=FORMATS[memory_format])
            step, optimizer = make_step(trial, image, case, device, memory_format)
        except Exception as error:  # others' models: some have weights that one format does not know
            failure = error
            continue
        made = True
        yield Contestant(step, parameters, macs, partial(count_bytes, trial, optimizer), folded, memory_format)
    if failure and not made:
        raise failure


def capture(step: Step) -> Step:
    """Return what replays a step's work on the GPU without the calls that ordered it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # what is chosen or made in the first calls
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay(keep: Step = step) -> None:  # with what the step holds, whose memory the graph reads
        graph.replay()

    return replay


def make_step(
    model: nn.Module, image: Tensor, case: Case, device: torch.device, memory_format: str
) -> tuple[Step, torch.optim.Optimizer | None]:
    """Return the step of a case, and the optimiser that it uses."""
    training = case.task == "train"
    image = image.to(device, DTYPES["fp32"] if training else DTYPES[case.precision])
    image = image.to(memory_format=FORMATS[memory_format])
    model.train(training)
    network: Callable[[Tensor], Tensor] = torch.compile(model, dynamic=False) if case.engine == "compile" else model
    if not training:

        def infer() -> None:
            with torch.inference_mode():
                network(image)

        return capture(infer) if case.engine == "graph" else infer, None

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    target = torch.randint(0, 1000, (len(image),), device=device)
    mixed = case.precision != "fp32"

    def train() -> None:
        with torch.autocast(device.type, DTYPES[case.precision]) if mixed else contextlib.nullcontext():
            loss = F.cross_entropy(network(image), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return train, optimizer
