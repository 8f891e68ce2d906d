"""oneDNN's operators: taken in inference, as exact as torch's convolution, left out where they would be wrong."""

import copy
import io
from types import SimpleNamespace

import pytest
import timm
import torch
from models import randomize
from timm.utils import reparameterize_model
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from glattn.benchmark.cost import count_bytes
from glattn.config import MixerConfig
from glattn.layers import onednn
from glattn.layers.conv2d import FoldedConv, Pointwise
from glattn.layers.fusion import FUSIONS

KINDS = {
    "pointwise": lambda bias=True: Pointwise(192, 160, 1, bias=bias),
    "folded pointwise": lambda bias=True: FoldedConv(192, 160, 1, bias=bias),
    "folded": lambda bias=True: FoldedConv(192, 160, 3, stride=2, padding=1, groups=32, bias=bias),
    "folded with dilation": lambda bias=True: FoldedConv(192, 192, 5, padding=4, dilation=2, groups=192, bias=bias),
}
PRODUCTS = ("pointwise", "folded pointwise")
FOLDED = [kind for kind in KINDS if "folded" in kind]


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def convolved(conv, x):
    """By torch's convolution."""
    return F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


@pytest.fixture
def calls(monkeypatch):
    """The names of oneDNN's operators that were called."""
    real, called = onednn._ONEDNN, []
    if real is None:
        pytest.skip("oneDNN's operators are not used here")

    def counting(name, overload=""):
        def call(*given):
            called.append(f"{name}.{overload}".rstrip("."))
            packet = getattr(real, name)
            return (getattr(packet, overload) if overload else packet)(*given)

        if not overload:
            call.binary = counting(name, "binary")
        return call

    monkeypatch.setattr(onednn, "_ONEDNN", SimpleNamespace(**{name: counting(name) for name in onednn._OPERATORS}))
    return called


def operators(calls):
    return [name for name in calls if name in ("_linear_pointwise", "_convolution_pointwise")]


def used(conv, x):
    """The same module, as it is once its weight is laid out."""
    with torch.no_grad():
        conv(x), conv(x)
    return conv


def wide(kind, bias=True):
    """A convolution, and a map, large enough for that product."""
    return (m.to(memory_format=torch.channels_last) for m in (KINDS[kind](bias), torch.randn(2, 192, 7, 9)))


def folded_model():
    """A folded model, and images for it."""
    model = reparameterize_model(randomize(timm.create_model("test_glattn", num_classes=3))).eval()
    return (m.to(memory_format=torch.channels_last) for m in (model, torch.randn(2, 3, 64, 64)))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", KINDS)
def test_a_convolution_in_inference_is_onednns(calls, kind, mode, bias):
    conv, x = wide(kind, bias)
    with mode():
        for _ in range(4):
            y = conv(x)
            assert y.is_contiguous(memory_format=torch.channels_last)
            close(y, convolved(conv, x))
    assert len(operators(calls)) == 4 - (kind not in PRODUCTS)
    assert sum("reorder" in name for name in calls) == ("folded" in kind)  # laid out once


@pytest.mark.parametrize("kind", KINDS)
def test_a_folded_convolution_takes_bfloat16(calls, kind):
    if torch.bfloat16 not in onednn._DTYPES:
        pytest.skip("this processor does not compute in bfloat16")
    conv, x = (m.bfloat16() for m in wide(kind))
    with torch.no_grad():
        torch.testing.assert_close(used(conv, x)(x), convolved(conv, x))
    assert bool(operators(calls)) == ("folded" in kind)  # F.linear's is oneDNN's


def autocast(conv, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return conv(x)


def count(conv, x):
    with FlopCounterMode(display=False) as counter:
        y = conv(x)
    assert counter.get_total_flops() == 2 * y.shape[0] * y[0, 0].numel() * conv.weight.numel()
    return y


def without_onednn(conv, x):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "enabled", False)
        return conv(x)


def odd_bias(conv, x):
    bias = torch.stack([conv.bias, torch.zeros_like(conv.bias)], 1)[:, 0]
    return torch.func.functional_call(conv, {"weight": conv.weight, "bias": bias}, x)


