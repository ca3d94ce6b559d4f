"""Fine-tuning of generative language models on PaddlePaddle.

    from finetune import train, predict
    result = train(model_name_or_path="...", dataset_name_or_path="...", output_dir="...", lora=True)

Importing this package is free: neither paddle nor paddlenlp is loaded until a
run has passed every check of its arguments.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.commands.python_calls import (
        PredictResult,
        TrainResult,
        evaluate,
        merge_lora,
        predict,
        preview,
        train,
    )
    from finetune.errors import RunError, UserError

__version__ = "0.1.0"

__all__ = [
    "PredictResult",
    "RunError",
    "TrainResult",
    "UserError",
    "evaluate",
    "merge_lora",
    "predict",
    "preview",
    "train",
]


def __getattr__(name: str) -> Any:
    """Loads a function of the Python interface when it is asked for."""
    from importlib import import_module

    if name == "merge":  # the package, which can be called
        return import_module(".merge", __name__)
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = ".errors" if name.endswith("Error") else ".commands.python_calls"
    return getattr(import_module(home, __name__), name)


def __dir__() -> list[str]:
    """The names of the interface, too, which are not loaded yet."""
    return sorted({*globals(), *__all__, "merge"})
