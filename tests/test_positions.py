"""Positions: biases by offset, rotations by complex numbers, tables by the cubic kernel, all recomputed here."""

import math

import pytest
import timm
import torch
from models import randomize
from oracles import attention, cells, conv_norm, heads_of, mixer, sees_by_head, softmax_attention
from safetensors.torch import save_file
from timm.layers import RelPosMlp

from glattn.layers import TABLES, MultiHeadGlobalAttention
from glattn.layers.absolute_position import AbsolutePosition, resize_map
from glattn.layers.position import AxialRotary, ContinuousBias, MixedRotary, RelativeBias, pairs, resize_table

POSITIONS = TABLES["position"]
BIASES = [kind for kind, row in POSITIONS.items() if row.adds_bias]
SIZES = [(7, 11), (5, 4), (1, 6)]


def image(*size, batch=2, dim=8):
    return torch.randn(batch, dim, *size, dtype=torch.float64)


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def cubic(line, size, *, corners):
    """Cubic convolution along the last axis, in a loop: the kernel with a = -0.75, the border's cell repeated."""
    length = line.shape[-1]
    out = []
    for i in range(size):
        at = i * (length - 1) / max(size - 1, 1) if corners else (i + 0.5) * length / size - 0.5
        whole = math.floor(at)
        value = 0.0
        for j in range(whole - 1, whole + 3):
            d, a = abs(at - j), -0.75
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            far = a * (d**3 - 5 * d**2 + 8 * d - 4)
            value = value + (near if d <= 1 else far if d < 2 else 0.0) * line[..., min(max(j, 0), length - 1)]
        out.append(value)
    return torch.stack(out, dim=-1)


def cubic_map(table, height, width, *, corners):
    by_row = cubic(table.transpose(-2, -1), height, corners=corners).transpose(-2, -1)
    return cubic(by_row, width, corners=corners)


def bias_of(attn, height, width):
    """The bias of a branch's first head group on such a map, and the group's queries and keys."""
    group = attn.groups[0]
    span = group.layout.span(height, width)
    like = torch.empty(0, dtype=torch.float64)
    queries = cells(span[0], span[1])
    keys = [(y - span[2], x - span[2]) for y, x in cells(span[0] + 2 * span[2], span[1] + 2 * span[2])]
    return group.position.bias(like, span, group.layout.reach(height, width)), queries, keys


@pytest.mark.parametrize("layout", ["full", "window", "grid", "overlap", "pooled"])
@pytest.mark.parametrize("position", BIASES)
def test_a_bias_is_toeplitz_in_the_offsets(position, layout):
    """Pairs with one offset share a number, pairs with another have another: in a map that is not square, too."""
    attn = attention(layout=layout, position=position, map_size=(6, 9))
    bias, queries, keys = bias_of(attn, 6, 9)
    assert bias.shape == (attn.num_heads, len(queries), len(keys))
    by_offset = {}
    for i, (y, x) in enumerate(queries):
        for j, (b, a) in enumerate(keys):
            by_offset.setdefault((y - b, x - a), []).append(bias[:, i, j])
    for found in by_offset.values():
        assert all(torch.equal(value, found[0]) for value in found)
    # as many numbers as offsets, so that no two axes or directions are mixed up
    assert len({value[0][0].item() for value in by_offset.values()}) == len(by_offset)


