"""What is wrong with a request, as both families of clients read it.

OpenAI's clients decide by status and `code` whether to try again, Anthropic's by `type`. A message
is at most 300 characters and names no file: it may quote a request, and it leaves the machine.
"""

from __future__ import annotations

from typing import Any

from chronos.common.errors import ChronosError

MOST_CHARACTERS = 300
_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    500: "api_error",
    503: "overloaded_error",
}


class Problem(Exception):
    """An answer that is an error. code: for programs; param: the field it is about; retry_after:
    seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.retry_after = retry_after
        self.message = shortened(message)

    def openai(self) -> dict[str, Any]:
        kind = _KINDS.get(self.status, "invalid_request_error")
        fields = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": fields}

    def anthropic(self, request_id: str) -> dict[str, Any]:
        kind = _KINDS.get(self.status, "invalid_request_error")
        error = {"type": kind, "message": self.message}
        return {"type": "error", "error": error, "request_id": request_id}


def shortened(message: str) -> str:
    text = " ".join(message.split())
    return text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 3] + "..."


def of_error(error: Exception, param: str | None = None) -> Problem:
    """What a client may know of an error: what was wrong with its request, and of anything else
    that the model could not be run. `where` of our errors is a path, and stays here."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, ChronosError) and error.exit_code in (2, 3):
        return Problem(400, error.what, param=param)
    return Problem(500, "the model could not be run; the server's log says why", code="internal")
