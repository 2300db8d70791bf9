"""How an update's samples are spread: over processes, and on each over micro-batches, whose gradients add up."""

from __future__ import annotations

from dataclasses import dataclass

from training.distill.settings import DistillSettings


@dataclass(frozen=True)
class Batches:
    """The micro-batches of one process.

    Attributes:
        size: samples of each; all are equal, so that the mean of their means is the mean of all.
        count: of them, one after the other.
        first: the number of the first, counted over all processes.
    """

    size: int
    count: int
    first: int

    @classmethod
    def of(cls, settings: DistillSettings, processes: int = 1, rank: int = 0) -> Batches:
        """Spread `batch_size` evenly.

        Raises:
            ValueError: it cannot be.
        """
        share, rest = divmod(settings.batch_size, processes)
        if rest or not share:
            raise ValueError(
                f"batch_size {settings.batch_size} is not to be shared evenly by {processes} processes: give a multiple"
            )
        size = settings.micro_batch or share
        if share % size:
            raise ValueError(
                f"micro_batch {size} does not divide the {share} samples of a process (batch_size "
                f"{settings.batch_size} over {processes}): give a divisor"
            )
        return cls(size, share // size, rank * (share // size))
