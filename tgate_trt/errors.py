"""Every error that tgate-trt raises on purpose.

    TGateError
    ├── InputError             the user's input is wrong: a bad value, an unknown name, an unfit file
    │   └── UnsupportedError   the request makes sense, but this version or this machine cannot do it
    ├── BundleError            a bundle is missing, damaged, of another version, or no bundle at all
    │   └── StaleBundleError   an intact bundle does not match its model, this machine or the request
    ├── BuildError             a trace, a cut or an engine build failed
    │   └── VerificationError  a graph or an engine differs from eager PyTorch
    ├── GateError              the gate cannot follow a run, such as one that would reuse another run's cache
    └── ServiceError           a service does not serve a request
        ├── BusyError          its queue is full
        ├── CancelledError     whoever made the request does not want it any more
        ├── DeadlineError      the request's time is over
        └── ClosedError        the service ends

Each message has one or two sentences: what was expected, what was found, what to do. Commands print it and exit with 1.
"""

from __future__ import annotations


class TGateError(Exception):
    """Base of all errors that tgate-trt raises on purpose."""


class InputError(TGateError, ValueError):
    """The user's input is wrong."""


class UnsupportedError(InputError):
    """The request makes sense, but this version or this machine cannot do it."""


class BundleError(TGateError):
    """A bundle is missing, damaged, of another schema version, or no bundle at all."""


class StaleBundleError(BundleError):
    """An intact bundle does not match its model, this machine or the request."""


class BuildError(TGateError):
    """A trace, a cut or an engine build failed."""


class VerificationError(BuildError):
    """A graph or an engine differs from eager PyTorch."""


class GateError(TGateError):
    """The gate cannot follow a denoising run."""


class ServiceError(TGateError):
    """A service does not serve a request."""


class BusyError(ServiceError):
    """A service's queue is full."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        """Say how full it is.

        Args:
            message: one sentence.
            retry_after: seconds until there may be room.
        """
        super().__init__(message)
        self.retry_after = retry_after


class CancelledError(ServiceError):
    """Whoever made a request does not want it any more."""


class DeadlineError(ServiceError):
    """The time of a request is over."""


class ClosedError(ServiceError):
    """A service ends, and takes or finishes no more requests."""
