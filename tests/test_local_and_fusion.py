"""Local branches, gates, fusions and the context block: each by its definition, from the module's own weights."""

import copy
import math

import pytest
import timm
import torch
from models import randomize
from oracles import cells, conv_norm, enliven, heads_of, mixer
from timm.utils import reparameterize_model
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from glattn.config import MixerConfig
from glattn.layers import (
    TABLES,
    GlobalLocalAttention,
    ImprovedLocalAttention,
    MultiHeadGlobalAttention,
    MultiScaleConv,
)
from glattn.layers.augmented import AugmentedConv, offset_embedding, relative_logits
from glattn.layers.conv import ConvNorm
from glattn.layers.conv2d import Pointwise
from glattn.layers.norm import BatchNorm2d
from glattn.layers.position import ConvPosition

DIM = 16
GROUPS = ["depthwise", "dense", 4]


def image(*size, batch=2, dim=DIM):
    return torch.randn(batch, dim, *size, dtype=torch.float64)


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def local_branch(dim=DIM, **options):
    config = mixer(**options)
    return enliven(TABLES["local"][config.local](dim, config=config).double().eval())


def mixed(**options):
    return enliven(GlobalLocalAttention(DIM, config=mixer(**options), map_size=(6, 9)).double().eval())


# the local branch


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("kernel_sizes", [(3,), (1, 3, 5), (7, 3), (5, 5, 9)])
def test_scales_are_convolved_apart_normalised_and_summed(kernel_sizes, groups):
    branch, x = local_branch(kernel_sizes=kernel_sizes, local_groups=groups, local_gate="none"), image(6, 9)
    number = {"depthwise": DIM, "dense": 1}.get(groups, groups)
    expected = torch.zeros_like(x)
    for part, size in zip(branch.conv.branches, kernel_sizes, strict=True):
        assert part.conv.weight.shape == (DIM, DIM // number, size, size)
        expected = expected + conv_norm(part, x)
    close(branch(x), expected)


@pytest.mark.parametrize("size", [(1, 1), (6, 9), (2, 13)])
@pytest.mark.parametrize("gate", TABLES["local_gate"])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("local", TABLES["local"])
def test_a_folded_branch_is_the_unfolded_one(local, groups, gate, size):
    branch, x = local_branch(local=local, local_groups=groups, local_gate=gate), image(*size)
    folded = reparameterize_model(branch)
    close(folded(x), branch(x))
    kernels = [m for m in folded.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    assert [m.kernel_size for m in kernels] == [(5, 5)]
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d | MultiScaleConv)]


@pytest.mark.parametrize("dilation", [1, 2, 4])
def test_dilated_branches_fold(dilation):
    branch = enliven(ImprovedLocalAttention(DIM, config=mixer(), dilation=dilation).double().eval())
    x = image(9, 7)
    close(reparameterize_model(branch)(x), branch(x))
    one = x.clone()
    one[:, :, 4, 3] += 1
    moved = (branch.conv(one) - branch.conv(x)).abs().amax((0, 1)) > 1e-12
    far = max(abs(y - 4) for y, row in enumerate(moved) if row.any())
    assert far == min(2 * dilation, 4)


def test_squeeze_and_excitation_by_its_formula():
    branch, plain = local_branch(local_gate="se"), local_branch(local_gate="none")
    plain.conv = branch.conv
    x = image(6, 9)
    inside = plain(x)
    mean = inside.mean((2, 3))
    gate = branch.gate
    hidden = (mean @ gate.fc1.weight.flatten(1).T + gate.fc1.bias).relu()
    scale = (hidden @ gate.fc2.weight.flatten(1).T + gate.fc2.bias).sigmoid()
    close(branch(x), inside * scale[:, :, None, None])
    assert isinstance(gate.fc1, nn.Conv2d)
    assert gate.fc1.out_channels < DIM


