"""The matrices of a scan, against what the scan itself makes of its input."""

import sys

import pytest
import torch

from mambapy import ops
from mambapy.attention import Attention
from mambapy.bidirectional import BiMamba2Block, BiMambaBlock
from mambapy.config import AttentionConfig, Mamba2Config, Mamba3Config, MambaConfig, VimConfig
from mambapy.errors import ConfigError, MissingExtraError, ShapeError
from mambapy.hidden_attention import attention_matrix, draw, patch_attention
from mambapy.mamba import MambaBlock
from mambapy.mamba2 import Mamba2Block
from mambapy.mamba3 import Mamba3Block
from mambapy.vim import VisionMamba, VMamba
from tests.helpers import assert_near

ONE = {"d_model": 8, "n_layers": 1, "d_state": 4}
TWO = {**ONE, "d_head": 4}
MIXERS = {
    "mamba": (MambaBlock, MambaConfig(**ONE)),
    "mamba, inner norms": (MambaBlock, MambaConfig(**ONE, inner_norm="learned")),
    "mamba2": (Mamba2Block, Mamba2Config(**TWO, n_groups=2)),
    "mamba2, limits": (Mamba2Block, Mamba2Config(**TWO, dt_limit=(0.3, 0.6))),
    "mamba2, wide D": (Mamba2Block, Mamba2Config(**TWO, n_groups=2, D_has_hdim=True)),
    "both ways": (BiMambaBlock, MambaConfig(**ONE)),
    "both ways, mamba2": (BiMamba2Block, Mamba2Config(**TWO, n_groups=2, dt_limit=(0.3, 0.9))),
}
each = pytest.mark.parametrize("kind", [*MIXERS])
TINY = {"img_size": 12, "patch_size": 4, "embed_dim": 8, "depth": 3, "num_classes": 5}


def perturbed(model, dtype=torch.float64):
    with torch.no_grad():
        for P in model.parameters():
            P.add_(0.3 * torch.randn_like(P))
    return model.to(dtype).eval()


def made(kind, dtype=torch.float64):
    block, config = MIXERS[kind]
    return perturbed(block(config), dtype)


@pytest.fixture
def seen(monkeypatch):
    """What goes into every scan that runs, and what comes out of it without the gate."""
    found = []

    def watch(name):
        run = getattr(ops, name)

        def watched(x, dt, A, B, C, D, z=None, **options):
            y = run(x, dt, A, B, C, D, **{**options, "return_state": False})
            found.append((x.detach(), y.detach()))
            if name == "ssd" and len(found) == 2:
                # It has one direction: a block that looks both ways turns what it gives it.
                found[1] = tuple(T.flip(1) for T in found[1])
            return run(x, dt, A, B, C, D, z, **options)

        monkeypatch.setattr(ops, name, watched)

    watch("selective_scan")
    watch("ssd")
    return found


def whole(kind, y):
    """A scan's output without the factor 1/2 in C and D that makes the mean of two directions."""
    return 2 * y if kind == "both ways" else y


def applied(M, x):
    """M x; a head's matrix counts for each of its channels."""
    x, heads = (x, x.dim() == 4) if M.shape[1] != x[0, 0].numel() else (x.flatten(2), False)
    return torch.einsum("bhts,bshp->bthp" if heads else "bmts,bsm->btm", M, x)


@each
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("l", [1, 2, 17])
def test_is_what_the_scan_multiplies_by(kind, l, dtype, tolerance, seen):
    mixer = made(kind, dtype)
    x = torch.randn(2, l, 8, dtype=dtype)
    mixer(x)
    M = attention_matrix(mixer, x)
    assert M.dtype == dtype
    assert not M.requires_grad
    ways = M if kind.startswith("both") else M[None]
    assert len(ways) == len(seen)
    for i, (M, (x, y)) in enumerate(zip(ways, seen, strict=True)):
        y = whole(kind, y)
        assert_near(applied(M, x), y if M.shape[1] == y.shape[2] else y.flatten(2), tolerance)
        assert torch.equal(M, M.triu() if i else M.tril())


