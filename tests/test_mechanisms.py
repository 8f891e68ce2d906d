"""Mechanisms: each against its paper's formula on its own weights, and against softmax where it must be that."""

import math

import pytest
import timm
import torch
from oracles import attention, conv_norm, heads_of, mixer, product, relu_attention, sees_by_head, softmax_attention
from torch.nn import functional as F

from glattn.layers import TABLES
from glattn.layers.linear_attention import Performer, orthogonal_features
from glattn.layers.mechanism import Softmax, resize_projection
from glattn.layers.reformer import lsh_attention

MECHANISMS = TABLES["mechanism"]
INDEXED = [kind for kind, row in TABLES["layout"].items() if not row.pooled]


def qkv(groups=2, heads=3, tokens=11, dim=4, dtype=torch.float64):
    return tuple(torch.randn(groups, heads, tokens, dim, dtype=dtype) for _ in range(3))


def made(kind, heads=3, dim=4, tokens=11, **options):
    return MECHANISMS[kind](heads, dim, tokens, config=mixer(mechanism=kind, **options)).double().eval()


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def some_keys(groups, tokens):
    """A mask of keys that leaves every group at least one, and differs from group to group."""
    mask = torch.rand(groups, tokens) < 0.7
    mask[:, 0] = True
    mask[0, -1] = False
    return mask


# every mechanism


@pytest.mark.parametrize("size", [(7, 11), (1, 5), (12, 3)])
@pytest.mark.parametrize("kind", MECHANISMS)
def test_a_map_of_one_value_stays(kind, size):
    """Weights are a mean's: positive ones that sum to one leave a value that all cells share."""
    attn = made(kind, tokens=size[0] * size[1])
    if kind == "linformer":  # whose rows are learned: make them means
        with torch.no_grad():
            attn.project_v.uniform_(0, 1)
            attn.project_v /= attn.project_v.sum(1, keepdim=True)
    q, k, _ = qkv(tokens=size[0] * size[1])
    q[..., 0] = q[..., 0].abs() + 0.1  # a query of zeros has no weights in ReLU attention
    k[..., 0] = k[..., 0].abs() + 0.1
    v = torch.randn(2, 3, 1, 4, dtype=torch.float64).expand_as(q)
    close(attn(q, k, v, None, None), v)


@pytest.mark.parametrize("kind", MECHANISMS)
def test_masked_keys_do_not_matter(kind):
    """Not even with values of a billion. Where queries are the keys, masked tokens' own answers are nobody's."""
    attn, (q, k, v), mask = made(kind), qkv(), some_keys(2, 11)
    missing = ~mask[:, None, :, None]
    if attn.shares_qk:
        k = q
    other = k.masked_fill(missing, 7.0)
    expected = attn(q, k, v, None, mask)
    out = attn(other if attn.shares_qk else q, other, v.masked_fill(missing, 1e9), None, mask)
    read = ~missing.expand_as(out) if attn.shares_qk else torch.ones_like(out, dtype=torch.bool)
    close(out[read], expected[read])
    assert not torch.allclose(attn(q, k, v, None, None)[0], expected[0])


@pytest.mark.parametrize("kind", MECHANISMS)
def test_groups_do_not_matter_to_each_other(kind):
    attn, (q, k, v), mask = made(kind), qkv(groups=3), some_keys(3, 11)
    k = q if attn.shares_qk else k
    together = attn(q, k, v, None, mask)
    for i in range(3):
        part = slice(i, i + 1)
        close(attn(q[part], k[part], v[part], None, mask[part]), together[part])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", MECHANISMS)
