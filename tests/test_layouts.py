"""Layouts: which cell sees which, against loops over all pairs of cells."""

import math

import pytest
import torch
import torch.nn.functional as F
from oracles import (
    attention,
    conv_norm,
    dense_attention,
    heads_of,
    mixer,
    product,
    relu_attention,
    sees,
    sees_by_head,
    softmax_attention,
)
from timm.models.maxxvit import grid_partition
from timm.models.swin_transformer import window_partition
from torch.utils.flop_counter import FlopCounterMode

from glattn import MixerConfig
from glattn.layers import TABLES, MultiHeadGlobalAttention
from glattn.layers.attention import HeadGroup
from glattn.layers.cross_window import strip_mean

SIZES = [(7, 11), (12, 12), (13, 5), (1, 9), (2, 2), (8, 4)]
INDEXED = [kind for kind, row in TABLES["layout"].items() if not row.pooled]


def image(*size, batch=2, dim=8):
    return torch.randn(batch, dim, *size, dtype=torch.float64)


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", INDEXED)
def test_a_layout_is_full_attention_behind_its_mask(layout, size):
    for seed, channels_last in enumerate((False, True)):
        torch.manual_seed(seed)
        attn = attention(layout=layout)
        x = image(*size)
        expected = dense_attention(attn, x, sees_by_head(attn, mixer(layout=layout), *size))
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        close(attn(x), expected)


@pytest.mark.parametrize("layout", INDEXED)
def test_linear_attention_in_a_layout_is_its_masked_form(layout):
    attn, x = attention(layout=layout, mechanism="relu_linear"), image(7, 10)
    close(attn(x), dense_attention(attn, x, sees_by_head(attn, mixer(layout=layout), 7, 10), attend=relu_attention))


@pytest.mark.parametrize(("layout", "mechanism"), product(layout=INDEXED, mechanism=TABLES["mechanism"]))
def test_what_a_cell_does_not_see_cannot_matter(layout, mechanism):
    size, query = (7, 10), 7 * 10 // 2 + 3
    config = mixer(layout=layout)
    attn, x = attention(layout=layout, mechanism=mechanism), image(*size)
    seen = sees(config, *size).any(0)[query]
    poisoned = x.flatten(2).clone()
    poisoned[:, :, ~seen] = 1e3 * torch.randn(2, 8, int((~seen).sum()), dtype=torch.float64)
    close(attn(poisoned.view_as(x)).flatten(2)[:, :, query], attn(x).flatten(2)[:, :, query])
    if layout != "full" and layout != "multi_scale":  # whose last head group sees the whole map
        assert not seen.all()


@pytest.mark.parametrize("mechanism", ["softmax", "relu_linear", "linformer"])
@pytest.mark.parametrize("layout", ["window", "shifted", "grid", "overlap"])
def test_cells_that_pad_a_map_are_never_attended(layout, mechanism):
    """Keys that do not exist get values of a billion: they would show."""
    attn = attention(layout=layout, mechanism=mechanism)
    group, (q, k, v) = attn.groups[0], (image(5, 7) for _ in range(3))
    expected = group(q, k, v)
    real = group.layout.group

    def poisoned(q, k, v):
        q, k, v, mask = real(q, k, v)
        assert mask is not None
        assert not mask.all()
        missing = ~mask.unsqueeze(2)
        return q, k.masked_fill(missing, 1e3), v.masked_fill(missing, 1e9), mask

    group.layout.group = poisoned
    close(group(q, k, v), expected)


LARGE = {
    "window": {"window_size": 16},
    "shifted": {"window_size": 16},
    "grid": {"window_size": 16},
    "overlap": {"window_size": 16, "halo": 3},
    "multi_scale": {"window_sizes": (16, 40)},
    "cross_shaped": {"window_size": 16},
    "pooled": {"pool_stride": 1},
    "full": {},
}


@pytest.mark.parametrize("position", ["none", "rope", "rope_mixed", "conv"])
@pytest.mark.parametrize("layout", TABLES["layout"])
def test_a_window_that_holds_the_map_is_full_attention(layout, position):
    for seed, size in enumerate([(7, 11), (16, 16), (9, 4)]):
        torch.manual_seed(seed)
        full = attention(layout="full", position=position)
        other = attention(layout=layout, position=position, **LARGE[layout])
        state = full.state_dict()
        if len(other.groups) > 1 and position == "rope_mixed":  # its frequencies are kept a head group
            freqs = state.pop("groups.0.position.freqs").chunk(2, dim=1)
            state |= {f"groups.{i}.position.freqs": part for i, part in enumerate(freqs)}
        other.load_state_dict(state)
        x = image(*size)
        close(other(x), full(x))