def test_efficient_channel_attention_by_its_formula():
    """A convolution along the channels of their means, padded with zeros, no bias."""
    branch, plain = local_branch(local_gate="eca"), local_branch(local_gate="none")
    plain.conv = branch.conv
    x = image(6, 9)
    inside = plain(x)
    weight = branch.gate.conv.weight.flatten()
    mean = F.pad(inside.mean((2, 3)), [len(weight) // 2] * 2)
    scale = torch.stack([mean[:, c : c + len(weight)] @ weight for c in range(DIM)], dim=1).sigmoid()
    close(branch(x), inside * scale[:, :, None, None])
    assert len(weight) > 1
    assert branch(x[:0]).shape == (0, DIM, 6, 9)


@pytest.mark.parametrize("gate", TABLES["local_gate"])
@pytest.mark.parametrize("local", TABLES["local"])
def test_gradients_of_a_local_branch_are_finite_differences(local, gate):
    branch = local_branch(local=local, local_gate=gate)
    names = [n for n, p in branch.named_parameters() if "bn" not in n]
    x = image(3, 4, batch=1).requires_grad_()

    def run(x, *values):
        return torch.func.functional_call(branch, dict(zip(names, values, strict=True)), (x,))

    parameters = [branch.get_parameter(name) for name in names]
    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("options", [{"local_groups": 3}, {"local_groups": 0}, {"local_groups": -2}])
def test_groups_that_do_not_divide_are_refused(options):
    with pytest.raises(ValueError, match=r"local_groups=.*16 channels.*'dense' or a divisor"):
        local_branch(**options)


# attention-augmented convolution


def augmented(attn_dim=8, num_heads=2, stride=1, reach=14, groups="dense"):
    conv = AugmentedConv(
        DIM, attn_dim=attn_dim, num_heads=num_heads, kernel_sizes=(1, 3), groups=groups, stride=stride, reach=reach
    )
    return enliven(conv.double().eval())


@pytest.mark.parametrize("groups", GROUPS)
def test_no_attention_channels_leave_the_convolution(groups):
    conv, x = augmented(attn_dim=0, groups=groups), image(6, 9)
    close(conv(x), sum(conv_norm(part, x) for part in conv.conv.branches))
    branch = local_branch(local="augmented", augment_ratio=0.0, local_groups=groups)
    plain = local_branch(local="conv", local_groups=groups)
    plain.load_state_dict({k.replace("conv.conv.", "conv.", 1): v for k, v in branch.state_dict().items()})
    close(branch(x), plain(x))


@pytest.mark.parametrize("size", [(4, 6), (5, 1), (3, 3)])
def test_relative_logits_are_a_loop(size):
    q = torch.randn(2, 3, size[0] * size[1], 5, dtype=torch.float64)
    rows, columns = (torch.randn(2 * max(side, 2) - 1, 5, dtype=torch.float64) for side in size)
    out = relative_logits(q, rows, columns, *size)
    for i, (y, x) in enumerate(cells(*size)):
        for j, (b, a) in enumerate(cells(*size)):
            expected = q[:, :, i] @ (rows[len(rows) // 2 + b - y] + columns[len(columns) // 2 + a - x])
            close(out[:, :, i, j], expected)


@pytest.mark.parametrize("length", [1, 2, 5, 8])
def test_relative_embeddings_are_interpolated(length):
    """No offset stays no offset, the largest stays the largest; between, a straight line."""
    table = torch.randn(9, 3, dtype=torch.float64)  # reach 5
    out = offset_embedding(table, length)
    for i in range(length):
        for j in range(length):
            at = 4 + (j - i) * 4 / max(length - 1, 1)
            low = min(int(at), 7)
            close(out[i, j], table[low] * (low + 1 - at) + table[low + 1] * (at - low))


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(("size", "stride"), [((4, 6), 1), ((5, 7), 2), ((8, 5), 3)])
def test_augmented_convolution_by_its_formula(size, stride, groups):
    conv, x = augmented(stride=stride, groups=groups), image(*size)
    small = F.avg_pool2d(x, stride, ceil_mode=True, count_include_pad=False) if stride > 1 else x
    height, width = small.shape[2:]
    q, k, v = (heads_of(part, 2) for part in conv_norm(conv.qkv, small).chunk(3, dim=1))
    by_row, by_column = offset_embedding(conv.rows, height), offset_embedding(conv.columns, width)
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k)
    for i, (y, x_) in enumerate(cells(height, width)):
        for j, (b, a) in enumerate(cells(height, width)):
            scores[:, :, i, j] = scores[:, :, i, j] + q[:, :, i] @ (by_row[y, b] + by_column[x_, a])
    attended = ((scores / math.sqrt(4)).softmax(-1) @ v).transpose(2, 3).reshape(2, 8, height, width)
    attended = conv_norm(conv.proj, attended)
    if stride > 1:
        attended = F.interpolate(attended, scale_factor=stride, mode="bilinear")[:, :, : size[0], : size[1]]
    seen = x if groups == "dense" else x[:, :8]
    convolved = sum(conv_norm(part, seen) for part in conv.conv.branches)
    close(conv(x), torch.cat([convolved, attended], dim=1))


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5])
def test_the_ratio_says_how_many_channels_attention_provides(ratio):
    branch = local_branch(32, local="augmented", augment_ratio=ratio)
    assert branch.conv.attn_dim == 32 * ratio
    assert branch.conv.conv_dim == 32 - 32 * ratio


# fusion


def by_hand(module, x, config):
    """The mixer from its parts, the fusion written out."""
    fusion, proj = module.fusion, module.proj
    if config.fusion == "sum":
        out = module.local(x) + module.attn(x)
    elif config.fusion == "gated":
        local, globe = module.local(x), module.attn(x)
        gate = conv_norm(fusion.gate, torch.cat([local, globe], dim=1)).sigmoid()
        out = gate * local + (1 - gate) * globe
    elif config.fusion == "concat":
        out = torch.cat([module.local(x), module.attn(x)], dim=1)
    elif config.fusion == "split":
        first, second = x[:, : fusion.local_dim], x[:, fusion.local_dim :]
        out = torch.cat([module.local(first), module.attn(second)], dim=1)
    else:
        out = {"local": module.local, "global": module.attn}[config.fusion](x)
    return conv_norm(proj, out)


@pytest.mark.parametrize("size", [(6, 9), (1, 7)])
@pytest.mark.parametrize("fusion", TABLES["fusion"])
def test_fusions_are_their_definitions_and_fold(fusion, size):
    module, x = mixed(fusion=fusion), image(*size)
    expected = by_hand(module, x, mixer(fusion=fusion))
    close(module(x), expected)
    close(reparameterize_model(module)(x), expected)


@pytest.mark.parametrize("fusion", TABLES["fusion"])
def test_gradients_of_a_fusion_are_finite_differences(fusion):
    module, x = mixed(fusion=fusion), image(2, 3, batch=1).requires_grad_()
    assert torch.autograd.gradcheck(module, (x,), fast_mode=True)
    module(x).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(("ratio", "widths"), [(0.25, (4, 12)), (0.5, (8, 8)), (0.7, (12, 4)), (0.3, (4, 12))])
def test_a_split_keeps_whole_heads(ratio, widths):
    module = mixed(fusion="split", split_ratio=ratio)
    assert (module.fusion.local_dim, module.fusion.global_dim) == widths
    assert module.attn.dim == widths[1]
    x = image(6, 9)
    close(module(x), by_hand(module, x, mixer(fusion="split")))


def test_a_split_costs_less_and_a_concatenation_more():
    costs = {}
    for fusion in TABLES["fusion"]:
        module = GlobalLocalAttention(64, config=mixer(fusion=fusion), map_size=(14, 14), device="meta").eval()
        with FlopCounterMode(display=False) as counter:
            module(torch.empty(1, 64, 14, 14, device="meta"))
        costs[fusion] = counter.get_total_flops()
    assert costs["split"] < 0.7 * costs["sum"]
    assert costs["sum"] < costs["concat"]
    assert max(costs["local"], costs["global"]) < costs["sum"]


def test_gates_choose_between_the_branches():
    module, x = mixed(fusion="gated"), image(6, 9)
    with torch.no_grad():
        module.fusion.gate.bn.bias.fill_(1e3)
        close(module(x), conv_norm(module.proj, module.local(x)))
        module.fusion.gate.bn.bias.fill_(-1e3)
        close(module(x), conv_norm(module.proj, module.attn(x)))


# context


def test_uniform_context_logits_pool_the_mean():
    module, plain = mixed(context="gc"), mixed()
    block, x = module.context, image(6, 9)
    with torch.no_grad():
        for parameter in block.conv_attn.parameters():
            parameter.zero_()
    assert block.mlp_add is not None
    close(block(x), x + block.mlp_add(x.mean((2, 3), keepdim=True)))
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if not k.startswith("context")})
    fused = plain.fusion(plain.local(x), plain.attn(x))
    close(module(x), conv_norm(module.proj, fused + block.mlp_add(fused.mean((2, 3), keepdim=True))))


