"""The base of every section of a job: a typed group of values, each of which may be left out."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Name = Annotated[str, Field(min_length=1)]


def derived(**constraints: Any) -> Any:
    """A value that is filled in where the user leaves it out; None until then.

    Declared with the type that it has in a resolved job, so that its readers need no None checks.
    """
    return Field(default=None, **constraints)


class Section(BaseModel):
    """Values of one subject. Unknown names, wrong types and numbers that are not finite are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python takes true for 1, so that `steps=true` would be one step."""
        asks = cls.model_fields[str(info.field_name)].annotation
        if asks is not bool and _holds_bool(value):
            raise ValueError("must not be true or false")
        return value


def _holds_bool(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, list | tuple) and any(map(_holds_bool, value)))
