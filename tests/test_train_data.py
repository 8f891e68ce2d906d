"""Images in, whatever they are: modes, damage, classes, splits, archives, and a word for what is wrong."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import sys
import tarfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from image_folders import COLOURS, noisy, spoil, write_class, write_folder
from PIL import Image
from timm.data import create_transform
from timm.data.readers.img_extensions import get_img_extensions

from glattn.cli import main
from glattn.training import build
from glattn.training.batches import TrainingBatches, ValidationBatches, make_loader, seed_everything
from glattn.training.check import find_bad_images, refuse_bad, refuse_unreadable
from glattn.training.config import TrainConfig
from glattn.training.data import open_sources
from glattn.training.image_folder import EXTENSIONS, open_folder
from glattn.training.images import BadImageError, find_bad, read_image

RAMP = np.tile(np.linspace(0, 255, 16).round().astype(np.uint8), (16, 1))
GREY = Image.fromarray(RAMP)
DATA_CONFIG = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear"}


def rgba():
    image = GREY.convert("RGBA")
    image.putpixel((0, 0), (0, 0, 0, 0))  # the black corner is transparent: white
    return image


def save(kind, folder):
    """Write the ramp as `kind`, and return the path."""
    path = folder / f"image.{kind.split()[-1]}"
    other = Image.fromarray(255 - RAMP)
    if kind.startswith("animated"):
        extra = {"lossless": True} if kind.endswith("webp") else {}
        GREY.convert("RGB").save(path, save_all=True, append_images=[other.convert("RGB")], duration=100, **extra)
        return path
    image = {
        "grey png": lambda: GREY,
        "two-tone png": lambda: GREY.convert("1", dither=Image.Dither.NONE),
        "grey-alpha png": lambda: GREY.convert("LA"),
        "rgb png": lambda: GREY.convert("RGB"),
        "rgba png": rgba,
        "palette png": lambda: GREY.convert("RGB").quantize(16),
        "16-bit png": lambda: Image.fromarray(RAMP.astype(np.uint16) * 257),
        "16-bit tif": lambda: Image.fromarray(RAMP.astype(np.uint16) * 257),
        "32-bit tif": lambda: Image.fromarray(RAMP.astype(np.int32)),
        "float tif": lambda: Image.fromarray(RAMP.astype(np.float32) / 255),
        "cmyk jpg": lambda: GREY.convert("CMYK"),
    }[kind]()
    image.save(path)
    return path


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [
        ("grey png", 0), ("two-tone png", 128), ("grey-alpha png", 0), ("rgb png", 0), ("rgba png", 0),
        ("palette png", 8), ("16-bit png", 1), ("16-bit tif", 1), ("32-bit tif", 1), ("float tif", 1),
        ("cmyk jpg", 12), ("animated gif", 2), ("animated webp", 1), ("animated png", 0),
    ],
)  # fmt: skip
def test_every_mode_reads_as_the_same_rgb(kind, tolerance, tmp_path):
    path = save(kind, tmp_path)
    image = read_image(path)
    assert image.mode == "RGB"
    expected = RAMP.astype(int)
    if kind == "rgba png":
        expected[0, 0] = 255
    for channel in range(3):
        assert np.abs(np.asarray(image)[..., channel].astype(int) - expected).max() <= tolerance


def test_pixels_that_are_no_number_are_black_and_leave_the_others_as_they_are(tmp_path):
    values = RAMP.astype(np.float32) / 255
    values[0, :3] = np.nan, np.inf, -np.inf
    Image.fromarray(values).save(tmp_path / "image.tif")
    expected = RAMP.astype(int)
    expected[0, :3] = 0
    assert np.abs(np.asarray(read_image(tmp_path / "image.tif"))[..., 0] - expected).max() <= 1


def bad_crc(path):
    # a flipped byte in a PNG's pixels
    whole = bytearray(path.read_bytes())
    whole[whole.index(b"IDAT") + 10] ^= 0xFF
    path.write_bytes(whole)


@pytest.mark.parametrize("how", ["truncated", "zero bytes", "text"])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif"])
def test_damaged_files_say_why(how, suffix, tmp_path):
    path = tmp_path / f"image.{suffix}"
    noisy((90, 120, 150), 0).save(path)
    with pytest.raises(BadImageError, match=r".+"):
        read_image(spoil(path, how))


def test_flipped_bytes_and_dangling_links_are_found(tmp_path):
    noisy((90, 120, 150), 0).save(tmp_path / "flipped.png")
    bad_crc(tmp_path / "flipped.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    noisy((90, 120, 150), 0).save(tmp_path / "good.png")
    paths = [str(tmp_path / f"{name}.png") for name in ("flipped", "good", "link")]
    assert [path for path, _ in find_bad(paths, workers=1)] == [paths[0], paths[2]]


@pytest.mark.slow
def test_processes_find_the_same_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr("glattn.training.images.IMAGES_A_PROCESS", 64)
    write_class(tmp_path / "c", COLOURS["red"], 130)
    spoil(tmp_path / "c" / "100.png", "truncated")
    paths = sorted(str(path) for path in (tmp_path / "c").iterdir())
    assert list(find_bad(paths, workers=2)) == list(find_bad(paths, workers=1)) != []


# --- classes and splits: (what is done to a good folder, what the one line must say) --------------------------


def empty_class(root):
    (root / "train" / "violet").mkdir()


def without_val_class(root):
    for path in (root / "val" / "red").iterdir():
        path.unlink()
    (root / "val" / "red").rmdir()


def other_val_class(root):
    (root / "val" / "red").rename(root / "val" / "rose")


def one_class(root):
    for split in ("train", "val"):
        for name in ("blue", "green"):
            for path in (root / split / name).iterdir():
                path.unlink()
            (root / split / name).rmdir()


def two_of_one_name(root):
    write_class(root / "train" / "group" / "red", (200, 30, 30), 2)


def one_within_another(root):
    write_class(root / "train" / "red" / "more" / "crimson", (200, 30, 30), 2)


def loose_images(root):
    noisy((1, 2, 3), 0).save(root / "train" / "loose.png")


def no_images(root):
    for path in root.glob("train/*/*.png"):
        path.rename(path.with_suffix(".txt"))


def val_only(root):
    (root / "train").rename(root / "elsewhere")


PROBLEMS = {
    empty_class: "class 'violet' is empty",
    without_val_class: "without validation images (partial_val=true allows it): 'red'",
    other_val_class: "(partial_val=true allows it): 'red'; without training images: 'rose'",
    one_class: "one class only ('red')",
    two_of_one_name: "class 'red' has two folders",
    one_within_another: "red holds images, and so does crimson in it",
    loose_images: "holds images of no class (loose.png",
    no_images: "no images in",
    val_only: "holds val but no train folder",
}


@pytest.mark.parametrize("break_it", PROBLEMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("command", ["train", "check-data"])
def test_a_broken_folder_is_one_line_before_any_compute(break_it, command, tmp_path, capsys, monkeypatch):
    root = write_folder(tmp_path / "data")
    break_it(root)
    monkeypatch.setattr(build, "build_model", lambda *_: pytest.fail("a model was built"))
    rest = ["--model", "test_glattn", "--run", str(tmp_path / "run"), "tracker=none"] if command == "train" else []
    arguments = ["train", "--data", str(root), *rest] if command == "train" else ["check-data", str(root)]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert PROBLEMS[break_it] in captured.err
    assert not (tmp_path / "run").exists()


def test_validation_may_lack_classes_where_that_is_said(tmp_path, capsys):
    root = write_folder(tmp_path / "data")
    shutil.rmtree(root / "val" / "blue")  # the first: the others keep their numbers
    train, val = open_sources(TrainConfig(data=str(root), partial_val=True))
    assert val.class_names == train.class_names
    assert sorted(set(val.targets.tolist())) == [1, 2]
    assert all(val.class_names[val.read(number)[1]] in val.name(number) for number in range(len(val)))
    options = ["partial_val=true", "model=test_glattn", "image_size=32", "epochs=1", "tracker=none", "workers=0"]
    assert main(["train", "--data", str(root), "--run", str(tmp_path / "run"), *options]) == 0
    assert "3 classes, 24 + 8 images" in capsys.readouterr().out
    (root / "val" / "green").rename(root / "val" / "grass")
    assert main(["train", "--data", str(root), "--run", str(tmp_path / "other"), *options]) == 1
    assert "without training images: 'grass'" in capsys.readouterr().err


def test_hidden_folders_are_left_out(tmp_path):
    root = write_folder(tmp_path, train=4, val=0)
    for hidden in (".cache", "blue/.ipynb_checkpoints", "red/.thumbnails/large"):
        write_class(root / hidden, COLOURS["red"], 3)
    sources = open_sources(TrainConfig(data=str(root), val_fraction=0.5))
    for source in sources:
        assert source.class_names == tuple(COLOURS)
        assert source.class_counts().tolist() == [2, 2, 2]
        assert all(f"/{source.class_names[source.read(n)[1]]}/0" in source.name(n) for n in range(6))
    for path in root.glob("green/*.png"):
        path.unlink()
    write_class(root / "green" / ".ipynb_checkpoints", COLOURS["green"], 2)
    with pytest.raises(ValueError, match="class 'green' is empty"):
        open_sources(TrainConfig(data=str(root)))
    for name in COLOURS:
        shutil.rmtree(root / name)
    with pytest.raises(ValueError, match="no images in"):
        open_sources(TrainConfig(data=str(root)))


def test_a_run_folder_is_no_class(tmp_path, monkeypatch, capsys):
    root = write_folder(tmp_path / "images", val=0)
    write_folder(tmp_path / "both")
    monkeypatch.chdir(root)
    for data, run in (
        (".", []), (".", ["run=out"]), (".", ["run=."]), (str(root), [f"run={root}/out/mine"]),
        ("../both", ["run=../both/val"]), ("../both", ["run=../both/train/out"]),
    ):  # fmt: skip
        before = sorted(root.rglob("*"))
        assert main(["train", "--data", data, "model=test_glattn", *run]) == 1
        assert "each folder is a class; give another run=FOLDER" in capsys.readouterr().err
        assert sorted(root.rglob("*")) == before


def test_an_image_that_torchvision_cannot_decode_is_one_of_the_bad(tmp_path, monkeypatch):
    root = write_folder(tmp_path)
    train, _ = open_sources(TrainConfig(data=str(root), dataset="torch/image_folder", val_split="val"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8)
    with pytest.raises(BadImageError, match="exceeds limit"):
        train.read(0)


def test_a_class_of_one_image_cannot_be_split(tmp_path):
    root = write_folder(tmp_path, val=0)
    write_class(tmp_path / "violet", (120, 30, 200), 1)
    with pytest.raises(ValueError, match="'violet' has 1 image"):
        open_sources(TrainConfig(data=str(root)))


def test_one_folder_is_split_by_class_and_seed(tmp_path):
    write_class(tmp_path / "many", COLOURS["red"], 50)
    write_class(tmp_path / "few", COLOURS["blue"], 10)

    def names(seed):
        sources = open_sources(TrainConfig(data=str(tmp_path), seed=seed, val_fraction=0.2))
        assert [source.class_names for source in sources] == [("few", "many")] * 2
        assert [source.class_counts().tolist() for source in sources] == [[8, 40], [2, 10]]
        return [{source.name(n) for n in range(len(source))} for source in sources]

    train, val = names(0)
    assert len(train | val) == 60
    assert names(0) == [train, val]
    assert names(1)[1] != val


def test_a_class_keeps_an_image_to_train_on(tmp_path):
    for name in ("red", "blue"):
        write_class(tmp_path / name, COLOURS[name], 2)
    for source in open_sources(TrainConfig(data=str(tmp_path), val_fraction=0.9)):
        assert source.class_counts().tolist() == [1, 1]


# timm keeps a .tar open as long as its reader lives
LEFT_OPEN = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def packed(folder):
    """Pack a folder beside it, and return the .tar."""
    with tarfile.open(f"{folder}.tar", "w") as tar:
        tar.add(folder, arcname=".")
    return Path(f"{folder}.tar")


@LEFT_OPEN
@pytest.mark.parametrize("workers", [0, 2])
def test_tar_reads_as_its_folder(workers, tmp_path):
    root = write_folder(tmp_path / "data", train=6)
    (tmp_path / "packed").mkdir()
    for split in ("train", "val"):
        packed(root / split).rename(tmp_path / "packed" / f"{split}.tar")
    folder, _ = open_sources(TrainConfig(data=str(root)))
    archive, val = open_sources(TrainConfig(data=str(tmp_path / "packed")))
    assert archive.class_names == folder.class_names == tuple(COLOURS)
    assert archive.digest() == folder.digest() != val.digest()
    assert val.class_counts().tolist() == [4, 4, 4]
    archive.read(0)  # the tar is open before the workers fork

    def images(source):
        batches = ValidationBatches(len(source), 4)
        loader = make_loader(source, batches, DATA_CONFIG, workers=workers, device=torch.device("cpu"))
        found = list(loader)
        return torch.cat([x for x, _ in found]), torch.cat([y for _, y in found])

    for mine, theirs in zip(images(archive), images(folder), strict=True):
        assert torch.equal(mine, theirs)


@LEFT_OPEN
def test_names_alike_but_for_case_and_zeros_have_one_order(tmp_path):
    classes = ["01", "1", "002", "02", "2", "A", "a", "B", "b", "C", "c"]
    for name in reversed(classes):
        (tmp_path / "data" / name).mkdir(parents=True)
        for file in ("1.png", "01.png", "001.png"):
            noisy(COLOURS["red"], 0).save(tmp_path / "data" / name / file)
    folder, archive = open_folder(tmp_path / "data"), open_folder(packed(tmp_path / "data"))
    assert folder.class_names == archive.class_names == tuple(classes)
    assert [Path(folder.name(i)).name for i in range(6)] == ["001.png", "01.png", "1.png"] * 2
    for source in (folder, archive):
        for i in range(len(source)):
            assert Path(source.name(i)).parent.name == source.class_names[source.read(i)[1]]


@LEFT_OPEN
@pytest.mark.parametrize("suffix", EXTENSIONS)
def test_a_tar_holds_every_kind_of_image_that_a_folder_does(suffix, tmp_path):
    for name, colour in COLOURS.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        noisy(colour, 0).convert("L" if suffix == ".pgm" else "RGB").save(tmp_path / "data" / name / f"0{suffix}")
    before = get_img_extensions()
    folder, archive = open_folder(tmp_path / "data"), open_folder(packed(tmp_path / "data"))
    assert archive.digest() == folder.digest()
    assert len(archive) == len(COLOURS)
    assert get_img_extensions() == before


@LEFT_OPEN
@pytest.mark.parametrize("break_it", [two_of_one_name, one_within_another, loose_images, no_images])
def test_a_broken_tar_is_refused_as_its_folder(break_it, tmp_path):
    root = write_folder(tmp_path / "data")
    break_it(root)
    with pytest.raises(ValueError, match=re.escape(PROBLEMS[break_it].replace("(loose", "(./loose"))):
        open_folder(packed(root / "train"))


def packed_classes(folder):
    """Pack each class of a folder, and the .tar files beside the folder; return that one."""
    with tarfile.open(f"{folder}-classes.tar", "w") as tar:
        for path in folder.iterdir():
            with tarfile.open(folder.parent / f"{path.name}.tar", "w") as inner:
                for image in path.iterdir():
                    inner.add(image, arcname=image.name)
            tar.add(inner.name, arcname=f"{path.name}.tar")
    return Path(f"{folder}-classes.tar")


@LEFT_OPEN
def test_tars_in_a_tar_are_classes(tmp_path):
    root = write_folder(tmp_path / "data", train=2)
    source = open_folder(packed_classes(root / "train"))
    assert source.class_names == tuple(sorted(COLOURS))
    assert source.class_counts().tolist() == [2, 2, 2]


def test_a_tar_that_is_none_is_refused(tmp_path):
    root = tmp_path / "unpacked"  # a word of the message that tells a .tar without images
    root.mkdir()
    for split in ("train", "val"):
        (root / f"{split}.tar").write_bytes(b"no archive")
    (root / "lost.tar").symlink_to(root / "nowhere.tar")
    with pytest.raises(ValueError, match=r"train\.tar is neither a folder nor a \.tar"):
        open_sources(TrainConfig(data=str(root)))
    with pytest.raises(ValueError, match=r"lost\.tar is neither a folder nor a \.tar"):
        open_folder(root / "lost.tar")


# --- loading ------------------------------------------------------------------------------------------------


def epoch_of(source, *, workers, epoch, start=0, rank=0, world=1):
    batches = TrainingBatches(len(source), 8, seed=3, rank=rank, world=world)
    batches.epoch, batches.start = epoch, start
    augmentation = {"is_training": True, "auto_augment": "rand-m9-mstd0.5-inc1", "hflip": 0.5}
    loader = make_loader(
        source, batches, DATA_CONFIG, workers=workers, device=torch.device("cpu"), replace=True, **augmentation
    )
    return [(zlib.crc32(x.numpy().tobytes()), y[:, 1].tolist()) for x, y in loader]


def test_what_is_loaded_follows_from_its_place_alone(tmp_path):
    source, _ = open_sources(TrainConfig(data=str(write_folder(tmp_path, train=11))))
    first = epoch_of(source, workers=0, epoch=0)
    assert len(first) == 4
    assert epoch_of(source, workers=2, epoch=0) == first
    assert epoch_of(source, workers=1, epoch=0, start=2) == first[2:]
    assert epoch_of(source, workers=0, epoch=1) != first
    seen = [n for _, places in first for n in places]
    assert len(seen) == len(set(seen)) == 32
    halves = [epoch_of(source, workers=0, epoch=0, rank=rank, world=2) for rank in (0, 1)]
    for (_, whole), (_, a), (_, b) in zip(first, *halves, strict=True):
        assert a == whole[0::2]
        assert b == whole[1::2]


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "rand-m10", "v0", "original", "3a", "augmix-m5"])
def test_no_policy_of_timm_fails_in_the_middle_of_an_epoch(policy):
    transform = create_transform(32, is_training=True, auto_augment=policy, use_prefetcher=True)
    image = noisy((90, 120, 150), 0)
    for seed in range(120):
        seed_everything(seed)
        assert transform(image).shape == (3, 32, 32)


def test_unreadable_images_are_replaced_or_marked(tmp_path):
    root = write_folder(tmp_path, train=4)
    spoil(root / "train" / "blue" / "001.png", "truncated")
    spoil(root / "val" / "red" / "000.png", "zero bytes")
    train, val = open_sources(TrainConfig(data=str(root)))
    cpu = torch.device("cpu")
    loader = make_loader(train, ValidationBatches(12, 12), DATA_CONFIG, workers=0, device=cpu, replace=True)
    places = next(iter(loader))[1]
    assert places[1].tolist() == [0, 1, 2]  # the next one instead
    assert (places[:, 1] != places[:, 2]).sum() == 1
    loader = make_loader(val, ValidationBatches(12, 12), DATA_CONFIG, workers=0, device=cpu)
    places = next(iter(loader))[1]
    assert places[places[:, 0] < 0, 1].tolist() == [8]


def test_no_readable_image_at_all_ends_in_an_error(tmp_path):
    root = write_folder(tmp_path, train=2)
    for path in root.glob("train/*/*.png"):
        spoil(path, "text")
    train, _ = open_sources(TrainConfig(data=str(root)))
    loader = make_loader(
        train, ValidationBatches(6, 2), DATA_CONFIG, workers=0, device=torch.device("cpu"), replace=True
    )
    with pytest.raises(ValueError, match="none of the training images can be read"):
        next(iter(loader))


@pytest.mark.parametrize(("split", "told"), [("train", "training"), ("val", "validation")])
def test_no_readable_image_at_all_is_told_before_training(split, told, tmp_path, capsys):
    root = write_folder(tmp_path / "data", train=2, val=2)
    for path in root.glob(f"{split}/*/*.png"):
        spoil(path, "text")
    given = ["train", "model=test_glattn", "device=cpu", "tracker=none", "workers=1", f"run={tmp_path / 'run'}"]
    assert main([*given, f"data={root}"]) == 1
    said = capsys.readouterr().err
    assert f"none of the 6 {told} images can be read, e.g. " in said
    assert "000.png (" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_class_named_as_a_split_is_told(tmp_path):
    for name in ("bus", "car", "train"):
        write_class(tmp_path / name, COLOURS["red"], 4, seed=1)
    with pytest.raises(ValueError, match="and a class named train is taken for a split"):
        open_sources(TrainConfig(data=str(tmp_path)))


class Columns:
    """A Hugging Face dataset, for what is asked of one."""

    def __init__(self, **columns):
        self.columns, self.features = columns, {name: SimpleNamespace() for name in columns}

    def __getitem__(self, name):
        return self.columns[name]

    def __len__(self):
        return len(next(iter(self.columns.values())))


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"image": [None] * 3, "label": [0, 2, 1]}, ("0", "1", "2")),
        ({"image": [None] * 3, "labels": [0, 2, 1]}, "no column 'label' of classes; it has 'image', 'labels'"),
        ({"image": [None] * 3, "label": ["a", "b", "a"]}, "column 'label' does not hold classes' numbers"),
        ({"image": [None] * 3, "label": [0.5, 1.7, 0.0]}, "column 'label' does not hold classes' numbers"),
        ({"image": [None] * 3, "label": [[0], [1], [0]]}, "column 'label' does not hold classes' numbers"),
        ({"image": [None] * 3, "label": [-1, -1, -1]}, "column 'label' does not hold classes' numbers"),
    ],
)
def test_columns_of_hugging_face_datasets(columns, found, monkeypatch):
    dataset = Columns(**columns)
    made = SimpleNamespace(reader=SimpleNamespace(dataset=dataset, label_key="label"))
    made = type("Dataset", (SimpleNamespace,), {"__len__": lambda self: len(dataset)})(**vars(made))
    monkeypatch.setattr("glattn.training.data.create_dataset", lambda *args, **kwargs: made)
    config = TrainConfig(dataset="hfds/some")
    if isinstance(found, tuple):
        assert open_sources(config)[0].class_names == found
    else:
        with pytest.raises(ValueError, match=re.escape(found)):
            open_sources(config)


# --- glattn check-data ----------------------------------------------------------------------------------------


def test_check_data_lists_every_bad_image(tmp_path, capsys):
    root = write_folder(tmp_path)
    assert main(["check-data", str(root)]) == 0
    said = capsys.readouterr().out
    assert "training: 24 images, 3 classes of 8 to 8 images" in said
    assert "every image can be read" in said
    bad = [
        spoil(root / "train" / "red" / "003.png", "truncated"),
        spoil(root / "train" / "blue" / "000.png", "text"),
        spoil(root / "val" / "green" / "001.png", "zero bytes"),
    ]
    assert main(["check-data", str(root)]) == 1
    said = capsys.readouterr().out
    for path in bad:
        assert f"cannot be read: {path}: " in said
    assert "3 image(s) cannot be read" in said


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' names are text")
def test_check_data_lists_names_that_are_no_text(tmp_path, capsys):
    root = write_folder(tmp_path)
    spoil(root / "val" / "red" / "000.png", "text").rename(root / "val" / "red" / "caf\udce9.png")
    assert main(["check-data", str(root)]) == 1
    assert "caf\\udce9.png: " in capsys.readouterr().out


@LEFT_OPEN
def test_a_large_tar_is_read_anew_where_its_index_is_older(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "data", train=2)
    index = root / "_train_tarinfos.pickle"
    for name, writable in (("1", False), ("2", True), ("3", True)):
        path = packed(root / "train")
        os.truncate(path, 11 * 2**30)  # of holes; timm keeps an index of what is above 10 GB
        monkeypatch.setattr(os, "access", lambda *_, yes=writable: yes)
        assert len(open_folder(path)) == 5 + int(name)
        assert index.exists() == writable
        if writable:
            os.utime(index, (0, 0))
        shutil.copy(root / "train" / "red" / "000.png", root / "train" / "red" / f"more{name}.png")
    index.write_bytes(b"")
    with pytest.raises(ValueError, match="that can be read: Ran out of input"):
        open_folder(path)


@LEFT_OPEN
def test_a_tar_that_was_read_through_goes_to_spawned_workers(tmp_path):
    root = write_folder(tmp_path / "data", train=2)
    for path in (packed(root / "train"), packed_classes(root / "train")):
        source = open_folder(path)
        refuse_unreadable(training=source)
        refuse_bad(source)
        assert len(pickle.loads(pickle.dumps(source))) == 6


def test_bad_images_are_refused_by_any_process_share(tmp_path):
    root = write_folder(tmp_path, train=4)
    bad = [spoil(root / "train" / name / "001.png", "text") for name in COLOURS]
    source = open_folder(root / "train")
    shares = [find_bad_images(source, rank=rank, world=5) for rank in range(5)]
    assert sorted(path for share in shares for path, _ in share) == sorted(map(str, bad))
    with pytest.raises(ValueError, match=r"3 image\(s\) cannot be read"):
        refuse_bad(source)


@LEFT_OPEN
def test_check_data_reads_archives(tmp_path, capsys):
    root = write_folder(tmp_path / "data")
    spoil(root / "train" / "red" / "003.png", "truncated")
    for split in ("train", "val"):
        packed(root / split).rename(tmp_path / f"{split}.tar")
    assert main(["check-data", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "red/003.png: " in said
    assert "1 image(s) cannot be read" in said