@each
def test_the_mean_over_channels(kind, monkeypatch):
    mixer, x = made(kind), torch.randn(2, 9, 8, dtype=torch.float64)
    M = attention_matrix(mixer, x)
    expected = M.abs().mean(dim=-3)
    for at_once in (1, 500, 2**20):
        monkeypatch.setattr("mambapy.hidden_attention.AT_ONCE", at_once)
        assert_near(attention_matrix(mixer, x, reduce="mean_abs"), expected, 1e-12)
        assert_near(attention_matrix(mixer, x), M, 1e-12)


@each
@pytest.mark.parametrize("rate", [1e-6, 1.0, 1e4])
def test_never_overflows(kind, rate, seen):
    """Steps of about one, and decays up to exp(-1e4) a step."""
    mixer, x = made(kind, torch.float32), torch.randn(1, 300, 8)
    with torch.no_grad():
        for name, P in mixer.named_parameters():
            if name in ("A_log", "A_b_log"):
                P.fill_(rate).log_()
            if name in ("dt_bias", "dt_bias_b", "dt_proj.bias", "dt_proj_b.bias"):
                P.fill_(0.5)
    mixer(x)
    M = attention_matrix(mixer, x)
    assert torch.isfinite(M).all()
    M = M[0] if kind.startswith("both") else M
    (x, y), *_ = seen
    y = whole(kind, y)
    assert_near(applied(M, x), y if M.shape[1] == y.shape[2] else y.flatten(2), 1e-4)


def test_layers_are_called():
    mixer, x = made("both ways"), torch.randn(1, 5, 8, dtype=torch.float64)
    plain = attention_matrix(mixer, x)
    for name, way in (("in_proj", (0, 1)), ("x_proj", (0,)), ("dt_proj_b", (1,))):
        hook = getattr(mixer, name).register_forward_hook(lambda _, __, y: 2 * y)
        changed = [
            not torch.equal(a, b) for a, b in zip(plain, attention_matrix(mixer, x), strict=True)
        ]
        assert changed == [0 in way, 1 in way]
        hook.remove()
    assert torch.equal(attention_matrix(mixer, x), plain)


