"""A check's findings in the terminal: how many, what, three examples, and what to do."""

from rich.table import Table
from rich.text import Text

from torchrelay.report.check.check import Report
from torchrelay.report.check.findings import Example, Pool

_EXAMPLES = 3


def table(report: Report) -> Table:
    """Return a row for each finding."""
    rows = Table.grid(padding=(0, 2, 1, 0))
    rows.add_column(justify="right", no_wrap=True)
    rows.add_column(overflow="fold")
    for finding in report.findings:
        head = Text(finding.heading, style="bold")
        if finding.serious:
            head.append("  serious", style="bold red")
        shown = [described(report.pool, example) for example in finding.examples[:_EXAMPLES]]
        more = ["…"] if finding.count > _EXAMPLES else []
        text = Text("\n").join([head, *map(Text, [*shown, *more]), Text(f"→ {finding.advice}", style="dim")])
        rows.add_row(Text(f"{finding.count:,}", style="red" if finding.serious else "yellow"), text)
    return rows


def described(pool: Pool, example: Example) -> str:
    """Return an example's samples by name, and its note."""
    named = " = ".join(pool.name(sample) for sample in example.samples)
    return "  ".join(part for part in (named, example.note) if part)
