"""Fractals: the table from its seed, the game against a loop, pictures from their seeds, and a run on them."""

import gzip
import pickle
from importlib import resources

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from glattn.cli import main
from glattn.training import fractals, pretrain
from glattn.training.augment import even_shares
from glattn.training.batches import TrainingBatches
from glattn.training.config import DRAWN
from glattn.training.pretrain import FormulaSource

TINY = ("model=test_glattn", "image_size=32", "batch_size=32", "tracker=none", "device=cpu", "workers=0")
FEW = (*TINY, "epoch_samples=128")
EVERY = pytest.mark.parametrize("dataset", pretrain.FORMULAS)


def test_what_is_drawn_is_what_a_run_takes():
    assert tuple(pretrain.FORMULAS) == DRAWN


@pytest.fixture(scope="module")
def table():
    return fractals.read_table()


def test_the_table_is_made_from_its_seed_to_the_bit(table):
    for number in (0, 1, 2, 500, 999):
        assert np.array_equal(fractals.make_class(number), table[number])
    assert not np.array_equal(fractals.make_class(0, seed=1), table[0])


@pytest.mark.slow
def test_the_whole_file_is_made_from_its_seed_to_the_bit():
    file = resources.files("glattn.training").joinpath(fractals.TABLE).read_bytes()
    made = fractals.pack([fractals.make_class(number) for number in range(fractals.CLASSES)])
    assert gzip.decompress(made) == gzip.decompress(file)


def test_every_system_is_one_that_is_asked_for(table):
    assert len(table) == fractals.CLASSES
    assert {len(maps) for maps in table} == {2, 3, 4}
    for maps in table:
        n = len(maps)
        values = np.linalg.svd(maps[:, :4].reshape(n, 2, 2), compute_uv=False)
        assert (5 + n) / 2 - 1e-3 <= (values @ [1, 2]).sum() <= (6 + n) / 2 + 1e-3
        assert values.max() <= 1 + 1e-4
        assert np.abs(maps[:, 4:]).max() <= 1
    assert len({maps.tobytes() for maps in table}) == len(table)


def test_the_game_is_played_as_by_hand(table):
    maps = table[3:5]
    draws = np.random.default_rng(1).random((2, fractals.SETTLING + fractals.STEPS, 7))
    padded, shares = fractals.systems(maps)
    points = fractals.walk(torch.from_numpy(padded), torch.from_numpy(fractals.choose(shares, draws)))
    for which, rows in enumerate(maps):
        areas = [max(abs(a * d - b * c), 0.01) for a, b, c, d, _, _ in rows]
        for chain in range(7):
            x = y = 0.0
            for step, draw in enumerate(draws[which, :, chain]):
                summed, number = 0.0, -1
                while summed <= draw:
                    number += 1
                    summed += areas[number] / sum(areas)
                a, b, c, d, e, f = rows[number]
                x, y = a * x + b * y + e, c * x + d * y + f
                if step >= fractals.SETTLING:
                    found = points[which, (step - fractals.SETTLING) * 7 + chain]
                    assert found.tolist() == pytest.approx([x, y])


@pytest.mark.parametrize("counts", [[1, 1, 1], [1, 2]])
def test_what_is_random_is_drawn_as_by_hand(table, counts):
    """One number after another, of a generator for each fractal: the pictures of a seed stay what they are."""
    maps, seeds = [table[number] for number in (7, 0, 51)], [[0, 5, 11, 7], [0, 5, 11, 0], [1, 51]]
    draws = fractals.Draws.of(maps, seeds, counts, side=32)
    expanding = 0
    for place, (rows, seed) in enumerate(zip(maps, seeds, strict=True)):
        rng = np.random.default_rng(seed)
        number, factor = rng.integers(len(rows)), rng.uniform(0.85, 1.05)
        changed = rows.copy()
        expanding += factor > 0.99 / np.linalg.norm(rows[number, :4].reshape(2, 2), 2)
        changed[number, :4] *= min(factor, 0.99 / np.linalg.norm(rows[number, :4].reshape(2, 2), 2))
        assert draws.maps[place, : len(rows)].tolist() == changed.astype(np.float32).tolist()
        areas = np.maximum(np.abs(changed[:, 0] * changed[:, 3] - changed[:, 1] * changed[:, 2]), 0.01)
        summed = np.cumsum(areas)
        shares = (summed / summed[-1]).astype(np.float32)
        steps = rng.random((fractals.SETTLING + fractals.STEPS, 64), dtype=np.float32)
        assert draws.chosen[place].tolist() == (steps[..., None] >= shares).sum(-1).tolist()
        least, largest, shift = (0.8, 1.6, 0.3) if place == 0 or len(counts) == 3 else (0.35, 1.0, 0.6)
        pose = [rng.integers(8), rng.uniform(least, largest), *rng.uniform(-shift, shift, size=2)]
        for drawn, expected in ((draws.pose, pose), (draws.colours, rng.uniform(size=(2, 3))),
                                (draws.noise, rng.uniform(size=(4, 5, 5)))):  # fmt: skip
            assert drawn[place].tolist() == np.float32(expected).tolist()
        assert draws.mono[place] == rng.choice(3, p=(0.7, 0.15, 0.15))
    assert expanding == 1  # and is held from it