def test_gradients_are_finite_differences(kind, masked):
    attn, mask = made(kind, tokens=7), some_keys(1, 7) if masked else None
    q, k, v = (x.requires_grad_() for x in qkv(groups=1, tokens=7))
    parameters = dict(attn.named_parameters())
    parts = (q, v) if attn.shares_qk else (q, k, v)

    def run(q, *rest):
        k, v, values = (q, rest[0], rest[1:]) if attn.shares_qk else (rest[0], rest[1], rest[2:])
        weights = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(attn, weights, (q, k, v, None, mask))

    assert torch.autograd.gradcheck(run, (*parts, *parameters.values()), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", MECHANISMS)
def test_half_precision_is_near(kind, dtype):
    """Queries, keys and values in half precision, and outputs; what is between is rounded no more than that."""
    attn = made(kind, tokens=77)
    q, k, v = (x.to(dtype) for x in qkv(tokens=77, dtype=torch.float32))
    k = q if attn.shares_qk else k
    exact = attn(q.double(), k.double(), v.double(), None, None)
    out = attn.to(dtype)(q, k, v, None, None)
    assert out.dtype == dtype
    if kind != "reformer":  # whose buckets may differ by a rounding
        assert (out.double() - exact).abs().max() < 0.05 * exact.abs().max()
    assert out.isfinite().all()


@pytest.mark.parametrize("kind", MECHANISMS)
def test_evaluation_is_deterministic_and_saved(kind, tmp_path):
    """Also with the random draws of another seed in between, and in another module with the saved weights."""
    attn, (q, k, v) = made(kind), qkv()
    k = q if attn.shares_qk else k
    expected = attn(q, k, v, None, None)
    torch.save(attn.state_dict(), tmp_path / "weights.pt")
    torch.manual_seed(123)
    assert torch.equal(attn(q, k, v, None, None), expected)
    other = made(kind)
    if other.state_dict():
        assert not torch.allclose(other(q, k, v, None, None), expected)
    other.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert torch.equal(other(q, k, v, None, None), expected)


@pytest.mark.parametrize("kind", MECHANISMS)
def test_the_same_seed_makes_the_same_mechanism(kind):
    states = []
    for _ in range(2):
        torch.manual_seed(7)
        states.append(made(kind).state_dict())
    for a, b in zip(*(state.values() for state in states), strict=True):
        assert torch.equal(a, b)


# softmax


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_softmax_is_its_formula(fused, biased, masked):
    attn, (q, k, v), mask = Softmax(3, 4, 11, config=mixer()), qkv(), some_keys(2, 11) if masked else None
    attn.fused_attn = fused
    bias = torch.randn(3, 11, 11, dtype=torch.float64) if biased else None
    seen = torch.ones(2, 11, dtype=torch.bool) if mask is None else mask
    expected = softmax_attention(q, k, v, 0.0 if bias is None else bias, seen[:, None, None])
    close(attn.eval()(q, k, v, bias, mask), expected)


@pytest.mark.parametrize("fused", [True, False])
def test_softmax_weights_drop_out_in_training_alone(fused):
    attn, (q, k, v) = Softmax(3, 4, 11, config=mixer(attn_drop=0.5)), qkv()
    attn.fused_attn = fused
    expected = softmax_attention(q, k, v)
    close(attn.eval()(q, k, v, None, None), expected)
    draws = torch.stack([attn.train()(q, k, v, None, None) for _ in range(2000)])
    assert not torch.equal(draws[0], draws[1])
    close(draws.mean(0), expected, 0.2)  # unbiased
    attn.eval().attn_drop.train()  # as Monte Carlo dropout does
    assert not torch.equal(attn(q, k, v, None, None), attn(q, k, v, None, None))


# ReLU linear attention


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 35])
def test_relu_attention_is_its_explicit_form(tokens, masked):
    attn, (q, k, v), mask = made("relu_linear"), qkv(tokens=tokens), some_keys(2, tokens) if masked else None
    q[..., 0] = q[..., 0].abs() + 0.1  # no row of zeros here
    k[..., 0] = k[..., 0].abs() + 0.1
    if tokens == 1 and masked:
        mask[:] = True
    close(attn(q, k, v, None, mask), relu_attention(q, k, v, sees=None if mask is None else mask[:, None, None]))