def of_duals(conv, x):
    with torch.autograd.forward_ad.dual_level():
        y = torch.autograd.forward_ad.unpack_dual(conv(torch.autograd.forward_ad.make_dual(x, x)))
        close(y.tangent, convolved(conv, x) - convolved(conv, torch.zeros_like(x)))
        return y.primal


def of_a_subclass(conv, x):
    class Weight(nn.Parameter):
        pass

    conv.weight = Weight(conv.weight.detach())
    return conv(x)


ELSEWHERE = {
    "gradients": torch.enable_grad()(lambda conv, x: conv(x).detach()),
    "forward derivatives": of_duals,
    "float64": lambda conv, x: conv.double()(x.double()).float(),
    "autocast": autocast,
    "vmap": lambda conv, x: torch.func.vmap(conv)(x[None])[0],
    "script": lambda conv, x: torch.jit.script(conv)(x),
    "trace": lambda conv, x: torch.jit.trace(conv, x, check_trace=False)(x),
    "export": lambda conv, x: torch.export.export(conv, (x,)).module()(x),
    "counting": count,
    "oneDNN disabled": without_onednn,
    "NCHW": lambda conv, x: conv(x.contiguous()),
    "a bias with strides": odd_bias,
    "a subclass": of_a_subclass,
    "no image": lambda conv, x: torch.cat([conv(x[:0]), convolved(conv, x)]),
}


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("case", ELSEWHERE)
@pytest.mark.parametrize("kind", KINDS)
def test_onednns_operators_are_left_out_where_they_would_be_wrong(calls, kind, case):
    conv, x = wide(kind)
    wanted = convolved(conv, x).detach()
    with torch.no_grad():
        y = ELSEWHERE[case](conv, x)
    assert not calls
    if y.dtype == torch.bfloat16:
        torch.testing.assert_close(y.float(), wanted, rtol=0.05, atol=0.05)
    else:
        close(y, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_map_of_other_channels_is_refused_as_torch_does(kind):
    conv, x = wide(kind)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"channels|shapes"):
        conv(x[:, :96].contiguous(memory_format=torch.channels_last))


# what a folded convolution computes besides: a ReLU, a sum


THEN = {
    "relu": (True, None),
    "a sum": (False, lambda y: torch.randn_like(y).to(memory_format=torch.channels_last)),
    "a sum in NCHW": (False, lambda y: torch.randn_like(y).contiguous()),
    "a sum of a wider type": (False, lambda y: torch.randn_like(y).double()),
    "a sum with one image": (False, lambda y: torch.randn_like(y[:1]).to(memory_format=torch.channels_last)),
    "both": (True, lambda y: torch.randn_like(y).to(memory_format=torch.channels_last)),
}
WHERE = {
    "inference": torch.no_grad()(lambda conv, x, *then: used(conv, x)(x, *then)),
    "gradients": lambda conv, x, *then: conv(x, *then).detach(),
    "NCHW": torch.no_grad()(lambda conv, x, *then: conv(x.contiguous(), *then)),
    "float64": torch.no_grad()(lambda conv, x, *then: conv.double()(x.double(), *then).float()),
    "script": torch.no_grad()(lambda conv, x, *then: torch.jit.script(conv)(x, *then)),
    "export": torch.no_grad()(lambda conv, x, *then: torch.export.export(conv, (x, *then)).module()(x, *then)),
}


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("then", THEN)
@pytest.mark.parametrize("kind", FOLDED)
def test_what_is_behind_a_folded_convolution_is_computed_with_it(kind, then, where):
    conv, x = wide(kind)
    relu, make = THEN[then]
    wanted = convolved(conv, x).detach()
    wanted = wanted.relu() if relu else wanted
    added = None if make is None else make(wanted)
    if added is not None:
        wanted = wanted + added
    close(WHERE[where](conv, x, added, relu).double(), wanted.double())


