"""Services that curves can be sent to (`report_to`), and the packages that send them."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection

TRACKER_PACKAGES = {
    "visualdl": "visualdl",
    "wandb": "wandb",
    "tensorboard": "tensorboardX",
    "swanlab": "swanlab",
    "mlflow": "mlflow",
}
"""Service -> the module that has to be installed; pip knows it by the same name."""

OWN_TRACKERS = ("swanlab", "mlflow")
"""Services that PaddleNLP's trainer does not know."""


def reports_to(services: Collection[str], service: str) -> bool:
    """Whether a run sends its curves to a service: named, or installed where the setting says "all".

    Args:
        services: The setting `report_to`.
        service: A key of `TRACKER_PACKAGES`.
    """
    if service in services:
        return True
    return "all" in services and importlib.util.find_spec(TRACKER_PACKAGES[service]) is not None
