"""What the demo shows: a live bar on a terminal, plain lines elsewhere, and the tables at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from inventory_sdk.cli.demo import Tally
from inventory_sdk.cli.recount import Recount
from inventory_sdk.cli.replay import Replayed
from inventory_sdk.testing.proof import Proof

SHOWN_DIFFERENCES: Final = 20
LINE_EVERY: Final = 0.1
"""Part of the work after which a plain progress line is printed."""

Advance = Callable[[int, str], None]
"""(done, note)"""


@contextmanager
def progress(console: Console, title: str, total: int) -> Iterator[Advance]:
    """A bar on a terminal; elsewhere a line per tenth, so that a log stays readable."""
    if not console.is_terminal:
        step = max(1, int(total * LINE_EVERY))
        began = time.perf_counter()
        shown = 0

        def line(done: int, note: str) -> None:
            nonlocal shown
            if done // step > shown or done == total:
                shown = done // step
                after = f"{time.perf_counter() - began:.1f} s"
                console.print(f"{title}: {done}/{total} after {after}{f', {note}' if note else ''}", highlight=False)

        yield line
        return
    note_column = TextColumn("{task.fields[note]}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), note_column)
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(title, total=total, note="")

        def advance(done: int, note: str) -> None:
            bars.update(task, completed=done, note=note)

        yield advance


def table(title: str, rows: Sequence[tuple[str, str]]) -> Table:
    shown = Table(title=title, show_header=False, title_justify="left")
    shown.add_column()
    shown.add_column(justify="right")
    for row in rows:
        shown.add_row(*row)
    return shown


def sale_table(tally: Tally) -> Table:
    return table(
        "What happened",
        [
            ("units supplied", f"{tally.supplied.total():,}"),
            ("units sold", f"{tally.sold.total():,}"),
            ("buyers", f"{tally.done:,}"),
            ("refused, sold out", f"{tally.refused:,}"),
            ("duplicates absorbed", f"{tally.duplicates:,}"),
            ("cancelled while waiting", f"{tally.cancelled:,}"),
            ("given back", f"{tally.released:,}"),
            ("expired", f"{tally.expired:,}"),
            ("calls answered per second", f"{tally.rate:,.0f}"),
            ("p50", f"{tally.percentile(0.5) * 1000:.1f} ms"),
            ("p99", f"{tally.percentile(0.99) * 1000:.1f} ms"),
        ],
    )


def replay_table(outcome: Replayed, counted: Recount) -> Table:
    rate = outcome.acts.total() / outcome.seconds if outcome.seconds else 0.0
    return table(
        "What happened",
        [
            ("lines in the file", f"{counted.lines:,}"),
            ("invoices", f"{len(counted.invoices):,}"),
            ("opening stock and unmatched returns", f"{outcome.acts['restock']:,}"),
            ("sales", f"{outcome.acts['deduct']:,}"),
            ("returns against a sale", f"{outcome.acts['take_back']:,}"),
            ("adjustments", f"{outcome.acts['adjust']:,}"),
            ("made by an earlier run already", f"{outcome.known:,}"),
            ("lines moved", f"{outcome.lines:,}"),
            ("operations per second", f"{rate:,.0f}"),
            ("seconds", f"{outcome.seconds:.1f}"),
        ],
    )


def verdict(console: Console, proof: Proof, more: Sequence[str], who: str) -> bool:
    """Print the proof; True when there is no difference."""
    differences = [*more, *proof.differences]
    if not differences:
        console.print(
            f"[bold green]PROVEN[/]  {who} agree on {proof.fields:,} SKUs, to the unit: {proof.available:,} available, "
            f"{proof.sold:,} sold;",
            "supplied = available + reserved + sold + written off; every change chain is unbroken.",
            highlight=False,
            soft_wrap=True,
        )
        return True
    console.print(f"[bold red]NOT EQUAL[/]  {len(differences):,} differences:", highlight=False)
    for difference in differences[:SHOWN_DIFFERENCES]:
        console.print(f"  {difference}", highlight=False, markup=False)
    if len(differences) > SHOWN_DIFFERENCES:
        console.print(f"  … and {len(differences) - SHOWN_DIFFERENCES:,} more", highlight=False)
    return False
