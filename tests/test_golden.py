"""What must not change unnoticed: parameter counts, keys and outputs of every variant (`--accept` renews them)."""

import hashlib
import json
from pathlib import Path

import pytest
import timm
import torch
from models import VARIANTS

GOLDEN = Path(__file__).with_name("golden.json")


def describe(name):
    meta = timm.create_model(name, device="meta")
    keys = "\n".join(f"{key} {tuple(value.shape)}" for key, value in meta.state_dict().items())
    told = {
        "parameters": sum(p.numel() for p in meta.parameters()),
        "keys": hashlib.sha256(keys.encode()).hexdigest()[:16],
    }
    # values do not hang on torch's random numbers, which may change with its version
    model = timm.create_model(name, num_classes=4, depths=(1, 1, 1, 1)).eval()
    with torch.no_grad():
        for i, parameter in enumerate(model.state_dict().values()):
            if parameter.is_floating_point():
                ramp = torch.arange(parameter.numel(), dtype=torch.float64)
                parameter.copy_((torch.sin(ramp * 0.7 + i) * 0.05 + (parameter.ndim < 2)).reshape(parameter.shape))
        image = torch.sin(torch.arange(3 * 64 * 80, dtype=torch.float64) * 0.01).reshape(1, 3, 64, 80)
        told["output"] = [round(v, 4) for v in model.double()(image)[0].tolist()]
    return told


@pytest.mark.parametrize("name", VARIANTS)
def test_golden(name, request):
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    told = describe(name)
    if request.config.getoption("--accept"):
        golden[name] = told
        kept = {key: golden[key] for key in sorted(golden) if key in VARIANTS}
        GOLDEN.write_text(json.dumps(kept, indent=1) + "\n")
        return
    expected = golden[name]
    assert {k: told[k] for k in ("parameters", "keys")} == {k: expected[k] for k in ("parameters", "keys")}
    assert told["output"] == pytest.approx(expected["output"], rel=1e-3, abs=1e-3)
