"""Refusals as OpenAI writes them: a status, and an object that names the field at fault."""

from typing import Any

from mlxlora.errors import MlxLoraError
from mlxlora.serve.orders import Fault

INVALID = "invalid_request_error"


class WireError(MlxLoraError):
    """A request that is answered with an error. param: the field, as `messages.0.content.1`."""

    def __init__(
        self,
        status: int,
        message: str,
        type: str = INVALID,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.type = status, message, type
        self.param, self.code = param, code


def bad_field(param: str | None, message: str, code: str | None = None) -> WireError:
    """A 400; the message begins with the field, so that it can be read alone."""
    return WireError(400, f"{param}: {message}" if param else message, param=param, code=code)


def error_body(error: WireError) -> dict[str, Any]:
    return {
        "error": {
            "message": str(error),
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }


def of_fault(fault: Fault) -> WireError:
    """What the engine could not complete; only what is wrong with the request is a 400."""
    if not fault.ours:
        return WireError(400, fault.message)
    return WireError(503, fault.message, "server_error", code="engine_fault")
