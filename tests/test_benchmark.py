"""glattn benchmark: counts against arithmetic, folding against the unfolded model, turns, rows, the command itself."""

import csv

import pytest
import timm
import torch
from models import randomize, relative
from torch import nn
from torch.nn import functional as F

from glattn.benchmark import command, contestant, machine, rows, session, timing
from glattn.benchmark.contestant import Case, create, prepare
from glattn.benchmark.cost import count_macs, measure_growth
from glattn.benchmark.folding import fold
from glattn.benchmark.peers import PEERS, SIZES, of_size
from glattn.benchmark.probe import survived
from glattn.benchmark.timing import Spread, take_turns
from glattn.cli import main

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_yardstick_and_a_clean_checkout(monkeypatch):
    monkeypatch.setitem(machine._SIDE, "cpu", 128)
    monkeypatch.setattr(machine, "commit", lambda digits: "c0")


def test_macs_of_a_transformer_are_the_analytic_ones():
    model = timm.create_model("test_vit", num_classes=10)
    tokens, dim = model.patch_embed.num_patches + 1, model.embed_dim
    side = model.patch_embed.patch_size[0]
    block = model.blocks[0]
    linear = sum(m.weight.numel() for m in block.modules() if isinstance(m, nn.Linear))
    attention = 2 * tokens * tokens * dim  # scores, and their product with the values
    patches = (tokens - 1) * 3 * side * side * dim
    expected = patches + len(model.blocks) * (tokens * linear + attention) + dim * 10
    assert block.attn.fused_attn, "the count is about the fused attention"
    assert count_macs(model, (1, 3, 160, 160)) == expected
    assert count_macs(model, (4, 3, 160, 160)) == 4 * expected


def test_macs_of_convolutions_are_the_analytic_ones():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 5, padding=2, groups=8), nn.Conv2d(8, 6, 1))
    assert count_macs(model, (1, 3, 10, 12)) == 120 * (3 * 8 * 9 + 8 * 25 + 8 * 6)


class Query(nn.Module):
    """Fused attention of a learnt query, a view of which a module is called with, as class tokens often are."""

    def __init__(self, reads):
        super().__init__()
        self.query, self.linear, self.reads = nn.Parameter(torch.randn(1, 4, 2, 8)), nn.Linear(8, 8), reads

    def forward(self, x):
        if self.reads:
            x.sum().item()  # what the meta device cannot do
        return F.scaled_dot_product_attention(self.linear(self.query.expand(len(x), -1, -1, -1)), x, x)


@pytest.mark.parametrize("reads", [False, True])
def test_macs_are_counted_of_attention_with_a_parameter_on_meta_and_off_it(reads):
    assert count_macs(Query(reads), (1, 4, 6, 8)) == 4 * (2 * 8 * 8 + 2 * 2 * 6 * 8)


