"""The example of image classification runs, and writes what it says."""

import json
import math
import sys

import pytest
import torch

from tests.test_examples import load

pytest.importorskip("matplotlib")

SMALL = ["--steps", "3", "--batch", "4", "--depth", "1", "--d_model", "16"]


def run(argv, out):
    """What the example wrote after a run of few steps."""
    example = load("image_classification")
    example.main([*SMALL, *argv, "--out", str(out)])
    for name in ("confusion.png", "misread.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def check(record, held, classes):
    """The table of what was read as what agrees with all else that is said of a model."""
    assert record["images"]["held out"] == held
    for found in record["models"].values():
        table = torch.tensor(found["confusion"])
        assert table.shape == (classes, classes)
        assert table.sum() == held
        assert found["accuracy"] == pytest.approx(table.trace().item() / held)
        assert len(found["misread"]) == held - table.trace()
        for _, true, read in found["misread"]:
            names = record["classes"]
            assert true != read
            assert table[names.index(true), names.index(read)] > 0
        assert found["parameters"] > 1000
        assert found["seconds"] > 0


def write(root, channels=3, count=6):
    """A folder of images: dark ones, and bright ones; and files that are none."""
    image = pytest.importorskip("PIL.Image")
    for name, level in (("dark", 20), ("bright", 200)):
        (root / name / "deeper").mkdir(parents=True)
        for i in range(count):
            shape = (10, 14, channels)[: 2 + (channels > 1)]
            pixels = torch.randint(level, level + 50, shape, dtype=torch.uint8).numpy()
            place = root / name / ("deeper" if i == 0 else "") / f"{i}.{('png', 'BMP')[i % 2]}"
            image.fromarray(pixels).save(place)
        (root / name / "notes.txt").write_text("not an image")
    (root / "readme.md").write_text("not a class")


def test_digits(tmp_path, capsys):
    pytest.importorskip("sklearn")
    record = run([], tmp_path / "out")
    check(record, held=359, classes=10)
    assert record["classes"] == [*"0123456789"]
    assert [*record["models"]] == ["vim", "vit"]
    printed = capsys.readouterr().out
    for kind, name in (("vim", "VisionMamba"), ("vit", "ViT")):
        accuracy = f"{record['models'][kind]['accuracy']:.2%}"
        assert [name, accuracy] in [line.split()[:2] for line in printed.splitlines()]
    assert record["settings"]["d_model"] == record["config"]["embed_dim"] == 16
    assert record["versions"]["torch"] == torch.__version__


def test_validation_leaves_the_held_out_alone(tmp_path, monkeypatch):
    """With --validate no image of the held-out fifth is trained on, nor measured."""
    pytest.importorskip("sklearn")
    example = load("image_classification")
    images, labels, names = example.digits()
    rows, held = example.split(labels, 0)
    assert sorted([*rows.tolist(), *held.tolist()]) == [*range(1797)]
    shares = labels[held].bincount() / labels.bincount()
    assert (shares - 0.2).abs().max() < 0.01
    assert torch.equal(held, example.split(labels, 0)[1])
    images[held] = math.nan
    seen = []
    monkeypatch.setattr(example, "digits", lambda: (images, labels, names))
    monkeypatch.setattr(example, "train", lambda *given: seen.append(given))
    options = ["--validate", "--models", "vit", "--out", str(tmp_path)]
    example.main([*SMALL, *options])
    record = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    check(record, held=287, classes=10)
    assert not {row for row, *_ in record["models"]["vit"]["misread"]} & {*held.tolist()}
    ((_, _, trained, _, normal, _),) = seen
    assert len(trained) == len(rows) - 287
    assert normal(trained).isfinite().all()  # and so are their mean and deviation


@pytest.mark.parametrize("channels", [1, 3])
def test_folder(tmp_path, channels):
    write(tmp_path / "data", channels)
    options = ["--size", "12", "--channels", str(channels), "--patch", "3", "--models", "vim"]
    record = run(["--data", str(tmp_path / "data"), *options], tmp_path / "out")
    check(record, held=2, classes=2)
    assert record["classes"] == ["bright", "dark"]
    assert record["config"]["in_chans"] == channels
    assert record["config"]["img_size"] == [12, 12]
    assert [*record["models"]] == ["vim"]
    images, labels, _ = load("image_classification").folder(tmp_path / "data", 12, channels)
    assert images.shape == (12, channels, 12, 12)
    assert labels.tolist() == 6 * [0] + 6 * [1]
    assert images[:6].min() > 0.7
    assert images[6:].max() < 0.3


def test_channels_stay_where_they_are(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        red = image.new("RGB", (4, 4))
        red.putpixel((3, 1), (255, 0, 0))
        red.save(tmp_path / name / "red.png")
    images, _, _ = load("image_classification").folder(tmp_path, 4, 3)
    assert images[1].nonzero().tolist() == [[0, 1, 3]]


def test_disturb():
    """Without amounts an image stays; with them it moves, by no more than they say."""
    example = load("image_classification")
    parser = {"turn": 0.0, "stretch": 0.0, "shift": 0.0}
    images = torch.rand(50, 2, 8, 8)
    still = type("Args", (), parser)
    assert torch.allclose(example.disturb(images, still), images, atol=1e-5)
    point = torch.zeros(50, 1, 9, 9)
    point[:, :, 4, 4] = 1
    shifted = type("Args", (), {**parser, "shift": 1 / 9})
    moved = example.disturb(point, shifted)
    assert (moved.flatten(1).argmax(1) != 40).any()
    assert moved[:, :, 3:6, 3:6].sum((1, 2, 3)) == pytest.approx(torch.ones(50), abs=1e-4)
    turned = example.disturb(point, type("Args", (), {**parser, "turn": 90.0, "stretch": 0.1}))
    assert turned[:, 0, 4, 4] == pytest.approx(torch.ones(50), abs=1e-4)


def test_errors_say_what_is_wrong(tmp_path, monkeypatch):
    example = load("image_classification")
    with pytest.raises(SystemExit, match="want at least two folders with images"):
        example.main(["--data", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        example.main(["--models", "vim,cnn"])
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(SystemExit, match="--data needs Pillow: pip install pillow"):
        example.main(["--data", str(tmp_path)])
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit, match="need scikit-learn: pip install scikit-learn"):
        example.main([])
