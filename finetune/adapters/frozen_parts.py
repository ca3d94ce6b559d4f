"""Which parameters of a model are trained where not all of them are, as people say it.

    freeze_layers            the first n decoder layers are frozen
    freeze_parameters_ratio  parameters from the bottom up are frozen, as long as they are this share of all or less
    freeze_parameters        what these names or patterns fit is frozen
    trainable_parameters     what these fit is trained, frozen above or not; given alone: nothing else is trained

A name is PaddleNLP's or Hugging Face's, whole or some neighbouring parts of it (`model.layers.3`, `self_attn`,
`lm_head`); any other text is a regular expression for a part of a name. The output layer's name stands for the
embedding where the two are one tensor. What is chosen does not depend on how the model is divided over processes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from finetune.adapters.pattern_matching import match_names
from finetune.adapters.targets import expected_parameters, split_names
from finetune.errors import UserError, list_some
from finetune.families.family import Family
from finetune.families.record_parts import OUTPUT_LAYER
from finetune.models.hf_names import embedding_name, is_tied, to_hugging_face

if TYPE_CHECKING:
    from finetune.processes.groups import ProcessGroups

_BARE = re.compile(r"[\w.-]+")
_MOST_NAMES = 12


@dataclass(frozen=True)
class PartChoice:
    """The four settings, and `modules_to_save`, whose names are further ones of `trainable`.

    Attributes:
        num_layers: Decoder layers that are frozen, from the first.
        ratio: Share of the parameters that is frozen from the bottom up, 0 to 1.
        frozen: Names and patterns of what is frozen.
        trainable: Those of what is trained.
    """

    num_layers: int = 0
    ratio: float = 0.0
    frozen: tuple[str, ...] = ()
    trainable: tuple[str, ...] = ()

    @property
    def is_made(self) -> bool:
        """Whether anything is frozen."""
        return bool(self.num_layers or self.ratio or self.frozen or self.trainable)


def choice_of(settings: Any) -> PartChoice:
    """The choice that the model arguments make."""
    return PartChoice(
        num_layers=settings.freeze_layers,
        ratio=settings.freeze_parameters_ratio,
        frozen=tuple(split_names(settings.freeze_parameters)),
        trainable=tuple(split_names(settings.trainable_parameters) + split_names(settings.modules_to_save)),
    )


def check_choice(choice: PartChoice, family: Family, config: Mapping[str, Any]) -> None:
    """Compares a choice with the names that a family's parameters have, before a model is built.

    Args:
        choice: What is frozen and trained.
        family: Record of the model.
        config: Its configuration as the family adapts it.

    Raises:
        UserError: A pattern is faulty or fits nothing, or there are fewer layers.
    """
    num_layers = int(config.get(family.fields.num_layers) or 1)
    if choice.num_layers > num_layers:
        raise UserError(
            f"freeze_layers is {choice.num_layers}, but this model has {num_layers} layers: give at most {num_layers}"
        )
    names = expected_parameters(family, config)
    matcher = _Matcher(names, family, is_tied=is_tied(config, family))
    matcher.find("freeze_parameters", choice.frozen)
    matcher.find("trainable_parameters", choice.trainable)


def freeze_parts(model: Any, choice: PartChoice, family: Family, groups: ProcessGroups) -> None:
    """Freezes what is not to be trained; all ranks must call it.

    Args:
        model: PaddleNLP's model, or this rank's part of it.
        choice: What is frozen and trained.
        family: Record of the model.
        groups: The run's process groups: the choice is made among the parameters of the whole model.

    Raises:
        UserError: A pattern fits nothing, or nothing is left to train.
    """
    from finetune.models.layers import named_weights

    own = named_weights(model)
    degree = groups.tensor.size
    local = {
        name: int(each.size) * (degree if getattr(each, "is_distributed", False) else 1)
        for name, each in own.items()
    }
    sizes: dict[str, int] = {}
    for part in groups.pipeline.gather_objects(local):
        sizes |= part
    config = model.config.to_dict()
    trained = choose_trained(choice, sizes, family, is_tied=is_tied(config, family))
    for name, parameter in own.items():
        parameter.stop_gradient = name not in trained


def choose_trained(
    choice: PartChoice, sizes: Mapping[str, int], family: Family, *, is_tied: bool
) -> set[str]:
    """Names of the parameters that are trained.

    Args:
        choice: What is frozen and trained.
        sizes: Number of elements of every parameter of the whole model.
        family: Record of the model.
        is_tied: Whether the output layer is the embedding.

    Raises:
        UserError: A pattern fits nothing, or nothing is left to train.
    """
    matcher = _Matcher(list(sizes), family, is_tied=is_tied)
    trained = set(sizes)
    if choice.trainable and not (choice.num_layers or choice.ratio or choice.frozen):
        trained = set()
    trained -= {name for name in sizes if (_layer_number(name) or 0) < choice.num_layers and _in_layer(name)}
    trained -= _bottom(sizes, choice.ratio, family)
    trained -= matcher.find("freeze_parameters", choice.frozen)
    trained |= matcher.find("trainable_parameters", choice.trainable)
    if not trained:
        raise UserError(
            "nothing is left to train: freeze_layers, freeze_parameters and freeze_parameters_ratio freeze every "
            "parameter; freeze less, or name what is trained in trainable_parameters"
        )
    return trained


def _bottom(sizes: Mapping[str, int], ratio: float, family: Family) -> set[str]:
    """The longest row of parameters from the bottom that is no larger than a share of all, as ms-swift counts it."""
    left = int(sum(sizes.values()) * ratio)
    found: set[str] = set()
    for name in _from_the_bottom(list(sizes), family):
        left -= sizes[name]
        if left < 0:
            break
        found.add(name)
    return found


def _from_the_bottom(names: Sequence[str], family: Family) -> list[str]:
    """Embeddings and what else comes before the layers, the layers by number, then the rest."""
    entries = (family.embedding_module, *family.entry_modules)

    def place(name: str) -> tuple[int, int]:
        if (number := _layer_number(name)) is not None:
            return 1, number
        return (0, 0) if any(part in entries for part in name.split(".")) else (2, 0)

    return sorted(names, key=place)  # stable: inside a layer all stages have one order


def _layer_number(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _in_layer(name: str) -> bool:
    return _layer_number(name) is not None


class _Matcher:
    """Finds the parameters that names and patterns mean.

    Args:
        names: PaddleNLP's names of the parameters.
        family: Record of the model.
        is_tied: Whether the output layer is the embedding.
    """

    def __init__(self, names: Sequence[str], family: Family, *, is_tied: bool):
        self.spellings = [(name, name) for name in names]
        self.spellings += [(to_hugging_face(name, family), name) for name in names]
        if is_tied and (embedding := embedding_name(family)) in names:
            heads = {OUTPUT_LAYER, family.head_module}
            self.spellings += [(f"{head}.weight", embedding) for head in heads]

    def find(self, setting: str, wanted: Collection[str]) -> set[str]:
        """All parameters that one of the names or patterns fits.

        Raises:
            UserError: One fits nothing, or is no regular expression.
        """
        found: set[str] = set()
        unused = []
        for text in wanted:
            fitting = self._find_one(text)
            found |= fitting
            unused += [] if fitting else [text]
        if unused:
            raise UserError([self._describe_unused(setting, text) for text in unused])
        return found

    def _find_one(self, text: str) -> set[str]:
        if _BARE.fullmatch(text):
            part = f".{text.strip('.')}."
            return {name for spelling, name in self.spellings if part in f".{spelling}."}
        spellings = list(dict.fromkeys(spelling for spelling, _ in self.spellings))
        fits = set(match_names([f"(?s:.*?)(?:{text})(?s:.*)"], spellings)[0])
        return {name for spelling, name in self.spellings if spelling in fits}

    def _describe_unused(self, setting: str, text: str) -> str:
        parts = {part for spelling, _ in self.spellings for part in spelling.split(".") if not part.isdigit()}
        layers = {spelling.rpartition(".")[0] for spelling, _ in self.spellings}
        nearest = get_close_matches(text, sorted({*parts, *layers}), n=3, cutoff=0.6)
        leaves = sorted({layer.rpartition(".")[2] for layer in layers})
        hint = f"did you mean {' or '.join(nearest)}? " if nearest else ""
        return (
            f"{setting}: no parameter of this model matches {text!r}; {hint}Give whole names, neighbouring parts of "
            f"them, or regular expressions; there are: {list_some(leaves, _MOST_NAMES, separator=', ')}."
        )