class Shared(nn.Module):
    """A convolution whose raw output is used twice: its norm must not be folded into it."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.conv(x)
        return self.last(self.bn(x).relu()) + x


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_glattn", "repvit_m0_9", "resnetv2_18"])
def test_folding_changes_no_output_and_leaves_what_it_says(name):
    model = randomize(timm.create_model(name)).eval()
    image = torch.randn(2, 3, 64, 64)
    folded, said = fold(model, image)  # the model's statistics are redrawn in place
    with torch.no_grad():
        assert relative(model(image), folded(image)) < 1e-3
    before, after = (sum(isinstance(m, nn.BatchNorm2d) for m in x.modules()) for x in (model, folded))
    assert said == f"{before - after} of {before} batch norms"
    if name == "resnetv2_18":  # norms before the convolutions: only those behind one can go
        assert 0 < after < before
    else:
        assert after == 0


def test_folding_leaves_a_norm_whose_convolution_is_used_twice():
    folded, said = fold(Shared(), torch.randn(1, 3, 8, 8))
    assert said == "0 of 1 batch norms"
    assert isinstance(folded.bn, nn.BatchNorm2d)


def test_memory_growth_is_what_a_step_allocates():
    def step():
        a = torch.zeros(1000, 250)  # 1 MB
        b = a + 1  # and another
        del a
        (b + 1).sum()  # two at a time

    measure_growth(step, CPU)
    assert 2_000_000 <= measure_growth(step, CPU) < 2_010_000


def test_turns_are_taken_in_rounds_and_stop_after_three_when_time_is_up():
    order = []
    steps = {name: (lambda name=name: order.append(name), 2) for name in "ABC"}
    quiet = {"synchronize": lambda: None, "progress": lambda: None, "failed": lambda *_: None}
    seconds = take_turns(steps, rounds=4, out_of_time=lambda: False, **quiet)
    assert "".join(order) == "AABBCC" * 4
    assert all(len(times) == 4 for times in seconds.values())
    order.clear()
    take_turns(steps, rounds=9, out_of_time=lambda: True, **quiet)
    assert "".join(order) == "AABBCC" * 3


def test_spread_is_median_and_quartiles():
    assert Spread.of([5, 1, 2, 4, 3]) == Spread(3, 2, 4)
    assert Spread.of([7]) == Spread(7, 7, 7)


def test_every_peer_is_a_model_of_timm_with_those_weights():
    for name, peer in PEERS.items():
        assert timm.is_model(name), name
        assert peer.tag in {tag.partition(".")[2] for tag in timm.list_models(f"{name}.*", include_tags=True)}, name
        assert 60 < peer.top1 < 90
    for size in SIZES:
        assert of_size(size)[:2] == [f"glattn_{size}", f"convnext_{size}"]
        assert timm.is_model(f"glattn_{size}")


@pytest.mark.parametrize(("task", "precision"), [("infer", "fp32"), ("infer", "bf16"), ("train", "bf16")])
def test_a_contestant_runs_its_case(task, precision):
    case = Case(task, precision, "eager", 2, 64)
    found = list(prepare("test_resnet", case, CPU))
    assert [ready.memory_format for ready in found] == ["NCHW", "NHWC"]
    ready = found[1]
    ready.step()
    plain = create("test_resnet", 64)
    parameters = sum(p.numel() for p in plain.parameters())
    assert ready.parameters == parameters
    forward = count_macs(fold(plain, torch.zeros(1, 3, 64, 64))[0], (1, 3, 64, 64))
    assert ready.macs == forward * (3 if task == "train" else 1)
    # weights in bf16 when inferring; in fp32, with AdamW's two averages, when training
    least = parameters * (12 if task == "train" else 2 if precision == "bf16" else 4)
    assert 0.95 * least < ready.held() < 1.1 * least


def test_models_of_a_fixed_size_are_made_for_the_images():
    assert create("levit_128s", 160).eval()(torch.zeros(1, 3, 160, 160)).shape == (1, 1000)


SHORT = ["--threads", "1", "--rounds", "3", "--turn", "0.001", "--batch", "1", "--pixels", "64", "--device", "cpu"]


def _run(folder, *arguments):
    return main(["benchmark", "test_glattn", "test_resnet", "--out", str(folder), *SHORT, *arguments])


def _rows(folder):
    with (folder / "rows.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_options_of_a_model_are_part_of_its_name(tmp_path):
    names = ["test_glattn", "test_glattn(depths=(1, 1, 1, 1), layout='full')"]
    model = create(names[1], 64)
    assert model.cfg.depths == (1, 1, 1, 1)
    assert model.cfg.mixer[0].layout == "full"
    assert main(["benchmark", *names, "--out", str(tmp_path), *SHORT]) == 0
    mine, other = _rows(tmp_path)
    assert [mine["model"], other["model"]] == names
    assert float(other["params_m"]) < float(mine["params_m"])


def test_the_command_measures_writes_and_draws(tmp_path, capsys):
    assert _run(tmp_path, "--sweep", "64", "96", "--baseline", "test_resnet") == 0
    found = _rows(tmp_path)
    assert [(row["model"], row["pixels"]) for row in found] == [
        ("test_glattn", "64"), ("test_resnet", "64"), ("test_glattn", "96"), ("test_resnet", "96"),
    ]  # fmt: skip
    for row in found:
        assert row["error"] == ""
        speed = float(row["images_per_second"])
        assert float(row["images_per_second_low"]) <= speed <= float(row["images_per_second_high"])
        assert speed == pytest.approx(1000 / float(row["milliseconds"]), rel=1e-2)
        assert float(row["gmacs_per_second"]) == pytest.approx(speed * float(row["gmacs"]), rel=0.05)
        share = float(row["gmacs_per_second"]) / float(row["matmul_gmacs_per_second"])
        assert float(row["share_of_matmul"]) == pytest.approx(share, rel=0.05)
        assert row["baseline"] == "test_resnet"
        assert row["rounds"] == "3"
        assert row["threads"] == "1"
        assert float(row["peak_mb"]) > float(row["held_mb"]) > 0
        assert all(row[name] for name in ("machine", "torch", "timm", "glattn", "python"))
        assert "/" not in row["machine"] + row["commit"]
    assert [row["ratio"] for row in found if row["model"] == "test_resnet"] == ["1.0000", "1.0000"]
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("speed.png", "scaling.png"))
    assert {p.name for p in tmp_path.iterdir()} == {"rows.csv", "speed.png", "scaling.png"}
    assert "infer fp32 eager batch 1 at 96" in capsys.readouterr().out


def test_resume_measures_only_what_is_missing(tmp_path, monkeypatch, capsys):
    assert _run(tmp_path) == 0
    first = _rows(tmp_path)
    assert _run(tmp_path) == 1
    assert "--resume" in capsys.readouterr().err

    prepared = []
    real = prepare
    monkeypatch.setattr(
        "glattn.benchmark.session.prepare",
        lambda name, case, *a, **k: prepared.append((name, case.pixels)) or real(name, case, *a, **k),
    )
    assert _run(tmp_path, "--resume", "--sweep", "64", "80") == 0
    assert prepared == [("test_glattn", 80), ("test_resnet", 80)]
    assert _rows(tmp_path)[:2] == first
    assert len(_rows(tmp_path)) == 4


def test_freed_memory_is_returned_where_asked_and_such_rows_stand_beside_others(tmp_path, monkeypatch):
    kept, drawn = [], []
    monkeypatch.setattr("glattn.memory.keep_freed_memory", lambda: kept.append(1) or True)
    monkeypatch.setattr("glattn.benchmark.figures.draw_speed", lambda folder, given: drawn.append(given))
    assert _run(tmp_path, "--freed-memory", "returned") == 0
    assert kept == []
    assert _run(tmp_path, "--resume") == 0
    assert kept == [1]
    assert [row["freed_memory"] for row in _rows(tmp_path)] == ["returned"] * 2 + ["kept"] * 2
    returned, kept = (rows.places(given) for given in drawn)
    assert returned == f"{kept}, freed memory returned"


def test_every_model_has_room_for_its_compiled_programs(tmp_path, monkeypatch):
    """Beyond torch's limit for one class, the rest would run eager, and be called compiled."""
    rooms = []
    names = [f"test_glattn(head_dim={width})" for width in (8, 16, 32)]

    def refuse(*_, **__):
        rooms.append(torch._dynamo.config.cache_size_limit)
        raise ValueError("not made")

    before = torch._dynamo.config.cache_size_limit
    monkeypatch.setattr("glattn.benchmark.session.prepare", refuse)
    main(["benchmark", *names, "--engine", "compile", "--out", str(tmp_path), *SHORT])
    assert min(rooms) >= before + 2 * len(names)
    assert torch._dynamo.config.cache_size_limit == before


