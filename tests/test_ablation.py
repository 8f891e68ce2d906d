"""Mechanisms switched one at a time: every design exists, and the table says what was measured, with its sign."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import ablate
import run_proxies

from glattn.benchmark import machine, rows
from glattn.benchmark.contestant import join_options, split_options

DESIGNS = [options for designs in ablate.DESIGNS.values() for options in designs]


def test_no_design_is_named_twice():
    names = [join_options("glattn_atto", options) for options in DESIGNS]
    assert len(set(names)) == len(names)
    assert all(join_options(*split_options(name)) == name for name in names)  # the benchmark's way of writing


@pytest.mark.parametrize("options", DESIGNS, ids=str)
def test_every_design_runs_at_64_pixels(options):
    model = timm.create_model("glattn_atto", num_classes=5, **json.loads(json.dumps(options))).eval()
    with torch.inference_mode():
        assert model(torch.randn(2, 3, 64, 64)).isfinite().all()


def test_the_table_has_the_signs_of_the_design(tmp_path, monkeypatch):
    wrong = {"glattn_atto": 20, "local": 60, "split": 0}
    missed = {}
    images = [f"a/{n:03d}.png" for n in range(200)]
    (tmp_path / "icons100" / "test" / "a").mkdir(parents=True)
    for image in images:
        Image.new("L", (1, 1)).save(tmp_path / "icons100" / "test" / image)

    def train(command, **_):
        said = dict(part.split("=", 1) for part in command if "=" in part)
        missed[said["run"]] = wrong[json.loads(said.get("model_args.fusion", f'"{said["model"]}"'))]
        return SimpleNamespace(returncode=0)

    def measured(command):
        folder = Path(command[command.index("--out") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        names = command[1 : command.index("--batch")]
        figures = {"params_m": "3", "gmacs": "0.4"}
        about = dict.fromkeys(rows.FIELDS, "") | place | figures
        elsewhere = [about | {"model": name, "machine": "another", "ratio": "9"} for name in names]
        here = [about | {"model": name, "ratio": str(n)} for n, name in enumerate(names, 1)]
        rows.write(folder / "rows.csv", [*here, *elsewhere])
        return 0

    place = machine.describe(torch.device("cpu"), kept=True)
    monkeypatch.setattr(ablate, "describe", lambda device, kept: place)
    monkeypatch.setattr(run_proxies.subprocess, "run", train)
    finished = {"val_top1": "50", "test_top1": "60"}
    monkeypatch.setattr(
        run_proxies,
        "finished",
        lambda run, data: (dict(finished), {image: n >= missed[str(run)] for n, image in enumerate(images)}),
    )
    monkeypatch.setattr(ablate, "glattn", measured)
    monkeypatch.setattr(
        ablate, "DESIGNS", {"default": [{}], "branches": [{"fusion": "local"}], "fusion": [{"fusion": "split"}]}
    )
    arguments = ["--data", str(tmp_path / "icons100"), "--runs", str(tmp_path), "--out", str(tmp_path / "out")]
    for only, designs in (("fusion", 2), ("branches", 3)):  # a later list adds to what is there
        monkeypatch.setattr(sys, "argv", ["ablate.py", *arguments, "--only", only])
        assert ablate.main() == 0
        assert len(run_proxies.read_csv(tmp_path / "out" / "icons100.csv")) == designs
    default, local, split = run_proxies.read_csv(tmp_path / "out" / "icons100.csv")
    monkeypatch.setattr(sys, "argv", ["ablate.py", *arguments, "--model", "glattn_atto(fusion='split', head_dim=16)"])
    assert ablate.main() == 0  # a change that the model has already is none
    assert [row["design"] for row in run_proxies.read_csv(tmp_path / "out" / "icons100.csv")] == [
        "glattn_atto(fusion='split', head_dim=16)",
        "glattn_atto(fusion='local', head_dim=16)",
    ]
    assert (default["points"], default["design"]) == ("", "glattn_atto")
    assert (local["points"], local["verdict"], local["times_default_speed"]) == ("-20.00", "worse", "2")
    assert (split["points"], split["verdict"]) == ("10.00", "better")
    assert float(local["low"]) < float(local["points"]) < float(local["high"]) < 0
    assert (tmp_path / "out" / "icons100.png").stat().st_size > 10_000