@pytest.mark.parametrize("layout", ["full", "window", "shifted"])
@pytest.mark.parametrize("position", BIASES)
@pytest.mark.parametrize("size", [(7, 11), (4, 4), (9, 2)])
def test_a_bias_is_added_to_the_scores_by_head(size, position, layout):
    attn, x = attention(layout=layout, position=position, map_size=(6, 9)), image(*size)
    group = attn.groups[0]
    span, reach = group.layout.span(*size), group.layout.reach(*size)
    like = torch.empty(0, dtype=torch.float64)
    table = group.position.bias(like, span, reach)
    local = {cell: i for i, cell in enumerate(cells(span[0], span[1]))}
    bias = torch.zeros(attn.num_heads, size[0] * size[1], size[0] * size[1], dtype=torch.float64)
    for i, (y, x_) in enumerate(cells(*size)):
        for j, (b, a) in enumerate(cells(*size)):
            down, across = y - b, x_ - a
            if abs(down) < span[0] and abs(across) < span[1]:
                query, key = local[max(down, 0), max(across, 0)], local[max(-down, 0), max(-across, 0)]
                bias[:, i, j] = table[:, query, key]
    q, k, v = (heads_of(part, attn.num_heads) for part in conv_norm(attn.qkv, x).chunk(3, dim=1))
    seen = sees_by_head(attn, mixer(layout=layout), *size)
    out = softmax_attention(q, k, v, bias, seen).transpose(2, 3).reshape(x.shape)
    close(attn(x), conv_norm(attn.proj, out))


