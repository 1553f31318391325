"""Loading and saving, the same for every language model here."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mambapy import checkpoints
from mambapy.errors import CheckpointError
from mambapy.layers import wide, wide_names

P = TypeVar("P", bound="Pretrained")


class Pretrained(nn.Module, ABC):
    """A language model that knows its architecture: it can be saved, and made from a checkpoint.

    The model has `embedding` and `lm_head`, which `tie_embeddings` may make one.
    """

    embedding: Any
    lm_head: Any
    tie_embeddings: bool

    @abstractmethod
    def architecture(self) -> checkpoints.Architecture:
        """What the model is, apart from its numbers."""

    @classmethod
    @abstractmethod
    def from_architecture(cls: type[P], architecture: checkpoints.Architecture) -> P:
        """A new model of that architecture."""

    @abstractmethod
    def tie(self) -> None:
        """Make embedding and head one parameter again, where they should be."""

    @property
    def model_type(self) -> str:
        """What our config.json calls the stack, "mamba" for instance; see `config.MODEL_TYPES`."""
        return self.architecture().model_type

    def own_weights(self) -> dict[str, Tensor]:
        """Every tensor that a checkpoint has: a tied head is the embedding, and left out."""
        tensors = self.state_dict().items()
        return {n: T for n, T in tensors if not (self.tie_embeddings and n.startswith("lm_head."))}

    def save_pretrained(self, directory: str | Path, format: str = "mambapy") -> None:
        """Write the weights and config.json to a folder.

        Args:
            directory: made if it is missing.
            format: "mambapy", our own; "official", which the papers' code loads; or "hf", which
                transformers loads.

        Raises:
            CheckpointError: the format cannot express this model, the model has parts that no
                checkpoint has (an adapter that is not merged, a head no longer tied), or a file
                could not be written; the earlier one is then still there.
        """
        self.check_unchanged("saved")
        checkpoints.save(directory, self.architecture(), self.own_weights(), format)

    def check_unchanged(self, verb: str) -> None:
        """Raise where somebody has put in layers that `LM` does not know, or untied the head."""
        with torch.device("meta"):
            expected = self.from_architecture(self.architecture()).state_dict()
        if foreign := sorted(set(self.state_dict()) ^ set(expected)):
            raise CheckpointError(
                f"the model cannot be {verb}: it has other layers than its configuration says "
                f"({foreign[0]}); merge or unload adapters first"
            )
        if self.tie_embeddings and self.lm_head.weight is not self.embedding.weight:
            raise CheckpointError(
                f"the model cannot be {verb}: its head is tied to the embedding by its "
                "configuration, and is a matrix of its own by now; make it with "
                "tie_embeddings=False"
            )

    @classmethod
    def from_pretrained(
        cls: type[P],
        name_or_dir: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
    ) -> P:
        """A trained model, in eval mode, every tensor as in the file.

        Takes what `save_pretrained` wrote, the papers' checkpoints (Mamba-1, Mamba-2, Mamba-3 and
        hybrids with attention), those of transformers (mamba, mamba2, falcon_mamba, bamba, jamba)
        and of Mistral (Codestral Mamba). Each tensor goes from the file straight to where it
        belongs; on a CPU, in its own dtype, it stays mapped from the file, which must therefore not
        be changed in place.

        Args:
            name_or_dir: a folder, or a name on the Hugging Face hub ("state-spaces/mamba-130m"),
                which is looked for in the local cache before it is downloaded.
            dtype: of the weights; the file's without it. A_log, D, dt_bias and their like are in
                float32 or wider all the same.
            device: where to put them; the CPU without it.
            revision: a branch, tag or commit on the hub.

        Raises:
            CheckpointError: the checkpoint is nowhere, damaged or of an unknown format; its
                configuration has a key that is not understood; a tensor is missing, unexpected or
                of another shape.
        """
        found = checkpoints.open_checkpoint(checkpoints.find(name_or_dir, revision))
        if dtype is not None and found.architecture.quantized:
            raise CheckpointError(
                f"{name_or_dir} is in {found.architecture.quantized}; dtype must be None for it"
            )
        with torch.device("meta"):
            model = cls.from_architecture(found.architecture)
        expected = model.own_weights()
        found.check({name: tuple(T.shape) for name, T in expected.items()})
        kept_wide = wide_names(model)
        device = torch.device("cpu" if device is None else device)
        weights = {}
        for name, like in expected.items():
            T = found.read(name, tuple(like.shape))
            wanted = T.dtype if dtype is None or not T.is_floating_point() else dtype
            weights[name] = T.to(device, wide(wanted) if name in kept_wide else wanted)
        tied = {
            name.replace("embedding.", "lm_head."): T
            for name, T in weights.items()
            if model.tie_embeddings and name.startswith("embedding.")
        }
        model.load_state_dict({**weights, **tied}, assign=True)
        model.tie()
        return model.eval()
