"""Several models answer a message at once, each as it would alone."""

from __future__ import annotations

import threading
from itertools import pairwise

import pytest

from finetune.errors import UserError
from finetune.serving.decoding.options import ModelOptions
from finetune.serving.decoding.settings import DecodingSettings
from finetune.serving.predict.answer_stream import Answerer, AnswerThread
from finetune.serving.predict.loading import load_pair, plan_model
from tests.serving.predict.builders import save_prefix

SETTINGS = DecodingSettings(max_new_tokens=20, min_new_tokens=20, top_k=0, temperature=0.9, seed=3)


def gather(thread, sides, settings=SETTINGS):
    """The whole answers, and who spoke when."""
    answers, speakers = [""] * len(sides), []
    for number, text in thread.stream([Answerer(side) for side in sides], "裙", settings):
        answers[number] += text
        speakers.append(number)
    return answers, speakers


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_together_as_alone(kind, sharp_llama, lora_folder, tmp_path):
    folders = (
        {"lora_path": lora_folder}
        if kind == "lora"
        else {"prefix_path": save_prefix(sharp_llama, tmp_path / "p")}
    )
    sides = load_pair(plan_model(ModelOptions(model_name_or_path=str(sharp_llama), **folders)))
    thread = AnswerThread()
    together, speakers = gather(thread, sides)
    alone = [gather(thread, [side])[0][0] for side in sides]
    assert together == alone and alone[0] != alone[1]
    changes = sum(before != after for before, after in pairwise(speakers))
    assert changes > len(speakers) / 2, "they took no turns"


class Speaker:
    """Says its words one by one."""

    def __init__(self, words, error=None):
        self.words, self.error, self.said = words, error, []

    def answer(self, turns, message, settings, *, system=None, on_text):
        for word in self.words:
            on_text(word)
            self.said.append(word)
        if self.error:
            raise self.error


def test_a_fault_of_one_ends_all_and_is_told():
    endless = Speaker("x" * 10_000)
    with pytest.raises(UserError, match="no room"):
        gather(AnswerThread(), [endless, Speaker("ab", UserError("no room"))])
    assert len(endless.said) < 10


def test_who_ends_early_leaves_the_turn_to_the_others():
    assert gather(AnswerThread(), [Speaker("ab"), Speaker("abcd"), Speaker("")])[0] == ["ab", "abcd", ""]


def test_stopped_or_unread_answers_end_and_the_next_message_is_answered():
    thread, stop = AnswerThread(), threading.Event()
    endless = [Speaker("x" * 100_000), Speaker("y" * 100_000)]
    heard = 0
    for _ in thread.stream([Answerer(each) for each in endless], "a", SETTINGS, stop=stop):
        heard += 1
        stop.set()
    assert heard < 1000
    unread = thread.stream([Answerer(each) for each in endless], "a", SETTINGS)
    next(unread)
    unread.close()
    assert gather(thread, [Speaker("ab"), Speaker("cd")])[0] == ["ab", "cd"]
    assert len(endless[0].said) < 50_000
