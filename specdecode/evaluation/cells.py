"""Records in, the cells that they are of, these in order, and what people call them, out."""

from collections.abc import Iterable
from typing import cast

from specdecode.decoding.sequence import VerifierName
from specdecode.evaluation.records import Record
from specdecode.evaluation.suite import BASELINE, EXPERIMENTS, Cell, ExperimentName

ALL = "all"  # the domains together


def cell_of(record: Record) -> Cell:
    """The cell that a record is of."""
    experiment, verifier = cast("ExperimentName", record.experiment), cast("VerifierName", record.verifier)
    return Cell(experiment, record.draft, record.K, record.temperature, verifier, record.batch)


def is_baseline_of(other: Cell, cell: Cell) -> bool:
    """The plain answers at the same temperature and batch size; of a peer's too."""
    return other.experiment == BASELINE and (other.temperature, other.batch) == (cell.temperature, cell.batch)


def in_order(cells: Iterable[Cell]) -> list[Cell]:
    """Each cell once, as the suite lists them: records begin with another one for each group of questions."""
    found = list(dict.fromkeys(cells))
    drafts = list(dict.fromkeys(cell.draft for cell in found))
    return sorted(
        found, key=lambda c: (c.batch, c.temperature, EXPERIMENTS.index(c.experiment), drafts.index(c.draft), c.K, c.verifier)
    )


def cell_names(cells: Iterable[Cell]) -> dict[Cell, str]:
    """What cells of one setting are called, as short as tells them apart."""
    found = list(dict.fromkeys(cells))
    names = {}
    for cell in found:
        peers = [other for other in found if other.experiment == cell.experiment]
        draft = f" {cell.draft}" if len({other.draft for other in peers}) > 1 else ""
        k = f" K={cell.K}" if len({other.K for other in peers}) > 1 else ""
        names[cell] = f"{cell.experiment}{draft}{k}"
    return names


def setting_of(cell: Cell) -> str:
    """What a cell shares with those that it is compared with."""
    verifier = f", {cell.verifier}" if cell.temperature > 0 else ""
    return f"temperature {cell.temperature:g}{verifier}, batch {cell.batch}"
