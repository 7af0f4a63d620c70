"""Pytest plugin: where everything can run, a skipped test is a failed one; and every random run can be replayed.

`scripts/test` turns the first on (DEDUPFS_CI=1) where nothing need be missing; CI=true does too, DEDUPFS_CI=0 turns it
off. An expected failure (xfail) stays what it is.
"""

import os
import random
from collections.abc import Generator, Mapping

import pytest

SEED_VARIABLE = "DEDUPFS_SEED"


def skipping_fails(environment: Mapping[str, str] = os.environ) -> bool:
    own = environment.get("DEDUPFS_CI", "")
    if own:
        return own != "0"
    return environment.get("CI", "").lower() in ("1", "true")


def _fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not report.skipped or hasattr(report, "wasxfail") or not skipping_fails():
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    report.outcome = "failed"
    report.longrepr = f"{report.nodeid}: {reason}\nNothing may be skipped here (tests/support/policy.py)."


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _fail_if_skipped(report)
    if report.failed:
        report.sections.append(("replay", f"{SEED_VARIABLE}={os.environ[SEED_VARIABLE]} gives the same random choices"))
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _fail_if_skipped(report)
    return report


def _encodable(value: object) -> object:
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {key: _encodable(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_encodable, value))
    return value


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, object, object]:
    """A failure may speak of a file name that is not UTF-8, which a worker of a parallel run could not send."""
    return _encodable((yield))


def pytest_configure() -> None:
    # In the environment, so that the workers of a parallel run have the same seed.
    os.environ.setdefault(SEED_VARIABLE, str(random.SystemRandom().randrange(1 << 32)))


def pytest_report_header() -> str:
    skipped = "fail" if skipping_fails() else "are allowed"
    return f"dedupfs: {SEED_VARIABLE}={os.environ[SEED_VARIABLE]}, skipped tests {skipped}"


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Random numbers that depend on the seed of the run and the name of the test, and on nothing else."""
    return random.Random(f"{os.environ[SEED_VARIABLE]} {request.node.nodeid}")
