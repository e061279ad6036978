"""What all sections of a configuration are made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
# Whole numbers are recorded in 32 bits.
MAX_INT = 2**31 - 1
Positive = Annotated[int, Field(ge=1, le=MAX_INT)]
Natural = Annotated[int, Field(ge=0, le=MAX_INT)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values keep their TOML types, and JSON can hold them."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
