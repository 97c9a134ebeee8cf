"""What a client is told when its request is not answered, in the form that OpenAI's clients read."""

from __future__ import annotations

from typing import Any


class Refusal(Exception):
    """An answer that is none. status: of HTTP; code: a word for programs; headers: further ones."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers or {}

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": None, "code": self.code}}


def bad_request(message: str) -> Refusal:
    """A request that cannot be meant, or cannot be defended."""
    return Refusal(400, "undefendable", message)