def test_context_by_its_formula():
    """GCNet: softmax over the cells weighs them to one vector; two layers with a norm between; added to each cell."""
    block, x = mixed(context="gc").context, image(6, 9)
    scores = x.flatten(2).transpose(1, 2) @ block.conv_attn.weight.flatten() + block.conv_attn.bias
    pooled = torch.einsum("bcn,bn->bc", x.flatten(2), scores.softmax(-1))
    fc1, norm, fc2 = block.mlp_add.fc1, block.mlp_add.norm, block.mlp_add.fc2
    hidden = pooled @ fc1.weight.flatten(1).T + fc1.bias
    hidden = (hidden - hidden.mean(1, keepdim=True)) / (hidden.var(1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    hidden = (hidden * norm.weight + norm.bias).relu()
    added = hidden @ fc2.weight.flatten(1).T + fc2.bias
    close(block(x), x + added[:, :, None, None])
    assert added.abs().max() > 0.01


def test_a_new_block_starts_without_its_context():
    model, plain = (timm.create_model("test_glattn", context=kind).eval() for kind in ("gc", "none"))
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if ".context." not in k})
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(x), plain(x))
    assert not torch.equal(randomized_context(model)(x), plain(x))


def randomized_context(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".context." in name:
                parameter.normal_()
    return model


@pytest.mark.parametrize("context", TABLES["context"])
@pytest.mark.parametrize("fusion", TABLES["fusion"])
@pytest.mark.parametrize("local", TABLES["local"])
def test_a_model_of_any_fusion_local_branch_and_context_folds(local, fusion, context):
    options = {"local": local, "fusion": fusion, "context": context, "layout": "full", "head_dim": 4}
    model = randomized_context(randomize(timm.create_model("test_glattn", num_classes=3, **options))).double()
    x = torch.randn(2, 3, 65, 34, dtype=torch.float64)
    with torch.no_grad():
        close(reparameterize_model(model)(x), model(x))


@pytest.mark.parametrize("training", [True, False])
def test_without_running_statistics_the_batch_has_its_own(training):
    mine, theirs = (kind(3, track_running_stats=False).train(training) for kind in (BatchNorm2d, nn.BatchNorm2d))
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(mine(x), theirs(x))


@pytest.mark.parametrize("training", [True, False])
def test_statistics_that_are_not_tracked_for_a_while_stay(training):
    mine, theirs = BatchNorm2d(3), nn.BatchNorm2d(3)
    mine(torch.randn(2, 3, 4, 4))
    theirs.load_state_dict(mine.state_dict())
    mine.train(training).track_running_stats = theirs.train(training).track_running_stats = False
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(mine(x), theirs(x), rtol=0, atol=0)
    assert mine(torch.randn(1, 3, 1, 1)).isfinite().all()
    for name, buffer in mine.state_dict().items():
        assert torch.equal(buffer, theirs.state_dict()[name])


# strides that fit two memory formats, where a side or the batch is 1: torch's own norm reads the first four wrongly
AMBIGUOUS = [
    ((1, 3, 4, 5), (3, 1, 15, 3)),
    ((1, 3, 4, 5), (0, 1, 15, 3)),
    ((2, 3, 1, 5), (15, 1, 3, 3)),
    ((2, 3, 5, 1), (15, 1, 15, 3)),
    ((1, 3, 4, 5), (60, 20, 5, 1)),
    ((2, 3, 1, 1), (1, 2, 7, 0)),
]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("size", "strides"), AMBIGUOUS)
@pytest.mark.parametrize("training", [True, False])
def test_a_norm_s_gradient_is_right_whatever_strides_come_back(training, size, strides, memory_format):
    norm = enliven(BatchNorm2d(3, dtype=torch.float64)).train(training)
    x = torch.randn(size, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    grad = torch.randn(200, dtype=torch.float64).as_strided(size, strides)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    given = torch.autograd.grad(norm(x), (x, *norm.parameters()), grad)
    if training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    scale = norm.weight * (var + norm.eps).rsqrt()
    wanted = (x - mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]
    for mine, theirs in zip(given, torch.autograd.grad(wanted, (x, *norm.parameters()), grad.clone()), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("size", [(0, 3, 1, 5), (0, 3, 4, 5), (0, 3, 1, 1)])
def test_a_norm_of_no_images_has_no_output(size):
    x = torch.randn(size, requires_grad=True)
    assert BatchNorm2d(3).eval()(x).shape == size


@pytest.mark.parametrize("options", [{"local": "augmented", "fusion": "local"}, {}])
def test_gradients_of_one_image_are_those_of_a_batch_of_it(options):
    model = randomize(timm.create_model("test_glattn", num_classes=0, global_pool="", **options)).double().eval()
    image, weight = torch.randn(1, 3, 96, 160, dtype=torch.float64), torch.randn(15, 1, dtype=torch.float64)

    def gradient(x):
        x = x.clone().requires_grad_()
        (model(x).flatten(2).transpose(1, 2) * weight).square().sum().backward()
        return x.grad[:1]

    torch.testing.assert_close(gradient(image), gradient(image.repeat(2, 1, 1, 1)))


# with AMX, torch computes all but two wrongly in bfloat16: their outputs, or the gradients of their weights
NARROW = [
    (160, 448, 1, 3, 2, (6, 2)),
    (3, 16, 1, 3, 2, (13, 1)),
    (64, 64, 64, 5, 4, (13, 1)),
    (32, 32, 32, 9, 8, (4, 4)),
    (16, 32, 1, 3, 2, (2, 6)),
    (16, 32, 1, 3, 2, (5, 5)),
    (64, 64, 1, 3, 2, (1, 2)),
    (64, 64, 1, 3, 2, (1, 1)),
    (64, 64, 64, 9, 8, (1, 1)),
]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", NARROW)
@pytest.mark.parametrize("folded", [False, True])
def test_strided_convolutions_of_narrow_maps_in_bfloat16(folded, shape, memory_format):
    dim, out, groups, kernel, stride, size = shape
    norm = ConvNorm(dim, out, kernel_size=kernel, stride=stride, groups=groups).eval()
    conv = (norm.fuse() if folded else norm.conv).to(torch.bfloat16, memory_format=memory_format)
    x = torch.randn(2, dim, *size).bfloat16().to(memory_format=memory_format).requires_grad_()
    weight, bias = conv.weight.detach().float().requires_grad_(), None if conv.bias is None else conv.bias.float()
    wanted = F.conv2d(x.float(), weight, bias, stride, kernel // 2, 1, groups)
    grad = torch.randn_like(wanted).bfloat16()
    with torch.no_grad():
        results = [conv(x) for _ in range(3)]  # where the map is wider, the third by a weight that is laid out
    results.append(conv(x))
    for result in results:
        assert result.shape == wanted.shape
        torch.testing.assert_close(result.float(), wanted, atol=0.03, rtol=0.03)
    (given,), (expected,) = (
        torch.autograd.grad(results[-1], conv.weight, grad),
        torch.autograd.grad(wanted, weight, grad),
    )
    assert (given.float() - expected).abs().max() < 0.02 * expected.abs().max()


def test_one_cell_is_no_batch_of_a_plain_average():
    norm, x = BatchNorm2d(4, momentum=None).train(), torch.randn(64, 4, 8, 8) + 5
    norm(torch.randn(1, 4, 1, 1))
    norm(x)
    close(norm.running_mean, x.mean((0, 2, 3)), 1e-4)
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [MultiScaleConv, ConvPosition])
def test_folding_half_precision_rounds_once(kind, dtype):
    made = kind(8, 8, kernel_sizes=(1, 3, 5), groups=8) if kind is MultiScaleConv else kind(8)
    half = randomize(made).eval().to(dtype)
    exact, folded = copy.deepcopy(half).float().fuse(), half.fuse()
    for name in ("weight", "bias"):
        assert torch.equal(getattr(folded, name), getattr(exact, name).to(dtype))


def test_a_model_in_half_precision_is_folded_as_in_full():
    half = randomize(timm.create_model("test_glattn", layer_scale=0.1)).eval().bfloat16()
    exact = reparameterize_model(copy.deepcopy(half).float()).bfloat16()
    for (name, mine), wanted in zip(
        reparameterize_model(half).state_dict().items(), exact.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, wanted), name


def test_a_plain_average_can_be_traced():
    norm = BatchNorm2d(4, momentum=None).train()
    x = torch.randn(2, 4, 5, 5)
    close(torch.fx.symbolic_trace(norm)(x), norm(x))


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
def test_running_statistics_follow_the_momentum(momentum):
    mine, theirs = BatchNorm2d(3, momentum=momentum), nn.BatchNorm2d(3, momentum=momentum)
    for _ in range(4):
        x = torch.randn(2, 3, 5, 4) + 2
        torch.testing.assert_close(mine(x), theirs(x))
    torch.testing.assert_close(mine.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("cells", [(1, 1, 1), (2, 3, 5), (3, 32, 40)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_pointwise_convolution_is_torchs(cells, bias, memory_format):
    conv = Pointwise(6, 10, 1, bias=bias).to(memory_format=memory_format)
    x = torch.randn(cells[0], 6, *cells[1:]).to(memory_format=memory_format).requires_grad_()
    y = conv(x)
    expected = F.conv2d(x, conv.weight, conv.bias)
    torch.testing.assert_close(y, expected)
    assert y.is_contiguous(memory_format=memory_format)
    loss = torch.randn_like(y)
    for mine, theirs in zip(
        torch.autograd.grad((y * loss).sum(), [x, *conv.parameters()]),
        torch.autograd.grad((expected * loss).sum(), [x, *conv.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_a_pointwise_convolution_of_few_cells_is_a_matrix_product(monkeypatch):
    conv = Pointwise(6, 10, 1)
    calls = []
    real = F.linear
    monkeypatch.setattr("torch.nn.functional.linear", lambda *given: calls.append(given) or real(*given))
    for training, height in ((True, 4), (False, 16)):
        calls.clear()
        with torch.set_grad_enabled(training):
            for more, channels_last in ((0, True), (1, True), (0, False)):
                x = torch.randn(2, 6, height + more, 32)
                conv(x.to(memory_format=torch.channels_last) if channels_last else x)
                assert len(calls) == 1, (training, more, channels_last)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of torch's attention under vmap
@pytest.mark.parametrize("name", ["test_glattn", "glattn_tiny_window"])
def test_vmap_takes_a_stack_of_batches(name):
    model = timm.create_model(name, num_classes=3).double().eval()
    x = torch.randn(2, 2, 3, 32, 64, dtype=torch.float64)
    with torch.no_grad():
        close(torch.func.vmap(model)(x), torch.stack([model(images) for images in x]))


def test_an_attended_map_of_one_image_is_resized_in_its_memory_format():
    attn = MultiHeadGlobalAttention(32, config=MixerConfig(layout="full", head_dim=16)).eval()
    with torch.no_grad():
        small = attn.groups[0](*(torch.randn(1, 32, 7, 7).to(memory_format=torch.channels_last) for _ in range(3)))
    assert F.interpolate(small, (14, 14), mode="bilinear").is_contiguous(memory_format=torch.channels_last)
