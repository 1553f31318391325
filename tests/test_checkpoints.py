import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from mambapy.checkpoints import atomic_write
from mambapy.errors import CheckpointError
from mambapy.lm import LM, from_pretrained
from tests.helpers import tiny


@pytest.fixture
def saved(tmp_path):
    model = LM(tiny(expand=1.5, bias=True), 21)
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_exact(tmp_path, tie, dtype):  # traps 53, 59
    model = LM(tiny(), 21, tie_embeddings=tie, pad_vocab_size_multiple=16).to(dtype)
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)
    loaded = from_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tie
    assert (loaded.lm_head.weight is loaded.embedding.weight) is tie
    assert loaded.config == model.config
    assert not loaded.training
    for (name, T), (other, U) in zip(
        model.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert name == other
        assert T.dtype == U.dtype
        assert torch.equal(T, U)
    tokens = torch.randint(21, (2, 7))
    assert torch.equal(model(tokens), loaded(tokens))


def test_weight_names_are_the_official_ones(saved):
    names = set(load_file(saved[1] / "model.safetensors"))
    mixer = "backbone.layers.0.mixer."
    leaves = {n.removeprefix(mixer) for n in names if n.startswith(mixer)}
    assert leaves == {
        "in_proj.weight", "in_proj.bias", "conv1d.weight", "conv1d.bias", "x_proj.weight",
        "dt_proj.weight", "dt_proj.bias", "A_log", "D", "out_proj.weight", "out_proj.bias",
    }  # fmt: skip
    assert {n for n in names if "layers" not in n} == {"embedding.weight", "norm_f.weight"}


def edit_config(directory, **changes):
    path = directory / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | changes))


def edit_weights(directory, change):
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors")


def test_tensors_that_do_not_match_are_named(saved):
    _, directory = saved
    edit_weights(directory, lambda w: w.update(extra=torch.zeros(1)))
    with pytest.raises(CheckpointError, match=r"extra \(1,\) is unexpected"):
        from_pretrained(directory)
    edit_weights(directory, lambda w: (w.pop("extra"), w.pop("norm_f.weight")))
    with pytest.raises(CheckpointError, match=r"norm_f\.weight \(8,\) is missing"):
        from_pretrained(directory)
    edit_weights(directory, lambda w: w.update({"norm_f.weight": torch.zeros(9)}))
    with pytest.raises(CheckpointError, match=r"norm_f\.weight is \(9,\) and should be \(8,\)"):
        from_pretrained(directory)


def test_a_wrong_config_is_no_default(saved):  # trap 59
    _, directory = saved
    good = (directory / "config.json").read_text()
    edit_config(directory, tie_embedings=True)
    with pytest.raises(CheckpointError, match="tie_embedings"):
        from_pretrained(directory)
    (directory / "config.json").write_text(good)
    edit_config(directory, config={"d_model": 8, "n_layers": 2, "d_stat": 3})
    with pytest.raises(CheckpointError, match="d_stat"):
        from_pretrained(directory)
    (directory / "config.json").write_text(good)
    edit_config(directory, model_type="mamba9")
    with pytest.raises(CheckpointError, match="model_type"):
        from_pretrained(directory)


def test_missing_truncated_and_foreign_files(saved, tmp_path):
    _, directory = saved
    with pytest.raises(CheckpointError, match="there is no folder"):
        from_pretrained(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        from_pretrained(tmp_path / "empty")
    weights = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        from_pretrained(directory)
    (directory / "model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(CheckpointError, match="damaged"):
        from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        from_pretrained(directory)
    edit_config(directory, format="other")
    with pytest.raises(CheckpointError, match="not of this library"):
        from_pretrained(directory)
    for text in ("{", "[]", "\udcff"):
        (directory / "config.json").write_text(text, errors="surrogateescape")
        with pytest.raises(CheckpointError, match=r"config\.json"):
            from_pretrained(directory)


FILL_DISK = """
import resource, sys, torch
from mambapy.errors import CheckpointError
from mambapy.lm import LM, from_pretrained
from mambapy.config import MambaConfig
model = from_pretrained(sys.argv[1])
with torch.no_grad():
    model.norm_f.weight.fill_(7)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    model.save_pretrained(sys.argv[1])
except CheckpointError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no file-size limit to set")
def test_a_full_disk_keeps_the_earlier_checkpoint(saved):
    model, directory = saved
    result = subprocess.run(
        [sys.executable, "-c", FILL_DISK, str(directory)], capture_output=True, text=True
    )
    assert result.stdout.startswith("cannot write"), result.stderr
    assert sorted(p.name for p in directory.iterdir()) == ["config.json", "model.safetensors"]
    again = from_pretrained(directory)
    assert torch.equal(again.norm_f.weight, model.norm_f.weight)


def test_atomic_write(tmp_path):
    target = tmp_path / "deep" / "file"
    with atomic_write(target) as path:
        path.write_text("first")
        assert not target.exists()

    def fail():
        with atomic_write(target) as path:
            path.write_text("second")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert target.read_text() == "first"
    assert [p.name for p in target.parent.iterdir()] == ["file"]
    (tmp_path / "a file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"), atomic_write(tmp_path / "a file/x"):
        pass


def test_files_have_the_users_permissions(saved):
    _, directory = saved
    (directory / "plain").touch()
    modes = {path.stat().st_mode for path in directory.iterdir()}
    assert len(modes) == 1


def test_the_folder_can_move(saved, tmp_path):
    model, directory = saved
    shutil.move(directory, tmp_path / "elsewhere")
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(LM.from_pretrained(str(tmp_path / "elsewhere"))(tokens), model(tokens))