def test_a_query_without_a_positive_channel_gets_zeros_and_finite_gradients():
    attn, (q, k, v) = made("relu_linear"), qkv()
    q[0, 0, 3] = -1.0
    k[1] = -1.0  # all keys of a group
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = attn(q, k, v, None, None)
    assert (out[0, 0, 3] == 0).all()
    assert (out[1] == 0).all()
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["relu_linear", "performer"])
def test_linear_attention_is_finite_in_half_precision_at_1024_pixels(kind, dtype):
    """65536 tokens at stride 4: sums of products of half-precision numbers would pass 65504."""
    attn = MECHANISMS[kind](1, 32, 65536, config=mixer(mechanism=kind)).to(dtype).eval()
    q, k, v = (10 * torch.randn(1, 1, 65536, 32).to(dtype) for _ in range(3))
    out = attn(q, k, v, None, None)
    assert out.dtype == dtype
    assert out.isfinite().all()
    for part in (slice(0, 50), slice(65000, 65050)):
        expected = attn.double()(q.double(), k.double(), v.double(), None, None)[:, :, part]
        scale = expected.abs().max()
        assert (out[:, :, part].double() - expected).abs().max() < 0.05 * scale
    with torch.autocast("cpu", dtype):
        assert attn.to(dtype)(q.float(), k.float(), v.float(), None, None).isfinite().all()


# Performer


def features(x, vectors):
    """FAVOR+: ``exp(w x - |x|^2 / 2) / sqrt(m)``, x scaled by the fourth root of the head's channels."""
    x = x / x.shape[-1] ** 0.25
    return torch.exp(x @ vectors.transpose(-2, -1) - (x * x).sum(-1, keepdim=True) / 2) / math.sqrt(vectors.shape[1])


@pytest.mark.parametrize("masked", [False, True])
def test_performer_is_its_formula(masked):
    attn, (q, k, v), mask = made("performer"), qkv(), some_keys(2, 11) if masked else None
    weights = features(q, attn.vectors) @ features(k, attn.vectors).transpose(-2, -1)
    if masked:
        weights = weights * mask[:, None, None]
    close(attn(q, k, v, None, mask), weights / weights.sum(-1, keepdim=True) @ v)


def test_performers_vectors_are_orthogonal_and_gaussian_in_length():
    vectors = orthogonal_features(torch.empty(0, dtype=torch.float64), 200, 10, 4)
    for block in (vectors[:, :4], vectors[:, 4:8]):
        products = block @ block.transpose(1, 2)
        off = products - torch.diag_embed(products.diagonal(dim1=1, dim2=2))
        assert off.abs().max() < 1e-4
    assert vectors[:, 8:].shape[1] == 2
    # squared lengths have the mean and variance of a chi-squared of 4; each channel those of a normal
    squares = vectors.square().sum(-1)
    assert squares.mean().item() == pytest.approx(4, rel=0.05)
    assert squares.var().item() == pytest.approx(8, rel=0.25)
    assert vectors.mean().item() == pytest.approx(0, abs=0.05)
    assert vectors.var().item() == pytest.approx(1, rel=0.05)


def test_performers_kernel_is_unbiased():
    """The mean of ``features(q) features(k)'`` over draws is ``exp(q k' / sqrt(D))``."""
    q, k, _ = (0.7 * x for x in qkv(groups=1, heads=1, tokens=5))
    vectors = orthogonal_features(q, 20000, 4, 4)
    kernel = (features(q, vectors) @ features(k, vectors).transpose(-2, -1)).mean(1)
    exact = torch.exp(q @ k.transpose(-2, -1) / 2)[:, 0]
    torch.testing.assert_close(kernel, exact, rtol=0.05, atol=0)


def test_performers_error_falls_with_the_root_of_its_features():
    """Where scores are moderate; large ones have heavy tails, and need more features until the root shows."""
    q, k, v = (0.3 * x for x in qkv(groups=1, heads=1, tokens=40, dim=8))
    exact = softmax_attention(q, k, v)
    counts, errors = [16, 32, 64, 128, 256, 512, 1024], []
    for count in counts:
        attn = made("performer", heads=1, dim=8, random_features=count)
        total = 0.0
        for _ in range(24):
            attn.reset_parameters()
            total += (attn(q, k, v, None, None) - exact).square().mean().item()
        errors.append(math.sqrt(total / 24))
    x, y = torch.tensor(counts, dtype=torch.float64).log2(), torch.tensor(errors, dtype=torch.float64).log2()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert slope.item() == pytest.approx(-0.5, abs=0.04)
    assert errors[-1] < 0.1 * exact.std().item()


