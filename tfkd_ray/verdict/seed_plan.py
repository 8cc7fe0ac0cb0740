"""How many seeds a sequential comparison may take; without SciPy, as files of arms are read with it."""

from typing import NamedTuple


class SeedPlan(NamedTuple):
    """How many seeds a sequential comparison may take."""

    first: int
    """Seeds before the first look, at least 3."""
    limit: int
    """Seeds of the last look."""

    @property
    def looks(self) -> range:
        """Return the numbers of seeds at which candidates are judged."""
        return range(self.first, self.limit + 1)
