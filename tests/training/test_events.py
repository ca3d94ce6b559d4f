"""Callbacks see one state and one control object, and only those of the first process write."""

import pytest
from paddlenlp.trainer import TrainerCallback
from paddlenlp.trainer.trainer_callback import CallbackHandler, TrainerControl, TrainerState

from finetune.training.events import CallbackEvents


class OwnControl(TrainerCallback):
    """Hands back a control object of its own."""

    def on_step_end(self, args, state, control, **_more):
        return TrainerControl(should_save=True)


def make_events(*callbacks, is_first=True) -> CallbackEvents:
    handler = CallbackHandler(list(callbacks), None, None, None, None)
    return CallbackEvents(handler, None, TrainerState(), TrainerControl(), is_first=is_first)


def test_what_a_callback_hands_back_is_taken_over():
    events = make_events(OwnControl())
    control = events.control
    events.tell("on_step_end")
    assert events.control is control and control.should_save


@pytest.mark.parametrize("is_first", [True, False])
def test_a_loaded_state_does_not_change_which_process_this_is(is_first):
    events = make_events(is_first=is_first)
    state = events.state
    events.set_state(TrainerState(global_step=7))
    assert events.state is state
    assert (state.global_step, state.is_world_process_zero) == (7, is_first)


@pytest.mark.parametrize("is_first", [True, False])
def test_visualdl_takes_a_skipped_step_from_the_first_process(tmp_path, is_first):
    visualdl = pytest.importorskip("visualdl")
    from paddlenlp.trainer.integrations import VisualDLCallback

    with visualdl.LogWriter(logdir=str(tmp_path)) as writer:
        events = make_events(VisualDLCallback(writer), is_first=is_first)
        events.state.global_step = 4
        events.tell("on_log", {"step": 4, "loss": 2.5, "skipped": True, "loss_scale": 512.0})
    files = tmp_path.glob("vdlrecords*.log")  # a thread writes them, and is done now
    tags = [tag for file in files for tag in visualdl.LogReader(file_path=str(file)).tags()]
    assert any(tag.endswith("train%skipped") for tag in tags) == is_first
