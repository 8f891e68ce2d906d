"""The snippets of docs/downstream.md, each run on the smallest model."""

import importlib.util
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "downstream.md"
BLOCK = re.compile(r"(?:<!-- needs: (?P<needs>[^(]+) \((?P<extra>\w+)\) -->\n)?```python\n(?P<code>.*?)```", re.DOTALL)
BLOCKS = list(BLOCK.finditer(PAGE.read_text()))


def _title(block):
    return re.findall(r"^## (.*)$", PAGE.read_text()[: block.start()], re.MULTILINE)[-1]


def test_every_snippet_is_found():
    assert len(BLOCKS) == PAGE.read_text().count("```python") == 10


@pytest.mark.parametrize(
    "block",
    [pytest.param(b, marks=[pytest.mark.export] if "export(" in b["code"] else []) for b in BLOCKS],
    ids=_title,
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:pytorch_grad_cam", "ignore:read_text is deprecated")
def test_a_snippet_runs(block, tmp_path, monkeypatch):
    for name in (block["needs"] or "").split(", "):
        if name and importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is missing: pip install 'glattn[{block['extra']}]'")
    monkeypatch.chdir(tmp_path)
    code = block["code"].replace("glattn_atto", "test_glattn")
    assert code != block["code"]
    exec(compile(code, f"{PAGE.name}: {_title(block)}", "exec"), {})


def test_the_extras_named_are_there():
    extras = (PAGE.parents[1] / "pyproject.toml").read_text()
    for extra in set(re.findall(r"glattn\[(\w+)\]", PAGE.read_text())) | {b["extra"] for b in BLOCKS if b["extra"]}:
        assert re.search(rf"^{extra} = \[", extras, re.MULTILINE), extra
