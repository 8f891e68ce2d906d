"""The backbone: sizes, any input, folding, initialisation, timm's habits."""

import copy
import itertools

import pytest
import timm
import torch
from models import SIZES, VARIANTS, randomize, relative, scripted
from timm.layers import set_fused_attn, set_reentrant_ckpt
from timm.models._manipulate import reinit_non_persistent_buffers
from timm.utils import AttentionExtract, freeze, reparameterize_model, unfreeze
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops.misc import FrozenBatchNorm2d

import glattn
from glattn.layers import GlobalLocalAttention, ImprovedLocalAttention, MultiHeadGlobalAttention

# millions of parameters and GMACs at 224: ConvNeXt's of the same name
TARGETS = {
    "glattn_atto": (3.7, 0.55),
    "glattn_pico": (9.0, 1.4),
    "glattn_nano": (15.0, 2.5),
    "glattn_tiny": (28.0, 4.5),
    "glattn_small": (50.0, 8.7),
    "glattn_base": (89.0, 15.4),
    "glattn_large": (198.0, 34.4),
}
# one model for each mechanism that behaves differently when sizes change
KINDS = {
    "default": {},
    "window": {"layout": "window", "window_size": 3, "position": "bias"},
    "shifted": {"layout": "shifted", "window_sizing": "tokens", "window_tokens": 9, "position": "rope"},
    "grid": {"layout": "grid", "window_size": 3, "mechanism": "linformer"},
    "linear": {"layout": "full", "mechanism": "relu_linear", "abs_pos": "stem"},
    "performer": {"layout": "overlap", "mechanism": "performer", "window_size": 3},
    "reformer": {"layout": "multi_scale", "mechanism": "reformer", "window_sizes": (3, 0), "head_dim": 4},
    "augmented": {"local": "augmented", "fusion": "concat", "context": "gc", "abs_pos": "stages"},
    "gated": {"fusion": "gated", "cross_window": "strip", "position": "cpb"},
}