@EVERY
def test_a_picture_is_a_function_of_its_seed_and_of_no_other_picture(dataset):
    source = FormulaSource.of(dataset, 3000, fixed=False, side=48)
    together = pickle.loads(pickle.dumps(source)).draw([(5, 11), (5, 12), (1005, 11)], 48)  # as a worker has it
    assert together.shape == (3, 3, 48, 48)
    assert 0 <= together.min() < together.max() <= 1
    for place, picture in zip([(5, 11), (5, 12), (1005, 11)], together, strict=True):
        assert torch.equal(source.draw([place], 48)[0], picture)
    assert not torch.equal(together[0], together[1])
    fixed = FormulaSource.of(dataset, 3000, fixed=True, side=48)
    assert torch.equal(fixed.draw([(5, 11)], 48), fixed.draw([(5, 12)], 48))
    assert not torch.equal(fixed.draw([(5, 11)], 48), source.draw([(5, 11)], 48))
    image, target = fixed.read(1005)
    assert (image.size, target) == ((48, 48), 5)


@EVERY
def test_a_picture_of_several_classes_is_of_them_and_their_seeds_alone(dataset):
    source = FormulaSource.of(dataset, 1000, fixed=False, side=48, instances=4)
    places = [(5, seed) for seed in range(40)]
    shown = [source.classes(*place) for place in places]
    assert {len(classes) for classes in shown} == {1, 2, 3, 4}
    assert all(classes[0] == 5 and len(set(classes)) == len(classes) for classes in shown)
    many = [source.classes(5, seed) for seed in range(20_000)]  # its own is among the others' numbers in a few of them
    assert all(len(set(classes)) == len(classes) for classes in many)
    assert {number for classes in many for number in classes} == set(range(1000))
    together = source.draw(places, 48)
    assert 0 <= together.min() < together.max() <= 1
    assert all(torch.equal(source.draw([place], 48)[0], one) for place, one in zip(places, together, strict=True))


def test_fractals_are_drawn_one_over_the_other(table):
    """With the first's ground, each in its own ink, all without colour if the first has none."""
    seeds = [[3, 0], [3, 1]]
    two = fractals.Draws.of([table[1], table[2]], seeds, [2], side=48)
    for mono, lone in ((0, 0), (1, 1), (2, 2)):
        two.mono[:] = torch.tensor([mono, 0])
        picture = fractals.render(two, 48)[0]
        columns = {name: value for name, value in vars(two).items() if name != "counts"}
        parts = [
            fractals.Draws(**{name: value[n : n + 1].clone() for name, value in columns.items()}, counts=[1])
            for n in range(2)
        ]
        parts[1].mono[:] = lone
        first, second = (fractals.render(part, 48)[0] for part in parts)
        bare = fractals.Draws(**vars(parts[1]) | {"colours": torch.ones(1, 2, 3), "mono": torch.full((1,), 2.0)})
        figure = fractals.render(bare, 48)[0]  # white on black: how much of each pixel it covers
        assert torch.equal(picture[:, figure[0] == 0], first[:, figure[0] == 0])
        solid = figure[0] > 0.999
        assert solid.any()
        torch.testing.assert_close(picture[:, solid], second[:, solid], atol=2e-3, rtol=0)


@pytest.mark.parametrize("workers", [0, 2])
@EVERY
def test_an_accelerator_is_given_the_same_draws_several_batches_at_once(monkeypatch, dataset, workers):
    monkeypatch.setattr(pretrain, "_AT_ONCE", 3)  # of 64 x 64 pixels: 24 pictures of 16 x 16, two classes each
    source = FormulaSource.of(dataset, 100, fixed=False, side=16, instances=2)
    batches = TrainingBatches(100, 10, seed=1)
    config = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.2,) * 3}
    loader = pretrain.FormulaLoader(source, batches, config, workers=workers, device=torch.device("meta"))
    for batches.epoch in range(2):
        groups = list(loader.draws)
        assert [sizes for sizes, _, _ in groups] == [[10] * 3] * 3 + [[10]]
        places = [place for batch in batches for place in batch]
        pictures = torch.cat([source.formula.render(draws, 16) for _, draws, _ in groups])
        assert torch.equal(pictures, source.draw(places, 16))
        assert torch.equal(torch.cat([numbers for _, _, numbers in groups]), source.numbers(places))


def test_targets_are_even_over_the_classes_of_a_picture():
    shares = even_shares(torch.tensor([[2, -1, -1], [0, 3, -1], [1, 4, 0]]), 5)
    expected = [[0, 0, 1, 0, 0], [1 / 2, 0, 0, 1 / 2, 0], [1 / 3, 1 / 3, 0, 0, 1 / 3]]
    torch.testing.assert_close(shares, torch.tensor(expected))