def test_pictures_show_what_an_earlier_call_measured_here(tmp_path, monkeypatch):
    assert _run(tmp_path) == 0
    path = tmp_path / "rows.csv"
    elsewhere = [dict(row, machine="another") for row in _rows(tmp_path)]
    rows.write(path, [*rows.read(path), *elsewhere])
    drawn = []
    monkeypatch.setattr("glattn.benchmark.figures.draw_speed", lambda folder, given: drawn.extend(given))
    assert _run(tmp_path, "--resume", "--pixels", "32") == 0
    assert {row["pixels"] for row in drawn} == {"64", "32"}
    assert {row["machine"] for row in drawn} == {_rows(tmp_path)[0]["machine"]}


def test_a_case_that_lacks_a_model_is_measured_whole(tmp_path):
    """Rows of one case took turns with each other: none stays of another time."""
    assert main(["benchmark", "test_resnet", "--out", str(tmp_path), *SHORT]) == 0
    (first,) = _rows(tmp_path)
    assert _run(tmp_path, "--resume") == 0
    found = _rows(tmp_path)
    assert [row["model"] for row in found] == ["test_glattn", "test_resnet"]
    assert found[1]["milliseconds"] != first["milliseconds"]
    rows.write(tmp_path / "rows.csv", [row | {"torch": "1.0"} for row in found])
    assert _run(tmp_path, "--resume") == 0
    assert [row["torch"] == "1.0" for row in _rows(tmp_path)] == [True, True, False, False]