class Copies(TorchDispatchMode):
    """Record the copies that are made of maps and tokens."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten.copy_, torch.ops.aten._to_copy):
            self.seen.append((func, args[0].shape))
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=KINDS)
def small(request):
    return randomize(timm.create_model("test_glattn", num_classes=5, img_size=64, **KINDS[request.param]))


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_convnexts(name):
    model = timm.create_model(name, device="meta").eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    parameters, gmacs = TARGETS[name]
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, rel=0.1)
    assert counter.get_total_flops() / 2e9 <= gmacs


def test_the_test_model_is_small():
    assert sum(p.numel() for p in timm.create_model("test_glattn").parameters()) < 500_000
    assert set(TARGETS) == set(SIZES)


def test_the_registry_lists_exactly_the_family():
    assert timm.list_models(module="glattn") == sorted(glattn.models.variants.VARIANTS)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (97, 64), (131, 259)])
def test_any_size_and_no_neighbour_matters(small, size):
    x = torch.randn(3, 3, *size)
    with torch.no_grad():
        together = small(x)
        alone = torch.cat([small(image[None]) for image in x])
    assert together.shape == (3, 5)
    assert relative(alone, together) < 1e-4
    poisoned = x.clone()
    poisoned[1] = float("nan")
    with torch.no_grad():
        assert torch.equal(small(poisoned)[[0, 2]], together[[0, 2]])


@pytest.mark.parametrize("batch", [1, 2])
def test_the_smallest_image_trains_at_any_batch(small, batch):
    small.train()
    small(torch.randn(batch, 3, 32, 32)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in small.parameters())
    assert all(torch.isfinite(b).all() for b in small.buffers())


@pytest.mark.parametrize("in_chans", [1, 4, 12])
def test_channels(in_chans):
    assert timm.create_model("test_glattn", in_chans=in_chans)(torch.randn(2, in_chans, 64, 64)).shape == (2, 1000)


def test_types_and_autocast(small):
    x = torch.randn(2, 3, 75, 64)
    with torch.no_grad():
        expected = small(x)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = small(x)
        half = small.to(torch.bfloat16)(x.bfloat16())
    assert mixed.dtype == half.dtype == torch.bfloat16
    assert relative(mixed.float(), expected) < 0.1
    assert relative(half.float(), expected) < 0.1


def test_folding_leaves_plain_convolutions(small):
    small = small.double()
    x = torch.randn(2, 3, 75, 101, dtype=torch.float64)
    with torch.no_grad():
        expected = small(x)
        folded = reparameterize_model(small)
        assert relative(folded(x), expected) < 1e-10
        assert torch.equal(reparameterize_model(folded)(x), folded(x))
        assert relative(folded.float()(x.float()).double(), expected) < 1e-4
    kinds = {type(m).__name__ for m in folded.modules()}
    assert not kinds & {"BatchNorm2d", "ConvNorm", "MultiScaleConv", "LayerScale2d", "ConvPosition"}


def test_folding_in_steps_is_the_same():
    model = randomize(timm.create_model("test_glattn")).double()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        for block in model.stages[0].blocks:
            reparameterize_model(block.mixer.local.conv, inplace=True)
            reparameterize_model(block.mixer.attn.embed, inplace=True)
        for block in itertools.chain.from_iterable(stage.blocks for stage in model.stages[1:]):
            reparameterize_model(block.mixer, inplace=True)
        assert relative(reparameterize_model(model)(x), expected) < 1e-10


def test_a_stem_and_a_head_of_ones_own_are_called_for_themselves():
    model, x = timm.create_model("test_glattn").eval(), torch.randn(2, 3, 64, 64)
    model.stem, model.head = nn.Conv2d(3, model.cfg.dims[0], 4, 4), nn.Identity()
    last, maps = model.forward_intermediates(x)
    assert torch.equal(model(x), last)
    assert [tuple(m.shape[2:]) for m in maps] == [(16, 16), (8, 8), (4, 4), (2, 2)]


def test_what_is_frozen_is_folded_frozen():
    model = timm.create_model("test_glattn").eval().requires_grad_(False)
    model.stages[-1].requires_grad_(True)
    folded = reparameterize_model(model)
    last = {id(parameter) for parameter in folded.stages[-1].parameters()}
    assert all(parameter.requires_grad == (id(parameter) in last) for parameter in folded.parameters())


def test_folding_takes_running_statistics_in_any_mode():
    """As folding of timm's own models does: its validate.py folds before it calls ``eval()``."""
    model = randomize(timm.create_model("test_glattn", num_classes=3)).train()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        folded = reparameterize_model(model).eval()
        torch.testing.assert_close(folded(x), model.eval()(x), atol=1e-4, rtol=1e-4)


def test_the_folded_default_is_one_attention_call_a_block(monkeypatch):
    model = reparameterize_model(timm.create_model("test_glattn").eval())
    calls = []
    attention = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or attention(*a, **k)
    )
    model(torch.randn(1, 3, 64, 64))
    assert len(calls) == sum(model.cfg.depths)
    left = {type(m).__name__ for m in model.modules() if not list(m.children())}
    assert left <= {
        "AdaptiveAvgPool2d", "Dropout", "FastAdaptiveAvgPool", "Flatten", "FoldedConv", "Full", "Hardswish", "Identity",
        "Linear", "NoExchange", "NoPosition", "Pointwise", "ReLU", "Sigmoid", "SumFusion",
    }  # fmt: skip


@pytest.mark.parametrize("act_layer", ["hardswish", "relu", "gelu"])
def test_activations_are_in_place_where_training_copies_nothing_for_it(act_layer):
    model = timm.create_model("test_glattn", act_layer=act_layer)
    x = torch.randn(1, 3, 64, 64)
    with Copies() as copies:
        model(x).sum().backward()
    hidden = model.stages[0].blocks[0].mlp.fc1.conv.out_channels
    copied = [tuple(shape) for _, shape in copies.seen]
    assert (1, hidden) not in [shape[:2] for shape in copied]
    assert (1, model.stem.inner_dim, 32, 32) not in copied
    folded = reparameterize_model(model.eval())
    for act in (folded.stem.act, folded.stages[0].blocks[0].mlp.act):
        assert getattr(act, "inplace", act_layer == "gelu")


