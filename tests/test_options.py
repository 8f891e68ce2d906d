"""The product of layout, position and mechanism: what is valid does all that a model does, the rest is refused."""

import itertools
import re
from pathlib import Path

import pytest
import timm
import torch
from models import randomize, relative
from oracles import OPTIONS, product
from timm.utils import reparameterize_model
from torch import nn
from torch.nn import functional as F

from glattn import GLAttnConfig, MixerConfig
from glattn.layers import TABLES, GlobalLocalAttention, MultiHeadGlobalAttention
from glattn.layers.block import GlobalLocalBlock, Mlp

AXES = {axis: TABLES[axis] for axis in ("layout", "position", "mechanism")}
EVERY = list(itertools.product(*AXES.values()))
VALID = product(**AXES)
REFUSED = [kinds for kinds in EVERY if kinds not in VALID]
SOME = [("window", "bias", "softmax"), ("pooled", "none", "relu_linear")]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def options(layout, position, mechanism):
    small = {**OPTIONS.get(layout, {}), **OPTIONS.get(mechanism, {})}
    return {"layout": layout, "position": position, "mechanism": mechanism, "head_dim": 4, **small}


def tiny(*kinds):
    """A strided convolution and a block behind it: the least that is a network."""
    mixer = GlobalLocalAttention(8, config=MixerConfig(**options(*kinds)), map_size=(5, 6))
    mlp = Mlp(8, hidden_dim=16, act_layer="hard_swish")
    block = GlobalLocalBlock(mixer, mlp, dim=8, layer_scale=0.1, drop_path=0.0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), block)


@pytest.mark.parametrize(("layout", "position", "mechanism"), VALID)
def test_what_is_valid_trains_folds_and_takes_any_size_and_type(layout, position, mechanism):
    model = tiny(layout, position, mechanism)
    for size in ((10, 12), (13, 21)):
        x = torch.randn(2, 3, *size, requires_grad=True)
        out = model.train()(x)
        assert out.shape == (2, 8, *(-(-side // 2) for side in size))
        out.square().mean().backward()
        assert x.grad.isfinite().all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name

    x = torch.randn(2, 3, 17, 13)
    with torch.no_grad():
        exact = randomize(model)(x)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(x)
        assert rounded.isfinite().all()
        if mechanism != "reformer":  # whose buckets may differ by a rounding
            assert relative(rounded.float(), exact) < 0.15
        model, x = model.double(), x.double()
        assert relative(reparameterize_model(model)(x), model(x)) < 1e-10
    with torch.autocast("cpu", torch.bfloat16):
        model.float().train()(x.float()).square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(("layout", "position", "mechanism"), REFUSED)
def test_what_is_refused_names_the_conflict_and_a_way_out(layout, position, mechanism):
    given = options(layout, position, mechanism)
    messages = set()
    for build in (
        lambda: MixerConfig(**given),
        lambda: GLAttnConfig().replace(**given),
        lambda: timm.create_model("test_glattn", device="meta", **given),
    ):
        with pytest.raises(ValueError) as caught:
            build()
        messages.add(str(caught.value))
    assert len(messages) == 1
    message = messages.pop()
    assert "\n" not in message
    conflict, way_out = message.split(";")
    named = dict(re.findall(r"(\w+)='(\w+)'", conflict))
    assert len(named) == 2
    assert all(given[axis] == kind for axis, kind in named.items())
    # what it says to use is taken, alone, in place of what was given
    found = re.findall(r"(\w+)='(\w+)'(?: or '(\w+)')?", way_out)
    assert found
    for axis, *kinds in found:
        for kind in filter(None, kinds):
            others = {axis_: given[axis_] for axis_ in named}  # the two that conflict
            MixerConfig(**{**others, axis: kind})


def test_the_product_is_walked():
    assert len(EVERY) == len(VALID) + len(REFUSED)
    assert len(VALID) > len(REFUSED) > 0
    for axis, table in enumerate(AXES.values()):
        assert {kinds[axis] for kinds in VALID} == set(table)


def check_export(model):
    model = reparameterize_model(model)
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        model, (torch.randn(2, 3, 40, 48),), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},)
    ).module()
    for shape in ((1, 3, 40, 40), (3, 3, 33, 51)):
        x = torch.randn(shape)
        with torch.no_grad():
            assert relative(program(x), model(x)) < 1e-4