@pytest.mark.parametrize("halo", [0, 2])
@pytest.mark.parametrize("span", [(3, 5), (4, 1), (2, 2)])
def test_a_table_is_read_by_query_minus_key(span, halo):
    position = RelativeBias(3, 4, (span[0] + halo, span[1] + halo))
    bias = pairs(position.table, (*span, halo))
    centre = [side // 2 for side in position.table.shape[1:]]
    for i, (y, x) in enumerate(cells(*span)):
        for j, (b, a) in enumerate(cells(span[0] + 2 * halo, span[1] + 2 * halo)):
            expected = position.table[:, centre[0] + y - (b - halo), centre[1] + x - (a - halo)]
            assert torch.equal(bias[:, i, j], expected)


@pytest.mark.parametrize("reach", [(2, 2), (7, 4), (5, 13), (1, 6), (14, 14)])
def test_a_resized_table_keeps_its_centre_and_its_corners(reach):
    """No offset stays no offset, the largest stays the largest, and between them it is cubic interpolation."""
    table = torch.randn(3, 13, 9, dtype=torch.float64)  # reach (7, 5)
    new = resize_table(table, *reach)
    rows, columns = (2 * max(side, 2) - 1 for side in reach)
    assert new.shape == (3, rows, columns)
    close(new[:, rows // 2, columns // 2], table[:, 6, 4])
    close(new[:, :: rows - 1, :: columns - 1], table[:, ::12, ::8])
    close(new, cubic_map(table, rows, columns, corners=True))
    # what is symmetric (a distance) stays so
    even = resize_table(table + table.flip(1, 2), *reach)
    close(even, even.flip(1, 2))


def test_a_table_of_the_right_size_is_itself():
    table = torch.randn(3, 13, 9)
    assert resize_table(table, 7, 5) is table


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("layout", ["full", "pooled"])
def test_resizing_once_is_resizing_each_time(layout, position):
    attn, x = attention(layout=layout, position=position, map_size=(6, 9)), image(10, 7)
    at_run_time = attn(x)
    attn.set_map_size((10, 7))
    close(attn(x), at_run_time)
    new = attention(layout=layout, position=position, map_size=(10, 7))
    new.load_state_dict(attn.state_dict())
    close(new(x), at_run_time)


def test_the_continuous_bias_is_swin_v2s():
    """timm's, with our weights, in a window that is not square."""
    ours = ContinuousBias(3, 4, (5, 7)).double()
    theirs = RelPosMlp((5, 7), num_heads=3, hidden_dim=512, mode="swin").double().eval()
    state = {"mlp.fc1.weight": ours.mlp[0].weight, "mlp.fc1.bias": ours.mlp[0].bias}
    state["mlp.fc2.weight"] = ours.mlp[2].weight
    theirs.load_state_dict(state, strict=False)
    like = torch.empty(0, dtype=torch.float64)
    close(ours.bias(like, (5, 7, 0), (5, 7)).unsqueeze(0), theirs.get_bias(), 1e-6)  # its coordinates are float32


def test_the_continuous_bias_by_its_formula():
    position = ContinuousBias(2, 4, (6, 9)).double()
    bias = position.bias(torch.empty(0, dtype=torch.float64), (3, 4, 1), (6, 9))

    def log(offset, largest):
        return math.copysign(math.log2(1 + 8 * abs(offset) / largest) / math.log2(8), offset)

    for i, (y, x) in enumerate(cells(3, 4)):
        for j, (b, a) in enumerate(cells(5, 6)):
            place = torch.tensor([log(y - b + 1, 5), log(x - a + 1, 8)], dtype=torch.float64)
            inner = (position.mlp[0].weight @ place + position.mlp[0].bias).relu()
            close(bias[:, i, j], 16 / (1 + (-(position.mlp[2].weight @ inner)).exp()))


def test_an_offset_means_the_same_to_the_continuous_bias_on_any_map():
    position = ContinuousBias(2, 4, (6, 9)).double()
    like = torch.empty(0, dtype=torch.float64)
    small = position.bias(like, (6, 9, 0), (6, 9)).unflatten(2, (6, 9)).unflatten(1, (6, 9))
    large = position.bias(like, (15, 20, 0), (15, 20)).unflatten(2, (15, 20)).unflatten(1, (15, 20))
    close(large[:, 4:10, 7:16, 4:10, 7:16], small)
    assert large.isfinite().all()


ROTARY = {"rope": AxialRotary, "rope_mixed": MixedRotary}


def turned(maps, frequencies, num_heads):
    """Pairs of channels as complex numbers times ``exp(i (y fy + x fx))``, cell by cell."""
    tokens = heads_of(maps, num_heads)
    numbers = torch.view_as_complex(tokens.unflatten(-1, (-1, 2)).contiguous())
    out = torch.empty_like(numbers)
    for n, (y, x) in enumerate(cells(*maps.shape[2:])):
        angle = y * frequencies[0] + x * frequencies[1]  # (heads or 1, pairs)
        out[:, :, n] = numbers[:, :, n] * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(out).flatten(-2).transpose(2, 3).reshape(maps.shape)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ROTARY)
def test_rotary_turns_pairs_by_their_cells_angles(kind, size):
    position = ROTARY[kind](2, 8, size).double()
    if kind == "rope":
        bands = [100.0 ** (-j / 2) for j in range(2)]
        zeros = [0.0, 0.0]
        frequencies = torch.tensor([[bands + zeros], [zeros + bands]], dtype=torch.float64)
        close(position.frequencies(image(1, 1)), frequencies)
    else:
        frequencies = position.freqs
    q, k = image(*size, dim=16), image(*size, dim=16)
    for new, old in zip(position.encode(q, k), (q, k), strict=True):
        close(new, turned(old, frequencies, 2))


@pytest.mark.parametrize("kind", ROTARY)
def test_rotary_keeps_norms_and_scores_know_offsets_alone(kind):
    position = ROTARY[kind](2, 8, (6, 9)).double()
    content_q, content_k = (torch.randn(1, 16, 1, 1, dtype=torch.float64).expand(-1, -1, 6, 9) for _ in range(2))
    q, k = (heads_of(part, 2)[0] for part in position.encode(content_q, content_k))
    close(q.norm(dim=-1), heads_of(content_q, 2)[0].norm(dim=-1))
    scores = (q @ k.transpose(1, 2)).unflatten(2, (6, 9)).unflatten(1, (6, 9))
    close(scores[:, 1:, 2:, 1:, 2:], scores[:, :-1, :-2, :-1, :-2])
    # ... and both axes' offsets
    assert not torch.allclose(scores[:, 0, 0, 0, 3], scores[:, 0, 0, 0, 0])
    assert not torch.allclose(scores[:, 0, 0, 3, 0], scores[:, 0, 0, 0, 0])


@pytest.mark.parametrize("kind", ROTARY)
def test_rotary_attention_by_hand(kind):
    attn, x = attention(16, position=kind, head_dim=8), image(6, 9, dim=16)
    q, k, v = conv_norm(attn.qkv, x).chunk(3, dim=1)
    frequencies = attn.groups[0].position.frequencies(x)
    q, k = turned(q, frequencies, 2), turned(k, frequencies, 2)
    out = softmax_attention(*(heads_of(part, 2) for part in (q, k, v))).transpose(2, 3).reshape(x.shape)
    close(attn(x), conv_norm(attn.proj, out))


def test_axial_rotary_tells_rows_from_columns():
    """The first half of a head's channels turns with y alone, the second with x alone."""
    q = torch.randn(1, 8, 1, 1).expand(-1, -1, 5, 7).double()
    out = AxialRotary(1, 8, (5, 7)).encode(q, q)[0]
    close(out[:, :4], out[:, :4, :, :1].expand(-1, -1, -1, 7))
    close(out[:, 4:], out[:, 4:, :1].expand(-1, -1, 5, -1))
    assert (out[:, :4, 1:] != out[:, :4, :-1]).any()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ROTARY)
def test_rotary_angles_are_float32_under_bfloat16(kind, autocast):
    """At cell 250 an angle in bfloat16 would be a whole turn off; the result has one rounding of its own."""
    torch.manual_seed(2)
    position = ROTARY[kind](2, 8, (7, 7))
    q = torch.randn(1, 16, 3, 260).bfloat16()
    exact = position.encode(q.double(), q.double())[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = position.encode(q, q)[0]
    assert out.dtype == torch.bfloat16
    assert ((out.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-3).all()


def test_mixed_rotary_starts_axial_but_turned():
    """A head's frequencies are the axial bands along one direction and the direction across it."""
    freqs = MixedRotary(5, 16, (7, 7)).freqs.detach().double()
    close(freqs.norm(dim=0), (10.0 ** -(torch.arange(8).double() % 4 / 4)).expand(5, -1), 1e-6)
    along, across = freqs[:, :, :4], freqs[:, :, 4:]
    close((along * across).sum(0), torch.zeros(5, 4, dtype=torch.float64), 1e-6)
    angles = torch.atan2(along[1], along[0])
    close(angles, angles[:, :1].expand(-1, 4), 1e-6)
    assert angles[:, 0].unique().numel() == 5


def test_odd_head_widths_are_refused_by_rotary():
    with pytest.raises(ValueError, match=r"head_dim=6.*multiple of 4"):
        MultiHeadGlobalAttention(12, config=mixer(position="rope", head_dim=6))


def test_the_convolution_is_added_before_queries_keys_and_values():
    attn, plain = attention(position="conv"), attention(position="none")
    plain.load_state_dict({k: v for k, v in attn.state_dict().items() if not k.startswith("embed")})
    x = image(7, 5)
    close(attn(x), plain(x + conv_norm(attn.embed.conv, x)))
    assert attn.embed.conv.conv.weight.shape == (8, 1, 3, 3)


@pytest.mark.parametrize("position", POSITIONS)
def test_only_without_position_do_moved_cells_just_move(position):
    attn, x = attention(position=position), image(5, 7)
    order = torch.randperm(35)
    moved = attn(x.flatten(2)[:, :, order].view_as(x)).flatten(2)
    same = torch.allclose(moved, attn(x).flatten(2)[:, :, order])
    assert same == (position == "none")


@pytest.mark.parametrize("layout", ["full", "overlap", "multi_scale"])
@pytest.mark.parametrize("position", POSITIONS)
def test_gradients_are_finite_differences(position, layout):
    """Of the input, and of every parameter of the position."""
    attn = attention(layout=layout, position=position, map_size=(3, 4), window_sizes=(2, 0))
    parameters = {n: p for n, p in attn.named_parameters() if ".position." in n or n.startswith("embed.")}
    names = list(parameters)
    x = image(3, 5, batch=1).requires_grad_()

    def by_weights(x, *values):
        return torch.func.functional_call(attn, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(by_weights, (x, *parameters.values()), fast_mode=True)
    assert bool(names) == (position not in ("none", "rope"))


@pytest.mark.parametrize("size", [(7, 5), (14, 9), (3, 2), (8, 20)])
def test_the_absolute_table_is_resized_by_cubic_interpolation(size):
    position = AbsolutePosition(3, (7, 5)).double()
    x = image(*size, dim=3)
    close(position(x) - x, cubic_map(position.table, *size, corners=False).expand_as(x))
    if size == (7, 5):
        assert torch.equal(position(x), x + position.table)
        assert resize_map(position.table, *size) is position.table
    assert torch.autograd.gradcheck(lambda table: resize_map(table, *size), (position.table,), fast_mode=True)


@pytest.mark.parametrize("size", [(64, 64), (75, 102)])
def test_the_absolute_table_is_added_behind_the_stem_or_at_each_stage(size):
    x = torch.randn(2, 3, *size)
    for abs_pos, count in (("none", 0), ("stem", 1), ("stages", 4)):
        model = randomize(timm.create_model("test_glattn", abs_pos=abs_pos, img_size=64))
        tables = {name: module for name, module in model.named_modules() if isinstance(module, AbsolutePosition)}
        assert len(tables) == count
        plain = randomize(timm.create_model("test_glattn", img_size=64))
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if "pos_embed" not in k})
        # the plain model with the tables added by hand, where each belongs
        y = plain.stem(x)
        if abs_pos == "stem":
            y = y + resize_map(model.stem.pos_embed.table, *y.shape[2:])
        for mine, theirs in zip(plain.stages, model.stages, strict=True):
            y = mine.downsample(y)
            if abs_pos == "stages":
                y = y + resize_map(theirs.pos_embed.table, *y.shape[2:])
            y = mine.blocks(y)
        torch.testing.assert_close(model.forward_features(x), y)


def loaded_at(options, small, large, tmp_path):
    """A model, and one for larger images with its checkpoint: both answer a large image."""
    old = randomize(timm.create_model("test_glattn", img_size=small, num_classes=5, **options))
    save_file(old.state_dict(), tmp_path / "model.safetensors")
    overlay = {"file": str(tmp_path / "model.safetensors"), "num_classes": 5}
    new = timm.create_model(
        "test_glattn", pretrained=True, pretrained_cfg_overlay=overlay, img_size=large, num_classes=5, **options
    ).eval()
    resized = {k for k, v in old.state_dict().items() if v.shape != new.state_dict()[k].shape}
    x = torch.randn(1, 3, *large)
    with torch.no_grad():
        torch.testing.assert_close(new(x), old(x), rtol=1e-4, atol=1e-4)
    return resized


def test_a_checkpoint_at_224_loads_at_384(tmp_path):
    """And then gives what the model that wrote it gives at 384."""
    resized = loaded_at({"position": "bias", "abs_pos": "stem"}, (224, 224), (384, 384), tmp_path)
    assert "stem.pos_embed.table" in resized
    assert "stages.3.blocks.0.mixer.attn.groups.0.position.table" in resized


@pytest.mark.parametrize("position", POSITIONS)
def test_a_checkpoint_loads_at_another_size(position, tmp_path):
    resized = loaded_at({"position": position, "abs_pos": "stages"}, (96, 64), (101, 160), tmp_path)
    assert len([key for key in resized if "pos_embed" in key]) == 4


@pytest.mark.filterwarnings("ignore")  # torch says where its quantisation moves to
def test_a_quantised_model_finds_its_offsets():
    model = randomize(timm.create_model("test_glattn", num_classes=3, layout="full", position="cpb"))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        found = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)(x)
    assert (found - expected).norm() < 0.1 * expected.norm()
