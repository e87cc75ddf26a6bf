"""What a training says when it cannot go on: one readable line with the next step."""


class TrainingError(Exception):
    """The training cannot go on; the message says what happened and what to do next."""


class DataError(TrainingError):
    """The data set cannot be trained on; the message says what, where, and what to do next."""
