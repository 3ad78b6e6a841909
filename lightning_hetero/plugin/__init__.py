"""The glue to Lightning: thin, without arithmetic."""

# First and as a whole: at its end the strategies are registered, for which the files of this package are imported.
import lightning.pytorch  # noqa: F401
