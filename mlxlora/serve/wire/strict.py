"""Parts of a request, validated strictly; what does not fit is a WireError that names its place."""

from typing import Any, NoReturn, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from mlxlora.serve.wire.refusals import WireError, bad_field

MOST_FIELDS = 100
UNKNOWN = "this server does not know this field; leave it out"
SHOWN = 100  # characters of a name that is not ours


class Strict(BaseModel):
    """No field beside those named, no text for a number; null is as if it were not there."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        known = {field.alias or name for name, field in cls.model_fields.items()}
        if len(value) > MOST_FIELDS:  # or each would be complained of
            refuse(UNKNOWN, next(name for name in value if name not in known))
        return {name: v for name, v in value.items() if v is not None or name not in known}

    @classmethod
    def read(cls, value: dict[str, Any]) -> Self:
        """Raises WireError for the first field that does not fit."""
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise _first(error) from None


def refuse(message: str, at: str = "") -> NoReturn:
    """In a validator: what is wrong with the value, or with its field `at`."""
    raise PydanticCustomError("refused", "{why}", {"why": message, "at": at})


_TELLING = {"literal_error": 0, "extra_forbidden": 1}


def _first(error: ValidationError) -> WireError:
    details = error.errors(include_url=False, include_input=False)
    # A kind that is not known explains what else is wrong; so does a field, what is missing.
    first = min(details, key=lambda one: _TELLING.get(one["type"], len(_TELLING)))
    at = first.get("ctx", {}).get("at")
    path = [*first["loc"], *([at] if at else [])]
    return bad_field(".".join(str(part)[:SHOWN] for part in path) or None, _said(first))


def _said(details: ErrorDetails) -> str:
    if details["type"] == "extra_forbidden":
        return UNKNOWN
    if details["type"] == "missing":
        return "this field is required"
    message = details["msg"]
    message = message.replace("Input should be", "it must be").replace("should be", "must be")
    return message[:1].lower() + message[1:]