def test_rows_that_took_no_turns_together_are_measured_anew(tmp_path):
    assert _run(tmp_path) == 0
    mine, other = _rows(tmp_path)
    rows.write(tmp_path / "rows.csv", [mine, other | {"matmul_gmacs_per_second": "1"}])
    assert main(["benchmark", "test_glattn", "--out", str(tmp_path), *SHORT, "--resume"]) == 0
    assert _rows(tmp_path)[0] == mine  # alone it stays
    assert _run(tmp_path, "--resume") == 0
    first, second = _rows(tmp_path)
    assert first["milliseconds"] != mine["milliseconds"]
    assert first["matmul_gmacs_per_second"] == second["matmul_gmacs_per_second"]


@pytest.mark.parametrize("changed", [{"commit": "0123456789ab"}, {"glattn": "0.0"}, {"commit": "c0-dirty"}])
def test_resume_keeps_no_row_of_other_code(changed, tmp_path, monkeypatch):
    if "c0-dirty" in changed.values():  # code that nobody can get again
        monkeypatch.setattr(machine, "commit", lambda digits: "c0-dirty")
    assert _run(tmp_path) == 0
    first = _rows(tmp_path)
    rows.write(tmp_path / "rows.csv", [row | changed for row in first])
    assert _run(tmp_path, "--resume") == 0
    again = _rows(tmp_path)
    assert [row["model"] for row in again] == [row["model"] for row in first]
    assert all(row[name] == old[name] for row, old in zip(again, first, strict=True) for name in changed)
    assert again[0]["milliseconds"] != first[0]["milliseconds"]


def test_rows_of_another_baseline_are_not_written_over(tmp_path, capsys):
    assert _run(tmp_path) == 0
    first = _rows(tmp_path)
    assert main(["benchmark", "test_resnet", "--out", str(tmp_path), *SHORT, "--resume"]) == 1
    assert "ratios of test_glattn are to test_glattn; give another --out" in capsys.readouterr().err
    assert _rows(tmp_path) == first
    assert _run(tmp_path, "--resume", "--baseline", "test_resnet") == 0  # all of the case: measured anew
    assert [row["baseline"] for row in _rows(tmp_path)] == ["test_resnet"] * 2


def test_a_model_that_cannot_fold_itself_is_measured_all_the_same(monkeypatch):
    def refuse(model):
        raise AttributeError("no such thing")

    monkeypatch.setattr("glattn.benchmark.folding.reparameterize_model", refuse)
    _, word = fold(timm.create_model("test_resnet"), torch.randn(1, 3, 64, 64))
    folded, _, total, *_ = word.split()
    assert folded == total


