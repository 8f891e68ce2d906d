"""Deployed forms of the folded model: the same numbers at other batches and sizes, and tensors that exporters take."""

import csv
import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
from models import randomize, relative
from timm.utils import reparameterize_model

from glattn.export import FORMATS, export
from glattn.models.variants import VARIANTS

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import benchmark_deployment

SHAPES = [(batch, 3, *size) for size in ((224, 224), (256, 256), (192, 320)) for batch in (1, 3, 8)]
# mobile runtimes refuse tensors of more dimensions
MOST_DIMENSIONS = 5


def _runner(to, path):
    """Return a function from images to logits by the file's runtime."""
    if to == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(session.run(None, {"image": x.numpy()})[0])
    if to == "openvino":
        import openvino

        compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return lambda x: torch.from_numpy(compiled(x.numpy())[0].copy())
    return torch.export.load(path).module()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return randomize(timm.create_model("test_glattn", num_classes=7))


@torch.no_grad()
def check(model, run):
    """Compare a runtime with the model that is not folded, at every batch and size."""
    for shape in SHAPES:
        x = torch.randn(shape)
        assert relative(run(x), model(x)) < 1e-4, shape


@pytest.mark.export
@pytest.mark.parametrize("to", FORMATS)
def test_exported_files_give_the_model_s_numbers(model, to, tmp_path):
    if missing := [name for name in FORMATS[to].needs if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{', '.join(missing)} is missing")
    check(model, _runner(to, export(model, to, tmp_path / f"model{FORMATS[to].suffix}").path))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_aot_inductor_gives_the_model_s_numbers(model, tmp_path):
    """Of the program that `glattn export` writes, compiled ahead of time."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is missing")
    program = torch.export.load(export(model, "torch-export", tmp_path / "model.pt2").path)
    program.example_inputs = ((torch.randn(2, 3, 224, 256),), {})  # left out of the file, for its size
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "compiled.pt2"))
    check(model, torch._inductor.aoti_load_package(package))


@pytest.mark.export
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_executorch_gives_the_model_s_numbers(model):
    """By XNNPACK, of a program a size, free in the batch."""
    pytest.importorskip("executorch", reason="pip install 'glattn[executorch]'")
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    folded, batch = reparameterize_model(model), torch.export.Dim("batch", min=1, max=8)
    for size in sorted({shape[2:] for shape in SHAPES}):
        program = torch.export.export(folded, (torch.randn(2, 3, *size),), dynamic_shapes=({0: batch},))
        program = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        assert any("executorch_call_delegate" in node.name for node in program.exported_program().graph.nodes)
        file = program.to_executorch().buffer  # the runtime reads it where it lies
        method = Runtime.get().load_program(file).load_method("forward")
        for shape in SHAPES:
            if shape[2:] == size:
                x = torch.randn(shape)
                assert relative(method.execute([x])[0], model(x)) < 1e-4, shape


def _ranks(graph):
    """Return the rank of each tensor that a node makes, by the node's name."""
    ranks = {}
    for node in graph.nodes:
        values = node.meta.get("val")
        for value in values if isinstance(values, (tuple, list)) else (values,):
            if isinstance(value, torch.Tensor):
                ranks[f"{node.name} ({node.target})"] = max(value.ndim, ranks.get(node.name, 0))
    return ranks


@pytest.mark.parametrize("decomposed", [False, True])
def test_no_tensor_of_the_graph_has_more_than_five_dimensions(model, decomposed):
    program = torch.export.export(reparameterize_model(model), (torch.randn(2, 3, 128, 160),))
    if decomposed:
        program = program.run_decompositions()
    ranks = _ranks(program.graph)
    assert len(ranks) > 100
    assert {name: rank for name, rank in ranks.items() if rank > MOST_DIMENSIONS} == {}


@pytest.mark.export
@pytest.mark.parametrize("name", VARIANTS)
def test_nor_that_of_any_variant(name):
    """At its own widths and mixers, a block or two a stage."""
    model = timm.create_model(name, depths=(2, 2, 1, 1), dims=(32, 32, 64, 64), head_dim=16).eval()
    program = torch.export.export(reparameterize_model(model), (torch.randn(2, 3, 128, 160),))
    ranks = _ranks(program.run_decompositions().graph)
    assert {name: rank for name, rank in ranks.items() if rank > MOST_DIMENSIONS} == {}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("position", ["rope", "rope_mixed"])
def test_the_older_exporter_to_onnx_turns_as_we_do(position, tmp_path):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = randomize(timm.create_model("test_glattn", num_classes=3, position=position, layout="full")).eval()
    image = torch.randn(2, 3, 64, 96)
    torch.onnx.export(model, (image,), str(tmp_path / "model.onnx"), dynamo=False, input_names=["image"])
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        torch.testing.assert_close(
            torch.from_numpy(session.run(None, {"image": image.numpy()})[0]), model(image), rtol=1e-3, atol=1e-4
        )


@pytest.mark.export
def test_nor_that_of_the_onnx_file(model, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    path = export(model, "onnx", tmp_path / "model.onnx").path
    graph = onnx.shape_inference.infer_shapes(onnx.load(str(path))).graph
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in (*graph.value_info, *graph.output)}
    assert len(ranks) > 50
    assert max(ranks.values()) <= MOST_DIMENSIONS


@pytest.mark.export
def test_the_benchmark_of_deployed_forms_writes_what_it_measured(tmp_path, monkeypatch):
    file = tmp_path / "rows.csv"
    options = ["--batches", "1", "2", "--sizes", "64", "33x40", "--runtimes", "torch.export", "--rounds", "1"]
    threads = str(torch.get_num_threads())
    arguments = ["benchmark_deployment.py", "test_glattn", *options, "--threads", threads, "--output", str(file)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert benchmark_deployment.main() == 0
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["runtime"] for row in rows] == ["eager", "torch.export"] * 4
    assert {(row["batch"], row["height"], row["width"]) for row in rows} == {
        (batch, *size) for batch in "12" for size in (("64", "64"), ("33", "40"))
    }
    assert all(float(row["difference"]) < 1e-4 and float(row["milliseconds"]) > 0 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nosuch"], "timm knows no model 'nosuch'"),
        (["test_glattn", "--rounds", "0"], "--rounds: invalid count value: '0'"),
        (["test_glattn", "--sizes", "0x64"], "--sizes: invalid size value: '0x64'"),
    ],
)
def test_what_that_benchmark_cannot_measure_is_said(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark_deployment.py", *arguments])
    with pytest.raises(SystemExit):
        benchmark_deployment.main()
    assert said in capsys.readouterr().err