def test_pictures_show_figures_of_every_kind():
    source = FormulaSource.of("fractals", 1000, fixed=True, side=64)
    pictures = source.draw([(number, 0) for number in range(0, 1000, 5)], 64)
    assert torch.isfinite(pictures).all()
    grey = (pictures.amax(1) - pictures.amin(1)).flatten(1).amax(1) < 1e-6
    assert 0.2 < grey.float().mean() < 0.4
    dark = pictures[grey].mean((1, 2, 3)) < 0.5
    assert dark.any()
    assert (~dark).any()
    ink = torch.where(dark[:, None, None], pictures[grey][:, 0], 1 - pictures[grey][:, 0])
    share = (ink > 0.5).float().mean((1, 2))
    assert 0.05 < share.median() < 0.5
    assert (share > 0.005).all()


@pytest.fixture
def _short(monkeypatch):
    monkeypatch.setattr(pretrain, "HELD_OUT", 64)


@pytest.mark.usefixtures("_short")
def test_a_run_that_is_cut_and_resumed_ends_as_one_that_is_not(tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(["pretrain", "--samples", "256", "--run", str(whole), *FEW]) == 0
    said = capsys.readouterr().out
    assert "1000 classes, 128 + 64 images at 32x32" in said
    assert "classes without a training image: 872" in said
    assert main(["pretrain", "--samples", "128", "--run", str(cut), *FEW, "schedule=constant"]) == 0
    assert main(["pretrain", "--samples", "256", "--run", str(cut), "--resume", "auto", *FEW]) == 1
    assert "schedule" in capsys.readouterr().err
    for samples in ("128", "256"):
        arguments = ["--samples", samples, "--run", str(tmp_path / "twice"), "--resume", "auto"]
        assert main(["pretrain", *arguments, *FEW, "schedule=constant"]) == 0
    once = ["--samples", "256", "--run", str(tmp_path / "once"), *FEW, "schedule=constant"]
    assert main(["pretrain", *once]) == 0
    states = [torch.load(max((tmp_path / run / "checkpoints").glob("*.pt")), weights_only=True)["model"]
              for run in ("once", "twice")]  # fmt: skip
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert load_file(whole / "best" / "model.safetensors")["head.fc.weight"].shape[0] == fractals.CLASSES
    assert (whole / "report.html").exists()


@pytest.mark.usefixtures("_short")
@EVERY
def test_a_run_on_several_classes_goes_on_from_one_on_single_fractals(tmp_path, monkeypatch, dataset):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["pretrain", "--samples", "128", "--run", str(first), *FEW]) == 0
    asked, spread = [], even_shares
    monkeypatch.setattr("glattn.training.augment.even_shares", lambda *a: asked.append(spread(*a)) or asked[-1])
    start = f"checkpoint={first / 'best' / 'model.safetensors'}"
    arguments = ["pretrain", "--samples", "128", "--run", str(second), *FEW, start, f"dataset={dataset}"]
    arguments += ["instances=3", "lr=1e-9"]
    assert main(arguments) == 0
    states = [load_file(run / "best" / "model.safetensors") for run in (first, second)]
    torch.testing.assert_close(states[0]["head.fc.weight"], states[1]["head.fc.weight"], atol=1e-4, rtol=0)
    assert [tuple(shares.shape) for shares in asked] == [(32, 1000)] * 4
    several = torch.cat(asked).gt(0).sum(1)
    assert set(several.tolist()) == {1, 2, 3}


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["instances=0"], "1 to 16"),
        (["instances=2", "cutmix=1"], "cutmix=0"),
        (["instances=2", "loss=bce"], "cross_entropy"),
        (["--samples", "75000"], "epoch_samples=50000"),
        (["--samples", "75000", "epoch_samples=100000"], "epoch_samples=100000"),
        (["--samples", "50000", "--epochs", "3"], "both"),
        (["--model", "glattn_pico", "model=glattn_atto"], "--model and model=glattn_atto both say it"),
        (["image_size=0"], "image_size"),
        (["image_size=null"], "image_size=64"),
        (["--data", "photos"], "leave data out"),
        (["dataset=digits"], "glattn train"),
        ([*TINY, "model_args.in_chans=1"], "RGB"),
        ([*TINY, "interpolation=bogus"], "interpolation='bogus'"),
    ],
)
def test_what_is_asked_wrongly_is_one_line(arguments, word, capsys):
    assert main(["pretrain", *arguments]) == 1
    error = capsys.readouterr().err
    assert word in error
    assert error.count("\n") == 1


def test_a_key_that_is_no_option_is_said_how_to_write(capsys):
    with pytest.raises(SystemExit):
        main(["pretrain", "--device", "cpu"])
    assert (
        "unrecognized arguments: --device; a key of the configuration is written key=value" in capsys.readouterr().err
    )


def test_a_recipe_of_other_images_is_refused(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(f"dataset: digits\ndata: {tmp_path / 'digits'}\n")
    assert main(["pretrain", "--config", str(tmp_path / "recipe.yaml"), "--run", str(tmp_path / "run"), *TINY]) == 1
    assert "dataset='digits': glattn pretrain draws fractals or contours" in capsys.readouterr().err
    assert not (tmp_path / "digits").exists()
