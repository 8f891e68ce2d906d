"""Fetch timm's own test-suite, from its source distribution, for tests/test_contract.py to run."""

import argparse
import hashlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from glattn.files import replacing

VERSION = "1.0.31"
MEMBER = f"timm-{VERSION}/tests/test_models.py"
SHA256 = "ffb62c6df02601a96c2fda403723a7f96a806897ee061d1009c1f3135fb64eb7"
FOLDER = Path(__file__).resolve().parents[1] / ".cache" / f"timm-{VERSION}"


def fetch(folder: Path = FOLDER) -> Path:
    """Return the suite's file, downloaded once from the package index and checked against its hash."""
    target = folder / "test_models.py"
    if not target.exists():
        with tempfile.TemporaryDirectory() as work:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=timm"]
            subprocess.run([*command, f"--dest={work}", f"timm=={VERSION}"], check=True)
            with tarfile.open(next(Path(work).glob("timm-*.tar.gz"))) as archive:
                member = archive.extractfile(MEMBER)
                assert member is not None
                text = member.read()
        with replacing(target) as temporary:
            temporary.write_bytes(text)
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ValueError(f"{target} has SHA-256 {digest}, not {SHA256}; delete it to fetch it again")
    return target


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(fetch())