def test_memory_format_is_kept_and_nothing_is_copied():
    model = timm.create_model("test_glattn").eval().to(memory_format=torch.channels_last)
    model = reparameterize_model(model)
    x = torch.randn(2, 3, 75, 96).to(memory_format=torch.channels_last)
    with torch.no_grad(), Copies() as copies:
        for features in model.forward_intermediates(x)[1]:
            assert features.is_contiguous(memory_format=torch.channels_last)
    assert not copies.seen


@pytest.mark.parametrize("name", VARIANTS)
def test_scripted_and_traced_give_the_same_numbers(name):
    if name not in ("test_glattn", "glattn_atto") and not name.startswith("glattn_tiny_"):
        pytest.skip("one default size and every mechanism; the others run timm's suite")
    model = randomize(timm.create_model(name, num_classes=3, depths=(1, 1, 1, 1)))
    x, y = torch.randn(2, 3, 64, 64), torch.randn(1, 3, 97, 70)
    for net in (model, reparameterize_model(model)):
        with torch.no_grad():
            script, graph = scripted(net), torch.fx.symbolic_trace(net)
            for image in (x, y):
                assert relative(script(image), net(image)) < 1e-5
                assert relative(graph(image), net(image)) < 1e-5


@pytest.mark.parametrize("options", [{}, {"local": "augmented"}, {"local": "augmented", "augment_ratio": 0.5}])
def test_what_is_scripted_trains(options):
    model = timm.create_model("test_glattn", num_classes=3, **options)
    script, x = scripted(model), torch.randn(2, 3, 64, 64)
    for _ in range(3):  # TorchScript derives from the second call on
        script(x).square().sum().backward()
    given = {name: p.grad for name, p in script.named_parameters()}
    model.zero_grad()
    for _ in range(3):
        model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(given[name], parameter.grad, rtol=1e-3, atol=1e-3)


TRACED = {
    "grid": {"layout": "grid", "window_size": 4},
    "window": {"layout": "window", "window_size": 4, "position": "bias"},
    "bias": {"layout": "full", "position": "bias"},
    "table": {"abs_pos": "stem"},
    "linformer": {"layout": "full", "mechanism": "linformer"},
    "augmented": {"local": "augmented"},
}


@pytest.mark.parametrize("kind", TRACED)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:FutureWarning")
def test_a_trace_holds_at_other_sizes(kind):
    model = randomize(timm.create_model("test_glattn", num_classes=3, img_size=64, **TRACED[kind]))
    with torch.no_grad():
        traced = torch.jit.trace(model, torch.randn(2, 3, 64, 64))
        for x in (torch.randn(2, 3, 64, 64), torch.randn(1, 3, 96, 96), torch.randn(3, 3, 75, 61)):
            assert relative(traced(x), model(x)) < 1e-5


@pytest.mark.export
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fold", [False, True])
def test_exported_programs_take_any_batch_and_size(kind, fold):
    model = randomize(timm.create_model("test_glattn", num_classes=5, img_size=64, **KINDS[kind]))
    model = reparameterize_model(model) if fold else model
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        model, (torch.randn(2, 3, 224, 256),), dynamic_shapes={"x": {0: dynamic, 2: dynamic, 3: dynamic}}
    ).module()
    for shape in ((1, 3, 224, 224), (3, 3, 193, 321), (2, 3, 288, 225)):
        x = torch.randn(shape)
        with torch.no_grad():
            assert relative(program(x), model(x)) < 1e-4


@pytest.mark.compile
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_models_are_one_graph(kind):
    model = randomize(timm.create_model("test_glattn", num_classes=5, img_size=64, **KINDS[kind]))
    for net in (model, reparameterize_model(model)):
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        for size in ((64, 64), (75, 97), (128, 96)):
            x = torch.randn(2, 3, *size)
            with torch.no_grad():
                assert relative(compiled(x), net(x)) < 1e-4


