"""What is answered to a request that cannot be answered, in the shape of OpenAI's interface."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """A request is refused, or failed.

    Args:
        status: Of HTTP.
        message: What is wrong, and what to do.
        param: The field that it is about.
        code: A word for programs.
        headers: Of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        kind = _KINDS.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class InvalidRequest(ApiError):
    """The request itself is wrong (400)."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None):
        super().__init__(400, message, param=param, code=code)
