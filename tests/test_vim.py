"""Vision Mamba: numbers against the specification, images of any size, padding both ways."""

import argparse
import math

import pytest
import torch
import torch.nn.functional as F

from mambapy.bidirectional import BiMamba2Block, BiMambaBlock
from mambapy.config import Mamba2Config, MambaConfig, VimConfig
from mambapy.errors import CheckpointError, ConfigError, ShapeError
from mambapy.optim import make_optimizer
from mambapy.vim import (
    VisionMamba,
    VMamba,
    from_pretrained,
    vim_base,
    vim_small,
    vim_tiny,
)
from tests.helpers import assert_near

TINY = {"img_size": 12, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_classes": 5}
CONFIGS = {
    "mamba": MambaConfig(d_model=8, n_layers=2, d_state=4),
    "mamba2": Mamba2Config(d_model=8, n_layers=2, d_state=4, d_head=4, n_groups=2),
}
each = pytest.mark.parametrize("kind", [*CONFIGS])


def perturbed(model, dtype=torch.float64):
    with torch.no_grad():
        for P in model.parameters():
            P.add_(0.2 * torch.randn_like(P))
    return model.to(dtype).eval()


def tiny(dtype=torch.float64, **changes):
    return perturbed(VisionMamba(VimConfig(**TINY | changes)), dtype)


def naive_block(w, x):
    """Vim's mixer by its specification: both directions, step by step, on whole sequences."""
    x, z = (x @ w["in_proj.weight"].T).chunk(2, -1)
    total = 0
    for b in ("", "_b"):
        u, gate = (x.flip(1), z.flip(1)) if b else (x, z)
        weight = w[f"conv1d{b}.weight"]
        k = weight.shape[-1]
        padded = F.pad(u, (0, 0, k - 1, 0))
        taps = [padded[:, j : j + u.shape[1]] * weight[:, 0, j] for j in range(k)]
        u = F.silu(sum(taps) + w[f"conv1d{b}.bias"])
        A = -w["A_b_log" if b else "A_log"].exp()
        R, n = w[f"dt_proj{b}.weight"].shape[1], A.shape[1]
        low, B, C = (u @ w[f"x_proj{b}.weight"].T).split([R, n, n], -1)
        dt = F.softplus(low @ w[f"dt_proj{b}.weight"].T + w[f"dt_proj{b}.bias"])
        h, ys = 0, []
        for t in range(u.shape[1]):
            h = torch.exp(dt[:, t, :, None] * A) * h + (dt * u)[:, t, :, None] * B[:, t, None]
            ys.append((h * C[:, t, None]).sum(-1))
        y = (torch.stack(ys, 1) + w[f"D{b}"] * u) * F.silu(gate)
        total = total + (y.flip(1) if b else y)
    return (total / 2) @ w["out_proj.weight"].T


def naive_vim(w, images, patch):
    """The whole model, tokens in the middle; `w` has the names of the published checkpoints."""
    b = len(images)
    x = F.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2)
    middle = x.shape[1] // 2
    x = torch.cat((x[:, :middle], w["cls_token"].expand(b, -1, -1), x[:, middle:]), 1)
    x = x + w["pos_embed"]
    norm = lambda T, weight: T * (T.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight  # noqa: E731
    i = 0
    while f"layers.{i}.norm.weight" in w:
        mixer = {
            n.removeprefix(f"layers.{i}.mixer."): T for n, T in w.items() if f"layers.{i}.mix" in n
        }
        x = x + naive_block(mixer, norm(x, w[f"layers.{i}.norm.weight"]))
        i += 1
    x = norm(x, w["norm_f.weight"])[:, middle]
    return x @ w["head.weight"].T + w["head.bias"]


def published_names(model):
    """The model's weights by the names of the published checkpoints."""
    found = {}
    for name, T in model.state_dict().items():
        name = name.replace("backbone.layers.", "layers.").replace(
            "patch_embed.", "patch_embed.proj."
        )
        found[name] = T
    return found


@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
def test_numbers_of_the_specification(backend):
    model = tiny(backend=backend)
    images = torch.randn(3, 3, 12, 12, dtype=torch.float64)
    assert_near(model(images), naive_vim(published_names(model), images, 4), 1e-11)
    single = tiny(torch.float32, backend=backend)
    exact = naive_vim({n: T.double() for n, T in published_names(single).items()}, images, 4)
    assert_near(single(images.float()), exact, 1e-5)


@each
def test_padding_in_both_directions(kind):  # trap 40
    model = perturbed(VMamba(CONFIGS[kind]))
    mask = torch.tensor([[1] * 9, [0, 0, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 1, 0, 0, 1]]).bool()
    x = torch.randn(3, 9, 8, dtype=torch.float64)
    spoilt = torch.where(mask[:, :, None], x, float("nan"))
    y = model(spoilt, mask=mask)
    for row in range(3):
        assert_near(y[row, mask[row]], model(x[row : row + 1, mask[row]])[0], 1e-11)
    assert torch.equal(y[~mask], torch.zeros_like(y[~mask]))
    grads = torch.autograd.grad((y * y).sum(), list(model.parameters()))
    alone = sum(model(x[r : r + 1, mask[r]]).square().sum() for r in range(3))
    for got, want in zip(grads, torch.autograd.grad(alone, list(model.parameters())), strict=True):
        assert_near(got, want, 1e-10)


@each
def test_packed_documents_in_both_directions(kind):  # traps 30, 31, 40
    model = perturbed(VMamba(CONFIGS[kind]))
    x = torch.randn(1, 11, 8, dtype=torch.float64)
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, -1, 1, 2, 2, 2, 2]])
    y = model(x, seq_idx=seq_idx)
    for document in range(3):
        chosen = seq_idx[0] == document
        assert_near(y[0, chosen], model(x[:, chosen])[0], 1e-11)