def test_half_precision_is_calculated_in_float32():
    for kind in MIXERS:
        mixer = made(kind, torch.float32)
        x = torch.randn(1, 9, 8)
        full = attention_matrix(mixer, x)
        half = attention_matrix(mixer.to(torch.bfloat16), x.to(torch.bfloat16))
        assert half.dtype == torch.float32
        assert_near(half, full, 0.1)


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
@pytest.mark.parametrize("class_token", ["middle", "head", "none"])
@pytest.mark.parametrize(
    ("sizes", "image", "grid"),
    [
        ({}, (12, 12), (3, 3)),
        ({"patch_size": (4, 3), "img_size": (8, 12)}, (8, 12), (2, 4)),
        ({"patch_size": 4, "stride": 2}, (12, 12), (5, 5)),
        ({}, (8, 20), (2, 5)),
        ({"patch_size": 12}, (12, 12), (1, 1)),
    ],
)
def test_patches(mixer, class_token, sizes, image, grid):
    options = {"d_state": 4, **({"d_head": 4} if mixer == "mamba2" else {})}
    config = VimConfig(**TINY | sizes, mixer=mixer, mixer_options=options, class_token=class_token)
    model = perturbed(VisionMamba(config))
    images = torch.randn(2, 3, *image, dtype=torch.float64)
    inputs = []
    for layer in model.backbone.layers:
        layer.mixer.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    model(images)
    first, last = inputs[0], inputs[-1]
    place = {"middle": grid[0] * grid[1] // 2, "head": 0, "none": None}[class_token]
    for i, x in ((0, first), (-1, last)):
        found = patch_attention(model, images, layer=i)
        assert found.shape == (2, *grid)
        assert (found >= 0).all()
        M = attention_matrix(model.backbone.layers[i].mixer, x).abs().mean(2).sum(0)
        if place is None:
            expected = M.mean(1)
        else:
            expected = torch.cat((M[:, place, :place], M[:, place, place + 1 :]), 1)
        assert_near(found, expected.reshape(found.shape), 1e-12)


def one_patch(class_token):
    """Only a bright patch is written to the state, and only the class token reads it."""
    config = VimConfig(**TINY | {"depth": 1}, class_token=class_token)
    model = VisionMamba(config)
    mixer = model.backbone.layers[0].mixer
    n, R = mixer.config.d_state, mixer.config.rank
    with torch.no_grad():
        for name in ("patch_embed.weight", "patch_embed.bias", "pos_embed", "cls_token"):
            model.get_parameter(name).zero_()
        model.patch_embed.weight[1] = 1
        model.cls_token[..., 0] = 1
        mixer.in_proj.weight.copy_(torch.eye(*mixer.in_proj.weight.shape))
        for b in ("", "_b"):
            conv, x_proj = getattr(mixer, f"conv1d{b}"), getattr(mixer, f"x_proj{b}")
            conv.bias.zero_()
            conv.weight.zero_()[..., -1] = 1
            x_proj.weight.zero_()[R : R + n, 1] = 1
            x_proj.weight[R + n :, 0] = 1
    return model.eval()


@pytest.mark.parametrize("class_token", ["middle", "head"])
def test_shows_the_patch_that_was_looked_at(class_token):
    model = one_patch(class_token)
    for row in range(3):
        for column in range(3):
            images = torch.zeros(1, 3, 12, 12)
            images[..., 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 1
            found = patch_attention(model, images)[0]
            assert found[row, column] > 0
            assert int((found != 0).sum()) == 1


@pytest.mark.parametrize("channels", [1, 3])
def test_draw(channels, tmp_path):
    pytest.importorskip("matplotlib")
    image, weights = torch.randn(channels, 24, 40), torch.rand(3, 5, dtype=torch.float64)
    draw(image, weights, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    draw(torch.zeros(channels, 24, 40), torch.zeros(1, 1), str(tmp_path / "flat.png"))
    assert (tmp_path / "flat.png").stat().st_size > 0
    with pytest.raises(ShapeError, match=r"image must be \(1 or 3, H, W\), got \(2, 4, 4\)"):
        draw(torch.zeros(2, 4, 4), weights, tmp_path / "no.png")
    with pytest.raises(ShapeError, match=r"weights must be \(rows, columns\), got \(1, 3, 5\)"):
        draw(image, weights[None], tmp_path / "no.png")
    assert not (tmp_path / "no.png").exists()


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mambapy\[train\]'"):
        draw(torch.zeros(3, 4, 4), torch.zeros(1, 1), tmp_path / "no.png")


def test_refuses():
    x = torch.randn(1, 5, 8)
    attention = Attention(AttentionConfig(d_model=8, n_layers=1, n_heads=2))
    third = Mamba3Block(Mamba3Config(**TWO))
    for other in (attention, third, VMamba(MambaConfig(**ONE))):
        with pytest.raises(ConfigError, match=rf"y = M x, got {type(other).__name__}$"):
            attention_matrix(other, x)
    mixer = made("mamba", torch.float32)
    for wrong in (x[0], x[..., :7], x[:, :0], x.long(), None):
        with pytest.raises(ShapeError, match=r"x must be (\(b, l, d\) with d = 8|floating point)"):
            attention_matrix(mixer, wrong)
    with pytest.raises(ConfigError, match="reduce='mean' must be None or 'mean_abs'"):
        attention_matrix(mixer, x, reduce="mean")
    model, images = VisionMamba(VimConfig(**TINY)), torch.randn(1, 3, 12, 12)
    for layer in (3, -4, True, 1.0, None):
        with pytest.raises(ConfigError, match=f"layer={layer}: there is no such block of 3"):
            patch_attention(model, images, layer=layer)
    with pytest.raises(ConfigError, match="model must be a VisionMamba, got VMamba"):
        patch_attention(model.backbone, images)
    with pytest.raises(ShapeError, match="is not covered by patches"):
        patch_attention(model, images[..., :11])