@pytest.mark.parametrize("slow", ["NCHW", "NHWC"])
def test_the_faster_memory_format_is_chosen_in_the_rounds(slow, tmp_path, monkeypatch):
    def turns(steps, **_):
        return {entry: [0.004 if slow in entry else 0.002] * 3 for entry in steps}

    monkeypatch.setattr("glattn.benchmark.session.warm_up", lambda step, _: (step() or 0.0, 0.001))
    monkeypatch.setattr("glattn.benchmark.session.take_turns", turns)
    assert _run(tmp_path) == 0
    for row in _rows(tmp_path):
        assert row["memory_format"] != slow
        assert float(row["milliseconds"]) == 2


def test_time_that_is_up_leaves_cases_for_later(tmp_path, capsys):
    assert _run(tmp_path, "--minutes", "1e-12") == 0
    assert not (tmp_path / "rows.csv").exists()
    assert "1 of 1 cases are left; go on with --resume" in capsys.readouterr().out


def test_finished_cases_behind_the_first_that_time_leaves_are_shown_and_counted(tmp_path, capsys):
    assert _run(tmp_path) == 0
    capsys.readouterr()
    assert _run(tmp_path, "--resume", "--pixels", "32", "64", "--minutes", "1e-12") == 0
    said = capsys.readouterr().out
    assert "infer fp32 eager batch 1 at 64" in said
    assert "1 of 2 cases are left" in said


