"""The suite that every poller passes, on the gateways."""

import pytest

from daemon.testing.poller_suite import *  # noqa: F403 - that is how it is used
from daemon.testing.poller_suite import Script, bare, one_bucket, only
from tests.conformance.gateway_cases import CASES

pytestmark = pytest.mark.anyio
__all__ = ["CASES"]


async def test_complete_chain_is_the_whole_truth(case):
    """As the suite's own, for pages that go by number: what is asked for is the next number, not a cursor."""
    first, second, third = case.starts(3)
    buckets = [
        case.bucket(first, [case.row(1), case.row(2)]),
        case.bucket(second, [case.row(3)]),
        case.bucket(third, [case.row(1)]),
    ]
    if case.paging == "whole":
        pages = [case.page(buckets, False, None)]
    else:
        pages = [case.page([buckets[0]], True, "c1"), case.page([buckets[1]], True, "c2")]
        pages.append(case.page([buckets[2]], False, None))
    script = Script(*pages)
    snapshot = await case.poller.fetch(case.target, case.source, case.grain, case.window(3), script)
    assert snapshot.window == case.window(3)
    assert snapshot.grain == case.grain
    assert snapshot.pages == len(script.requests) == len(pages)
    assert [(bucket.start, sorted(map(bare, bucket.rows))) for bucket in snapshot.buckets] == [
        (first, [case.means(1), case.means(2)]),
        (second, [case.means(3)]),
        (third, [case.means(1)]),
    ]
    first_query, *rest = [script.query(n) for n in range(len(pages))]
    assert [set(query) - set(first_query) for query in rest] == [{("page", str(n + 2))} for n in range(len(rest))]
    assert all(set(first_query) <= set(query) for query in rest)


@only(lambda case: case.poller.sources[case.source].can_probe)
async def test_probe_sees_what_a_fetch_would(case):
    """As the suite's own; OpenRouter's probe is answered by another endpoint than its report is."""
    used = {"data": {"total_credits": 50, "total_usage": 12.5}}
    script = Script(used if case.paging == "whole" else one_bucket(case, case.row(1)))
    probe = await case.poller.probe(case.target, case.source, case.grain, case.window(1), script)
    assert len(script.requests) == 1
    assert probe.totals is None
    assert probe.digest is not None


def test_grain_is_sorted_and_follows_the_settings(case):
    """As the suite's own, but for what is always in the grain because it tells whose money a row is."""
    always = {name for name in case.grain.group_by if name in ("billing", "upstream")}
    if case.poller.sources[case.source].upstream is not None:
        assert "upstream" in always
    assert list(case.grain.group_by) == sorted(set(case.grain.group_by))
    for some in (["model"] if case.source in ("logs", "costs") else [case.grain.group_by[0]], []):
        chosen = {**case.settings, "group_by": {case.source: some}}
        case.poller.check_settings(chosen)
        assert set(case.poller.grain(case.source, chosen).group_by) == {*some, *always}
