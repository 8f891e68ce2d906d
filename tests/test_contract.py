"""timm's contract: its own test-suite over the family, nothing left out."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import timm

import glattn  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import fetch_timm_tests  # noqa: E402

# forward, backward, default cfgs, script, features, two of intermediates, pruning, and fx three times
CASES_A_MODEL = 11
CASES_OF_WEIGHTS = 2  # loaded whole, and for features

GROUPS = [
    pytest.param("test_glattn"),
    pytest.param("glattn_atto,glattn_pico,glattn_nano", marks=pytest.mark.slow),
    pytest.param("glattn_tiny*", marks=pytest.mark.slow),
    pytest.param("glattn_small,glattn_base", marks=pytest.mark.slow),
    pytest.param("glattn_large", marks=pytest.mark.slow),
]


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("models", GROUPS)
def test_timms_own_suite_passes(models, tmp_path):
    suite = fetch_timm_tests.fetch()
    report = tmp_path / "report.xml"
    env = {**os.environ, "GLATTN_CONTRACT_MODELS": models, "PYTHONPATH": str(ROOT / "tests"), "TIMEOUT": "900"}
    command = [sys.executable, "-m", "pytest", "-p", "timm_family", "-p", "no:cacheprovider", "-c", os.devnull, "-q"]
    command += [f"--rootdir={suite.parent}", f"--junitxml={report}", str(suite)]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    counts = ElementTree.parse(report).getroot()[0].attrib
    chosen = [name for pattern in models.split(",") for name in timm.list_models(pattern, module="glattn")]
    assert chosen
    carried = sum(timm.get_pretrained_cfg(name).file is not None for name in chosen)
    assert int(counts["tests"]) == CASES_A_MODEL * len(chosen) + CASES_OF_WEIGHTS * carried
    assert counts["skipped"] == counts["failures"] == counts["errors"] == "0"


def test_every_model_is_in_one_group():
    grouped = [
        name
        for group in GROUPS
        for pattern in group.values[0].split(",")
        for name in timm.list_models(pattern, module="glattn")
    ]
    assert sorted(grouped) == sorted(timm.list_models(module="glattn"))