def test_performer_draws_anew_in_training_alone():
    attn, (q, k, v) = made("performer"), qkv()
    before = attn.vectors.clone()
    trained = [attn.train()(q, k, v, None, None) for _ in range(2)]
    assert not torch.allclose(*trained)
    assert torch.equal(attn.vectors, before)  # which a checkpoint carries
    assert "vectors" in attn.state_dict()
    still = [attn.eval()(q, k, v, None, None) for _ in range(2)]
    assert torch.equal(*still)


def test_performer_does_not_overflow():
    attn = Performer(3, 4, 11, config=mixer(mechanism="performer")).eval()
    q, k, v = (x.float() for x in qkv())
    for scale in (1e-4, 1.0, 30.0, 1e3):
        out = attn(scale * q, scale * k, v, None, None)
        assert out.isfinite().all()
        assert out.abs().max() <= v.abs().max() * 1.001


def test_performers_weights_sum_to_one_however_large_queries_are():
    attn, (q, k, _) = made("performer"), qkv()
    for scale in (1, 10, 20):
        out = attn(scale * q, scale * k, torch.ones_like(q), None, None)
        torch.testing.assert_close(out, torch.ones_like(out))


# Linformer


def test_linformers_keys_are_those_that_a_window_sees():
    model = timm.create_model("test_glattn", mechanism="linformer", layout="overlap", window_size=4, halo=2)
    assert {m.project_k.shape[1] for m in model.modules() if hasattr(m, "project_k")} == {8 * 8}


def test_linformer_with_identity_projections_is_softmax():
    attn, (q, k, v) = made("linformer", linformer_rank=11), qkv()
    with torch.no_grad():
        attn.project_k.copy_(torch.eye(11))
        attn.project_v.copy_(torch.eye(11))
    close(attn(q, k, v, None, None), softmax_attention(q, k, v))


@pytest.mark.parametrize("masked", [False, True])
def test_linformer_is_its_formula(masked):
    attn, (q, k, v), mask = made("linformer"), qkv(), some_keys(2, 11) if masked else None
    real = 1.0 if mask is None else mask[:, None, :, None].double()
    rows = torch.einsum("rn,shnd->shrd", attn.project_k, k * real)
    values = torch.einsum("rn,shnd->shrd", attn.project_v, v * real)
    close(attn(q, k, v, None, mask), softmax_attention(q, rows, values))
    assert attn.project_k.shape == (5, 11)


@pytest.mark.parametrize("tokens", [4, 11, 23])
def test_linformers_projections_are_interpolated_for_other_lengths(tokens):
    attn = made("linformer")
    new = resize_projection(attn.project_k, tokens)
    assert new.shape == (5, tokens)
    for i in range(tokens):
        at = min(max((i + 0.5) * 11 / tokens - 0.5, 0), 10)
        low = int(at)
        part = attn.project_k[:, low] * (1 - at + low) + attn.project_k[:, min(low + 1, 10)] * (at - low)
        close(new[:, i], part * 11 / tokens)
    constant = resize_projection(torch.full((5, 11), 0.3, dtype=torch.float64), tokens)
    close(constant.sum(1), torch.full((5,), 3.3, dtype=torch.float64))
    q, k, v = qkv(tokens=tokens)
    close(attn(q, k, v, None, None), softmax_attention(q, new @ k, resize_projection(attn.project_v, tokens) @ v))


# Reformer


def shared_attention(q, v, allowed=None):
    """Every token with every other, by queries that are the keys, normalised; itself only where it has no other."""
    tokens = q.shape[2]
    scores = q @ F.normalize(q, dim=-1).transpose(2, 3) / math.sqrt(q.shape[-1])
    allowed = torch.ones_like(scores, dtype=torch.bool) if allowed is None else allowed.expand_as(scores)
    itself = torch.eye(tokens, dtype=torch.bool)
    alone = (allowed & ~itself).sum(-1, keepdim=True) == 0
    scores = scores.masked_fill(~allowed | (itself & ~alone), -math.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("rounds", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 2, 11, 16])
