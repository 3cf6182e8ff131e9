"""What goes wrong, in words that say what, where, and what to do."""


class RunnerError(Exception):
    """The runner could not do what it was asked to; nothing was judged."""


class CaptureError(RunnerError):
    """A pass could not be captured as it ran; no file was left."""