@pytest.mark.compile
def test_inductor_gives_the_same_numbers():
    model = reparameterize_model(randomize(timm.create_model("test_glattn", num_classes=5)))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert relative(torch.compile(model, fullgraph=True)(x), model(x)) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_from_meta_equals_one_made_directly(kind):
    options = KINDS[kind]
    torch.manual_seed(3)
    direct = timm.create_model("test_glattn", **options)
    meta = timm.create_model("test_glattn", device="meta", **options).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in itertools.chain(meta.parameters(), meta.buffers()):
            tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
    filled = copy.deepcopy(meta)
    filled.load_state_dict(direct.state_dict())
    reinit_non_persistent_buffers(filled)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(filled.eval()(x), direct.eval()(x))
    torch.manual_seed(5)
    direct.init_weights()
    torch.manual_seed(5)
    meta.init_weights()
    for (name, a), b in zip(direct.state_dict().items(), meta.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("feature_cls", [None, "list", "dict", "hook", "getter", "fx"])
def test_feature_wrappers_see_the_same_network(feature_cls):
    options = {"abs_pos": "stem", "num_classes": 5}
    torch.manual_seed(0)
    model = timm.create_model("test_glattn", **options).eval()
    kwargs = {} if feature_cls is None else {"feature_cls": feature_cls}
    torch.manual_seed(0)  # the same weights again
    wrapper = timm.create_model("test_glattn", features_only=True, **options, **kwargs).eval()
    x = torch.randn(2, 3, 75, 97)
    out = wrapper(x)
    out = list(out.values()) if isinstance(out, dict) else out
    for mine, theirs in zip(model.forward_intermediates(x, intermediates_only=True), out, strict=True):
        torch.testing.assert_close(theirs, mine)
    assert wrapper.feature_info.reduction() == [4, 8, 16, 32]
    assert wrapper.feature_info.channels() == list(model.cfg.dims)


@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_output_stride_dilates(output_stride):
    model = timm.create_model("test_glattn", output_stride=output_stride, features_only=True).eval()
    for info, out in zip(model.feature_info, model(torch.randn(1, 3, 96, 160)), strict=True):
        assert info["reduction"] <= output_stride
        assert out.shape[2:] == (96 // info["reduction"], 160 // info["reduction"])


@pytest.mark.parametrize("output_stride", [8, 16])
def test_what_is_dilated_is_what_was_strided(output_stride):
    """Of convolutions alone: at the cells that both have, the maps are the same."""
    alone = {"fusion": "local", "local_gate": "none", "num_classes": 0, "global_pool": ""}
    strided = randomize(timm.create_model("test_glattn", **alone)).double().eval()
    dilated = timm.create_model("test_glattn", output_stride=output_stride, **alone).double().eval()
    dilated.load_state_dict(strided.state_dict())
    x, step = torch.randn(1, 3, 96, 160, dtype=torch.float64), 32 // output_stride
    torch.testing.assert_close(dilated(x)[:, :, ::step, ::step], strided(x))


AUGMENTED = {"fusion": "local", "local": "augmented", "dims": (32, 32, 32, 64)}


@pytest.mark.parametrize("method", ["fx", "hook"])
@pytest.mark.parametrize("options", [{}, AUGMENTED], ids=["softmax", "augmented"])
def test_attention_maps_are_extracted(options, method):
    fused = timm.create_model("test_glattn", layout="full", **options).eval()
    set_fused_attn(False)
    try:
        model = timm.create_model("test_glattn", layout="full", **options).eval()
    finally:
        set_fused_attn(True)
    model.load_state_dict(fused.state_dict())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x), fused(x))
    maps = AttentionExtract(model, method=method)(x)
    assert len(maps) == sum(model.cfg.depths)
    for attention in maps.values():
        torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention.sum(-1)))


