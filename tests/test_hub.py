"""Names on the Hugging Face hub: the folder first, then the cache, then a download.

The hub is a small server here: huggingface_hub itself asks it, in a process of its own.
"""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from mambapy.lm import LM, MambaConfig

pytest.importorskip("huggingface_hub")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "someone/tiny-mamba"
LOAD = """
import json, sys
from mambapy.errors import CheckpointError
from mambapy.lm import from_pretrained
for name, revision in json.loads(sys.argv[1]):
    try:
        print(float(from_pretrained(name, revision=revision).norm_f.weight[0]))
    except CheckpointError as error:
        print(error)
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks of a hub: a repository's files, and each of them."""

    root = Path()
    asked: list[str] = []  # noqa: RUF012

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = self.path.split("?")[0]
        type(self).asked.append(path)
        files = {p.name: p.read_bytes() for p in self.root.iterdir()}
        if path.startswith(f"/api/models/{NAME}/tree/"):
            rows = [
                {"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                for n, b in files.items()
            ]
            self.send(json.dumps(rows).encode(), body)
        elif path in (f"/api/models/{NAME}", *(f"/api/models/{NAME}/revision/{r}" for r in REFS)):
            value = {"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": n} for n in files]}
            self.send(json.dumps(value).encode(), body)
        elif path.startswith(f"/{NAME}/resolve/") and path.split("/")[-1] in files:
            self.send(files[path.split("/")[-1]], body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def send(self, content, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


REFS = ("main", COMMIT, "older")


@pytest.fixture
def hub(tmp_path):
    """A hub with one repository that has its weights in two formats; environment for a process."""
    root = tmp_path / "hub"
    model = LM(MambaConfig(d_model=8, n_layers=1, d_state=4), 11)
    with torch.no_grad():
        model.norm_f.weight.fill_(0.375)
    model.save_pretrained(root, format="hf")
    (root / "pytorch_model.bin").write_bytes(b"the same again, not wanted")
    (root / "modeling.py").write_text("raise SystemExit('code was run')")
    handler = type("OneHub", (Hub,), {"root": root, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    environment.pop("HF_HUB_OFFLINE", None)
    yield handler, environment
    server.shutdown()
    thread.join()
    server.server_close()


def load(environment, *names, cwd=None, **more):
    """What comes of each name, a line each, and what else was printed."""
    pairs = [name if isinstance(name, tuple) else (name, None) for name in names]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps(pairs)],
        env={**environment, **more, "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        cwd=cwd,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


def test_a_name_is_downloaded_once_and_then_found_offline(hub, tmp_path):
    handler, environment = hub
    printed, progress = load(environment, NAME)
    assert printed == ["0.375"]
    fetched = {path.split("/")[-1] for path in handler.asked if "/resolve/" in path}
    assert fetched == {"config.json", "model.safetensors"}
    # A progress bar.
    assert "%" in progress
    handler.asked.clear()
    # A folder of that name is nearer than the cache.
    model = LM(MambaConfig(d_model=8, n_layers=1, d_state=4), 11)
    model.save_pretrained(tmp_path / "here" / "near")
    found, _ = load(
        environment, NAME, (NAME, "main"), (NAME, COMMIT), "near", cwd=tmp_path / "here",
        HF_HUB_OFFLINE="1",
    )  # fmt: skip
    assert found == ["0.375", "0.375", "0.375", "1.0"]
    assert not handler.asked


def test_a_name_that_is_nowhere(hub, tmp_path):
    handler, environment = hub
    wrong = ["a/b/c", "/no/such/folder", "a b"]
    names = ["someone/else", (NAME, "no-such-branch"), *wrong]
    printed, _ = load(environment, *names)
    assert len(printed) == 5
    start = "'someone/else' was found nowhere: there is no folder of that name"
    assert printed[0].startswith(start)
    assert str(tmp_path / "cache") in printed[0]
    assert "and the hub gave: 404" in printed[0]
    assert "'someone/tiny-mamba' was found nowhere" in printed[1]
    for name, line in zip(wrong, printed[2:], strict=True):
        assert line == f"there is no folder {name}, and no such name can be on the hub"
    handler.asked.clear()
    (line,), _ = load(environment, NAME, HF_HUB_OFFLINE="1")
    assert "was found nowhere" in line
    assert "offline" in line.lower()
    assert not handler.asked


def test_without_huggingface_hub(hub, tmp_path):
    _, environment = hub
    (tmp_path / "huggingface_hub.py").write_text("raise ImportError('not here')")
    path = f"{tmp_path}{os.pathsep}{Path(__file__).parent.parent}"
    done = subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps([(NAME, None)])],
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("there is no folder someone/tiny-mamba; to look for that name")
    assert "pip install 'mambapy[hub]'" in done.stdout
