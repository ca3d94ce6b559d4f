"""PaddleNLP's callbacks: what they are told, and what they ask for."""

from __future__ import annotations

from typing import Any

from paddlenlp.trainer.trainer_callback import TrainerState


class CallbackEvents:
    """Tells callbacks what happens.

    `state` and `control` stay the same objects from beginning to end, so whoever was handed them sees every change.

    Args:
        handler: PaddleNLP's CallbackHandler.
        args: PaddleNLP's TrainingArguments.
        state: Where the training stands.
        control: What callbacks ask for: to log, to evaluate, to save.
        is_first: Whether this is the first process, the one that writes records.
    """

    def __init__(self, handler: Any, args: Any, state: TrainerState, control: Any, *, is_first: bool = True):
        self.state, self.control = state, control
        self._handler, self._args, self._is_first = handler, args, is_first
        state.is_world_process_zero = is_first

    def tell(self, event: str, *details: Any) -> None:
        """Calls a method of all callbacks, such as "on_step_end".

        Args:
            event: The method.
            details: What it is given besides arguments, state and control.
        """
        answer = getattr(self._handler, event)(self._args, self.state, self.control, *details)
        if answer is not self.control:  # a callback may hand back a control object of its own
            vars(self.control).update(vars(answer))

    def set_optimizer(self, optimizer: Any, lr_scheduler: Any) -> None:
        """Shows callbacks what updates the weights, made when the training begins."""
        self._handler.optimizer, self._handler.lr_scheduler = optimizer, lr_scheduler

    def set_state(self, state: TrainerState) -> None:
        """Takes over another state, say that of a checkpoint, but not which process this is."""
        vars(self.state).update(vars(state))
        self.state.is_world_process_zero = self._is_first
