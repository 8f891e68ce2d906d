"""Import directions: layers -> models -> hub and heads; training sees timm alone."""

import ast
from pathlib import Path

import pytest

import glattn

PACKAGE = Path(glattn.__file__).parent
MAY_IMPORT = {
    "files.py": set(),
    "provenance.py": set(),
    "memory.py": set(),
    "figures.py": {"files"},
    "config.py": {"config", "layers"},  # layers for their tables, inside a function
    "layers": {"config", "layers"},
    "models": {"files", "config", "layers", "models"},
    "heads": {"config", "layers", "models", "heads"},
    "hub": {"files", "config", "models", "hub", ""},
    "training": {"files", "figures", "memory", "provenance", "training", "config", "hub", ""},
    "benchmark": {"files", "figures", "memory", "provenance", "layers", "benchmark", ""},
    "export.py": {"files", "models", "hub", ""},
    "listing.py": {"benchmark"},
    "cli.py": {""},
}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_only_what_they_may(room):
    path = PACKAGE / room
    files = [path] if path.suffix else sorted(path.rglob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: relative import"
                names = [node.module or ""]
                if node.module == "glattn":  # a room, or a name of the package's own
                    names = [f"glattn.{a.name}" if list(PACKAGE.glob(f"{a.name}*")) else "glattn" for a in node.names]
            for name in names:
                if name.split(".")[0] == "glattn":
                    assert [*name.split("."), ""][1] in MAY_IMPORT[room], f"{file} imports {name}"
