"""All errors that this package raises deliberately."""

__all__ = [
    "ConfigurationError",
    "DivergedRanksError",
    "HeteroError",
    "InfeasiblePlanError",
    "RankFailedError",
    "RankOutOfMemoryError",
    "UnsupportedFeatureError",
]


class HeteroError(Exception):
    """Base class of all errors of this package."""


class ConfigurationError(HeteroError, ValueError):
    """An argument breaks a rule; the message names the argument, the rule, the value and the way out."""


class InfeasiblePlanError(ConfigurationError):
    """No plan satisfies the limits, for example because all ranks together cannot hold the global batch."""


class UnsupportedFeatureError(HeteroError, RuntimeError):
    """The set-up is legitimate, but this version cannot train it exactly and refuses to train it wrongly."""


class DivergedRanksError(HeteroError, RuntimeError):
    """Ranks follow different plans or are at different steps; continuing would silently give wrong results."""


class RankFailedError(HeteroError, RuntimeError):
    """Another rank has failed; the message names it, and that rank reports the cause."""


class RankOutOfMemoryError(HeteroError, RuntimeError):
    """This rank ran out of memory and could not continue in smaller micro-batches; the message says where and why."""
