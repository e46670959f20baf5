"""Counts how many cases of a property test reached the property itself.

A property test that skips cases passes when it skips all of them. Where a skip cannot be avoided,
the test counts what it checked and requires a share of it at the end.
"""


class CaseCount:
    """Cases tried and cases checked."""

    def __init__(self) -> None:
        self.tried = 0
        self.checked = 0

    def add(self, is_checked: bool) -> bool:
        """Count one case; returns ``is_checked``, so that a test can branch on it."""
        self.tried += 1
        self.checked += is_checked
        return is_checked

    def require(self, share: float = 0.6, at_least: int = 1) -> None:
        """Fail unless enough of the cases were checked."""
        counts = f"{self.checked} of {self.tried} cases were checked"
        assert self.checked >= max(at_least, share * self.tried), counts
