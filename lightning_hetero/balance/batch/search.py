"""Search for the largest size that fits, in few trials."""

from __future__ import annotations

__all__ = ["Search"]


class Search:
    """A search that doubles a size while it fits and then bisects.

    Args:
        start: Size to start from; it has run before, so it is assumed to fit.
        most: Largest size of interest.

    Example:
        >>> search = Search(start=8, most=100)
        >>> while (size := search.next_size()) is not None:
        ...     search.tell(size <= 37)
        >>> search.largest
        37
    """

    def __init__(self, start: int, most: int) -> None:
        self.largest = min(start, most)
        self._most = most
        self._too_large: int | None = None
        self._tried = 0

    def next_size(self) -> int | None:
        """Return the size to try next; None once the largest is found."""
        if self.largest >= self._most or (self._too_large is not None and self._too_large - self.largest < 2):
            return None
        doubled = min(2 * self.largest, self._most)
        self._tried = doubled if self._too_large is None else (self.largest + self._too_large) // 2
        return self._tried

    def tell(self, fits: bool) -> None:
        """Report whether the size to try has fitted."""
        if fits:
            self.largest = self._tried
        else:
            self._too_large = self._tried
