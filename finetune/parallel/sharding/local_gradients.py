"""Where backward passes leave the gradients of parameters, before they are summed over processes.

Paddle adds up the gradients of micro-batches in the parameter's dtype. With `amp_master_grad` they are added up in
float32: a hook takes each gradient of a micro-batch away as soon as backward has it. That is what
`paddle.distributed.fleet.utils.mix_precision_utils.MixPrecisionLayer` does, under the same name (`main_grad`);
its optimizer wrapper is not needed, because Paddle's optimizers take a float32 gradient of a half-precision parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import paddle

from finetune.parallel.sharding.flat_slices import no_grad_no_autocast


class ParameterGradients:
    """Gradients in the parameters' dtype, where Paddle leaves them.

    Attributes:
        attribute: Of a parameter, under which its gradient is.
    """

    attribute = "grad"

    def exists(self, parameter: Any) -> bool:
        """Whether a backward pass left a gradient."""
        return getattr(parameter, self.attribute) is not None

    def get(self, parameter: Any) -> Any:
        """The gradient, of the parameter's shape, until it is cleared; zeros for none."""
        gradient = getattr(parameter, self.attribute)
        return paddle.zeros(parameter.shape, dtype=self._dtype(parameter)) if gradient is None else gradient

    def take(self, parameters: Mapping[str, Any]) -> tuple[list[Any], set[str]]:
        """Gradients, flat, of which nothing is left behind; and which of the parameters have one."""
        present = {name for name, parameter in parameters.items() if self.exists(parameter)}
        gradients = [self.get(parameter).flatten() for parameter in parameters.values()]  # keeps the memory
        for parameter in parameters.values():
            self.clear(parameter)
        return gradients, present

    def hand_over(self, parameter: Any) -> None:
        """Leaves the gradient, or zeros for none, where the optimizer looks: in `parameter.grad`."""
        if parameter.grad is None:
            parameter.grad = self.get(parameter)

    def clear(self, parameter: Any) -> None:
        """Drops the gradient."""
        parameter.clear_gradient(False)

    def _dtype(self, parameter: Any) -> Any:
        return parameter.dtype


class MasterGradients(ParameterGradients):
    """Gradients added up in float32.

    Args:
        parameters: Those that are trained; each gets a hook for good.
    """

    attribute = "main_grad"

    def __init__(self, parameters: Iterable[Any]):
        for parameter in parameters:
            parameter.main_grad = None
            parameter._register_grad_hook(_add_to_main(parameter))

    def hand_over(self, parameter: Any) -> None:
        """Leaves the gradient, or zeros for none, where the optimizer looks: in `parameter.grad`."""
        parameter.grad = self.get(parameter)
        parameter.main_grad = None

    def clear(self, parameter: Any) -> None:
        """Drops the gradient."""
        parameter.main_grad = None

    def _dtype(self, parameter: Any) -> Any:
        return paddle.float32


def _add_to_main(parameter: Any) -> Callable[[Any], None]:
    def add(gradient: Any) -> None:
        if gradient is None or not gradient._is_initialized():
            return
        with no_grad_no_autocast():
            wide = gradient.clone() if gradient.dtype == paddle.float32 else gradient.astype("float32")
            if parameter.main_grad is None:
                parameter.main_grad = wide
            else:
                parameter.main_grad.add_(wide)
            gradient._clear_data()  # Paddle adds only gradients that have data to `parameter.grad`

    return add