def test_one_bucket_is_full_attention_by_shared_queries_and_keys(tokens, rounds):
    attn, (q, _, v) = made("reformer", lsh_bucket_size=16, lsh_rounds=rounds), qkv(tokens=tokens)
    close(attn(q, q, v, None, None), shared_attention(q, v))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [3, 4, 6, 11])
def test_a_round_is_sorted_cut_and_looks_back(size, masked):
    """One round by loops: sort by hash (then place), cut, meet the own bucket and the one before it."""
    attn, (q, _, v) = made("reformer", lsh_bucket_size=size, lsh_rounds=1), qkv()
    mask = some_keys(2, 11) if masked else torch.ones(2, 11, dtype=torch.bool)
    out = attn(q, q, v, None, mask if masked else None)
    for s in range(2):
        for h in range(3):
            hashed = q[s, h] @ attn.directions[0]
            bucket = torch.cat([hashed, -hashed], -1).argmax(-1).tolist()
            order = sorted(range(11), key=lambda i: (not mask[s, i], bucket[i], i))
            at = {token: place // size for place, token in enumerate(order)}
            allowed = torch.tensor(
                [[at[j] in (at[i], at[i] - 1) and bool(mask[s, j]) for j in range(11)] for i in range(11)]
            )
            expected = shared_attention(q[s : s + 1, h : h + 1], v[s : s + 1, h : h + 1], allowed)
            close(out[s, h][mask[s]], expected[0, 0][mask[s]])


def test_rounds_are_joined_by_their_softmax_sums():
    """What each round alone gives, weighted by the sum of its exponentials."""
    attn, (q, _, v) = made("reformer", lsh_bucket_size=4, lsh_rounds=3), qkv(groups=1, heads=1)
    outs, sums = [], []
    for i in range(3):
        directions = attn.directions[i : i + 1]
        outs.append(lsh_attention(q, v, None, directions, 4))
        # the round's softmax sum: numbers of the keys met, each by its score
        order = lsh_order(q[0, 0], directions[0])
        scores = q[0, 0] @ F.normalize(q[0, 0], dim=-1).T / 2
        at = {token: place // 4 for place, token in enumerate(order)}
        met = torch.tensor([[at[j] in (at[i], at[i] - 1) and i != j for j in range(11)] for i in range(11)])
        sums.append((scores.exp() * met).sum(-1))
    share = torch.stack(sums) / torch.stack(sums).sum(0)
    expected = sum(out[0, 0] * part.unsqueeze(1) for out, part in zip(outs, share, strict=True))
    close(attn(q, q, v, None, None)[0, 0], expected)


def lsh_order(q, directions):
    hashed = q @ directions
    bucket = torch.cat([hashed, -hashed], -1).argmax(-1).tolist()
    return sorted(range(len(q)), key=lambda i: (bucket[i], i))


def test_recall_of_the_top_keys_rises_with_rounds():
    """Values that name their tokens tell which keys have a weight."""
    tokens, recalls = 128, []
    q = torch.randn(4, 1, tokens, 16, dtype=torch.float64)
    v = torch.eye(tokens, dtype=torch.float64).expand(4, 1, tokens, tokens)
    scores = (q @ F.normalize(q, dim=-1).transpose(2, 3)).masked_fill(torch.eye(tokens, dtype=torch.bool), -math.inf)
    top = scores.topk(4, dim=-1).indices
    for rounds in (1, 2, 4, 8, 16):
        torch.manual_seed(rounds)
        directions = torch.randn(rounds, 16, 64, dtype=torch.float64)
        weights = torch.stack([seen_weights(q[i : i + 1], v[i : i + 1], directions) for i in range(4)])
        recalls.append((weights.gather(-1, top) > 0).double().mean().item())
    assert recalls == sorted(recalls)
    assert recalls[0] > 1.5 * 16 / tokens  # better than chance: 16 keys are met
    assert recalls[-1] > 0.8
    # ... and the answer nears full attention's
    values = torch.randn(4, 1, tokens, 16, dtype=torch.float64)
    errors = [
        (lsh_attention(q, values, None, torch.randn(r, 16, 64, dtype=torch.float64), 8) - shared_attention(q, values))
        .square()
        .mean()
        .item()
        for r in (1, 4, 16)
    ]
    assert errors == sorted(errors, reverse=True)


def seen_weights(q, v, directions):
    """``(heads, N, N)`` weights: attention over values that name their tokens, as many channels at once as q has."""
    parts = [lsh_attention(q, part, None, directions, 8)[0] for part in v.split(q.shape[-1], dim=-1)]
    return torch.cat(parts, dim=-1)


@pytest.mark.parametrize("rounds", [1, 3])
def test_equal_tokens_meet(rounds):
    """Tokens with one hash stand side by side: two tokens of one direction among orthogonal-ish others."""
    q = torch.randn(1, 1, 64, 16, dtype=torch.float64)
    q[0, 0, 50] = 3 * q[0, 0, 5]
    directions = torch.randn(rounds, 16, 64, dtype=torch.float64)
    v = torch.eye(64, dtype=torch.float64).expand(1, 1, 64, 64)
    weights = seen_weights(q, v, directions)[0]
    assert weights[50, 5] > 0


# in a branch


@pytest.mark.parametrize(
    ("kind", "layout"),
    # Linformer's rows are of a window's tokens, padded ones too; Reformer's case follows
    [("linformer", "full"), *product(mechanism=["softmax", "relu_linear", "performer"], layout=INDEXED)],
)
def test_a_branch_is_its_mechanism_on_its_heads(kind, layout):
    """On the projections of x: of each window alone, against the mechanism's own formula with what is seen."""
    torch.manual_seed(1)
    size = (5, 7)
    attn = attention(layout=layout, mechanism=kind, map_size=size)
    x = torch.randn(2, 8, *size, dtype=torch.float64)
    q, k, v = (heads_of(part, attn.num_heads) for part in conv_norm(attn.qkv, x).chunk(3, dim=1))
    seen = sees_by_head(attn, mixer(layout=layout), *size)
    inner = attn.groups[0].inner_attn
    if kind == "softmax":
        out = softmax_attention(q, k, v, sees=seen)
    elif kind == "relu_linear":
        out = relu_attention(q, k, v, sees=seen)
    elif kind == "performer":
        vectors = torch.cat([group.inner_attn.vectors for group in attn.groups])
        weights = features(q, vectors) @ features(k, vectors).transpose(-2, -1) * seen
        out = weights / weights.sum(-1, keepdim=True) @ v
    else:
        out = softmax_attention(q, inner.project_k @ k, inner.project_v @ v)
    close(attn(x), conv_norm(attn.proj, out.transpose(2, 3).reshape(x.shape)))


@pytest.mark.parametrize("size", [(6, 9), (5, 8)])
def test_a_reformer_branch_is_shared_attention_on_its_heads(size):
    attn = attention(mechanism="reformer", lsh_bucket_size=64)
    x = torch.randn(2, 8, *size, dtype=torch.float64)
    q, v = (heads_of(part, attn.num_heads) for part in conv_norm(attn.qkv, x).chunk(2, dim=1))
    close(attn(x), conv_norm(attn.proj, shared_attention(q, v).transpose(2, 3).reshape(x.shape)))
    assert attn.qkv.conv.out_channels == 16  # no keys of their own


@pytest.mark.parametrize(("mechanism", "layout"), product(mechanism=MECHANISMS, layout=TABLES["layout"]))
def test_a_branch_passes_gradients_to_all_it_has(mechanism, layout):
    attn = attention(layout=layout, mechanism=mechanism).train()
    x = torch.randn(2, 8, 7, 10, dtype=torch.float64).requires_grad_()
    attn(x).square().sum().backward()
    assert x.grad.isfinite().all()
    for name, parameter in attn.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