@pytest.mark.parametrize("size", [(12, 8), (8, 12), (4, 12), (15, 10)])
@pytest.mark.parametrize("window", [4, 5])
def test_shifted_windows_are_swins(size, window):
    """timm's Swin rolls the map and masks regions; which pairs that leaves, by the cells' numbers."""
    if size[0] % window or size[1] % window:
        size = tuple(math.ceil(s / window) * window for s in size)
    shift = [0 if s <= window else window // 2 for s in size]
    numbers = torch.arange(size[0] * size[1]).view(1, *size, 1)
    rolled = window_partition(numbers.roll((-shift[0], -shift[1]), (1, 2)), (window, window)).flatten(1)
    regions = torch.zeros(1, *size, 1)
    count = 0
    for rows in _swin_slices(window, shift[0]):
        for columns in _swin_slices(window, shift[1]):
            regions[:, rows, columns] = count
            count += 1
    regions = window_partition(regions, (window, window)).flatten(1)
    expected = torch.zeros(size[0] * size[1], size[0] * size[1], dtype=torch.bool)
    for of_window, ids in zip(regions, rolled, strict=True):
        for a, i in zip(of_window, ids, strict=True):
            expected[i, ids[of_window == a]] = True
    assert torch.equal(seen_by_gradient(attention(layout="shifted", window_size=window), size), expected)


def _swin_slices(window, shift):
    return (slice(0, -window), slice(-window, -shift), slice(-shift, None)) if shift else (slice(None),)


def seen_by_gradient(attn, size):
    """``(N, N)``: does a change of the key's cell change the query's?"""
    x = image(*size, batch=1).requires_grad_()
    out = attn(x).flatten(2).pow(2).sum(1)[0]
    rows = [torch.autograd.grad(value, x, retain_graph=True)[0].flatten(2).abs().amax(1)[0] > 0 for value in out]
    return torch.stack(rows)


@pytest.mark.parametrize("layout", INDEXED)
def test_what_is_seen_is_what_has_a_gradient(layout):
    assert torch.equal(seen_by_gradient(attention(layout=layout), (5, 8)), sees(mixer(layout=layout), 5, 8).any(0))


def test_the_grid_is_maxvits():
    numbers = torch.arange(12 * 8).view(1, 12, 8, 1)
    expected = torch.zeros(96, 96, dtype=torch.bool)
    for ids in grid_partition(numbers, (4, 4)).flatten(1):
        expected[ids.unsqueeze(1), ids.unsqueeze(0)] = True
    assert torch.equal(sees(MixerConfig(layout="grid", window_size=4), 12, 8)[0], expected)


@pytest.mark.parametrize(("size", "rounds"), [((12, 8), 1), ((16, 16), 1), ((13, 10), 2), ((7, 15), 2)])
def test_window_then_grid_reaches_every_cell(size, rounds):
    """Where windows fill the map; a last window cut by the border needs a second round."""
    parts = [attention(layout=layout, window_size=4) for layout in ("window", "grid")] * rounds
    x = image(*size, batch=1).requires_grad_()
    out = x
    for part in parts:
        out = part(out)
    for value in out.pow(2).sum(1).flatten():
        grad = torch.autograd.grad(value, x, retain_graph=True)[0]
        assert (grad.abs().amax(1) > 0).all()


@pytest.mark.parametrize(("side", "window", "reached"), [(49, 7, True), (50, 7, False), (56, 7, False), (56, 8, True)])
def test_window_and_grid_reach_every_cell_up_to_the_windows_square(side, window, reached):
    near, far = (sees(MixerConfig(layout=kind, window_size=window), side, 1)[0].int() for kind in ("window", "grid"))
    assert ((near @ far).bool().all(), (far @ near).bool().all()) == (reached, reached)


@pytest.mark.parametrize(
    ("layout", "position", "mechanism"),
    product(layout=["multi_scale", "cross_shaped"], position=TABLES["position"], mechanism=TABLES["mechanism"]),
)
def test_head_groups_are_each_alone_and_concatenated(layout, position, mechanism):
    options = {"layout": layout, "position": position, "mechanism": mechanism, "window_sizes": (3, 5, 0)}
    count = 3 if layout == "multi_scale" else 2
    attn = attention(8 * count, map_size=(7, 9), **options)
    x = image(7, 9, dim=8 * count)
    qkv = conv_norm(attn.qkv, attn.embed(x))
    shared = qkv.shape[1] == 2 * attn.dim
    q, k, v = [qkv[:, : attn.dim], *qkv.chunk(2 if shared else 3, dim=1)[-2:]]
    outs = []
    for i, group in enumerate(attn.groups):
        alone = HeadGroup(2, 4, layout=group.layout, map_size=(7, 9), config=mixer(**options)).double().eval()
        alone.load_state_dict(group.state_dict())
        outs.append(alone(*(part[:, 8 * i : 8 * i + 8] for part in (q, k, v))))
    close(attn(x), conv_norm(attn.proj, torch.cat(outs, dim=1)))


@pytest.mark.parametrize("halo", [1, 2, 4])
@pytest.mark.parametrize("size", [(7, 11), (9, 9), (2, 10)])
def test_overlapping_windows_are_cut_one_by_one(size, halo):
    attn = attention(layout="overlap", window_size=3, halo=halo, position="bias", map_size=size)
    table, x = attn.groups[0].position.table, image(*size)
    q, k, v = conv_norm(attn.qkv, x).chunk(3, dim=1)
    out = torch.zeros_like(q)
    for top in range(0, size[0], 3):
        for left in range(0, size[1], 3):
            inner = slice(top, min(top + 3, size[0])), slice(left, min(left + 3, size[1]))
            outer = [
                slice(max(s.start - halo, 0), min(s.start + 3 + halo, n)) for s, n in zip(inner, size, strict=True)
            ]
            queries, keys = (
                [(y, x) for y in range(a.start, a.stop) for x in range(b.start, b.stop)] for a, b in (inner, outer)
            )
            centre = [n // 2 for n in table.shape[1:]]
            bias = torch.stack(
                [
                    torch.stack([table[:, centre[0] + a[0] - b[0], centre[1] + a[1] - b[1]] for b in keys], -1)
                    for a in queries
                ],
                -2,
            )
            parts = q[(..., *inner)], k[(..., *outer)], v[(..., *outer)]
            answer = softmax_attention(*(heads_of(part, attn.num_heads) for part in parts), bias)
            out[(..., *inner)] = answer.transpose(2, 3).reshape(parts[0].shape)
    close(attn(x), conv_norm(attn.proj, out))


@pytest.mark.parametrize("position", TABLES["position"])
def test_no_halo_is_plain_windows(position):
    torch.manual_seed(1)
    window = attention(layout="window", position=position, window_size=4)
    overlap = attention(layout="overlap", position=position, window_size=4, halo=0)
    overlap.load_state_dict(window.state_dict())
    x = image(7, 10)
    close(overlap(x), window(x))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 8, 30])
