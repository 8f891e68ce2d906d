"""README: its code runs, its commands exist, its tables are what the models say."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from glattn.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
sys.path.insert(0, str(ROOT / "scripts"))
import make_tables  # noqa: E402


def test_its_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)


def test_its_tables_are_generated():
    filled = make_tables.fill(README, "sizes", make_tables.sizes())
    filled = make_tables.fill(filled, "variants", make_tables.variants())
    assert filled == README, "run `make tables`"
    assert make_tables.results() == (ROOT / "docs" / "results.md").read_text(), "run `make tables`"


def test_cards_are_generated():
    folders = [path for path in (ROOT / "docs" / "weights").iterdir() if path.is_dir()]
    assert folders
    for folder in folders:
        assert (folder / "README.md").read_text() == make_tables.card(folder.name), "run `make tables`"


def test_a_card_names_the_runs_that_the_weights_went_on_from(tmp_path):
    before = tmp_path / "before"
    for folder, command, epochs in ((tmp_path, "c", 1), (before, "b", 2), (before / "before", "a", 3)):
        folder.mkdir(exist_ok=True)
        environment = {
            "command": f"glattn pretrain {command}",
            "commit": "c0",
            "device": "cpu",
            "images_per_epoch": 7200,
        }
        (folder / "environment.json").write_text(json.dumps(environment))
        (folder / "config.yaml").write_text("seed: 5\n")
        # the last but one is the best
        rows = [f"{90 if epoch == max(epochs - 1, 1) else 50},2" for epoch in range(1, epochs + 1)]
        (folder / "metrics.csv").write_text("\n".join(["top1,images_per_second", *rows]))
    said = make_tables.started(tmp_path)
    lines = [line for line in said.splitlines() if line.startswith("- ")]
    assert [line.split("`")[1] for line in lines] == [f"glattn pretrain {command}" for command in "abc"]
    assert "at its best after 14,400 pictures, 3 hours of steps in all on cpu, seed 5, commit c0" in lines[0]
    assert [line.partition("[record](")[2] for line in lines] == ["before/before))", "before))", ".))"]
    assert "saw 28,800 pictures" in said
    assert make_tables.started(before / "before") == ""


def test_its_commands_exist():
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    commands = [shlex.split(line.split("#")[0]) for line in text.splitlines() if line.startswith("    ")]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert len(commands) >= 3
    for command in commands:
        if command[0] == "make":
            assert command[1] in targets
        else:
            assert command[0].endswith("glattn")
            assert command[1] in COMMANDS


def test_its_links_and_pictures_are_there():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.stem)
def test_scripts_say_what_they_do(script):
    assert script.read_text().startswith('"""')
