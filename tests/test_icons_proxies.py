"""The list of proxy runs: lr chosen on val alone, resumed, compared over authors."""

import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from image_folders import COLOURS, write_class
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import manifest
import run_proxies
from bootstrap import compare

RECIPE = Path(__file__).resolve().parents[1] / "configs" / "icons.yaml"
IMAGES = [f"a/i{n:03d}.png" for n in range(200)]


def answers(wrong):
    return {image: int(image[3:6]) not in wrong for image in IMAGES}


def test_the_interval_is_wider_where_one_author_makes_the_difference():
    many = {image: f"a{int(image[3:6]) // 10}" for image in IMAGES}
    mine, theirs = answers(set()), answers(set(range(10)))  # all the gain is one author's
    by_author = compare([mine], [theirs], many)
    by_image = compare([mine], [theirs], {image: image for image in IMAGES})
    assert by_author.points == by_image.points == pytest.approx(5)
    assert by_author.authors == 20
    assert by_author.low == 0
    assert by_author.verdict == "not told apart"
    assert by_image.verdict == "better"
    assert compare([theirs], [mine], {image: image for image in IMAGES}).verdict == "worse"


def test_seeds_are_averaged_and_the_images_must_be_the_same():
    authors = {image: image for image in IMAGES}
    half = compare([answers(set()), answers(set(range(100)))], [answers(set(range(100)))] * 2, authors)
    assert half.points == pytest.approx(25)
    with pytest.raises(ValueError, match="same images"):
        compare([answers(set())], [{IMAGES[0]: True}], authors)


def test_the_interval_holds_95_of_100():
    """Of 200 independent images, each a gain of 1 or 0, as the binomial has it."""
    found = compare([answers(set())], [answers(set(range(0, 200, 2)))], {image: image for image in IMAGES})
    assert found.points == pytest.approx(50)
    assert found.high - found.low == pytest.approx(2 * 1.96 * 100 * (0.25 / 200) ** 0.5, rel=0.06)


def test_authors_are_the_manifests_and_one_author_is_no_sample():
    emoji = [
        f"{e.label}/{e.set}--{e.icon}.png" for e in manifest.read(manifest.FOLDER / "emoji.csv.gz") if e.split == "test"
    ]
    assert run_proxies.authors_of(emoji) == {image: image for image in emoji}
    icons = {f"{e.label}/{e.set}--{e.icon}.png": e.author for e in manifest.read(manifest.FOLDER / "icons100.csv.gz")}
    assert run_proxies.authors_of(list(icons)) == icons  # whichever of them are tested on


def draw(path):
    Image.new("L", (1, 1)).save(path)


@pytest.fixture
def proxies(tmp_path, monkeypatch):
    """Return a maker of lists whose trainings are pretended: the higher lr is better on val, worse on test."""
    trained = []

    def train(command, **_):
        said = dict(part.split("=") for part in command if "=" in part)
        trained.append((said["model"], float(said["lr"]), int(said["seed"])))
        Path(said["run"]).mkdir(parents=True)
        return SimpleNamespace(returncode=int(said["model"] == "fails"))

    def finished(run, data):
        high = "0.002" in run.name
        right = answers(set(range(50)) if run.name.startswith("b-") else set())
        return {"val_top1": "80" if high else "70", "test_top1": "60" if high else "90"}, right

    for split in ("train", "test"):
        (tmp_path / "data" / split / "a").mkdir(parents=True)
        for image in IMAGES:
            draw(tmp_path / "data" / split / image)
    monkeypatch.setattr(run_proxies.subprocess, "run", train)
    monkeypatch.setattr(run_proxies, "finished", finished)

    def make(*models, end=float("inf"), **changed):
        folders = {"data": tmp_path / "data", "runs": tmp_path / "runs", "out": tmp_path / "out"}
        options = {"config": RECIPE, "lr": [1e-3, 2e-3], "seeds": [0, 1, 2], "settings": []}
        args = SimpleNamespace(models=models, end=end, **folders | options | changed)
        return run_proxies.Proxies(args)

    return make, trained


def test_lr_is_chosen_on_val_and_the_other_seeds_follow_it(proxies):
    make, trained = proxies
    done = make("a", "b")
    assert done.run()
    assert trained == [(m, lr, seed) for m in "ab" for lr, seed in ((1e-3, 0), (2e-3, 0), (2e-3, 1), (2e-3, 2))]
    assert [row["chosen"] for row in done.rows] == ["no", "yes", "yes", "yes"] * 2
    found = done.compare()
    assert (found[0]["points"], found[0]["seeds"], found[0]["verdict"]) == ("25.00", "3", "better")
    assert (done.out / "comparisons.csv").exists()