@each
def test_it_sees_both_ways_and_has_no_state(kind):  # trap 40
    model = perturbed(VMamba(CONFIGS[kind]))
    x = torch.randn(1, 6, 8, dtype=torch.float64, requires_grad=True)
    for t in (0, 3, 5):
        (grad,) = torch.autograd.grad(model(x)[0, t].sum(), x)
        assert bool((grad[0].abs().sum(-1) > 0).all())
    for call in (
        lambda: model.prefill(x),
        lambda: model.step(x[:, 0], model.init_state(1)),
    ):
        with pytest.raises(ConfigError, match="a bidirectional model has no prefill and no step"):
            call()


def test_one_image_of_each_shape_and_patch():
    model = tiny(img_size=(8, 16), patch_size=(4, 2), stride=(2, 2), in_chans=2)
    assert model.grid == (3, 8)
    y = model(torch.randn(2, 2, 8, 16, dtype=torch.float64))
    assert y.shape == (2, 5)
    # A larger image has more patches; positions are interpolated.
    assert model(torch.randn(2, 2, 12, 20, dtype=torch.float64)).shape == (2, 5)
    with pytest.raises(ShapeError, match=r"an image of 9 x 16 is not covered by patches of 4 x 2"):
        model(torch.randn(2, 2, 9, 16, dtype=torch.float64))
    with pytest.raises(ShapeError, match="images have 3 channels, the model is for 2"):
        model(torch.randn(2, 3, 8, 16, dtype=torch.float64))
    with pytest.raises(ShapeError, match=r"images must be \(b, c, H, W\), got \(2, 8, 16\)"):
        model(torch.randn(2, 8, 16, dtype=torch.float64))
    with pytest.raises(ShapeError, match="images must be floating point"):
        model(torch.zeros(2, 2, 8, 16, dtype=torch.uint8))


@pytest.mark.parametrize("place", ["middle", "head", "none"])
def test_positions_of_other_sizes(place):
    model = tiny(class_token=place)
    with torch.no_grad():
        model.pos_embed.copy_(torch.randn_like(model.pos_embed))
    table = model._positions((3, 3))
    assert torch.equal(table, model.pos_embed)
    larger = model._positions((6, 3))
    assert larger.shape[1] == 18 + (place != "none")
    patches = model._patches(larger).transpose(1, 2).unflatten(2, (6, 3))
    own = model._patches(model.pos_embed).transpose(1, 2).unflatten(2, (3, 3))
    assert_near(patches, F.interpolate(own.float(), (6, 3), mode="bicubic", antialias=True), 1e-6)
    if place != "none":
        assert torch.equal(larger[:, model._place(18)], model.pos_embed[:, model._place(9)])
    # The class token is where it should be.
    images = torch.randn(1, 3, 12, 12, dtype=torch.float64)
    features = model.forward_features(images)
    expected = {"middle": features[:, 4], "head": features[:, 0], "none": features.mean(1)}
    assert_near(model.forward_head(features, pre_logits=True), expected[place], 0)


