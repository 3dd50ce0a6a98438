"""What was found in the rows, each with the option or command that mends it; and a verdict."""

from collections.abc import Iterator, Sequence

import numpy as np

from mlxlora.config import DataConfig
from mlxlora.data.inspect.copies import Copies
from mlxlora.data.inspect.lengths import Lengths
from mlxlora.data.inspect.scan import Faults, Table
from mlxlora.data.inspect.similar import MOST_PAIRS, NEAR
from mlxlora.data.inspect.template import Finding

REASONS_SHOWN = 5
CLEANED = "--fix OUT writes a copy without them"


def advise(
    table: Table, data: DataConfig, lengths: Lengths, copies: Copies | None
) -> Iterator[Finding]:
    """Findings about the rows, the gravest kinds first. Those about the template are apart."""
    skip = data.on_bad_row == "skip"
    yield _lines(table, skip)
    if not table.counts:
        return
    yield _formats(table, skip)
    if lengths.refused.count:
        yield _refused(lengths, skip)
    if lengths.spelled.count:
        yield _spelled(lengths)
    yield _nothing(lengths)
    yield _cut(lengths)
    if copies is not None:
        yield _exact(table, copies)
        if (table.splits > 0).any():
            yield _leaks(table, copies)
        if copies.compared:
            yield _near(table, copies)


def verdict(findings: tuple[Finding, ...]) -> Finding:
    """All findings in one line."""
    states = [finding.state for finding in findings]
    if fails := states.count("fail"):
        return Finding("fail", "verdict", f"Not ready: {fails} to mend before training.")
    if warns := states.count("warn"):
        return Finding("warn", "verdict", f"Ready to train; {warns} to look at first.")
    return Finding("pass", "verdict", "Ready to train; nothing to mend.")


def _lines(table: Table, skip: bool) -> Finding:
    faults = table.faults
    if not faults.count:
        return Finding("pass", "lines", f"all {len(table):,} can be read as rows")
    if not table.counts:
        found = f"none of {len(table):,} can be used\n{listed(faults)}"
        return Finding("fail", "lines", found, "mend that, and look again")
    return Finding(
        "warn" if skip else "fail",
        "lines",
        f"{faults.count:,} of {len(table):,} cannot be used\n{listed(faults)}",
        f"mend them; or {CLEANED}" + ("" if skip else "; or --on-bad-row skip leaves them out"),
    )


def _formats(table: Table, skip: bool) -> Finding:
    said = ", ".join(f"{count:,} of {name!r}" for name, count in table.counts.items())
    others = int((~table.of_kind).sum()) - table.faults.count
    if not others:
        return Finding("pass", "formats", f"{said}: one kind of row")
    kinds = " and ".join(sorted(set(table.kinds.values())))
    return Finding(
        "warn" if skip else "fail",
        "formats",
        f"{said}: training takes one kind of row, and these are {kinds}",
        f"keep the kinds in files of their own; --fix OUT writes the {table.kind} rows alone",
    )


def _refused(lengths: Lengths, skip: bool) -> Finding:
    return Finding(
        "warn" if skip else "fail",
        "refused",
        f"{lengths.refused.count:,} of {sampled(lengths)} cannot be rendered\n"
        f"{listed(lengths.refused)}",
        f"mend them; or {CLEANED}" + ("" if skip else "; or --on-bad-row skip leaves them out"),
    )


def _spelled(lengths: Lengths) -> Finding:
    return Finding(
        "warn",
        "special",
        f"{lengths.spelled.count:,} of {sampled(lengths)} spell out special tokens, which then "
        f"begin and end turns\n{listed(lengths.spelled)}",
        "take them out of the messages: the chat template adds what is needed",
    )


def _nothing(lengths: Lengths) -> Finding:
    faults = lengths.nothing
    if not faults.count:
        return Finding("pass", "trained", f"each of {sampled(lengths)} trains something")
    return Finding(
        "warn",
        "trained",
        f"{faults.count:,} of {sampled(lengths)} train nothing and are left out\n{listed(faults)}",
        f"a larger --max-length, if they were cut; or {CLEANED}",
    )


