"""The three errors that colocc raises."""


class LayoutError(ValueError):
    """The user's layouts, groups or batch do not fit together; the message says what to write
    instead."""


class CaptureError(RuntimeError):
    """The user's model cannot be traced; the message names the user's line and the remedy."""


class VerifyError(AssertionError):
    """A graph or a plan breaks a promise of the compiler: a bug in colocc, not in the user's
    code."""
