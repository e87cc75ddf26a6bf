"""Every failure the workbench explains: what happened, where, and what to do next."""


class WorkbenchError(Exception):
    """The root of all failures that are told to a person; its text is one sentence with the next step."""


class NotFound(WorkbenchError):
    """What was asked for does not exist."""


class Conflict(WorkbenchError):
    """The request collides with something that is already there or with somebody else's work."""


class Unavailable(WorkbenchError):
    """A part that is needed does not answer; trying again later is worth it."""


class Invalid(WorkbenchError, ValueError):
    """The input is wrong; trying again unchanged will fail again."""


class Cancelled(WorkbenchError):
    """A person cancelled the job."""
