"""``python -m benchmarks compare BASE NEW``: has one of ours become slower, in ratio to peers timed in the same run?

Two runs may be on machines of different speed or load, so times are never compared across them: in each file our median is divided by a
peer's of the same case, and the quotients are compared. Where several peers were timed in both, the median of the changes counts,
so that one disturbed peer decides nothing.
"""

from __future__ import annotations

import statistics

from .records import Records, is_ours, timed

LIMIT = 0.10


def add_arguments(parser) -> None:
    parser.add_argument("base", metavar="BASE", help="record file to hold on to")
    parser.add_argument("new", metavar="NEW", help="record file to judge")
    parser.add_argument("--peer", help="compare with this peer alone")
    parser.add_argument("--limit", type=float, default=LIMIT, help="regression that fails, 0.10 is 10%% (default)")


def run(args) -> int:
    changes, lost = compare(Records.read(args.base), Records.read(args.new), args.peer)
    worse = {k: v for k, v in changes.items() if v > 1 + args.limit}
    for (provider, *case), change in sorted(changes.items(), key=lambda item: -item[1]):
        mark = "REGRESSION" if change > 1 + args.limit else ""
        print(f"{change:6.3f}x  {provider}  {_text(case)}  {mark}".rstrip())
    for (provider, *case), status in lost.items():
        print(f"  LOST   {provider}  {_text(case)}  {status}")
    if not changes and not lost:
        print("nothing to compare: the files share no case that one of ours and a peer did in both")
        return 1
    print(f"{len(changes)} compared, {len(worse)} slower by more than {args.limit:.0%}, {len(lost)} lost")
    return 1 if worse or lost else 0


def compare(base: Records, new: Records, peer: str | None = None) -> tuple[dict[tuple, float], dict[tuple, str]]:
    """Changes of our time in ratio to the peers', above 1 is slower, by (provider, *case); and what had a figure in ``base``, was tried in
    ``new`` and has none there, by the same key."""
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


def _text(case) -> str:
    head, dtype, phase, n, d, c = case
    return f"{head} {dtype} {phase} N={n:,} D={d:,} C={c:,}"
