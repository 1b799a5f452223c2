"""``python -m benchmarks compare BASE NEW``: has one of our backends become slower, relative to peers timed in the same run?

The two runs may come from machines of different speed or load, so times are never compared across files. In each file our median time is
divided by that of a peer on the same case, and these ratios are compared. Where several peers were timed in both files, the median of the
changes counts, so that one disturbed peer does not decide the result.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

from marginkernels.cli._text import number

from .records import Records, is_ours, record_file, timed

LIMIT = 0.10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", type=record_file, metavar="BASE", help="record file to compare with")
    parser.add_argument("new", type=record_file, metavar="NEW", help="record file to check")
    parser.add_argument("--peer", help="compare relative to this peer only")
    parser.add_argument("--limit", type=number(0), default=LIMIT, help="slowdown that counts as a regression, 0.10 for 10%% (default)")


def run(args: argparse.Namespace) -> int:
    changes, lost = compare(Records.read(args.base), Records.read(args.new), args.peer)
    worse = {k: v for k, v in changes.items() if v > 1 + args.limit}
    for (provider, *case), change in sorted(changes.items(), key=lambda item: -item[1]):
        mark = "REGRESSION" if change > 1 + args.limit else ""
        print(f"{change:6.3f}x  {provider}  {_text(case)}  {mark}".rstrip())
    for (provider, *case), status in lost.items():
        print(f"  LOST   {provider}  {_text(case)}  {status}")
    if not changes and not lost:
        print("nothing to compare: no case was timed for one of our backends and a peer in both files")
        return 1
    print(f"{len(changes)} compared, {len(worse)} slower by more than {args.limit:.0%}, {len(lost)} lost")
    return 1 if worse or lost else 0


def compare(base: Records, new: Records, peer: str | None = None) -> tuple[dict[tuple, float], dict[tuple, str]]:
    """Compare the providers of this package in two record files.

    Returns:
        Both by (provider, *case): the change of our time relative to the peers, above 1 where it is slower; and the status of what was
        timed in ``base`` and tried in ``new`` but has no time there.
    """
    changes, lost = {}, {}
    for key in base.cases.keys() & new.cases.keys():
        before, after = timed(base.cases[key]), timed(new.cases[key])
        peers = [name for name in before.keys() & after.keys() if not is_ours(name) and peer in (None, name)]
        for name in filter(is_ours, before):
            if name not in after:
                if name in new.cases[key]:
                    lost[(name, *key)] = new.cases[key][name]["status"]
            elif peers:
                changes[(name, *key)] = statistics.median(
                    (after[name]["ms_p50"] / after[p]["ms_p50"]) / (before[name]["ms_p50"] / before[p]["ms_p50"]) for p in peers
                )
    return changes, lost


def _text(case: Sequence) -> str:
    head, dtype, phase, n, d, c = case
    return f"{head} {dtype} {phase} N={n:,} D={d:,} C={c:,}"