def test_timms_conventions():
    model = tiny()
    images = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    features = model.forward_features(images)
    assert features.shape == (2, 10, 8)
    assert_near(model.forward_head(features), model(images), 0)
    final, maps = model.forward_intermediates(images)
    assert_near(final, features, 1e-12)
    assert [m.shape for m in maps] == [(2, 8, 3, 3)] * 2
    (last,) = model.forward_intermediates(
        images, [-1], norm=True, output_fmt="NLC", intermediates_only=True
    )
    assert_near(last, model._patches(features), 1e-12)
    assert len(model.forward_intermediates(images, 1, intermediates_only=True)) == 1
    with pytest.raises(ConfigError, match="there is no block 2 of 2"):
        model.forward_intermediates(images, [2])
    with pytest.raises(ConfigError, match="output_fmt='NHWC'"):
        model.forward_intermediates(images, output_fmt="NHWC")
    model.reset_classifier(7)
    assert model(images).shape == (2, 7)
    assert model.get_classifier().out_features == 7
    model.reset_classifier(0)
    assert_near(model(images), model.forward_head(features, pre_logits=True), 1e-12)
    assert VisionMamba(VimConfig(**TINY | {"num_classes": 0})).head.state_dict() == {}
    fixed = model.no_weight_decay()
    assert {"pos_embed", "cls_token", "backbone.layers.1.mixer.A_b_log"} < fixed
    groups = make_optimizer(model, lr=1e-3, weight_decay=0.1).param_groups
    decayed = {id(P) for g in groups if g["weight_decay"] for P in g["params"]}
    assert not any(id(P) in decayed for n, P in model.named_parameters() if n in fixed)


def test_drop_path():
    model = VisionMamba(VimConfig(**TINY | {"drop_path_rate": 0.5, "depth": 3}))
    assert [layer.drop_path for layer in model.backbone.layers] == [0, 0.25, 0.5]
    images = torch.randn(4, 3, 12, 12)
    assert torch.equal(model.eval()(images), model(images))
    model.train()
    layer, x = model.backbone.layers[2], torch.randn(2000, 2, 8)
    from mambapy.ragged import Ragged

    y, added = layer(x, Ragged()) - x, layer.mixer(layer.norm(x), Ragged())
    kept = (y.abs().sum((1, 2)) > 0).float().mean()
    assert 0.45 < kept < 0.55
    assert_near(y[y.abs().sum((1, 2)) > 0], 2 * added[y.abs().sum((1, 2)) > 0], 1e-5)


def test_published_sizes():
    with torch.device("meta"):
        counts = [
            sum(P.numel() for P in make().parameters()) for make in (vim_tiny, vim_small, vim_base)
        ]
    # 7, 26 and 98 millions in the paper's table.
    assert [round(count / 1e6) for count in counts] == [7, 26, 98]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"img_size": 13}, "an image of 13 x 13 is not covered by patches of 4 x 4 every 4 x 4"),
        ({"patch_size": 16}, "must be a multiple of 16, and not negative"),
        ({"patch_size": 0}, "patch_size=0 must be an integer >= 1, or two of them"),
        ({"stride": (1, 2, 3)}, "stride="),
        ({"in_chans": 0}, "in_chans=0 must be >= 1"),
        ({"class_token": "left"}, "class_token='left' must be one of middle, head, none"),
        ({"drop_path_rate": 1}, "drop_path_rate=1 must be at least 0 and below 1"),
        ({"mixer": "mamba3"}, "mixer='mamba3' must be one of mamba, mamba2"),
        ({"mixer_options": {"d_stat": 3}}, "unknown keys"),
    ],
)
def test_a_vim_that_cannot_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        VimConfig(**TINY | changes)


def test_blocks_alone():
    for kind, block in (("mamba", BiMambaBlock), ("mamba2", BiMamba2Block)):
        layer = perturbed(block(CONFIGS[kind]))
        x = torch.randn(2, 5, 8, dtype=torch.float64)
        assert layer(x).shape == x.shape
        layer.reset_parameters()
        assert torch.equal(layer.D_b, torch.ones_like(layer.D_b))
        assert math.isfinite(layer(x).sum().item())
    with pytest.raises(ConfigError, match="inner_norm must be 'none'"):
        BiMambaBlock(MambaConfig(d_model=8, n_layers=1, inner_norm="plain"))
    with pytest.raises(ConfigError, match="config must be a MambaConfig or Mamba2Config"):
        VMamba(VimConfig(**TINY))


def publish(model, path):
    """A file as hustvl/Vim's trainer writes it."""
    extra = {"epoch": 299, "args": argparse.Namespace(model="vim_tiny", lr=0.001)}
    torch.save({"model": published_names(model), **extra}, path)