def test_of_rates_that_validate_alike_the_lower_is_chosen(proxies, monkeypatch):
    make, trained = proxies
    monkeypatch.setattr(
        run_proxies, "finished", lambda run, data: ({"val_top1": "80", "test_top1": "60"}, answers(set()))
    )
    assert make("a", lr=[2e-3, 1e-3], seeds=[0, 1]).run()
    assert trained[-1] == ("a", 1e-3, 1)


def test_a_model_may_have_options(proxies, monkeypatch):
    make, _ = proxies
    named = "a(layout=['pooled', 'full', 'full', 'full'], head_dim=16)"
    done = make("a", named)
    commands, train = [], run_proxies.subprocess.run
    monkeypatch.setattr(
        run_proxies.subprocess, "run", lambda c, **options: (commands.append(c), train(c, **options))[1]
    )
    assert done.run()
    assert 'model_args.layout=["pooled", "full", "full", "full"]' in commands[-1]
    assert "model_args.head_dim=16" in commands[-1]
    assert "model=a" in commands[-1]
    assert done.folder("a", 1e-3, 0) != done.folder(named, 1e-3, 0)
    assert {row["model"] for row in done.rows} == {"a", named}
    with pytest.raises(ValueError, match="is no model"):
        make("a(").run()


def test_what_torch_cannot_train_in_channels_last_is_trained_otherwise(proxies, monkeypatch, tmp_path):
    make, _ = proxies
    tried, train = [], run_proxies.subprocess.run

    def crash(command, **options):
        tried.append(command[-1].removeprefix(f"run={tmp_path}"))
        otherwise = "channels_last=false" in command
        return train(command, **options) if otherwise else SimpleNamespace(returncode=-signal.SIGSEGV)

    monkeypatch.setattr(run_proxies.subprocess, "run", crash)
    assert make("a", lr=[1e-3], seeds=[0]).run()
    first, second = tried
    assert second == f"{first}-nchw"


def test_a_list_goes_on_where_it_was(proxies):
    make, trained = proxies
    assert make("a").run()
    rows = run_proxies.read_csv(make("a").path)
    trained.clear()
    assert not make("a", "b", end=0).run()
    assert trained == []
    assert make("a", "b").run()
    assert {model for model, _, _ in trained} == {"b"}
    assert run_proxies.read_csv(make("a").path)[:4] == rows


def test_a_later_list_adds_to_what_is_there(proxies):
    make, trained = proxies
    first = make("a", "b")
    assert first.run()
    compared = first.compare()
    trained.clear()
    # fewer rates and models, another seed: the rate is still the first seed's, of all that were tried
    more = make("a", "c", lr=[1e-3], seeds=[5])
    assert more.run()
    assert trained == [("a", 0.002, 5), ("c", 0.001, 5)]
    assert [row["chosen"] for row in more.rows_of("a")] == ["no", "yes", "yes", "yes", "yes"]
    assert [(row["other"], row["seeds"]) for row in more.compare()] == [("c", "1")]
    rows = run_proxies.read_csv(more.out / "comparisons.csv")
    assert rows[0] == compared[0]
    assert [row["other"] for row in rows] == ["b", "c"]


def test_two_lists_keep_each_others_rows(proxies):
    make, _ = proxies
    assert not make("b", end=0).run()
    assert make("b", lr=[1e-3], seeds=[0]).run()
    first = make("a")  # it has read that b's first rate is chosen, which another will be
    assert make("b").run()
    assert first.run()
    rows = run_proxies.read_csv(first.path)
    assert {row["model"] for row in rows} == {"a", "b"}
    assert {row["lr"] for row in rows if row["chosen"] == "yes"} == {"0.002"}


def test_a_rate_of_many_digits_finds_its_runs(proxies):
    make, trained = proxies
    assert make("a", lr=[0.00123456789], seeds=[0]).run()
    trained.clear()
    assert make("a", lr=[0.00123456789], seeds=[0]).run()
    assert trained == []


def test_recipes_have_folders_of_their_own_and_leave_a_lists_arguments_alone(proxies, tmp_path):
    make, _ = proxies
    (tmp_path / "other.yaml").write_text("epochs: 3  # as before\n")
    other = make("a", config=tmp_path / "other.yaml")
    assert make("a").folder("a", 1e-3, 0) != other.folder("a", 1e-3, 0)
    with pytest.raises(ValueError, match="seed=9: the list itself gives each run its seed"):
        make("a", settings=["epochs=3", "seed=9"])
    with pytest.raises(ValueError, match="val_split=test: the list itself"):  # which would choose on the test
        make("a", settings=["val_split=test"])
    (tmp_path / "test.yaml").write_text("val_split: test\n")
    with pytest.raises(ValueError, match="may not choose rate and epoch"):
        make("a", config=tmp_path / "test.yaml")


