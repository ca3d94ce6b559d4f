"""Curves sent to MLflow (`report_to mlflow`); PaddleNLP's trainer has no callback for it.

Metrics have the names that PaddleNLP's other trackers give them: `train/loss`, `eval/accuracy`, and the optimizer
step as their step. Without MLFLOW_TRACKING_URI they go into a database in the run's own folder, so that nothing is
written where the command happens to be started; `mlflow ui --backend-store-uri` shows it.
"""

from __future__ import annotations

import logging
import numbers
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
from paddlenlp.trainer import TrainerCallback
from paddlenlp.trainer.integrations import rewrite_logs

from finetune.storage.files import write_atomically

logger = logging.getLogger(__name__)

_MAX_PARAMETER_LENGTH = 500  # MLflow's servers before 2.8 refuse longer values of parameters


class MlflowCallback(TrainerCallback):
    """Sends what is logged to one MLflow run, from the first process only.

    A run that continues from a checkpoint continues its MLflow run, too. Names and places are taken from MLflow's own
    variables (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, MLFLOW_RUN_ID). A server that fails is told once and then
    left alone: it ends no training.

    Args:
        folder: For the database, where no MLFLOW_TRACKING_URI says otherwise, and for the id of the run, which is
            looked up there when the run goes on.
        run_name: Shown for the run.
        settings: Of the run, without secrets; sent as its parameters.
        continues: Whether the run goes on from a checkpoint.
    """

    def __init__(self, folder: Path, *, run_name: str, settings: dict[str, Any], continues: bool):
        self._folder, self._run_name, self._settings = folder, run_name, settings
        self._continues = continues
        self._has_run, self._has_failed = False, False

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_more: Any) -> None:
        """Starts the run, or the one of the checkpoint again."""
        if state.is_world_process_zero:
            self._send(self._start)

    def on_log(self, _args: Any, state: Any, _control: Any, logs: Any = None, **_more: Any) -> None:
        """Sends numbers; what is logged besides is left out."""
        if state.is_world_process_zero and self._has_run:
            figures = rewrite_logs(logs or {})
            metrics = {
                name: float(value)
                for name, value in figures.items()
                if isinstance(value, numbers.Real) and not isinstance(value, bool)
            }
            self._send(lambda: mlflow.log_metrics(metrics, step=state.global_step))

    def on_train_end(self, _args: Any, state: Any, _control: Any, **_more: Any) -> None:
        """Marks the run as finished."""
        if state.is_world_process_zero and self._has_run:
            self._send(mlflow.end_run)

    def _start(self) -> None:
        if "MLFLOW_TRACKING_URI" not in os.environ:
            self._folder.mkdir(parents=True, exist_ok=True)
            address = f"sqlite:///{(self._folder / 'mlflow.db').resolve()}"
            mlflow.set_tracking_uri(address)
            logger.info("MLflow: %s", address)
        id_file = self._folder / "mlflow_run_id"
        known = id_file.read_text(encoding="utf-8").strip() if self._continues and id_file.is_file() else None
        run = mlflow.start_run(run_id=known, run_name=None if known else self._run_name)
        self._has_run = True
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(id_file, f"{run.info.run_id}\n".encode())
        if not known:
            parameters = {
                name: str(value)[:_MAX_PARAMETER_LENGTH]
                for name, value in self._settings.items()
                if value is not None
            }
            mlflow.log_params(parameters)

    def _send(self, act: Callable[[], Any]) -> None:
        if self._has_failed:
            return
        try:
            act()
        except Exception as error:  # a tracker's own classes differ by version and transport
            self._has_failed = True
            logger.warning(
                "MLflow got no more of this run: %s. Training goes on; train_log.jsonl holds everything.",
                str(error).partition("\n")[0],
            )