@pytest.mark.parametrize(
    "changes",
    [
        {"embed_dim": 192, "img_size": 224, "patch_size": 16, "depth": 2, "num_classes": 10},
        {"img_size": 32, "patch_size": 4},
        {"img_size": 32, "patch_size": 8, "stride": 4},
        {"img_size": 32, "patch_size": 8, "in_chans": 1, "mixer_options": {"d_state": 4}},
    ],
    ids=["tiny", "small image", "overlapping", "grey"],
)
def test_a_published_file(tmp_path, changes):
    """vim_t_midclstok's layout with random numbers, against the naive forward in float64."""
    model = tiny(torch.float32, **changes)
    publish(model, tmp_path / "vim_t_midclstok.pth")
    size = model.config.sizes("img_size")[0]
    images = torch.randn(2, model.config.in_chans, size, size, dtype=torch.float64)
    w = {name: T.double() for name, T in published_names(model).items()}
    expected = naive_vim(w, images, model.config.sizes("stride")[0])
    for path in (tmp_path, tmp_path / "vim_t_midclstok.pth"):
        loaded = from_pretrained(path, dtype=torch.float64, img_size=size)
        assert not loaded.training
        assert_near(loaded(images), expected, 1e-10)
    single = from_pretrained(tmp_path, img_size=size)
    for name, T in model.state_dict().items():
        assert torch.equal(single.state_dict()[name], T), name
    assert_near(single(images.float()), expected, 1e-5)
    half = from_pretrained(tmp_path, img_size=size, dtype=torch.bfloat16)
    assert half.backbone.layers[0].mixer.A_b_log.dtype == torch.float32
    assert half.head.weight.dtype == torch.bfloat16


def test_what_does_not_match_a_published_file(tmp_path):
    model = tiny(torch.float32, img_size=32, patch_size=4)
    good = published_names(model)
    path = tmp_path / "vim.pth"
    for change, message in {
        lambda w: w.update(extra=torch.ones(2)): r"extra \(2,\) is unexpected",
        lambda w: w.pop("layers.1.mixer.D_b"): r"backbone.layers.1.mixer.D_b \(16,\) is missing",
        lambda w: w.update({"norm_f.weight": torch.ones(3)}): (
            r"norm_f.weight is \(3,\) and should be \(8,\)"
        ),
        lambda w: w.pop("patch_embed.proj.weight"): "is no Vision Mamba: it has no 'patch_embed",
        lambda w: w.update(pos_embed=torch.ones(1, 8, 8)): "7 patches of 4 x 4 do not cover",
    }.items():
        w = dict(good)
        change(w)
        torch.save({"model": w}, path)
        with pytest.raises(CheckpointError, match=message):
            from_pretrained(path, img_size=32)
    path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="is damaged or no file of tensors"):
        from_pretrained(path)
    torch.save([1], path)
    with pytest.raises(CheckpointError, match="holds no dict of tensors"):
        from_pretrained(path)
    (tmp_path / "other.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"has no config.json and 2 \.pth files"):
        from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"there is no folder /nowhere/vim\.pth"):
        from_pretrained("/nowhere/vim.pth")


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_saved_and_loaded(tmp_path, mixer):
    options = {"d_head": 4, "d_state": 4} if mixer == "mamba2" else {}
    model = tiny(torch.float32, mixer=mixer, mixer_options=options, img_size=(8, 12))
    model.reset_classifier(7)
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert loaded.config.num_classes == 7
    for name, T in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], T)
    images = torch.randn(1, 3, 8, 12)
    assert_near(loaded(images), model.eval()(images), 1e-5)


def test_timm():
    """Where timm can be imported: it needs torchvision, which has no build for every torch."""
    timm = pytest.importorskip("timm", reason="timm, or its torchvision, cannot be imported here")
    model = timm.create_model("vim_tiny_patch16_224.mambapy", num_classes=7, depth=2, img_size=32)
    images = torch.randn(2, 3, 32, 32)
    assert isinstance(model, VisionMamba)
    assert model(images).shape == (2, 7)
    assert model.default_cfg["input_size"] == (3, 224, 224)
    assert "vim_small_patch16_224" in timm.list_models("vim_*")
    features = timm.create_model(
        "vim_tiny_patch16_224", features_only=True, out_indices=(0, 2), depth=4, img_size=32
    )
    assert [m.shape for m in features(images)] == [(2, 192, 2, 2)] * 2
    assert features.feature_info.channels() == [192, 192]


def test_pruned_for_its_features():
    model = tiny(depth=4)
    images = torch.randn(1, 3, 12, 12, dtype=torch.float64)
    expected = model.forward_intermediates(images, [0, 2], intermediates_only=True)
    wanted = model.prune_intermediate_layers([0, -2], prune_norm=True)
    assert (wanted, len(model.backbone.layers)) == ([0, 2], 3)
    found = model.forward_intermediates(images, wanted, intermediates_only=True)
    for got, want in zip(found, expected, strict=True):
        assert_near(got, want, 1e-12)


def test_intermediates_in_half_precision_are_those_of_the_forward_pass():  # trap 12
    model = tiny(torch.bfloat16, depth=4)
    images = torch.randn(2, 3, 12, 12, dtype=torch.bfloat16)
    final, maps = model.forward_intermediates(images)
    assert torch.equal(final, model.forward_features(images))
    assert {m.dtype for m in maps} == {torch.bfloat16}