def test_what_is_no_model_is_said_before_any_training(proxies):
    make, trained = proxies
    with pytest.raises(ValueError, match=r"bad\("):
        make("a", "bad(")
    assert not trained


def test_a_recipe_that_changed_is_refused_once_it_has_rows(proxies, tmp_path):
    make, _ = proxies
    recipe = tmp_path / "mine.yaml"
    for text in ("epochs: 3\n", "epochs: 4\n", "# as it was\nepochs: 4\n"):
        recipe.write_text(text)
        done = make("a", config=recipe)
    assert done.run()
    recipe.write_text("epochs: 5\n")
    assert make("a").run()  # by another recipe
    with pytest.raises(ValueError, match=r"its rows of mine.yaml were made before that was changed"):
        make("a", config=recipe)
    (done.out / "recipes.json").unlink()  # what they said is not known any more
    with pytest.raises(ValueError, match=r"its rows of mine.yaml were made before that was changed"):
        make("a", config=recipe)
    folder = done.folder("a", 1e-3, 0)  # where a run that was killed, and left no row, would go on
    recipe.write_text("epochs: 6\n")
    assert done.folder("a", 1e-3, 0) != folder
    with pytest.raises(FileNotFoundError, match="no recipe"):
        make("a", config=tmp_path / "none.yaml")


def test_a_class_that_nothing_is_trained_on_is_refused_before_training(proxies, tmp_path):
    make, _ = proxies
    (tmp_path / "data" / "test" / "new").mkdir()
    draw(tmp_path / "data" / "test" / "new" / "i.png")
    with pytest.raises(ValueError, match=r"test/ has a class 'new' that train/ has not"):
        make("a")
    (tmp_path / "data" / "test" / "new" / "i.png").rename(tmp_path / "data" / "test" / "i.png")
    with pytest.raises(ValueError, match="test/ has images outside its classes"):
        make("a")


def test_a_test_image_that_cannot_be_read_is_named_before_training(proxies, tmp_path):
    make, trained = proxies
    (tmp_path / "data" / "test" / IMAGES[3]).write_bytes(b"no image")
    with pytest.raises(ValueError, match=rf"test image .*{IMAGES[3]} cannot be read \(.+\): repair it"):
        make("a")
    assert not trained


def test_rows_of_other_images_are_refused_and_answers_are_kept(proxies, tmp_path):
    make, _ = proxies
    assert make("a", "b").run()
    assert run_proxies.unpack(make("b").rows[-1]["answers"], IMAGES) == answers(set(range(50)))
    draw(tmp_path / "data" / "test" / "a" / "new.png")
    with pytest.raises(ValueError, match="8 rows are of other images"):
        make("a")
    with pytest.raises(ValueError, match="200 images were tested, which are not the 201"):
        make("c", out=tmp_path / "other").run()
    with pytest.raises(FileNotFoundError, match="no such folder"):
        run_proxies.survey(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"no images in it; .* in no .tar"):
        run_proxies.survey(tmp_path / "out")


def test_images_that_only_some_manifest_knows_are_refused():
    known = next(e for e in manifest.read(manifest.FOLDER / "icons100.csv.gz") if e.split == "test")
    image = known.file.removeprefix("test/")
    assert run_proxies.authors_of([image, image]) == {image: image}
    with pytest.raises(ValueError, match=r"no manifest of data_manifests/ names, such as a/other--x"):
        run_proxies.authors_of([image, "a/other--x.png"])
    author = run_proxies.authors_of([image, "a/mine.png"])
    assert author["a/mine.png"] == "a/mine.png"
    assert author[image] != image


def test_a_training_that_fails_is_said_and_the_others_are_done(proxies, capsys):
    make, _ = proxies
    done = make("a", "fails", "b")
    assert not done.run()
    assert done.failed == ["fails"]
    assert re.search(r"fails: .*see .*\.log", capsys.readouterr().err)
    assert [row["other"] for row in done.compare()] == ["b"]


def test_linked_folders_are_surveyed_as_they_are_trained_on(tmp_path):
    for split in ("train", "val"):
        write_class(tmp_path / "there" / split / "red", COLOURS["red"], 2)
    (tmp_path / "data" / "val").mkdir(parents=True)
    (tmp_path / "data" / "train").symlink_to(tmp_path / "there" / "train")
    (tmp_path / "data" / "val" / "red").symlink_to(tmp_path / "there" / "val" / "red")
    tested, digest = run_proxies.survey(tmp_path / "data")
    assert tested == ["red/000.png", "red/001.png"]
    assert digest == run_proxies.survey(tmp_path / "there")[1]
