"""The configuration of a multimodal folder's text part, as a folder of the text part alone would have it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from finetune.errors import UserError
from finetune.families.multimodal.kinds import MultimodalKind, find_kind
from finetune.families.registry import find_candidates

_OF_ALL = (
    *("torch_dtype", "dtype", "quantization_config", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("tie_word_embeddings", "transformers_version"),
)
"""Fields that hold for the whole model, and stand at the top."""
_OF_OTHERS = re.compile(
    r"vision|visual|image|video|audio|(^|_)(mm|im)_|^(auto_map|architectures|tokenizer_(padding_side|model_max_length))$"
)
"""Fields of other parts, where those of the text part stand beside them."""
_STREAMS = ("mrope_section", "mrope_interleaved")


def text_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the text part; that of a model of text alone as it is.

    Raises:
        UserError: Of a kind whose text part is not computed here, or it has none.
    """
    kind = find_kind(config)
    return dict(config) if kind is None else _text_config(config, kind)


def _text_config(config: Mapping[str, Any], kind: MultimodalKind) -> dict[str, Any]:
    if kind.refusal:
        raise UserError(
            f"{kind.name} ({config['model_type']}) is a multimodal model whose text part cannot be trained here: "
            f"{kind.refusal}. Use a model of text alone"
        )
    nested = next((config[name] for name in kind.text_fields if isinstance(config.get(name), dict)), None)
    if nested is None and not kind.is_flat:
        raise UserError(
            f"config.json is of {kind.name}, but has no {' or '.join(kind.text_fields)}: copy it again"
        )
    if nested is None:
        text = {name: value for name, value in config.items() if not _OF_OTHERS.search(name)}
        text["model_type"] = kind.same_types.get(str(config["model_type"]), kind.text_type)
    else:
        text = {name: config[name] for name in _OF_ALL if name in config}
        # A field of null in the text part's own leaves what holds for all, and elsewhere says something: no window.
        own = {name: value for name, value in nested.items() if value is not None or name not in text}
        text |= {name: value for name, value in own.items() if name not in ("architectures", "auto_map")}
        named = str(nested.get("model_type") or kind.text_type)
        text["model_type"] = kind.same_types.get(named, named)
        text = _with_left_out(text)
    return _with_one_stream(text)


def _with_left_out(text: dict[str, Any]) -> dict[str, Any]:
    """Adds the sizes that transformers takes by itself: files hold only what differs from them."""
    try:
        families = find_candidates({"model_type": text["model_type"]})
    except UserError:  # told with the model's name where the family is looked for
        return text
    sizes = dict(families[0].left_out)
    if text.get("rope_parameters"):  # the base stands in it
        sizes.pop("rope_theta", None)
    return sizes | text


def _with_one_stream(text: dict[str, Any]) -> dict[str, Any]:
    """Positions of text: time, height and width are the same number, so how a head is shared out changes nothing."""
    changed = dict(text)
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(settings := text.get(name), dict):
            kept = {key: value for key, value in settings.items() if key not in _STREAMS}
            for key in ("type", "rope_type"):
                if kept.get(key) in ("mrope", "default"):
                    del kept[key]
            changed[name] = kept or None
    return changed


def with_vocabulary(config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """The configuration of a whole multimodal model whose text part has that many embeddings."""
    return with_text_fields(config, {"vocab_size": size})


def with_text_fields(config: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a whole multimodal model with other values for fields of its text part.

    A field changes wherever it says something of the text part: in that part's own configuration, and at the top if it
    is there, or if the text part has none of its own.

    Args:
        config: config.json.
        fields: Names and values.
    """
    kind = find_kind(config)
    places = [name for name in kind.text_fields if isinstance(config.get(name), dict)] if kind else []
    changed = dict(config) | {name: value for name, value in fields.items() if name in config or not places}
    for place in places:
        changed[place] = dict(config[place]) | dict(fields)
    return changed
