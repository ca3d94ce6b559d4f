"""A reward model: a causal model with a head of one value in the place of its output layer.

The value of an answer is read at its last token: reward = h @ w, with h [hidden] behind the final norm and w
[hidden, 1] without a bias. Names are those of transformers' `...ForSequenceClassification` with one label: the weight
is `score.weight`, `architectures` and the labels of config.json say what it is. Nothing else is asked: a folder is a
reward model if its configuration says so.

The head takes the name `score` at the top of the model. The family's forward pass goes on to call its output layer by
the layer's own name; a property of that name hands it the head, so that a pipeline may replace the head by a stub.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError

if TYPE_CHECKING:
    from finetune.families.family import Family

REWARD_HEAD = "score"
"""Name of the head's layer, in files and in the model."""
REWARD_WEIGHT = f"{REWARD_HEAD}.weight"
_SUFFIX = "ForSequenceClassification"
_CAUSAL = re.compile(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration|Model)$")
_MODEL = "_model_of_head"

_classes: dict[Any, Any] = {}


def is_reward_config(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a model with a head over whole texts."""
    return any(str(name).endswith(_SUFFIX) for name in config.get("architectures") or ())


def is_reward_model(model: Any) -> bool:
    """Whether a model, or a stage of one, gives rewards instead of logits."""
    return bool(getattr(type(model), "gives_rewards", False))


def reward_config(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The configuration of the reward model on a causal model, or of a reward model itself.

    Raises:
        UserError: It is a classifier of several labels.
    """
    if is_reward_config(config):
        check_labels(config)
        return dict(config)
    labels = {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return with_reward_class({**config, **labels}, family)


def reward_architecture(family: Family) -> str:
    """Name of the class in transformers."""
    return _CAUSAL.sub("", family.architectures[0]) + _SUFFIX


def class_name(config: Mapping[str, Any]) -> str:
    """The class that the configuration of a reward model names."""
    return str(config["architectures"][0])


def with_reward_class(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The configuration naming transformers' class."""
    return {**config, "architectures": [reward_architecture(family)]}


def check_labels(config: Mapping[str, Any]) -> None:
    """Refuses a classifier.

    Raises:
        UserError: It tells several labels apart.
    """
    labels = config.get("id2label")
    number = len(labels) if isinstance(labels, Mapping) else config.get("num_labels", 2)
    if number != 1:
        raise UserError(
            f"config.json has {class_name(config)} with {number} labels, but a reward model has one: give a "
            "reward model, or the causal model to train one on"
        )


def reward_class(model_class: Any, family: Family) -> Any:
    """The model class with a reward head.

    Args:
        model_class: The family's causal language model.
        family: Its record.
    """
    if model_class not in _classes:
        _classes[model_class] = _make_class(model_class, family)
    return _classes[model_class]


def _make_class(model_class: Any, family: Family) -> Any:
    head = re.compile(rf"(^|\.){re.escape(family.head_module)}\.")

    def start(self: Any, config: Any) -> None:
        model_class.__init__(self, config)
        _replace_head(self, family)

    def name_mappings(cls: Any, config: Any) -> list[Any]:
        from paddlenlp.transformers.conversion_utils import StateDictNameMapping

        known = model_class._get_name_mappings(config)
        kept = [
            each
            for each in known
            if not head.search(each.source_name) and not each.source_name.endswith(REWARD_WEIGHT)
        ]
        return [*kept, StateDictNameMapping(REWARD_WEIGHT, REWARD_WEIGHT, "transpose")]

    ignored = [*(model_class._keys_to_ignore_on_load_unexpected or []), head.pattern]
    facts = {
        "__init__": start,
        "__module__": __name__,
        "__doc__": f"{model_class.__name__} with a reward head.",
        "_get_name_mappings": classmethod(name_mappings),
        "_keys_to_ignore_on_load_missing": [rf"^{re.escape(REWARD_WEIGHT)}$"],
        "_keys_to_ignore_on_load_unexpected": ignored,
        "_tied_weights_keys": [],
        "gives_rewards": True,
    }
    return type(reward_architecture(family), (model_class,), facts)


def _replace_head(model: Any, family: Family) -> None:
    from finetune.models.layers import find_layer
    from finetune.models.score_layer import RewardHead

    old = find_layer(model, family.head_module)
    owner = next(layer for layer in model.sublayers(include_self=True) if old in layer.children())
    # What comes to the output layer is as wide as the embedding, which a projection may make narrower than the layers.
    width = find_layer(model, family.embedding_module).weight.shape[1]
    del owner._sub_layers[family.head_module]
    model._tied_weights_keys, model._keys_to_ignore_on_load_missing = (
        [],
        type(model)._keys_to_ignore_on_load_missing,
    )
    owner_class: Any = type(owner)
    owner.__class__ = _with_alias(owner_class, family.head_module)
    owner.__dict__[_MODEL] = model  # not as a sublayer: the model may be above its owner
    model.score = RewardHead(width, model.config)


@functools.cache
def _with_alias(owner_class: Any, name: str) -> Any:
    """The class with a property that gives the reward head."""
    alias = property(lambda self: self.__dict__[_MODEL].score)
    return type(owner_class.__name__, (owner_class,), {name: alias, "__module__": owner_class.__module__})
