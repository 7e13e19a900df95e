"""The base of every section of a job: a typed group of values, each of which may be left out."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


def derived(**constraints: Any) -> Any:
    """A value that is filled in where the user leaves it out; None until then.

    Declared with the type that it has in a resolved job, so that its readers need no None checks.
    """
    return Field(default=None, **constraints)


class Section(BaseModel):
    """Values of one subject. Unknown names, wrong types and numbers that are not finite are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
