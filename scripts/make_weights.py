"""Put a run's best weights into the package, matrices and kernels in fp16, and the run's record into docs/weights/.

    glattn pretrain --run runs/fractals && python scripts/make_weights.py runs/fractals && make tables

The last makes the card from the record and from what the weights gain (transfer.py).
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import timm
import torch

import glattn
from glattn.files import replacing, write_text
from glattn.models.weights import save_weights
from glattn.training.fractals import HELD_OUT
from glattn.training.pretrain import FractalSource
from glattn.training.validation import predict_source

ROOT = Path(__file__).resolve().parents[1]
RECORD = ("config.yaml", "environment.json", "metrics.csv", "curve.png")


def measure(model: torch.nn.Module) -> dict[str, Any]:
    """Return what a model knows of the held-out fractals."""
    source = FractalSource.of(HELD_OUT, fixed=True, side=64)
    config = {**timm.data.resolve_model_data_config(model), "input_size": (3, 64, 64)}
    device = torch.device("cpu")
    return predict_source(model.eval(), source, config, batch_size=100, workers=0, device=device).metrics()


def main() -> int:
    """Write the file, load it as a user does, measure it; the record is of what the user gets."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter, epilog=__doc__
    )
    parser.add_argument("run", type=Path, help="run folder of `glattn pretrain`")
    args = parser.parse_args()
    try:
        model = glattn.create_model(f"local-dir:{args.run / 'best'}", pretrained=True)
        name = model.pretrained_cfg["architecture"]
        cfg = timm.get_pretrained_cfg(name)
        if cfg is None or not cfg.file:
            raise ValueError(f"the package carries no weights of {name}; name them in glattn/models/glattn.py first")
        if model.pretrained_cfg.get("label_names") != list(cfg.label_names):
            raise ValueError(f"{args.run}: its classes are not the {len(cfg.label_names)} fractals of {name}.{cfg.tag}")
        best = json.loads((args.run / "best" / "metrics.json").read_text())
        absent = [file for file in RECORD if not (args.run / file).is_file()]
        if absent:
            raise FileNotFoundError(f"{args.run}: no {absent[0]}; is it a run folder of `glattn pretrain`?")
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data = parameter.data.half()
        save_weights(model, cfg.file)
        shipped = measure(timm.create_model(name, pretrained=True))
        record = ROOT / "docs" / "weights" / f"{name}.{cfg.tag}"
        for file in RECORD:
            with replacing(record / file) as temporary:
                shutil.copyfile(args.run / file, temporary)
        text = json.dumps({"epoch": best["epoch"], **shipped}, indent=2) + "\n"
        write_text(record / "best" / "metrics.json", text)
    except (ValueError, OSError) as error:
        print(f"make_weights: {error}", file=sys.stderr)
        return 1
    size = Path(cfg.file).stat().st_size / 1e6
    print(f"{cfg.file}: {size:.2f} MB; {shipped['top1']:.2f}% of held-out fractals, {best['top1']:.2f}% before fp16")
    return 0


if __name__ == "__main__":
    sys.exit(main())