@pytest.mark.parametrize("kinds", SOME, ids="-".join)
def test_some_are_exported_for_any_size(kinds):
    check_export(randomize(tiny(*kinds)))


@pytest.mark.export
@pytest.mark.slow
@pytest.mark.parametrize("kinds", VALID, ids="-".join)
def test_all_are_exported_for_any_size(kinds):
    check_export(randomize(tiny(*kinds)))


@pytest.mark.parametrize("cross_window", TABLES["cross_window"])
@pytest.mark.parametrize("sizing", TABLES["window_sizing"])
@pytest.mark.parametrize("layout", [kind for kind, row in TABLES["layout"].items() if row.sized])
def test_sized_windows_train_and_fold(layout, sizing, cross_window):
    given = {"window_sizing": sizing, "window_ratio": 8, "window_tokens": 30, "cross_window": cross_window}
    config = MixerConfig(**{**options(layout, "bias", "softmax"), **given})
    attn = MultiHeadGlobalAttention(8, config=config, map_size=(10, 12), stride=4)
    x = torch.randn(2, 8, 7, 13)
    attn(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in attn.parameters())
    attn, x = randomize(attn).double(), x.double()
    assert relative(reparameterize_model(attn)(x), attn(x)) < 1e-10


@pytest.mark.parametrize("sizing", [kind for kind in TABLES["window_sizing"] if kind != "fixed"])
@pytest.mark.parametrize("layout", [kind for kind, row in TABLES["layout"].items() if not row.sized])
def test_a_sizing_without_windows_to_size_is_refused(layout, sizing):
    if layout == "full":  # ignores every window option alike
        assert MixerConfig(layout=layout, window_sizing=sizing).window_sizing == sizing
        return
    with pytest.raises(ValueError, match=f"window_sizing='{sizing}' with layout='{layout}'.*layout='window'"):
        MixerConfig(layout=layout, window_sizing=sizing)