@pytest.mark.parametrize("size", [(7, 11), (1, 5), (6, 3)])
def test_strips_are_naive_means(size, length):
    x = image(*size)
    for dim, cells_along in ((2, size[0]), (3, size[1])):
        out = strip_mean(x, length, dim)
        for i in range(cells_along):
            around = [j for j in range(i - length // 2, i - length // 2 + length) if 0 <= j < cells_along]
            mean = torch.stack([x.select(dim, j) for j in around]).mean(0)
            close(out.select(dim, i), mean)


def test_strips_are_summed_and_as_long_as_the_window():
    attn, plain = attention(layout="window", cross_window="strip"), attention(layout="window")
    plain.load_state_dict(attn.state_dict())
    attn.proj = plain.proj = torch.nn.Identity()
    x = image(9, 7)
    inside = plain(x)
    close(attn(x), strip_mean(inside, 4, 2) + strip_mean(inside, 4, 3))


def test_strips_carry_gradients_across_windows():
    joined = seen_by_gradient(attention(layout="window", cross_window="strip"), (8, 8))
    apart = seen_by_gradient(attention(layout="window"), (8, 8))
    edge, beyond = 3 * 8 + 3, 3 * 8 + 4  # neighbours on both sides of a vertical border
    assert joined[edge, beyond]
    assert not apart[edge, beyond]
    assert (apart <= joined).all()


@pytest.mark.parametrize("position", ["none", "rope", "conv"])
def test_strips_work_where_the_map_is_smaller(position):
    attn = attention(layout="window", window_size=7, cross_window="strip", position=position)
    full = attention(layout="full", position=position)
    full.load_state_dict(attn.state_dict())
    full.proj = torch.nn.Identity()
    x = image(2, 3)
    inside = full(x)
    expected = inside.mean(2, keepdim=True) + inside.mean(3, keepdim=True)
    close(attn(x), conv_norm(attn.proj, expected))


@pytest.mark.parametrize("mechanism", ["softmax", "relu_linear", "performer"])
def test_vertical_stripes_are_transposed_horizontal_ones(mechanism):
    """CSWin: the second half of the heads does to x what the first does to transposed x."""
    horizontal, vertical = attention(layout="cross_shaped", mechanism=mechanism).groups
    vertical.load_state_dict(horizontal.state_dict())
    maps = [image(7, 10, dim=4) for _ in range(3)]
    across = horizontal(*(m.transpose(2, 3) for m in maps)).transpose(2, 3)
    close(vertical(*maps), across)
    assert not torch.allclose(horizontal(*maps), across)


@pytest.mark.parametrize("stride", [2, 3, 4])
@pytest.mark.parametrize("size", [(7, 11), (8, 8), (5, 2)])
def test_pooled_attention_is_full_attention_on_the_strided_map(size, stride):
    attn, x = attention(layout="pooled", pool_stride=stride), image(*size)
    small = conv_norm(attn.pool, F.pad(x, [0, -size[1] % stride, 0, -size[0] % stride]))
    assert small.shape[2:] == tuple(math.ceil(s / stride) for s in size)
    out = F.interpolate(dense_attention(attn, small), scale_factor=stride, mode="bilinear")
    close(attn(x), out[:, :, : size[0], : size[1]])


@pytest.mark.parametrize("size", [(16, 24), (17, 23), (5, 9), (1, 7)])
@pytest.mark.parametrize("stride", [2, 3, 4, 8])
def test_the_pooled_map_misses_no_cell_and_stays_in_place(stride, size):
    attn = attention(layout="pooled", pool_stride=stride)
    x = image(*size).requires_grad_()
    (seen,) = torch.autograd.grad(attn(x)[:, :, 0, 0].square().sum(), x)
    assert seen.ne(0).all()
    # the cells behind a pooled cell lie around where bilinear resizing puts it, to half a cell
    x = image(4 * stride, 4 * stride).requires_grad_()
    (behind,) = torch.autograd.grad(attn.pool(x)[:, :, 1, 1].sum(), x)
    rows = behind[0, 0].nonzero()[:, 0]
    assert abs((rows.min() + rows.max()) / 2 - (1.5 * stride - 0.5)) <= 0.5


def test_pooling_by_one_is_full_attention():
    full, pooled = attention(layout="full"), attention(layout="pooled", pool_stride=1)
    pooled.load_state_dict(full.state_dict())
    x = image(7, 11)
    assert torch.equal(pooled(x), full(x))


# image -> (window of the layer at stride 4: image / 32, map / 8, at most 196 tokens)
STATED = {
    (224, 224): ((7, 7), (7, 7), (14, 14)),
    (448, 448): ((14, 14), (14, 14), (14, 14)),
    (1024, 1024): ((32, 32), (32, 32), (14, 14)),
    (225, 333): ((7, 10), (8, 11), (12, 14)),
    (96, 640): ((3, 20), (3, 20), (12, 14)),
    (16, 20): ((1, 1), (1, 1), (4, 5)),
}


@pytest.mark.parametrize("size", STATED)
def test_dynamic_windows_have_the_stated_size(size):
    height, width = (math.ceil(side / 4) for side in size)
    found = []
    for sizing, ratio in (("image", 32), ("map", 8), ("tokens", 8)):
        config = mixer(layout="window", window_sizing=sizing, window_ratio=ratio, window_tokens=196)
        attn = MultiHeadGlobalAttention(8, config=config, map_size=(height, width), stride=4)
        found.append(attn.groups[0].layout.size(height, width))
    assert tuple(found) == STATED[size]
    assert found[0] == tuple(max(math.ceil(side / 4) * 4 // 32, 1) for side in size)
    assert found[1] == (math.ceil(height / 8), math.ceil(width / 8))


@pytest.mark.parametrize("layout", ["window", "shifted", "overlap"])
def test_no_query_sees_more_than_the_token_budget(layout):
    for budget in (25, 49, 60, 196):
        attn = attention(layout=layout, window_sizing="tokens", window_tokens=budget, halo=1)
        for size in [(1, 1), (7, 7), (15, 56), (57, 83), (256, 256)]:
            x = image(*size, batch=1, dim=4)
            _, k, _, _ = attn.groups[0].layout.group(x, x, x)
            assert k.shape[1] <= budget


def test_windows_by_the_map_cut_it_at_run_time():
    attn = attention(layout="window", window_sizing="map", window_ratio=3)
    assert attn.groups[0].layout.frame(10, 7)[:4] == (3, 4, 3, 3)
    assert attn.groups[0].layout.frame(2, 30)[:4] == (2, 1, 3, 10)


@pytest.mark.parametrize("position", ["none", "bias"])
def test_windows_by_the_image_follow_a_new_image_size(position):
    options = {"layout": "window", "window_sizing": "image", "position": position}
    attn = MultiHeadGlobalAttention(8, config=mixer(**options), map_size=(14, 14), stride=16)
    attn.set_map_size((24, 20))
    new = MultiHeadGlobalAttention(8, config=mixer(**options), map_size=(24, 20), stride=16)
    assert attn.groups[0].layout.size(24, 20) == new.groups[0].layout.size(24, 20) == (12, 10)
    new.load_state_dict(attn.state_dict())


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("window", {"window_sizing": "tokens", "window_tokens": 196}),
        ("shifted", {"window_sizing": "tokens", "window_tokens": 196}),
        ("overlap", {"window_sizing": "tokens", "window_tokens": 196}),
        ("window", {"window_size": 8}),
        ("grid", {"window_size": 8}),
        ("full", {"mechanism": "relu_linear"}),
        ("full", {"mechanism": "performer"}),
        ("full", {"mechanism": "linformer"}),
    ],
)
def test_cost_a_pixel_stays_flat(layout, options):
    """Multiply-adds a pixel at stride 4, 224 to 1024 pixels and odd sizes, counted on the meta device."""
    costs = []
    for side in (224, 229, 448, 613, 1024):
        attn = MultiHeadGlobalAttention(
            32,
            config=MixerConfig(layout=layout, position="none", **options),
            map_size=(56, 56),
            stride=4,
            device="meta",
        ).eval()
        cells_along = math.ceil(side / 4)
        with FlopCounterMode(display=False) as counter:
            attn(torch.empty(1, 32, cells_along, cells_along, device="meta"))
        costs.append(counter.get_total_flops() / cells_along**2)
    # small maps pay for windows that their border cuts, shifted ones for a row and a column of windows more
    assert max(costs) < 1.5 * min(costs)
    assert costs[-1] < 1.1 * costs[0]


def test_full_attention_does_not_stay_flat():
    """The count above can fail."""
    costs = []
    for side in (56, 112):
        attn = MultiHeadGlobalAttention(32, config=MixerConfig(layout="full"), device="meta").eval()
        with FlopCounterMode(display=False) as counter:
            attn(torch.empty(1, 32, side, side, device="meta"))
        costs.append(counter.get_total_flops() / side**2)
    assert costs[1] > 3 * costs[0]


@pytest.mark.parametrize("cross_window", TABLES["cross_window"])
@pytest.mark.parametrize("layout", TABLES["layout"])
def test_gradients_are_finite_differences(layout, cross_window):
    attn = attention(layout=layout, position="bias", cross_window=cross_window, map_size=(3, 4))
    x = image(3, 5, batch=1).requires_grad_()
    weight, table = attn.qkv.conv.weight, attn.groups[0].position.table

    def by_weights(x, weight, table):
        changed = {"qkv.conv.weight": weight, "groups.0.position.table": table}
        return torch.func.functional_call(attn, changed, (x,))

    assert torch.autograd.gradcheck(by_weights, (x, weight, table), fast_mode=True)


@pytest.mark.parametrize("unfused", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_tiny_shifted_windows_have_finite_gradients(size, unfused):
    """A window without a cell would make NaN of its neighbours' gradients."""
    attn = attention(layout="shifted", window_size=size)
    attn.groups[0].inner_attn.fused_attn = not unfused
    x = image(5, 4).requires_grad_()
    attn(x).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_every_layout_is_in_these_tests():
    assert set(LARGE) == set(TABLES["layout"])
    assert [kind for kind, row in TABLES["layout"].items() if row.pooled] == ["pooled"]