def wide_block(**options):
    """A folded block whose products are large, and a map."""
    block = randomize(nn.Sequential(timm.create_model("glattn_atto", **options).stages[0].blocks[0]))
    block = reparameterize_model(block.eval())
    return (m.to(memory_format=torch.channels_last) for m in (block, torch.randn(1, 32, 56, 56)))


def test_a_folded_blocks_relu_and_sums_take_no_pass_of_their_own(calls):
    block, x = wide_block()
    with torch.no_grad():
        used(block, x)
        calls.clear()
        with torch.profiler.profile() as profile:
            block(x)
    # fc1's and its ReLU; proj's and fc2's, and what they are added to
    assert [calls.count(f"_linear_pointwise{overload}") for overload in ("", ".binary")] == [1, 2]
    names = {f"aten::{name}" for name in ("add", "mul", "addcmul", "relu", "relu_")}
    passes = [event.name for event in profile.events() if event.name in names]
    assert passes == ["aten::relu", "aten::addcmul"]  # the gate's on one cell, and its product with the branches' sum


def by_hook(module, seen):
    module.register_forward_hook(lambda _, inputs, output: seen.append(output.clone()))


def by_global_hook(module, seen):
    return nn.modules.module.register_module_forward_hook(
        lambda called, inputs, output: seen.append(output.clone()) if called is module else None
    )


def by_another_forward(module, seen):
    """As accelerate's offload does, which has a weight on its device within a call alone."""
    forward = module.forward
    module.forward = lambda *given, **named: seen.append(forward(*given, **named)) or seen[-1].clone()


PARTS = {
    "mixer": ("mixer", "mixer.proj", "mixer.proj_drop"),
    "mlp": ("mlp", "mlp.fc1", "mlp.act", "mlp.fc2"),
    "branches": ("mixer.local", "mixer.attn", "mixer.fusion"),
    "gate": ("mixer.local.gate", *(f"mixer.local.gate.{part}" for part in ("fc1", "bn", "act", "fc2", "gate"))),
}


@pytest.mark.parametrize("look", [by_hook, by_global_hook, by_another_forward])
@pytest.mark.parametrize("name", [name for names in PARTS.values() for name in names])
def test_whoever_looks_on_at_parts_of_a_folded_block_sees_what_those_compute(name, look):
    block, x = wide_block()
    mixer, mlp = block[0].mixer, block[0].mlp
    gate = mixer.local.gate
    seen = []
    with torch.no_grad():
        expected = block(x)
        mixed = x + mixer(x)
        inside = mixer.local.conv(x)
        fc1 = F.conv2d(inside.mean((2, 3), keepdim=True), gate.fc1.weight, gate.fc1.bias)
        fc2 = F.conv2d(fc1.relu(), gate.fc2.weight, gate.fc2.bias)
        local = inside * fc2.sigmoid()
        outputs = dict.fromkeys(PARTS["mixer"], mixed - x) | dict.fromkeys(PARTS["mlp"], expected - mixed)
        outputs["mlp.fc1"] = convolved(mlp.fc1, mixed)
        outputs["mlp.act"] = outputs["mlp.fc1"].relu()
        outputs |= zip(PARTS["branches"], (local, mixer.attn(x), local + mixer.attn(x)), strict=True)
        outputs |= zip(PARTS["gate"], (local, fc1, fc1, fc1.relu(), fc2, fc2.sigmoid()), strict=True)
        handle = look(block[0].get_submodule(name), seen)
        try:
            close(block(x), expected)
        finally:
            if handle is not None:
                handle.remove()
    close(seen[0], outputs[name])


def guided(model, x, *, everywhere):
    """Return guided backpropagation's gradient of the image (arXiv:1412.6806): no negative one passes a ReLU."""

    def positive(module, given, _):
        return (given[0].clamp(min=0),) if isinstance(module, nn.ReLU) else None

    acts = [module for module in model.modules() if isinstance(module, nn.ReLU)]
    for act in acts:
        act.inplace = False
    if everywhere:
        handles = [nn.modules.module.register_module_full_backward_hook(positive)]
    else:
        handles = [act.register_full_backward_hook(positive) for act in acts]
    x = x.clone().requires_grad_()
    try:
        model(x)[:, 0].sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    return x.grad


