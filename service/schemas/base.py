"""What all types here have in common."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Timestamp = Annotated[int, Field(description="Unix seconds")]


class Schema(BaseModel):
    """Base of all types here: frozen, and closed to unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")
