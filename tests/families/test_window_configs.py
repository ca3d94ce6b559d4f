"""Windows of attention that config.json asks for, in all layers or in some."""

from __future__ import annotations

import pytest

from finetune.errors import UserError
from finetune.families.family import get_family

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4}
MIXED = ["full_attention", "sliding_attention"] * 2
ALL = ["sliding_attention"] * 4
ON = {"use_sliding_window": True, "sliding_window": 8}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("qwen3_moe", ON | {"max_window_layers": 2}, "a window to some layers .max_window_layers 2"),
        ("qwen3_moe", ON | {"layer_types": MIXED}, "a window to some layers"),
        ("qwen2_moe", {"layer_types": MIXED}, "use_sliding_window None.*give them no window"),
        ("mistral", {"layer_types": MIXED}, "set model_type to ministral"),
        ("mistral", {"layer_types": ALL, "sliding_window": None}, "set model_type to ministral"),
    ],
)
def test_windows_that_are_read_in_two_ways_are_refused(name, settings, message):
    with pytest.raises(UserError, match=message):
        get_family(name).adapt_config({"model_type": name, **SIZES, **settings})


@pytest.mark.parametrize(
    ("name", "settings", "window", "kinds"),
    [
        ("qwen2_moe", ON | {"layer_types": MIXED}, 8, MIXED),
        ("qwen2_moe", ON | {"max_window_layers": 0}, 8, ALL),
        ("qwen2_moe", ON | {"sliding_window": None, "max_window_layers": 0}, None, None),
        ("qwen3_moe", ON, 8, ALL),
        ("qwen3_moe", {"use_sliding_window": False, "max_window_layers": 2}, None, None),
        ("mistral", {"sliding_window": 8, "layer_types": ALL}, 8, ALL),
        ("ministral", {"sliding_window": 8, "layer_types": MIXED}, 8, MIXED),
        ("ministral", {"sliding_window": 8}, 8, ALL),
        ("ministral", {"sliding_window": None}, None, None),
    ],
)
def test_the_layers_with_a_window(name, settings, window, kinds):
    family = get_family("mistral" if name == "ministral" else name)
    adapted = family.adapt_config({"model_type": name, **SIZES, **settings})
    assert (adapted["sliding_window"], adapted.get("layer_types")) == (window, kinds)
    again = family.adapt_config(dict(adapted))
    assert (again["sliding_window"], again.get("layer_types")) == (window, kinds)