@pytest.mark.parametrize("everywhere", [False, True])
def test_backward_hooks_see_a_folded_models_gradients_as_before_it_was_folded(everywhere):
    model = timm.create_model("test_glattn", num_classes=4, layer_scale=0).eval()
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    expected = guided(copy.deepcopy(model), x, everywhere=everywhere)
    close(guided(reparameterize_model(model), x, everywhere=everywhere), expected)


@pytest.mark.parametrize("name", ["fusion", "local", *(f"local.gate.{part}" for part in ("bn", "act", "gate", "fc1"))])
def test_what_takes_the_place_of_a_part_of_a_folded_mixer_is_called(name):
    block, x = wide_block()
    other = {
        "fusion": lambda: FUSIONS["global"](32, config=MixerConfig()),
        "local": nn.Hardtanh,
        "local.gate.fc1": lambda: nn.Sequential(block[0].mixer.local.gate.fc1, nn.Softplus()),
    }
    before = block(x)
    block[0].mixer.set_submodule(name, other.get(name, nn.Softplus)())
    after = block(x)  # where gradients are asked for, each part is called for itself
    assert not torch.allclose(before, after, atol=1e-3)
    with torch.no_grad():
        close(block(x), after)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("fusion", ["sum", "global", "gated"])
def test_a_folded_block_keeps_the_memory_format(fusion, memory_format):
    block, x = wide_block(fusion=fusion)
    with torch.no_grad():
        assert block(x.contiguous(memory_format=memory_format)).is_contiguous(memory_format=memory_format)


def test_dropout_of_a_folded_model_works_in_evaluation_where_it_is_asked_for():
    block, x = wide_block(proj_drop=0.5)
    with torch.no_grad():
        assert torch.equal(block(x), block(x))
        block[0].mixer.proj_drop.train()
        assert not torch.equal(block(x), block(x))


def test_what_takes_the_place_of_a_folded_mixers_dropout_is_called():
    """As Monte Carlo dropout's libraries put theirs, which drop in evaluation mode."""
    block, x = wide_block()
    with torch.no_grad():
        mixed = x + block[0].mixer(x)
        block[0].mixer.proj_drop = nn.Tanh().eval()
        close(block[0].mixer(x, x), x + (mixed - x).tanh())


