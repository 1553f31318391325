"""Where a checkpoint is: a folder here, the Hugging Face cache, or the hub itself."""

import json
from pathlib import Path
from typing import Any

from mambapy.errors import CheckpointError

# What a checkpoint may consist of, tokenizer included; nothing that is code.
_SMALL = ["*.json", "tokenizer.model", "*.txt", "tokenizer.byte"]
_WEIGHTS = (
    *("model*.safetensors", "pytorch_model*.bin", "consolidated*.safetensors"),
    # Vision Mamba's, which have no configuration beside them.
    "*.pth",
)


def find(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint.

    Looks for a local folder first, then in the Hugging Face cache, then downloads with
    huggingface_hub, showing its progress.

    Args:
        name: a folder, or a name on the hub, "state-spaces/mamba-130m" for instance.
        revision: of the name on the hub, a branch, tag or commit; None is its main branch.

    Raises:
        CheckpointError: it is nowhere; the message says where it was looked for.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if not _is_hub_name(str(name)):
        raise CheckpointError(f"there is no folder {name}, and no such name can be on the hub")
    try:
        from huggingface_hub import constants, snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f"there is no folder {name}; to look for that name on the Hugging Face hub, "
            "pip install 'mambapy[hub]'"
        ) from error
    if (cached := _in_cache(str(name), revision)) is not None:
        return cached
    options: dict[str, Any] = {"repo_id": str(name), "revision": revision}
    try:
        return Path(snapshot_download(**options, allow_patterns=_SMALL + _wanted(**options)))
    except Exception as error:  # huggingface_hub's, its HTTP library's and the system's
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"{name!r} was found nowhere: there is no folder of that name, it is not in the "
            f"Hugging Face cache {constants.HF_HUB_CACHE}, and the hub gave: {reason}"
        ) from error


def _in_cache(name: str, revision: str | None) -> Path | None:
    """The folder in the Hugging Face cache, if all of a checkpoint is there."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    for config in ("config.json", "params.json"):
        path = try_to_load_from_cache(name, config, revision=revision)
        if not isinstance(path, str):
            continue
        folder = Path(path).parent
        indices = list(folder.glob("*.index.json"))
        wanted = {shard for index in indices for shard in _shards(index)}
        if any(any(folder.glob(pattern)) for pattern in _WEIGHTS) and all(
            (folder / shard).is_file() for shard in wanted
        ):
            return folder
    try:
        folder = Path(
            snapshot_download(
                name, revision=revision, local_files_only=True, allow_patterns="*.pth"
            )
        )
    except (OSError, ValueError):  # it is not in the cache
        return None
    return folder if any(folder.glob("*.pth")) else None


def _shards(index: Path) -> set[str]:
    """The files that an index of shards names."""
    return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())


def _wanted(repo_id: str, revision: str | None) -> list[str]:
    """The patterns of one set of weights; some repositories have the same ones in two formats."""
    from huggingface_hub import list_repo_files

    files = list_repo_files(repo_id, revision=revision)
    for pattern in _WEIGHTS:
        if any(Path(file).match(pattern) and "/" not in file for file in files):
            return [pattern]
    raise CheckpointError(f"{repo_id} has none of {', '.join(_WEIGHTS)}")


def _is_hub_name(name: str) -> bool:
    """Whether a name could be one on the hub: "name" or "owner/name"."""
    parts = name.split("/")
    return len(parts) <= 2 and all(
        part and part not in (".", "..") and not set(part) & set('\\:*?"<>| ') for part in parts
    )