def test_a_case_that_was_cut_short_is_left(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        answers = iter([False])
        patched.setattr(session.Session, "out_of_time", lambda _: next(answers, True))
        assert _run(tmp_path, "--rounds", "4", "--minutes", "9") == 0
    assert [row["rounds"] for row in _rows(tmp_path)] == ["3", "3"]
    assert "1 of 1 cases are left" in capsys.readouterr().out
    assert _run(tmp_path, "--rounds", "4", "--resume") == 0
    assert [row["rounds"] for row in _rows(tmp_path)] == ["4", "4"]
    assert "left" not in capsys.readouterr().out


def test_uncommitted_code_is_told_that_its_rows_do_not_stay(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "commit", lambda digits: "c0-dirty")
    assert _run(tmp_path, "--minutes", "1e-12") == 0
    said = capsys.readouterr().out
    assert "rows of uncommitted code are measured again" in said
    assert "--resume" not in said
    assert _run(tmp_path, "--minutes", "1e-12", "--resume") == 0
    assert "rows of uncommitted code are measured again\n" in capsys.readouterr().out


def _fail(*_):
    raise RuntimeError("no such\nthing")


@pytest.mark.parametrize("bad", ["NCHW", "NHWC"])
@pytest.mark.parametrize("made", [False, True])
def test_a_model_that_fails_in_one_memory_format_is_measured_in_the_other(bad, made, tmp_path, monkeypatch):
    real = contestant.make_step

    def make_step(model, image, case, device, memory_format):
        if memory_format != bad:
            return real(model, image, case, device, memory_format)
        return (_fail, None) if made else _fail()

    monkeypatch.setattr(contestant, "make_step", make_step)
    assert _run(tmp_path) == 0
    assert [row["error"] for row in _rows(tmp_path)] == ["", ""]
    assert bad not in {row["memory_format"] for row in _rows(tmp_path)}


@pytest.mark.parametrize("steps", [3, 5])  # all of warming up; and of two turns
def test_a_model_that_fails_in_its_turns_is_a_row_and_the_others_keep_theirs(steps, tmp_path, monkeypatch, capsys):
    real = contestant.make_step

    def make_step(model, *given):
        step, optimizer = real(model, *given)
        left = iter(range(steps if type(model).__name__ == "ResNet" else 10**9))
        return lambda: step() if next(left, None) is not None else _fail(), optimizer

    monkeypatch.setattr(contestant, "make_step", make_step)
    assert _run(tmp_path, "--turn", "1e-9") == 0
    other, failed = _rows(tmp_path)
    assert (other["error"], other["rounds"], other["ratio"]) == ("", "3", "1.0000")
    assert (failed["error"], failed["images_per_second"]) == ("RuntimeError: no such thing", "")
    assert "test_resnet: not measured: RuntimeError: no such thing" in capsys.readouterr().out


def test_a_model_whose_memory_cannot_be_measured_is_a_row_and_the_others_stay(tmp_path, monkeypatch):
    growths = iter([lambda *_: 1000, _fail])
    monkeypatch.setattr(session, "measure_growth", lambda *given: next(growths)(*given))
    assert _run(tmp_path) == 0
    assert [row["error"] for row in _rows(tmp_path)] == ["", "RuntimeError: no such thing"]
    assert [row["images_per_second"] == "" for row in _rows(tmp_path)] == [False, True]


NO_BASELINE = ["--baseline", "test_vit", *SHORT, "--pixels", "36"]  # a size that it refuses


def test_a_baseline_that_cannot_is_said_and_its_case_is_kept(tmp_path, capsys):
    arguments = ["benchmark", "test_resnet", "--out", str(tmp_path), *NO_BASELINE]
    assert main(arguments) == 0
    assert "no ratios: test_vit could not be measured: AssertionError: Input height" in capsys.readouterr().out
    (row,) = first = _rows(tmp_path)
    assert (row["error"], row["baseline"], row["ratio"]) == ("", "test_vit", "")
    assert main([*arguments, "--resume"]) == 0
    assert "no ratios: test_vit could not be measured" in capsys.readouterr().out
    assert _rows(tmp_path) == first


def test_rows_without_a_ratio_stay_beside_another_baseline(tmp_path):
    assert main(["benchmark", "test_resnet", "test_vit", "--out", str(tmp_path), *NO_BASELINE]) == 0
    first = _rows(tmp_path)
    assert [row["baseline"] for row in first] == ["test_vit", "test_vit"]
    assert main(["benchmark", "test_glattn", "--out", str(tmp_path), *SHORT, "--pixels", "36", "--resume"]) == 0
    assert _rows(tmp_path)[:2] == first


def test_a_model_that_cannot_is_a_row_and_the_others_are_measured(tmp_path):
    assert main(["benchmark", "test_resnet", "test_vit", "--out", str(tmp_path), *SHORT,
                 "--pixels", "36"]) == 0  # fmt: skip
    by_name = {row["model"]: row for row in _rows(tmp_path)}
    assert by_name["test_resnet"]["error"] == ""
    assert by_name["test_vit"]["error"]
    assert by_name["test_vit"]["images_per_second"] == ""


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_call_that_measures_nothing_fails(resume, tmp_path, capsys):
    assert main(["benchmark", "test_vit", "--out", str(tmp_path), *SHORT, "--pixels", "36", *resume]) == 1
    assert "test_vit: not measured: AssertionError" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mistake", "said"),
    [(["", "test_resnet"], "no model of timm is named ''"), (["test_resnet", "--turn", "inf"], "--turn is inf"),
     (["test_resnet", "--minutes", "nan"], "--minutes is nan")],
)  # fmt: skip
def test_a_mistake_is_one_line(mistake, said, tmp_path, capsys):
    assert main(["benchmark", *mistake, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "--class"),
        (["no_such_model"], "no_such_model"),
        (["test_glattn(layout=full)"], "write options as in"),
        (["test_glat*(layout='full')"], "is no model"),
        (["test_glat(layout='full')"], "test_glat"),
        (["test_resnet", "--rounds", "0"], "--rounds"),
        (["test_resnet", "--batch", "0"], "--batch"),
        (["test_resnet", "--baseline", "no_such_model"], "no_such_model"),
        (["test_resnet", "--baseline", "test_*"], "give one"),
        (["test_resnet", "--engine", "graph", "--device", "cpu"], "--engine graph is for inference on a CUDA device"),
    ],
)
def test_what_is_asked_wrongly_is_one_line(arguments, word, tmp_path, capsys):
    assert main(["benchmark", *arguments, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert word in error
    assert error.count("\n") == 1


def test_another_table_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="not a table"):
        rows.read(path)


@pytest.mark.parametrize(
    "damage",
    [lambda line: line[:9], lambda line: line + b",1", lambda line: b"\xff" + line, lambda line: b'"' + line],
    ids=["cut", "a cell too many", "no UTF-8", "an open quote"],
)
def test_a_damaged_line_is_refused_before_anything_is_measured(damage, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    rows.write(path, [dict.fromkeys(rows.FIELDS, "1")] * 3)
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:2], damage(lines[2]), *lines[3:]]))
    assert _run(tmp_path, "--resume") == 1
    assert capsys.readouterr().err.endswith(f"{path}, line 3: damaged; remove the line, or give another --out\n")


