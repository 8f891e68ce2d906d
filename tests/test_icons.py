"""Drawings' data sets, on a package made by hand: labels, licences, splits by author, near-copies, rebuilding."""

import gzip
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops

pytest.importorskip("resvg_py")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import iconify
import make_emoji
import make_icons
import manifest

COMMITTED = {name: manifest.FOLDER / f"{name}.csv.gz" for name in ("icons100", "emoji")}


def shape(n, shift=0.0):
    """Return the body of a drawing of its own: bars that spell a number."""
    bars = "".join(f'<path d="M{2 + 3 * i + shift} 2h2v{4 + 14 * (n >> i & 1)}h-2z"/>' for i in range(7))
    return f'<g fill="currentColor">{bars}</g>'


def write_package(folder, sets):
    """Write a package; sets: name -> (what the list says of it, icons, other names)."""
    about = {}
    (folder / "json").mkdir(parents=True)
    for name, (info, icons, aliases) in sets.items():
        about[name] = {
            "author": {"name": info.get("author", f"{name} author")},
            "license": {"spdx": info.get("spdx", "MIT")},
            "category": info.get("category", "UI 24px"),
            "palette": info.get("palette", False),
            "name": info.get("name", name),
        }
        data = {"prefix": name, "icons": icons, "aliases": aliases, "width": 24, "height": 24}
        (folder / "json" / f"{name}.json").write_text(json.dumps(data))
    (folder / "collections.json").write_text(json.dumps(about))
    return folder


def icons(**drawings):
    return {name.replace("_", "-"): {"body": body} for name, body in drawings.items()}


@pytest.fixture
def package(tmp_path):
    sets = {}
    for n in range(10):
        sets[f"set{n}"] = ({}, icons(house=shape(n), house_filled=shape(n + 16), arrow_left=shape(n + 32)), {})
    # one author of two sets, with more styles than are taken
    many = {f"house-{style}": {"body": shape(64 + i)} for i, style in enumerate(("bold", "thin", "line", "24", "fill"))}
    sets["twin-a"] = ({"author": "twins"}, many, {})
    sets["twin-b"] = ({"author": "twins"}, icons(house=shape(80), arrow_left=shape(81)), {"home": {"parent": "house"}})
    sets["gone"] = ({}, {"house": {"body": shape(90), "hidden": True}, "arrow-left": {"body": shape(91)}}, {})
    for n, info in enumerate(({"spdx": "GPL-3.0"}, {"spdx": "CC-BY-SA-4.0"}, {"spdx": "CC-BY-NC-4.0"}, {"spdx": ""},
                              {"palette": True}, {"category": "Logos"}, {"category": "Flags / Maps"},
                              {"category": "Emoji"}, {"category": "Programming"},
                              {"name": "Some Brands"})):  # fmt: skip
        sets[f"refused{n}"] = (info, icons(house=shape(100 + n), arrow_left=shape(110 + n)), {})
    return iconify.Package(write_package(tmp_path / "package", sets))


@pytest.mark.parametrize(
    ("icon", "label"),
    [
        ("house", "house"), ("house-outline-rounded", "house"),
        ("baseline-house", "house"), ("house-24-filled", "house"),
        ("house-24px", "house"), ("house-two-tone", "house"), ("arrow-left", "arrow-left"), ("bold", "bold"),
        ("line-bold", "line"), ("house-off", "house-off"), ("3d-box", "3d-box"), ("outline", "outline"),
    ],
)  # fmt: skip
def test_labels_are_names_without_style(icon, label):
    assert make_icons.label_of(icon) == label