def test_a_pruned_model_takes_a_classifier_and_a_pooling():
    model = timm.create_model("test_glattn", num_classes=3)
    model.prune_intermediate_layers([1])
    with pytest.raises(ValueError, match="global_pool='' leaves num_classes=5 a map"):
        model.reset_classifier(5, "")
    model.reset_classifier(5, "avg")
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_is_reentrant_if_timm_says_so(reentrant, monkeypatch):
    asked = []
    plain = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        torch.utils.checkpoint, "checkpoint", lambda *a, **k: asked.append(k["use_reentrant"]) or plain(*a, **k)
    )
    model = timm.create_model("test_glattn", num_classes=3)
    model.set_grad_checkpointing()
    set_reentrant_ckpt(reentrant)
    try:
        model(torch.randn(2, 3, 64, 64)).sum().backward()
    finally:
        set_reentrant_ckpt(False)
    assert asked == [reentrant] * sum(model.cfg.depths)


def test_a_size_can_be_set_and_left():
    model = timm.create_model("test_glattn", layout="full", position="bias", abs_pos="stem", img_size=64).eval()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(1, 3, 96, 128)
    at_run_time = model(x)
    model.set_input_size((96, 128))
    torch.testing.assert_close(model(x), at_run_time)  # the same interpolation, once instead of each time
    assert model.state_dict()["stem.pos_embed.table"].shape[2:] == (24, 32)
    model.set_input_size(64)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in before.items()}


@pytest.mark.parametrize(
    "options",
    [{"position": "bias", "layout": "window"}, {"abs_pos": "stem"}, {"layout": "full", "mechanism": "linformer"}],
)
def test_a_size_that_is_set_again_leaves_parameters_to_whom_they_belong(options):
    model = timm.create_model("test_glattn", img_size=64, **options)
    held = dict(model.named_parameters())  # as an optimiser holds them
    model.set_input_size(64)
    assert all(parameter is held[name] for name, parameter in model.named_parameters())


@pytest.mark.parametrize("stem_features", [False, True])
def test_a_size_that_is_set_is_one_that_was_made(stem_features):
    options = {"layout": "full", "position": "bias", "abs_pos": "stages", "stem_features": stem_features}
    model = timm.create_model("test_glattn", img_size=64, **options)
    model.set_input_size((96, 128))
    made = timm.create_model("test_glattn", img_size=(96, 128), **options)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in made.state_dict().items()}


def test_what_was_frozen_and_is_not_trains_as_before():
    model = timm.create_model("test_glattn", num_classes=3)
    kinds = [type(module) for module in model.modules()]
    freeze(model)
    assert {FrozenBatchNorm2d} <= {type(module) for module in model.modules()}
    unfreeze(model)
    assert [type(module) for module in model.modules()] == kinds
    model.train()(torch.randn(1, 3, 32, 32)).sum().backward()