def _cut(lengths: Lengths) -> Finding:
    if not lengths.cut_rows:
        found = f"none of {sampled(lengths)} is longer than {lengths.max_length:,} tokens"
        return Finding("pass", "length", found)
    lost = f"{_share(lengths.cut_supervised, lengths.supervised)} of the trained ones"
    options = [f"--max-length {lengths.longest} keeps all"]
    if lengths.max_length < lengths.keeps_most < lengths.longest:
        options.insert(0, f"--max-length {lengths.keeps_most} keeps 99 % of the rows whole")
    return Finding(
        "warn",
        "length",
        f"{lengths.cut_rows:,} of {sampled(lengths)} "
        f"({_share(lengths.cut_rows, lengths.rows)}) are cut at {lengths.max_length:,} tokens; "
        f"that loses {lengths.cut_tokens:,} tokens, {lengths.cut_supervised:,} of them trained "
        f"({lost})",
        "; ".join(options) + " (mlxlora plan says whether it fits)",
    )


def _exact(table: Table, copies: Copies) -> Finding:
    count = int((copies.exact >= 0).sum())
    if not count:
        return Finding("pass", "copies", "no row stands there twice")
    return Finding(
        "warn",
        "copies",
        f"{_rows(count, 'says', 'say')} just what an earlier one says{pair(table, copies.exact)}",
        CLEANED,
    )


def _leaks(table: Table, copies: Copies) -> Finding:
    exact, near = (int((found >= 0).sum()) for found in (copies.leaks, copies.near_leaks))
    if not exact and not near:
        words = "or is near one" if copies.compared else "as it is"
        return Finding("pass", "leakage", f"no row of train is held out too, {words}")
    said = []
    if exact:
        said.append(
            f"{_rows(exact)} of train {_are(exact)} held out too{pair(table, copies.leaks)}"
        )
    if near:
        said.append(
            f"{_rows(near)} of train {_are(near)} near one held out{pair(table, copies.near_leaks)}"
        )
    remedy = "--fix OUT takes them out of train" + ", with --drop-near also the near ones" * bool(
        near
    )
    return Finding(
        "warn",
        "leakage",
        "; ".join(said) + ": validation would look better than it is",
        remedy,
    )


def _near(table: Table, copies: Copies) -> Finding:
    count = int((copies.near >= 0).sum())
    more = "" if copies.complete else f" (at least: {MOST_PAIRS:,} pairs were compared)"
    if not count:
        return Finding(
            "pass", "near", f"no two rows of train are alike by {NEAR:.0%} or more{more}"
        )
    return Finding(
        "warn",
        "near",
        f"{_rows(count)} of train {_are(count)} alike to an earlier one by {NEAR:.0%} or more{more}"
        f"{pair(table, copies.near)}",
        "look at them; --fix OUT --drop-near keeps the first of each",
    )


def pair(table: Table, copy_of: np.ndarray) -> str:
    """The first copy and what it is a copy of, by file and line."""
    row = int(np.argmax(copy_of >= 0))
    other = int(copy_of[row])
    same_file = table.files[row] == table.files[other]
    partner = f"line {table.numbers[other]}" if same_file else table.where(other)
    return f" (first {table.where(row)}, see {partner})"


def listed(faults: Faults) -> str:
    """A line a reason: where it is first, why, and how often."""
    lines = []
    for reason in faults.reasons[:REASONS_SHOWN]:
        first, *others = reason.places
        more = f" ({reason.count:,} times" if reason.count > 1 else ""
        if others:
            more += f", also at {_places(others, first)}"
        lines.append(f"{first}: {reason.text}{more}{')' if more else ''}")
    if rest := faults.count - sum(r.count for r in faults.reasons[:REASONS_SHOWN]):
        lines.append(f"and {rest:,} more, for other reasons")
    return "\n".join(lines)


def _places(places: Sequence[str], first: str) -> str:
    """The lines alone if all are in the file of the first."""
    path = first.rpartition(":")[0]
    if any(place.rpartition(":")[0] != path for place in places):
        return ", ".join(places)
    numbers = ", ".join(place.rpartition(":")[2] for place in places)
    return f"line{'s' * (len(places) > 1)} {numbers}"


def sampled(lengths: Lengths) -> str:
    if lengths.complete:
        return _rows(lengths.of)
    return f"{lengths.rows:,} rows spread over {lengths.of:,}"


def _rows(count: int, one: str = "", several: str = "") -> str:
    return f"{count:,} row" + "s" * (count != 1) + f" {one if count == 1 else several}".rstrip()


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / max(1, whole):.2g} %"
