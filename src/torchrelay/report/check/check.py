"""Look at the data of a recipe: run all checks, and join what they find."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from torchrelay.recipe.recipe import Recipe
from torchrelay.report.check import classes, images, labels
from torchrelay.report.check.duplicates import duplicates
from torchrelay.report.check.findings import Example, Finding, Pool
from torchrelay.report.check.samples import read
from torchrelay.report.check.thumbnails import thumbnails


@dataclass(frozen=True)
class Report:
    """What a check has found.

    Args:
        pool: the samples.
        findings: the serious ones first.
        notes: how it was looked for, and what wasn't.
    """

    pool: Pool
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def serious(self) -> int:
        """How many findings are serious."""
        return sum(finding.serious for finding in self.findings)


def check(recipe: Recipe, code: ModuleType | None, say: Callable[[str], None]) -> Report:
    """Look at the data of a recipe; nothing is written but the cache of images that a training would write as well.

    Args:
        recipe: all parameters.
        code: the user's own file.
        say: called with what is being done.

    Raises:
        RelayError: the data can't be read, even in part.
    """
    samples = read(recipe, code, say)
    pool = Pool(samples.parts)
    findings = images.unreadable(samples.unreadable) + classes.classes(pool)
    if samples.stops and not any(finding.serious for finding in findings):
        findings.append(Finding("error would stop a training", 1, (Example((), samples.stops),), "see there", True))
    copies = thumbnails(pool) if pool.has_images else None
    say(f"comparing {len(pool.part):,} {pool.unit}")
    findings += duplicates(pool, copies)
    if copies is not None:
        findings += images.odd_files(pool) + images.brightness(copies)
    suspicious, note = labels.suspicious(pool, say)
    findings += suspicious
    return Report(pool, tuple(sorted(findings, key=lambda finding: not finding.serious)), (note,) if note else ())