def test_a_classifier_needs_a_pooling():
    for refused in (
        lambda: timm.create_model("test_glattn", global_pool=""),
        lambda: timm.create_model("test_glattn").reset_classifier(5, ""),
    ):
        with pytest.raises(ValueError, match="give 0, or a pooling"):
            refused()
    assert timm.create_model("test_glattn", global_pool="", features_only=True)(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_grad_checkpointing_gives_the_same_gradients_and_statistics(small, momentum):
    small.train()
    for module in small.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = momentum
    other = copy.deepcopy(small)
    other.set_grad_checkpointing()
    for _ in range(2):
        x = torch.randn(2, 3, 64, 64)
        for model in (small, other):
            torch.manual_seed(1)
            model(x).square().mean().backward()
    for (name, a), b in zip(small.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, msg=name)
    for (name, a), b in zip(small.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(b, a, msg=name)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_by_others_counts_a_batch_once_too(reentrant):
    model = randomize(timm.create_model("test_glattn", features_only=True)).train()
    by_timm, by_torch = copy.deepcopy(model), copy.deepcopy(model)
    by_timm.set_grad_checkpointing()
    x = torch.randn(2, 3, 64, 64, requires_grad=True)
    for maps in (model(x), by_timm(x), checkpoint(lambda x: tuple(by_torch(x)), x, use_reentrant=reentrant)):
        sum(x.square().mean() for x in maps).backward()
    for (name, a), *others in zip(model.named_buffers(), by_timm.buffers(), by_torch.buffers(), strict=True):
        for b in others:
            torch.testing.assert_close(b, a, msg=name)


def test_grad_checkpointing_takes_a_second_backward_pass():
    model = randomize(timm.create_model("test_glattn", num_classes=3)).train()
    model.set_grad_checkpointing()
    loss = model(torch.randn(2, 3, 64, 64)).square().mean()
    first = torch.autograd.grad(loss, model.head.fc.weight, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, model.head.fc.weight), first)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_grad_checkpointing_compiles(fullgraph):
    model = randomize(timm.create_model("test_glattn", num_classes=3)).train()
    other, x = copy.deepcopy(model), torch.randn(2, 3, 64, 64)
    other.set_grad_checkpointing()
    model(x).square().mean().backward()
    torch.compile(other, backend="aot_eager", fullgraph=fullgraph)(x).square().mean().backward()
    torch.compiler.reset()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-4, msg=name)
    for (name, a), b in zip(model.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("part", [ImprovedLocalAttention, MultiHeadGlobalAttention, GlobalLocalAttention])
def test_parts_stand_alone(part):
    x = torch.randn(2, 64, 13, 9)
    assert part(64)(x).shape == x.shape


def test_the_mixer_by_hand():
    """Local branch, global branch and fusion from the module's weights, in loops over heads."""
    mixer = (
        randomize(timm.create_model("test_glattn", layout="full", position="none")).stages[2].blocks[0].mixer.double()
    )
    x = torch.randn(2, 32, 7, 5, dtype=torch.float64)

    def norm(y, bn):
        scale = bn.weight / (bn.running_var + bn.eps).sqrt()
        return (y - bn.running_mean[:, None, None]) * scale[:, None, None] + bn.bias[:, None, None]

    local = sum(
        norm(nn.functional.conv2d(x, b.conv.weight, padding=b.conv.weight.shape[-1] // 2, groups=32), b.bn)
        for b in mixer.local.conv.branches
    )
    gate = local.mean((2, 3), keepdim=True)
    gate = nn.functional.conv2d(gate, mixer.local.gate.fc1.weight, mixer.local.gate.fc1.bias).relu()
    gate = nn.functional.conv2d(gate, mixer.local.gate.fc2.weight, mixer.local.gate.fc2.bias).sigmoid()
    local = local * gate

    attn = mixer.attn
    qkv = norm(nn.functional.conv2d(x, attn.qkv.conv.weight), attn.qkv.bn).flatten(2)
    q, k, v = qkv.split(32, dim=1)
    heads = []
    for h in range(attn.num_heads):
        part = slice(h * attn.head_dim, (h + 1) * attn.head_dim)
        scores = torch.einsum("bcn,bcm->bnm", q[:, part], k[:, part]) / attn.head_dim**0.5
        heads.append(torch.einsum("bnm,bcm->bcn", scores.softmax(-1), v[:, part]))
    globe = torch.cat(heads, dim=1).reshape(2, 32, 7, 5)

    expected = norm(nn.functional.conv2d(local + globe, mixer.proj.conv.weight), mixer.proj.bn)
    torch.testing.assert_close(mixer(x), expected)


@pytest.mark.parametrize("shape", [(3, 64, 64), (64, 64), (1, 1, 3, 64, 64)])
def test_an_image_without_a_batch_dimension_is_told(shape):
    model = timm.create_model("test_glattn").eval()
    for net in (model, timm.utils.reparameterize_model(model).to(memory_format=torch.channels_last)):
        for _ in range(2):  # at the second a folded model has laid out its weights
            with torch.no_grad():
                net(torch.randn(1, 3, 64, 64))
                with pytest.raises(ValueError, match=rf"expected 4 dimensions, .*, got {len(shape)}"):
                    net(torch.randn(shape))
