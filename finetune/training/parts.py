"""What a run hands its trainer besides model and data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from finetune.checkpoints.writers import TensorSetWriter, WholeTensorWriter
from finetune.parallel.parallel_model import ParallelModel
from finetune.processes.groups import ProcessGroups
from finetune.processes.phases import PhaseRecord

if TYPE_CHECKING:
    from finetune.machine.randomness.source import Randomness
    from finetune.parallel.pipe.stage import Stage
    from finetune.training.expert_balance import ExpertBalance
    from finetune.training.loss import LabelPositions
    from finetune.training.preference.objective import PreferenceObjective
    from finetune.training.preference.reward_objective import RewardObjective


@dataclass(frozen=True)
class RunParts:
    """Layout, randomness and limits of a run; as they stand, those of one process.

    Attributes:
        groups: The run's process groups.
        stage: This rank's stage of the pipeline, or None.
        sharding_stage: 0 to 3.
        layers: Decoder layers of this rank.
        phases: What this process does, for the watch over the processes.
        label_positions: Restricts logits to labelled positions; None where no logits are computed.
        randomness: What draws by sample, such as NEFTune noise and dropout.
        writer: How checkpoints become files.
        replica_check_steps: Steps between comparisons of what ranks must agree on; 0: at start and saves only.
        master_gradients: Whether gradients are added up in float32 whatever the parameters' dtype.
        max_skipped_steps: float16 steps skipped in a row after which training stops.
        continues_on_save_error: Whether training goes on when the disk takes no checkpoint.
        objective: The loss of preference data; None: of label tokens.
        balance: The loss that spreads tokens over experts; None: there is none.
        pipeline_words: Of the setting `pipeline_parallel_config`.
        overlaps_sums: Whether ranks exchange gradients and weights while they compute, where the engine can.
        sharding_words: Of the setting `sharding_parallel_config`.
    """

    groups: ProcessGroups = field(default_factory=ProcessGroups)
    stage: Stage | None = None
    sharding_stage: int = 0
    layers: Sequence[Any] = ()
    phases: PhaseRecord = field(default_factory=PhaseRecord)
    label_positions: LabelPositions | None = None
    randomness: Sequence[Randomness] = ()
    writer: TensorSetWriter = field(default_factory=WholeTensorWriter)
    replica_check_steps: int = 0
    master_gradients: bool = False
    max_skipped_steps: int = 20
    continues_on_save_error: bool = False
    objective: PreferenceObjective | RewardObjective | None = None
    balance: ExpertBalance | None = None
    pipeline_words: Sequence[str] = ()
    overlaps_sums: bool = True
    sharding_words: Sequence[str] = ()

    def build_parallel(self, model: Any) -> ParallelModel:
        """This rank's part of a model, to be trained."""
        return ParallelModel(
            model,
            self.groups,
            stage=self.stage,
            sharding_stage=self.sharding_stage,
            layers=self.layers,
            master_gradients=self.master_gradients,
            pipeline_words=self.pipeline_words,
            overlaps_sums=self.overlaps_sums,
            sharding_words=self.sharding_words,
        )