@pytest.mark.parametrize("rates", [{"drop_path_rate": 0.9}, {"proj_drop": 0.5}])
def test_a_folded_model_in_training_drops_as_before(rates):
    model, x = reparameterize_model(timm.create_model("test_glattn", **rates).eval()), torch.randn(8, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        model.train()
        assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("name", ["mixer.proj", "mlp.fc1", "mlp.fc2"])
def test_a_plain_convolution_put_into_a_folded_block_computes_the_same(name):
    block, x = wide_block()
    with torch.no_grad():
        expected = block(x)
        conv = block[0].get_submodule(name)
        other = nn.Conv2d(conv.in_channels, conv.out_channels, 1)
        other.load_state_dict(conv.state_dict())
        block[0].set_submodule(name, other)
        close(block(x), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("name", ["mixer", "mlp", "ls1", "drop_path1", "drop_path2"])
def test_what_takes_the_place_of_a_part_of_a_folded_block_takes_its_map_alone(name):
    block, x = wide_block()
    setattr(block[0], name, nn.Tanh().eval())  # as all else, in evaluation mode
    parts = block[0]._modules
    mixer, mlp, ls1, drop_path1, drop_path2 = map(parts.get, ("mixer", "mlp", "ls1", "drop_path1", "drop_path2"))
    with torch.no_grad():
        y = x + drop_path1(ls1(mixer(x)))
        close(block(x), y + drop_path2(mlp(y)))
        close(torch.jit.script(block)(x), block(x))


# what a folded convolution keeps


def step(conv, **options):
    """A step of an optimiser, in evaluation mode."""
    optimizer = torch.optim.AdamW(conv.parameters(), lr=0.1, **options)
    with torch.enable_grad():
        conv(torch.randn(1, 192, 7, 9)).sum().backward()
    optimizer.step()


def through_data(conv):
    conv.weight.data.mul_(2)
    conv.eval()


def between(conv):
    """A step that is taken after an evaluation."""
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.1, fused=True)
    x = torch.randn(2, 192, 7, 9).to(memory_format=torch.channels_last)
    with torch.enable_grad():
        conv(x).sum().backward()
    conv(x)
    optimizer.step()


def frozen_but_for_a_step(conv):
    conv.requires_grad_(False)
    used(conv, torch.randn(2, 192, 7, 9).to(memory_format=torch.channels_last))
    conv.requires_grad_(True)
    step(conv, fused=True)
    conv.requires_grad_(False)


def frozen_before_its_step(conv):
    """A step that is taken after it was frozen, of a gradient of before."""
    optimizer = torch.optim.AdamW(conv.parameters(), lr=0.1, fused=True)
    x = torch.randn(2, 192, 7, 9).to(memory_format=torch.channels_last)
    with torch.enable_grad():
        conv(x).sum().backward()
    conv.requires_grad_(False)
    used(conv, x)
    optimizer.step()


def by_new_data_twice(conv):
    for _ in range(2):
        conv.weight.data = conv.weight.data * 2


CHANGES = {
    "in place": lambda conv: conv.weight.mul_(2),
    "state dict": lambda conv: conv.load_state_dict({k: 2 * v for k, v in conv.state_dict().items()}),
    "state dict, assigned": lambda conv: conv.load_state_dict(
        {k: 2 * v for k, v in conv.state_dict().items()}, assign=True
    ),
    "new data": by_new_data_twice,
    "new parameter": lambda conv: setattr(conv, "weight", nn.Parameter(conv.weight * 2)),
    "through data": through_data,
    "fused, after an evaluation": between,
    "fused, frozen before and behind": frozen_but_for_a_step,
    "fused, frozen in between": frozen_before_its_step,
    "a lower precision and back": lambda conv: conv.bfloat16().float(),
    "optimizer": step,
    "fused optimizer": lambda conv: step(conv, fused=True),
    "foreach optimizer": lambda conv: step(conv, foreach=True),
    "averaging": lambda conv: torch._foreach_lerp_(
        list(conv.parameters()), [torch.randn_like(p) for p in conv.parameters()], 0.5
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", FOLDED)
def test_a_changed_weight_is_seen(kind, change):
    conv, x = wide(kind)
    used(conv.eval(), x)
    with torch.no_grad():
        before = conv(x)
        CHANGES[change](conv)
        for _ in range(3):
            close(conv(x), convolved(conv, x))
        assert not torch.equal(conv(x), before)


def test_a_pruned_weight_is_seen():
    conv, x = wide("folded pointwise", bias=False)
    with torch.no_grad():
        used(conv, x)
        conv.weight = nn.Parameter(conv.weight.data[:32])  # in the same place
        close(conv(x), convolved(conv, x))


def test_weights_called_functionally_are_seen():
    conv, x = wide("folded")
    with torch.no_grad():
        for _ in range(4):
            weight, bias = torch.randn_like(conv.weight), torch.randn_like(conv.bias)
            y = torch.func.functional_call(conv, {"weight": weight, "bias": bias}, x)
            close(y, F.conv2d(x, weight, bias, 2, 1, 1, 32))


@pytest.mark.parametrize("kind", FOLDED)
def test_maps_of_any_size_are_taken_and_none_is_laid_out_for_in_vain(calls, kind):
    conv, _ = wide(kind)
    with torch.no_grad():
        for size in ((2, 7, 9), (3, 20, 4), (2, 7, 9), (3, 20, 4), (3, 20, 4), (3, 20, 4), (2, 7, 9), (3, 20, 4)):
            x = torch.randn(size[0], 192, *size[1:]).to(memory_format=torch.channels_last)
            close(conv(x), convolved(conv, x))
    assert len(operators(calls)) == (8 if kind in PRODUCTS else 3)
    assert sum("reorder" in name for name in calls) == 1


SURGERY = {
    "stride": {"stride": (3, 3)},
    "dilation": {"dilation": (3, 3), "padding": (3, 3)},
    "padding": {"padding": (4, 4)},
    "padding by name": {"padding": "valid"},
    "circular": {"padding_mode": "circular", "_reversed_padding_repeated_twice": [1, 1, 1, 1], "padding": (1, 1)},
}


@pytest.mark.parametrize("change", SURGERY)
@pytest.mark.parametrize("kind", FOLDED)
def test_a_changed_geometry_is_seen(kind, change):
    conv, _ = wide(kind)
    x = torch.randn(2, 192, 11, 12).to(memory_format=torch.channels_last)
    used(conv, x)
    plain = copy.deepcopy(conv)
    plain.__class__ = nn.Conv2d
    with torch.no_grad():
        for module in (conv, plain):
            for name, value in SURGERY[change].items():
                setattr(module, name, value)
        for _ in range(3):
            close(conv(x), plain(x))


@pytest.mark.parametrize("kind", FOLDED)
def test_other_views_of_the_same_memory_are_seen(kind):
    conv, x = wide(kind)
    used(conv, x)
    with torch.no_grad():
        conv.weight.data, conv.bias.data = conv.weight.data.flip(0), torch.randn(2 * len(conv.bias))[::2]
        close(used(conv, x)(x), convolved(conv, x))
        conv.bias = None
        weight = conv.weight.data
        conv.weight.data = weight[: len(weight) // 2] if conv.groups == 1 else weight.transpose(2, 3)
        close(conv(x), convolved(conv, x))


def test_a_map_of_one_channel_in_nchw_keeps_its_memory_format():
    conv = FoldedConv(1, 16, 3, padding=1)
    x = torch.randn(2, 1, 14, 14)
    assert used(conv, x)(x).detach().is_contiguous()


def test_shared_weights_are_not_laid_out(calls):
    conv, x = wide("folded")
    conv.share_memory()
    used(conv, x)
    assert not calls


@pytest.mark.parametrize("how", ["copied", "pickled"])
def test_a_folded_model_in_use_is_copied_and_pickled(how):
    model, x = folded_model()
    with torch.no_grad():
        expected = used(model, x)(x)
        if how == "copied":
            other = copy.deepcopy(model)
        else:
            torch.save(model, file := io.BytesIO())
            file.seek(0)
            other = torch.load(file, weights_only=False)
        for parameter in model.parameters():
            parameter.zero_()
        close(other(x), expected)


def test_a_folded_model_is_of_onednns_convolutions(calls):
    model, x = folded_model()
    convs = [m for m in model.modules() if isinstance(m, FoldedConv)]
    used(model, x)
    calls.clear()
    with torch.no_grad():
        y = model(x)
    close(y.detach(), model(x.requires_grad_()).detach())
    assert len(operators(calls)) == sum(not m.is_product() for m in convs) > 10  # its products are small


def test_a_folded_model_is_compiled_whole(calls):
    model, x = folded_model()
    with torch.no_grad():
        expected = used(model, x)(x)
        calls.clear()
        torch._dynamo.reset()
        close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
        assert not calls


def test_what_is_laid_out_is_nothing_to_the_compiler():
    conv, x = wide("folded")
    compilations = []

    def backend(graph, _):
        compilations.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(conv, backend=backend)
    compiled(x)
    used(conv, x)
    compiled(x)
    assert len(compilations) == 1


def test_the_benchmark_counts_what_is_kept():
    model, x = folded_model()
    plain = count_bytes(model)
    laid_out = [m for m in used(model, x).modules() if isinstance(m, FoldedConv) and not m.is_product()]
    assert count_bytes(model) >= plain + 4 * sum(m.weight.numel() for m in laid_out) * (onednn._ONEDNN is not None)
    assert count_bytes(model.train()) == plain