@pytest.mark.parametrize("abs_pos", ["stem", "stages"])
@pytest.mark.parametrize("position", TABLES["position"])
def test_absolute_positions_join_any_other(position, abs_pos):
    given = {"position": position, "abs_pos": abs_pos, "head_dim": 4, "img_size": 64, "num_classes": 3}
    model = timm.create_model("test_glattn", **given)
    x = torch.randn(2, 3, 67, 50)
    F.cross_entropy(model(x), torch.tensor([0, 2])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model = randomize(model).double()
    with torch.no_grad():
        assert relative(reparameterize_model(model)(x.double()), model(x.double())) < 1e-10


@pytest.mark.parametrize("axis", TABLES)
def test_a_kind_may_differ_from_stage_to_stage(axis):
    kinds = list(itertools.islice(itertools.cycle(TABLES[axis]), 4))
    given = {"layout": "window", "position": "rope", "head_dim": 4, axis: kinds}
    model = timm.create_model("test_glattn", num_classes=3, img_size=64, **given)
    assert [getattr(m, axis) for m in model.cfg.mixer] == kinds
    model(torch.randn(2, 3, 65, 40)).sum().backward()


# memory


class Held:
    """Counts the bytes that autograd keeps for the backward pass, each storage once, but the parameters'."""

    def __init__(self, module):
        self.seen = {p.untyped_storage()._cdata for p in (*module.parameters(), *module.buffers())}
        self.kept = []  # so that no address is used twice
        self.total = 0

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.kept.append(tensor)
            self.total += storage.nbytes()
        return tensor


def held_bytes(config, side):
    """Bytes kept by a branch at stride 4 for an image of this side, in pixels; nothing is computed."""
    with torch.device("meta"):
        attn = MultiHeadGlobalAttention(32, config=config, map_size=(14, 14), stride=4)
        x = torch.empty(1, 32, -(-side // 4), -(-side // 4), requires_grad=True)
    held = Held(attn)
    with torch.autograd.graph.saved_tensors_hooks(held.pack, lambda tensor: tensor):
        attn(x)
    return held.total


LINEAR = {
    "window": {"layout": "window", "window_size": 8},
    "window by tokens": {"layout": "window", "window_sizing": "tokens"},
    "shifted": {"layout": "shifted", "window_size": 8},
    "grid": {"layout": "grid", "window_size": 8},
    "overlap": {"layout": "overlap", "window_size": 8},
    "relu_linear": {"mechanism": "relu_linear"},
    "performer": {"mechanism": "performer"},
    "linformer": {"mechanism": "linformer"},
    "reformer": {"mechanism": "reformer"},
}


@pytest.mark.parametrize("unfused", [False, True])
@pytest.mark.parametrize("name", LINEAR)
def test_memory_is_linear_in_pixels(name, unfused, monkeypatch):
    """With the scores as tensors, too, which fused attention never keeps."""
    if unfused:
        monkeypatch.setattr("glattn.layers.mechanism.use_fused_attn", lambda: False)
    config = MixerConfig(position="none", **LINEAR[name])
    pixels = {side: held_bytes(config, side) / side**2 for side in (224, 320, 449, 640, 1024)}
    assert pixels[1024] < 1.15 * pixels[224]
    assert max(pixels.values()) < 1.4 * min(pixels.values())


def test_the_memory_of_scores_is_counted(monkeypatch):
    """The count above can fail."""
    monkeypatch.setattr("glattn.layers.mechanism.use_fused_attn", lambda: False)
    config = MixerConfig(position="none", layout="full")
    assert held_bytes(config, 448) / held_bytes(config, 224) > 10


# the documentation

DOCS = Path(__file__).resolve().parents[1] / "docs" / "mechanisms.md"
EXAMPLES = re.findall(r"^    timm\.create_model\((.*)\)$", DOCS.read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("option", TABLES)
def test_every_kind_is_documented(option):
    text = DOCS.read_text()
    for kind in TABLES[option]:
        assert f"`{kind}`" in text, kind
        if option != "context" and (option, kind) != ("cross_window", "none"):
            assert re.search(rf"\*\*`{kind}`\*\*", text), kind


def test_every_kind_and_option_is_switched_on_by_an_example():
    """Kinds that are one option's alone by its keyword; what names a paper has its number."""
    given = [eval(f"dict({example.split(',', 1)[1]})") for example in EXAMPLES]
    for option, kinds in TABLES.items():
        used = {kind for options in given for kind in _as_list(options.get(option))}
        assert set(kinds) - used <= {"none"}, option
    for name in timm.list_models("glattn_tiny_*", module="glattn"):
        assert f"`{name}`" in DOCS.read_text()
    assert len(re.findall(r"arXiv:\d{4}\.\d{5}", DOCS.read_text())) > 20


def _as_list(value):
    return value if isinstance(value, list) else [value]


@pytest.mark.parametrize("example", EXAMPLES)
def test_its_examples_run(example):
    name, rest = example.split(",", 1)
    given = eval(f"dict({rest})")
    short = {"depths": (1, 1, 1, 1), "num_classes": 3}
    timm.create_model(name.strip('"'), device="meta", **short, **given)
    model = timm.create_model("test_glattn", head_dim=4, img_size=64, **short, **given).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 65, 43)).isfinite().all()


def test_every_layout_is_in_the_picture():
    source = (DOCS.parents[1] / "scripts" / "draw_layouts.py").read_text()
    for kind in TABLES["layout"]:
        assert f'layout="{kind}"\'' in source
    assert "](layouts.png)" in DOCS.read_text()
    assert (DOCS.parent / "layouts.png").exists()
