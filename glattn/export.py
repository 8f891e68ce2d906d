"""``glattn export``: a model as ONNX, torch.export or OpenVINO, folded, for any batch and size, checked on the spot."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from glattn.files import one_line

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

Run = Callable[["Tensor"], "Tensor"]


@dataclass(frozen=True)
class Format:
    """A kind of file to export to.

    Args:
        suffix: The file's suffix.
        needs: Modules that writing or checking it imports.
        extra: The extra of this package that installs them.
        write: From a program, its metadata and a path to the file, and to how to run the file.
    """

    suffix: str
    needs: tuple[str, ...]
    extra: str
    write: Callable[[ExportedProgram, Mapping[str, str], Path], Run]


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        path: The file.
        difference: Largest difference to the eager model's logits.
        scale: Largest of those logits.
    """

    path: Path
    difference: float
    scale: float


def export(
    model: nn.Module,
    to: str,
    path: str | os.PathLike[str],
    *,
    tolerance: float = 1e-4,
    img_size: int | Sequence[int] | None = None,
) -> Exported:
    """Write a model for another runtime, folded, and run the file against the eager model.

    Batch, height and width are free in the file; class names and preprocessing are in its metadata. The model itself
    stays as it is.

    Args:
        model: A model of timm's.
        to: ``onnx``, ``torch-export`` or ``openvino``.
        path: The file to write; the format's suffix is added to a name without it.
        tolerance: Largest difference allowed to the eager model's logits, over the largest of them.
        img_size: Fix height and width, in pixels, one side or both, for models that are not free of them.

    Raises:
        ValueError: A package is missing, the model cannot be exported, or the file differs from it by more than
            ``tolerance``; no file is left then.
    """
    if to not in FORMATS:
        raise ValueError(f"{to!r} is no format to export to; there are {', '.join(FORMATS)}")
    kind, path = FORMATS[to], Path(path)
    if path.suffix != kind.suffix:
        path = path.with_name(path.name + kind.suffix)
    if missing := [name for name in kind.needs if importlib.util.find_spec(name) is None]:
        raise ValueError(f"export to {to} needs {', '.join(missing)}: pip install 'glattn[{kind.extra}]'")
    import torch
    from timm.data.model_config import resolve_input_data_config
    from timm.utils.model import unwrap_model

    from glattn.models.glattn import image_size

    model = unwrap_model(model)
    if not getattr(model, "pretrained_cfg", None) or not hasattr(model, "num_classes"):
        raise ValueError(f"{type(model).__name__} is no classifier of timm's; export the whole model")
    model = copy.deepcopy(model).cpu().float().eval()
    fixed = None if img_size is None else image_size(img_size)
    data_config = resolve_input_data_config(model, {"img_size": fixed})
    channels, *size = data_config["input_size"]
    program = _capture(model, (channels, *size), free=fixed is None)
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        written = Path(folder) / path.name
        try:
            run = kind.write(program, metadata(model, data_config), written)
        except RuntimeError as error:  # what the exporters raise of what they cannot express
            raise ValueError(f"{to} cannot express this model: {one_line(error)[-300:]}") from error
        others = [(size[0] + 37, max(size[1] - 51, 40)), (max(size[0] // 2, 40), size[1] + 64)]
        others = others if fixed is None else []
        shapes = [(1, channels, *size), (3, channels, *size), *((2, channels, *other) for other in others)]
        difference, scale = 0.0, 0.0
        for shape in shapes:
            image = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            try:
                with torch.inference_mode():
                    expected = model(image)
                given = run(image)
            except MemoryError:
                raise
            except Exception as error:  # each runtime has its own
                hint = "; fix the size with --img-size" if fixed is None else ""
                raise ValueError(
                    f"{path} is not written: it does not take {shape}{hint}: {one_line(error)[:300]}"
                ) from error
            off = (given - expected).abs().max().item()
            difference = off if not off <= difference else difference  # a NaN stays
            scale = max(scale, expected.abs().max().item())
        if not difference <= tolerance * scale:
            raise ValueError(
                f"{path} is not written: it differs from the model by {difference:.3g}, with logits up to "
                f"{scale:.3g}; {tolerance:g} of that is allowed"
            )
        # the file that names the others last, so that it is never there without them
        for part in sorted(Path(folder).iterdir(), key=lambda part: part == written):
            part.replace(path.parent / part.name)
    return Exported(path, difference, scale)


def metadata(model: nn.Module, data_config: Mapping[str, Any]) -> dict[str, str]:
    """Return what a file says of the model, and of the images it takes, as JSON under each name."""
    from glattn import __version__
    from glattn.hub.local_dir import all_names

    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    color = {"color": "RGB"} if data_config["input_size"][0] == 3 else {}
    facts = {
        "architecture": cfg.get("architecture"),
        "class_names": all_names(cfg.get("label_names"), model.num_classes),  # type: ignore[arg-type]
        "preprocessing": {**color, "range": [0, 1], **data_config},
        "license": cfg.get("license"),
        "glattn": __version__,
    }
    return {key: json.dumps(value) for key, value in facts.items() if value is not None}


def _capture(model: nn.Module, shape: tuple[int, int, int], free: bool) -> ExportedProgram:
    """Return the folded model's graph, free in the batch, and in height and width if wanted."""
    import torch
    from timm.utils.model import reparameterize_model
    from torch.export import Dim

    # sides that differ, and leave the last stage more than one cell: neither may be taken for given
    channels, height, width = shape
    example = torch.randn(2, channels, *((max(height, 128), max(width, 128) + 32) if free else (height, width)))
    dims = {0: Dim.DYNAMIC, **({2: Dim.DYNAMIC, 3: Dim.DYNAMIC} if free else {})}
    try:
        with torch.no_grad(), _quiet():
            program = torch.export.export(reparameterize_model(model), (example,), dynamic_shapes=(dims,))
    except (RuntimeError, ValueError, AssertionError) as error:
        name = type(model).__name__
        hint = "; fix the size with --img-size" if free else ""
        raise ValueError(f"{name} cannot be exported{hint}: {one_line(error)[:300]}") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine, which every format would carry on
    return program


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep exporters' remarks on their own inner workings from the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _write_onnx(program: ExportedProgram, facts: Mapping[str, str], path: Path) -> Run:
    import onnx
    import onnxruntime
    import torch
    from onnxscript import opset18

    def remainder(self, other):  # type: ignore[no-untyped-def]  # noqa: ANN001
        """Cells counted by a size that is free, which the exporter's own translation takes for a number."""
        return opset18.Mod(self, opset18.CastLike(other, self))

    # The kernel of attention that was traced leaves its result so that merging the heads is a view; the exporter
    # puts another in its place. ONNX itself knows no strides, so the copies cost nothing there.
    aten = torch.ops.aten
    for node in list(program.graph.nodes):
        if node.target in (aten.view.default, aten.reshape.default, aten.flatten.using_ints):
            with program.graph.inserting_before(node):
                source = node.args[0]
                copy = program.graph.call_function(
                    aten.clone.default, (source,), {"memory_format": torch.contiguous_format}
                )
            copy.meta.update(source.meta)
            node.replace_input_with(source, copy)
    program.graph_module.recompile()
    with _quiet():
        exported = torch.onnx.export(
            program,
            (),
            dynamo=True,
            input_names=["image"],
            output_names=["logits"],
            custom_translation_table={aten.remainder.Scalar: remainder},
            verbose=False,
        )
    assert exported is not None
    exported.save(str(path))
    graph = onnx.load(str(path), load_external_data=False)
    dims = graph.graph.input[0].type.tensor_type.shape.dim
    called = {d.dim_param: name for d, name in zip(dims, ("batch", "", "height", "width"), strict=True) if d.dim_param}
    for value in (*graph.graph.input, *graph.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            dim.dim_param = called.get(dim.dim_param, dim.dim_param) if dim.dim_param else ""
    for node in graph.graph.node:
        del node.metadata_props[:]  # the exporter's own notes, larger than a small model's weights
    onnx.helper.set_model_props(graph, dict(facts))
    onnx.save(graph, str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(["logits"], {"image": image.numpy()})[0])


def _write_torch(program: ExportedProgram, facts: Mapping[str, str], path: Path) -> Run:
    import torch

    example, program._example_inputs = program._example_inputs, None  # an image that would double a small file
    torch.export.save(program, path, extra_files=dict(facts))
    program._example_inputs = example
    loaded: Any = torch.export.load(path).module()

    def run(image: Tensor) -> Tensor:
        with torch.inference_mode():
            return loaded(image)

    return run


def _write_openvino(program: ExportedProgram, facts: Mapping[str, str], path: Path) -> Run:
    import openvino
    import torch

    with _quiet():
        model = openvino.convert_model(program)
    model.inputs[0].get_tensor().set_names({"image"})
    model.outputs[0].get_tensor().set_names({"logits"})
    for key, value in facts.items():
        model.set_rt_info(value, ["model_info", key])
    openvino.save_model(model, path, compress_to_fp16=False)
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda image: torch.from_numpy(compiled(image.numpy())[0].copy())


FORMATS = {
    "onnx": Format(".onnx", ("onnx", "onnxscript", "onnxruntime"), "onnx", _write_onnx),
    "torch-export": Format(".pt2", (), "", _write_torch),
    "openvino": Format(".xml", ("openvino",), "openvino", _write_openvino),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "model", help="run folder of a training, folder with config.json, or model name (also hf-hub:org/name)"
    )
    parser.add_argument("--to", required=True, choices=tuple(FORMATS), help="format to export to")
    parser.add_argument("--output", help="file to write (the model's name, here or in the run folder)")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        help="difference allowed to the eager model, over its largest logit (%(default)g)",
    )
    parser.add_argument("--img-size", type=int, help="fix height and width, in pixels")


def run(args: argparse.Namespace) -> int:
    """Export, and print what was written and how near it is."""
    from timm.models import get_pretrained_cfg

    from glattn.files import user_path
    from glattn.hub import create_model
    from glattn.hub.loading import plain_errors
    from glattn.hub.local_dir import model_folder
    from glattn.models.weights import missing_weights

    if args.img_size is not None and args.img_size < 1:
        raise ValueError(f"--img-size {args.img_size}: at least 1 pixel")
    run_folder = user_path(args.model)
    if run_folder.is_dir():
        name, pretrained = f"local-dir:{model_folder(run_folder)}", True
    else:
        name = args.model
        with plain_errors(name):
            known = get_pretrained_cfg(name) if ":" not in name else None
        here = known is not None and known.has_weights and not missing_weights(str(known.architecture), known.to_dict())
        pretrained = ":" in name or here
    model = create_model(name, pretrained=pretrained)
    if not pretrained:
        print(f"{name} has no weights yet: its parameters are random")
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    default = (run_folder if run_folder.is_dir() else Path()) / f"{cfg['architecture']}{FORMATS[args.to].suffix}"
    output = user_path(args.output) if args.output else default
    if output.suffix != FORMATS[args.to].suffix:
        raise ValueError(f"--output {output}: a file for {args.to} ends in {FORMATS[args.to].suffix}")
    done = export(model, args.to, output, tolerance=args.tolerance, img_size=args.img_size)
    print(f"{done.path}: largest difference {done.difference:.3g}, with logits up to {done.scale:.3g}")
    return 0
