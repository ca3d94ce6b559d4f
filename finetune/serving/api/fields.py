"""The fields of a request's JSON object, each read once and by its type; what is left over is refused."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from finetune.serving.api.errors import InvalidRequest

_SHOWN = 60


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object of a request.

    Raises:
        InvalidRequest: It is no UTF-8, no JSON, no object, or holds half a character.
    """
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
        # Half of a pair of surrogates can be written as an escape, and is no text.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidRequest("The body holds half of a surrogate pair, which is no character.") from None
    except UnicodeDecodeError:
        raise InvalidRequest("The body is no UTF-8: send JSON in UTF-8.") from None
    except RecursionError:
        raise InvalidRequest("The body is nested too deeply.") from None
    except ValueError as error:
        raise InvalidRequest(f"The body is no JSON: {str(error)[:200]}.") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"The body is {name_type(value)}, expected a JSON object.")
    return value


class Fields:
    """Reads fields; null counts as absent everywhere.

    Args:
        values: The object.
        place: What stands in front of the names of its fields in messages: "messages[0]."
    """

    def __init__(self, values: dict[str, Any], place: str = ""):
        self._place = place
        self._left = {name: value for name, value in values.items() if value is not None}

    def take(self, name: str) -> Any:
        """A field as it is, None if absent."""
        return self._left.pop(name, None)

    def take_number(self, name: str, low: float, high: float) -> float | None:
        """A number within bounds."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            refuse_type(self._place + name, value, "a number")
        if not low <= value <= high:
            name = self._place + name
            raise InvalidRequest(f"{name} is {shown(value)} but must be {low:g} to {high:g}.", name)
        return float(value)

    def take_integer(self, name: str, low: int, high: int) -> int | None:
        """A whole number within bounds."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            refuse_type(self._place + name, value, "an integer")
        if not low <= value <= high:
            name = self._place + name
            raise InvalidRequest(f"{name} is {shown(value)} but must be {low} to {high}.", name)
        return int(value)

    def take_flag(self, name: str) -> bool:
        """True or false; false if absent."""
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            refuse_type(self._place + name, value, "true or false")
        return bool(value)

    def take_text(self, name: str) -> str | None:
        """A string."""
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            refuse_type(self._place + name, value, "a string")
        return value

    def refuse_unsupported(self, neutral: dict[str, tuple[Any, ...]]) -> None:
        """Refuses fields that would change the answer and are not understood; values that change nothing pass.

        Args:
            neutral: Field -> the values that pass.
        """
        for name, values in neutral.items():
            value = self.take(name)
            if value is not None and not any(value == each and type(value) is type(each) for each in values):
                name = self._place + name
                raise InvalidRequest(
                    f"{name} is {shown(value)}, which this server does not support: leave it out.",
                    name,
                    "unsupported_parameter",
                )

    def ignore(self, *names: str) -> None:
        """Takes fields that change no answer."""
        for name in names:
            self.take(name)

    def refuse_rest(self) -> None:
        """Refuses what was not taken."""
        if self._left:
            name = self._place + next(iter(self._left))
            raise InvalidRequest(
                f"{shown(name)} is no field of this request.", name[:_SHOWN], "unknown_parameter"
            )


def refuse_type(name: str, value: Any, expected: str) -> NoReturn:
    """Refuses a value of another type.

    Raises:
        InvalidRequest: Always.
    """
    raise InvalidRequest(f"{name} is {name_type(value)}, expected {expected}.", name, "invalid_type")


def name_type(value: Any) -> str:
    """What JSON calls a value."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def shown(value: Any) -> str:
    """A value as a message shows it."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
