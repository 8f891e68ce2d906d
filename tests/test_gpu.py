"""On a CUDA device (``pytest -m gpu``): every option against the CPU, training, folding, capture, and the commands."""

import copy
import csv
import json

import pytest
import timm
import torch
from models import VARIANTS, randomize, relative
from oracles import OPTIONS, product
from timm.utils import reparameterize_model
from torch.nn import functional as F

from glattn.benchmark.contestant import capture
from glattn.cli import main
from glattn.layers import TABLES
from glattn.layers.conv2d import Pointwise
from glattn.training import pretrain
from glattn.training.batches import TrainingBatches
from glattn.training.digits import write_digits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("default"),  # a library's word about a device ends no test here
]
GPU = torch.device("cuda")
VALID = product(**{axis: TABLES[axis] for axis in ("layout", "position", "mechanism")})


@pytest.fixture(autouse=True)
def _exact(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def small(**options):
    return randomize(timm.create_model("test_glattn", num_classes=10, **options))


@pytest.mark.parametrize(("layout", "position", "mechanism"), VALID)
def test_outputs_and_gradients_are_those_of_the_cpu(layout, position, mechanism):
    options = {**OPTIONS.get(layout, {}), **OPTIONS.get(mechanism, {})}
    model = small(layout=layout, position=position, mechanism=mechanism, head_dim=4, **options).double()
    moved = copy.deepcopy(model).to(GPU)
    for size in ((64, 64), (70, 45)):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, 3, *size, dtype=torch.float64)
            expected = model(x)
            expected.square().mean().backward()
            out = moved(x.to(GPU).to(memory_format=memory_format))
            out.square().mean().backward()
            assert relative(out.cpu(), expected) < 1e-6
            for one, other in zip(moved.parameters(), model.parameters(), strict=True):
                torch.testing.assert_close(one.grad.cpu(), other.grad, rtol=1e-5, atol=1e-8)
            model.zero_grad(), moved.zero_grad()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_the_same_folded_and_in_both_memory_formats(name):
    model = randomize(timm.create_model(name, num_classes=10))
    x = torch.randn(2, 3, *(2 * (model.pretrained_cfg["input_size"][-1] // 2 - 16,)))
    moved = copy.deepcopy(model).to(GPU)
    with torch.no_grad():
        expected = model(x)
        for folded in (False, True):
            moved = reparameterize_model(moved) if folded else moved
            for memory_format in (torch.contiguous_format, torch.channels_last):
                trial = copy.deepcopy(moved).to(memory_format=memory_format)
                assert relative(trial(x.to(GPU).to(memory_format=memory_format)).cpu(), expected) < 2e-3
        back = moved.cpu()
        assert relative(back(x), expected) < 2e-3
    for dtype in (torch.float16, torch.bfloat16):
        with torch.no_grad(), torch.autocast("cuda", dtype):
            assert copy.deepcopy(model).to(GPU)(x.to(GPU)).isfinite().all()


@pytest.mark.parametrize("mechanism", sorted(TABLES["mechanism"]))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near(mechanism, dtype):
    model = small(mechanism=mechanism, layout="full", head_dim=4).to(GPU).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 128, 96, device=GPU).to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = model(x)
        folded = reparameterize_model(copy.deepcopy(model)).to(dtype)
        for out in (torch.autocast("cuda", dtype)(model)(x), copy.deepcopy(model).to(dtype)(x.to(dtype)),
                    folded(x.to(dtype))):  # fmt: skip
            assert out.isfinite().all()
            if mechanism != "reformer":  # rounding moves a cell to another bucket
                assert relative(out.float(), expected) < 0.03


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_1x1_convolution_is_torchs(dtype, bias):
    conv = Pointwise(24, 40, 1, bias=bias).to(GPU, dtype)
    x = torch.randn(3, 24, 7, 11, device=GPU, dtype=dtype).to(memory_format=torch.channels_last)
    out = conv(x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    expected = F.conv2d(x.double(), conv.weight.double(), None if conv.bias is None else conv.bias.double())
    assert relative(out.double(), expected) < 1e-2


def test_a_captured_graph_replays_the_model():
    model = reparameterize_model(small()).to(GPU).to(memory_format=torch.channels_last)
    image = torch.randn(4, 3, 64, 64, device=GPU).to(memory_format=torch.channels_last)
    outs = []

    def infer():
        with torch.inference_mode():
            outs.append(model(image))

    replay = capture(infer)
    image.copy_(torch.randn_like(image))
    replay()
    torch.cuda.synchronize()
    with torch.no_grad():
        torch.testing.assert_close(outs[-1].clone(), model(image), rtol=1e-3, atol=1e-3)


@pytest.mark.compile
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiled_is_eager(mode):
    model = small().to(GPU).to(memory_format=torch.channels_last)
    compiled = torch.compile(model, mode=mode, fullgraph=True)
    for size in ((64, 64), (96, 80)):
        image = torch.randn(2, 3, *size, device=GPU).to(memory_format=torch.channels_last)
        with torch.no_grad():
            assert relative(compiled(image).clone(), model(image)) < 1e-3
    loss = F.cross_entropy(compiled.train()(image), torch.tensor([1, 2], device=GPU))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_digits_are_learnt_and_a_run_goes_on(tmp_path, monkeypatch, capsys, precision):
    monkeypatch.chdir(tmp_path)
    data = write_digits("data/digits")
    run = ["model=test_glattn", f"data={data}", "image_size=32", "batch_size=50", "lr=0.01", "epochs=3", "tracker=none",
           "workers=2", f"precision={precision}", "run=run", "schedule=constant"]  # fmt: skip
    assert main(["train", *run, "epochs=2"]) == 0
    assert main(["train", *run, "resume=auto"]) == 0
    assert "resumed from epoch 2" in capsys.readouterr().out
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["device"] == torch.cuda.get_device_name()
    with open(tmp_path / "run" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    assert float(rows[-1]["top1"]) > 50


@pytest.mark.parametrize("instances", [1, 3])
@pytest.mark.parametrize("dataset", pretrain.FORMULAS)
def test_pictures_are_those_of_the_cpu_whoever_draws(monkeypatch, dataset, instances):
    monkeypatch.setattr(pretrain, "_AT_ONCE", 120 * instances)
    source = pretrain.FormulaSource.of(dataset, 1000, fixed=False, side=64, instances=instances)
    config = {"input_size": (3, 64, 64), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2)}
    seen = []
    for device, workers in ((torch.device("cpu"), 0), (GPU, 0), (GPU, 3)):
        batches, found = TrainingBatches(1000, 50, seed=1), []
        loader = pretrain.FormulaLoader(source, batches, config, workers=workers, device=device)
        for batches.epoch in range(2):
            found += [(pictures.cpu(), numbers.cpu()) for pictures, numbers in loader]
        assert len(found) == 40
        seen.append(found)
    for found in seen[1:]:
        for (pictures, numbers), (expected, theirs) in zip(found, seen[0], strict=True):
            assert torch.equal(numbers, theirs)
            assert (pictures - expected).abs().mean() < 0.01
            assert ((pictures - expected).abs() > 0.1).float().mean() < 0.01


def test_pretraining_learns(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "HELD_OUT", 100)
    options = ["model=test_glattn", "tracker=none", "precision=bf16", "workers=2", "epoch_samples=5000"]
    assert main(["pretrain", "--samples", "10000", "--run", str(tmp_path / "run"), *options]) == 0
    with open(tmp_path / "run" / "metrics.csv") as file:
        losses = [float(row["train_loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 2
    assert losses[1] < losses[0]


def test_the_benchmark_measures_the_device(tmp_path):
    cases = "--precision fp32 bf16 --batch 8 --task infer train --pixels 160 --rounds 3 --turn 0.05 --device cuda"
    models = ["test_glattn", "test_vit", "--baseline", "test_vit"]
    assert main(["benchmark", *models, *cases.split(), "--out", str(tmp_path)]) == 0
    cases = "--precision bf16 --batch 1 --engine graph --pixels 160 --rounds 3 --turn 0.05 --device cuda --resume"
    assert main(["benchmark", *models, *cases.split(), "--out", str(tmp_path)]) == 0
    with open(tmp_path / "rows.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    assert {row["machine"] for row in rows} == {torch.cuda.get_device_name()}
    for row in rows:
        assert not row["error"]
        assert float(row["images_per_second"]) > 0
        assert float(row["held_mb"]) > 0
        assert (row["engine"] == "graph") == (row["peak_mb"] == "")
        assert row["engine"] == "graph" or float(row["peak_mb"]) > float(row["held_mb"])
