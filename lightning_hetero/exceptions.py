"""Every error that this package raises on purpose."""

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
    """An argument is outside its rule; the message names argument, rule, value and way out."""


class InfeasiblePlanError(ConfigurationError):
    """No plan satisfies the constraints, for example caps that together hold less than the global batch."""


class UnsupportedFeatureError(HeteroError, RuntimeError):
    """The user's set-up is legitimate, but this version cannot train it exactly and refuses to do it wrongly."""


class DivergedRanksError(HeteroError, RuntimeError):
    """Ranks follow different plans or are at different steps; going on would train silently wrong."""


class RankFailedError(HeteroError, RuntimeError):
    """Another rank has failed; the message says which, and that rank reports the cause."""


class RankOutOfMemoryError(HeteroError, RuntimeError):
    """This rank ran out of memory and could not go on in smaller passes; the message says where and why."""
