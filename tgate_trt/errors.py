"""Every error that tgate-trt raises on purpose.

    TGateError
    ├── InputError             what the user asked for cannot be: a bad value, an unknown name, an unfit file
    │   └── UnsupportedError   sensible, but not something this version does
    ├── BundleError            a bundle is missing, foreign, damaged or of another version
    │   └── StaleBundleError   a whole bundle that no longer fits what it was built from or is asked for
    ├── BuildError             a trace, a cut or an engine build failed
    │   └── VerificationError  a graph or an engine does not agree with eager PyTorch
    └── GateError              a run that the gate cannot follow, such as one that would reuse another run's cache

Each message is one sentence or two: what was expected, what was got, what to do. The commands print it and
exit with 1.
"""

from __future__ import annotations


class TGateError(Exception):
    """Root of the errors that tgate-trt raises on purpose."""


class InputError(TGateError, ValueError):
    """The user's input cannot be served as it stands."""


class UnsupportedError(InputError):
    """The request is sensible, but this version does not serve it."""


class BundleError(TGateError):
    """A bundle is missing, foreign, damaged or of another schema version."""


class StaleBundleError(BundleError):
    """A whole bundle does not fit what it was built from, or what it is asked to do."""


class BuildError(TGateError):
    """A trace, a cut or an engine build failed."""


class VerificationError(BuildError):
    """A graph or an engine does not agree with eager PyTorch."""


class GateError(TGateError):
    """A denoising run that the gate cannot follow."""
