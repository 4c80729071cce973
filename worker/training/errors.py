"""How a run ends without a result."""


class TrainingError(RuntimeError):
    """A run ended without a result."""


class TrainingDivergedError(TrainingError):
    """The loss is not a number any more; nothing of the run is usable. `edit_ids` are those whose loss was none."""

    def __init__(self, message: str, edit_ids: frozenset[str]) -> None:
        super().__init__(message)
        self.edit_ids = edit_ids


class TrainingCancelledError(TrainingError):
    """The caller asked the run to stop."""
