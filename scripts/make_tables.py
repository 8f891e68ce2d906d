"""Write the generated tables of README.md: sizes and named variants, counted from the models themselves."""

import argparse
from pathlib import Path

import timm

from glattn.files import write_text
from glattn.listing import describe

ROOT = Path(__file__).resolve().parents[1]
CONVNEXT = ("atto", "pico", "nano", "tiny", "small", "base", "large")


def count(name: str) -> tuple[float, float]:
    """Return millions of parameters and GMACs at the default size, attention counted, of a 1000-class model."""
    member = describe(name)
    return member.params / 1e6, member.macs / 1e9


def sizes() -> str:
    rows = ["| model | parameters (M) | GMACs at 224 | ConvNeXt of that name (M, GMACs) |", "|---|---|---|---|"]
    for size in CONVNEXT:
        (mine, macs), (theirs, their_macs) = count(f"glattn_{size}"), count(f"convnext_{size}")
        rows.append(f"| `glattn_{size}` | {mine:.1f} | {macs:.2f} | {theirs:.1f}, {their_macs:.2f} |")
    return "\n".join(rows)


def variants() -> str:
    rows = ["| model | parameters (M) | GMACs at 224 |", "|---|---|---|"]
    for name in timm.list_models("glattn_*_*", module="glattn"):
        parameters, macs = count(name)
        rows.append(f"| `{name}` | {parameters:.1f} | {macs:.2f} |")
    return "\n".join(rows)


def fill(text: str, name: str, table: str) -> str:
    """Return the text with what stands between the table's two markers replaced."""
    start, end = f"<!-- {name}: make tables -->", f"<!-- /{name} -->"
    before, rest = text.split(start)
    return f"{before}{start}\n{table}\n{end}{rest.split(end)[1]}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    readme = ROOT / "README.md"
    text = fill(fill(readme.read_text(), "sizes", sizes()), "variants", variants())
    write_text(readme, text)


if __name__ == "__main__":
    main()