def test_cases_are_the_product_and_the_sweep():
    import argparse

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    cases = command.choose_cases(
        parser.parse_args(["m", "--precision", "fp32", "bf16", "--task", "infer", "train", "--sweep"])
    )
    assert len(cases) == 2 * 2 * 2 + len(command.SWEEP) - 1  # 224 at batch 1 is there already
    assert len(set(cases)) == len(cases)


@pytest.mark.compile
def test_compiled_steps_run():
    for task in ("infer", "train"):
        for ready in prepare("test_resnet", Case(task, "fp32", "compile", 2, 32), CPU):
            ready.step()


def test_a_format_that_ends_the_process_is_left_out(tmp_path):
    """Some torch aborts in the backward pass of fastvit in NHWC: the row is of NCHW then, and the run goes on."""
    arguments = ["fastvit_t8", "test_resnet", "--task", "train", "--out", str(tmp_path)]
    assert main(["benchmark", *arguments, *SHORT]) == 0
    for row in _rows(tmp_path):
        assert row["error"] == ""
        assert row["memory_format"] in survived(row["model"], Case("train", "fp32", "eager", 1, 64))


@pytest.mark.parametrize(
    ("fatal", "left"), [((), ["NCHW", "NHWC"]), (("NHWC",), ["NCHW"]), (("NCHW",), ["NHWC"]), (("NCHW", "NHWC"), [])]
)
def test_formats_are_probed_in_processes_of_their_own(fatal, left, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(f"""
import sys
if sys.orig_argv[1:3] == ["-m", "glattn.benchmark.probe"]:
    import os
    from glattn.benchmark import contestant
    real = contestant.make_step
    def make_step(model, image, case, device, memory_format):
        if memory_format in {fatal}:
            os.abort()
        raise ValueError("an exception is survived")
    contestant.make_step = make_step
""")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert survived("test_resnet", Case("train", "fp32", "eager", 1, 64)) == left


def test_a_probe_that_does_not_begin_is_no_word_on_formats(tmp_path, monkeypatch):
    (tmp_path / "glattn.py").write_text("raise ImportError('broken here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match=r"did not begin: .*broken here"):
        survived("test_resnet", Case("train", "fp32", "eager", 1, 64))


def test_a_disturbed_step_does_not_tell_how_long_one_takes(monkeypatch):
    seconds = iter([0.2, 0.1, 0.01, 0.03, 0.3, 9.0])
    monkeypatch.setattr(timing, "time_step", lambda step, repeats, synchronize: next(seconds))
    assert timing.warm_up(lambda: None, lambda: None)[1] == 0.01
    assert next(seconds) == 9.0  # half a second of steps is enough
    seconds = iter([0.01] * 8 + [0.001])
    assert timing.warm_up(lambda: None, lambda: None)[1] == 0.01  # and eight steps are


@pytest.mark.parametrize(
    ("info", "name"),
    [
        (
            "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\nflags\t: fma avx512f\n\n"
            "processor\t: 1\ncpu family\t: 6\nmodel\t\t: 1\nmodel name\t: another\n",
            "AMD EPYC, family 25, model 17",
        ),
        ("processor\t: 0\nBogoMIPS\t: 50.00\nCPU architecture: 8\n", "aarch64"),
        (None, "aarch64"),
    ],
)
def test_a_processor_is_named_with_its_family_and_model(info, name, tmp_path, monkeypatch):
    given = tmp_path / "cpuinfo"
    if info is not None:
        given.write_text(info)
    monkeypatch.setattr(machine, "Path", lambda path: given)
    monkeypatch.setattr(machine.platform, "processor", lambda: "aarch64")
    assert machine._processor() == name