def test_a_damaged_archive_is_one_line(tmp_path):
    (tmp_path / "text.tgz").write_text("not an archive")
    with pytest.raises(ValueError, match=r"^.* is damaged or no .*$"):  # one line
        iconify.open_package(tmp_path / "text.tgz", tmp_path / "cache")
    (tmp_path / "note").write_text("x")
    with tarfile.open(tmp_path / "other.tgz", "w:gz") as tar:
        tar.add(tmp_path / "note", "note")
    with pytest.raises(ValueError, match="holds no folder package/"):
        iconify.open_package(tmp_path / "other.tgz", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_icons_are_of_free_sets_few_an_author_and_split_by_author(package):
    chosen = make_icons.choose(package, classes=2)
    assert {e.label for e in chosen} == {"house", "arrow-left"}
    assert not [e for e in chosen if e.set.startswith("refused")]
    assert not [e for e in chosen if (e.set, e.icon) == ("gone", "house")]
    assert [e for e in chosen if (e.set, e.icon) == ("gone", "arrow-left")]
    splits = {author: {e.split for e in chosen if e.author == author} for author in {e.author for e in chosen}}
    assert all(len(found) == 1 for found in splits.values())
    assert len(splits) == 12
    assert sum(found == {"test"} for found in splits.values()) == round(0.3 * 12)
    assert sum(found == {"val"} for found in splits.values()) == 1
    assert sum(e.author == "twins" and e.label == "house" for e in chosen) == 4
    assert len({e.hash for e in chosen}) == len(chosen)


def test_near_copies_leave_the_splits_that_are_tested(package):
    splits = make_icons.split_authors({e.author for e in make_icons.choose(package, classes=2)})
    trained = next(a for a, split in splits.items() if split == "train" and a.startswith("set"))
    tested = next(a for a, split in splits.items() if split == "test" and a.startswith("set"))
    before = make_icons.choose(package, classes=2)
    path = package.folder / "json" / f"{tested.split()[0]}.json"
    data = json.loads(path.read_text())
    n = int(trained.split()[0].removeprefix("set"))
    data["icons"]["house"]["body"] = shape(n, shift=0.02)  # set apart by a fiftieth of a unit
    path.write_text(json.dumps(data))
    after = make_icons.choose(iconify.Package(package.folder), classes=2)
    gone = {(e.set, e.icon) for e in before} - {(e.set, e.icon) for e in after}
    assert gone == {(tested.split()[0], "house")}


def test_near_copies_are_those_that_every_comparison_finds():
    rng = np.random.default_rng(0)
    others = rng.random((50, 576), np.float32)
    held_out = np.concatenate([others[:5] + 0.009, others[5:10] + 0.02, rng.random((5, 576), np.float32)])
    every = np.abs(held_out[:, None] - others[None]).mean(2).min(1) < 0.01
    assert every.tolist() == [True] * 5 + [False] * 10
    assert iconify.near_copies(held_out, others).tolist() == every.tolist()


def test_copies_are_found_a_pixel_aside_and_by_any_filter(package):
    drawings = next(package.sets(["set0"]))
    image = iconify.draw(drawings.svg("house"), 64, grey=True)
    other = iconify.draw(drawings.svg("arrow-left"), 64, grey=True)
    moved = ImageChops.offset(image, 0, 1)
    mine = np.stack([iconify.looks(each) for each in (image, moved, other)])
    assert iconify.copies(mine, iconify.looks(image)[None]).tolist() == [True, True, False]
    assert not iconify.near_copies(mine[1:2, 0], mine[:1, 0]).any()  # the first look alone does not see it


def test_a_drawing_under_two_labels_is_dropped(package):
    path = package.folder / "json" / "set4.json"
    data = json.loads(path.read_text())
    data["icons"]["arrow-left"]["body"] = data["icons"]["house"]["body"]
    path.write_text(json.dumps(data))
    chosen = make_icons.choose(iconify.Package(package.folder), classes=2)
    assert {e.icon for e in chosen if e.set == "set4"} == {"house-filled"}


def test_a_manifest_rebuilds_its_folder_and_notices_another_package(package, tmp_path):
    chosen = make_icons.choose(package, classes=2)
    path = tmp_path / "m" / "icons.csv.gz"
    manifest.write(path, chosen)
    first = path.read_bytes()
    manifest.write(path, reversed(chosen))
    assert path.read_bytes() == first
    assert manifest.read(path) == chosen
    manifest.build(chosen, package, tmp_path / "out", pixels=32, grey=True)
    found = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.png"))
    assert found == sorted(e.file for e in chosen)
    with Image.open(tmp_path / "out" / chosen[0].file) as image:
        assert image.size == (32, 32)
        assert image.mode == "L"
        assert image.getextrema()[0] < 30
        assert image.getpixel((0, 0)) == 255

    with pytest.raises(ValueError, match="4 pixels a side"):
        manifest.build(chosen, package, tmp_path / "again", pixels=4, grey=True)

    data = json.loads((package.folder / "json" / "set3.json").read_text())
    data["icons"]["house"]["body"] = shape(120)
    (package.folder / "json" / "set3.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="set3:house is not the drawing of the manifest"):
        manifest.build(chosen, iconify.Package(package.folder), tmp_path / "again", pixels=32, grey=True)
    assert not (tmp_path / "again").exists()
    assert not list(tmp_path.glob(".again*"))


def test_a_package_is_opened_from_a_folder_and_an_archive(package, tmp_path):
    archive = tmp_path / "package.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(package.folder, "package")
    for path in (package.folder, package.folder.parent, archive):
        opened = iconify.open_package(path, tmp_path / "cache")
        assert opened.about.keys() == package.about.keys()
    other = write_package(tmp_path / "other", {"only": ({}, icons(house=shape(1)), {})})
    with tarfile.open(tmp_path / "other.tgz", "w:gz") as tar:
        tar.add(other, "package")
    assert iconify.open_package(tmp_path / "other.tgz", tmp_path / "cache").about.keys() == {"only"}
    with pytest.raises(FileNotFoundError, match="no such file"):
        iconify.open_package(tmp_path / "none.tgz", tmp_path / "cache2")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no collections\.json"):
        iconify.open_package(tmp_path / "empty", tmp_path / "cache2")


def test_drawings_that_are_not_square_are_centred():
    drawings = iconify.IconSet(
        "s", {"icons": {"bar": {"body": '<path d="M0 0h10v20H0z"/>', "width": 10, "height": 20}}}, {}
    )
    values = np.asarray(iconify.draw(drawings.svg("bar"), 40, grey=True))
    assert (values[:, :9] == 255).all()
    assert (values[:, 11:29] == 0).all()
    assert (values[:, 31:] == 255).all()


def test_emoji_hold_one_hand_out_and_join_names(tmp_path):
    sets = {}
    for n, name in enumerate(make_emoji.SETS):
        names = icons(redheart=shape(n)) if name == "fxemoji" else icons(red_heart=shape(n), bear_face=shape(n + 8))
        names |= icons(boy_dark_skin_tone=shape(n + 16), lonely=shape(n + 24)) if n in (0, 5) else {}
        sets[name] = ({"category": "Emoji", "palette": True, "spdx": "Apache-2.0"}, names, {})
    sets["twemoji"][1]["bear"] = sets["twemoji"][1].pop("bear-face")
    sets["emojione"][2]["bear"] = {"parent": "bear-face"}
    package = iconify.Package(write_package(tmp_path / "package", sets))
    chosen = make_emoji.choose(package)
    assert {e.label for e in chosen} == {
        "red-heart",
        "bear-face",
    }  # "lonely" has one training drawing, a skin tone none
    assert {e.set for e in chosen if e.split == "test"} == {make_emoji.HELD_OUT}
    assert make_emoji.HELD_OUT not in {e.set for e in chosen if e.split != "test"}
    hearts = {e.set: e.icon for e in chosen if e.label == "red-heart"}
    assert hearts["fxemoji"] == "redheart"
    bears = {e.set: e.icon for e in chosen if e.label == "bear-face"}
    assert bears["twemoji"] == "bear"
    assert sum(e.split == "val" for e in chosen) == 2
    assert {e.set for e in make_emoji.choose(package, "noto") if e.split == "test"} == {"noto"}
    sets["noto-v1"][0]["author"] = sets["noto"][0]["author"] = "one vendor"
    other = make_emoji.choose(iconify.Package(write_package(tmp_path / "vendor", sets)), "noto")
    assert {e.set for e in other if e.split != "test"} <= set(make_emoji.SETS) - {"noto", "noto-v1"}
    sets["noto"][0]["spdx"] = "CC-BY-SA-4.0"
    with pytest.raises(ValueError, match="noto"):
        make_emoji.choose(iconify.Package(write_package(tmp_path / "other", sets)))


def test_another_held_out_set_needs_a_manifest_of_its_own(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["make_emoji.py", "--held-out", "noto", "--out", str(tmp_path / "emoji")])
    with pytest.raises(SystemExit):
        make_emoji.main()
    assert "give --manifest FILE for noto" in capsys.readouterr().err


def test_the_committed_manifests_are_as_described():
    for name, path in COMMITTED.items():
        assert path.stat().st_size < 1_000_000
        with gzip.open(path, "rt") as file:
            assert file.readline().strip() == "split,label,set,icon,author,licence,hash"
        entries = manifest.read(path)
        assert {e.licence for e in entries} <= iconify.PERMISSIVE
        assert len({(e.set, e.icon) for e in entries}) == len(entries)
        drawn = {split: {e.hash for e in entries if e.split == split} for split in manifest.SPLITS}
        assert not drawn["test"] & (drawn["train"] | drawn["val"])
        assert not drawn["val"] & drawn["train"]
        assert len({(e.hash, e.label) for e in entries}) == len({e.hash for e in entries})
        for split in ("train", "test"):
            assert {e.label for e in entries if e.split == split} == {e.label for e in entries}, name
    icons = manifest.read(COMMITTED["icons100"])
    assert len({e.label for e in icons}) == 100
    authors = {split: {e.author for e in icons if e.split == split} for split in manifest.SPLITS}
    assert not authors["test"] & (authors["train"] | authors["val"])
    assert not authors["train"] & authors["val"]
