"""Any error as what a client is told of it."""

import logging

from starlette.exceptions import HTTPException

from mlxlora.errors import DataError
from mlxlora.serve.answering import Failed
from mlxlora.serve.guard import KINDS
from mlxlora.serve.orders import Busy, Unknown
from mlxlora.serve.refusals import WireError, bad_field, of_fault

SERVER_ERROR = "server_error"
SAID = {404: "there is nothing at this path", 405: "this path has no such method"}


def as_wire(error: Exception) -> WireError:
    """What is no fault of the client is logged, and told without its inside."""
    if isinstance(error, WireError):
        return error
    if isinstance(error, Failed):
        return of_fault(error.fault)
    if isinstance(error, Busy):
        return WireError(429, f"{error}; come again later", KINDS[429], code="rate_limit_exceeded")
    if isinstance(error, Unknown):  # unloaded while it was being asked
        return WireError(404, str(error), param="model", code="model_not_found")
    if isinstance(error, DataError):
        return bad_field(None, str(error))
    if isinstance(error, HTTPException):
        return WireError(error.status_code, SAID.get(error.status_code, str(error.detail)))
    logging.getLogger(__name__).error("a request failed", exc_info=error)
    return WireError(500, f"a fault of this server ({type(error).__name__})", SERVER_ERROR)
