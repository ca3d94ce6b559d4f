"""What a model is used from: weights or adapter, configuration and tokenizer, to files and back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.adapters.base import is_adapter
from finetune.adapters.files import load_adapter_weights, save_adapter
from finetune.checkpoints.model_weights import save_model_weights
from finetune.models.loading import load_weights
from finetune.processes.joint_steps import fail_on_all_ranks
from finetune.tokenizers.saving import save_tokenizer

if TYPE_CHECKING:
    from finetune.checkpoints.writers import TensorSetWriter
    from finetune.parallel.sharding.replicas import Replicas
    from finetune.processes.groups import ProcessGroups


@dataclass(frozen=True)
class ModelFiles:
    """Writes and reads a model; all ranks call every method.

    Attributes:
        model: The model or the adapter on it, as this rank holds it.
        tokenizer: PaddleNLP's tokenizer, saved beside the weights.
        replicas: Make the parameters whole.
        groups: The run's process groups.
    """

    model: Any
    tokenizer: Any
    replicas: Replicas
    groups: ProcessGroups

    def write(self, folder: Path, writer: TensorSetWriter) -> None:
        """Writes everything into a folder, the same on all ranks."""
        whole = self.replicas.whole_parameters
        if is_adapter(self.model):
            save_adapter(self.model, folder, writer, num_tokens=len(self.tokenizer), whole=whole)
        else:
            save_model_weights(self.model, folder, writer, whole=whole)
        with fail_on_all_ranks(self.groups):
            if self.groups.is_first:
                save_tokenizer(self.tokenizer, folder)

    def load_weights(self, folder: Path) -> None:
        """Sets the weights, or those of the adapter, to what a folder holds."""
        with self.replicas.whole_parameters():
            if is_adapter(self.model):
                load_adapter_weights(self.model, folder, is_stage=self.groups.pipeline.size > 1)
            else:
                load_weights(self.model, folder)
