"""The plugin that turns skipped tests into failed ones does, and only where it is told to."""

import subprocess
import sys
from pathlib import Path

import pytest

from .mounted import REPOSITORY
from .policy import skipping_fails

SAMPLE = """
import pytest

@pytest.mark.skip(reason="no such device")
def test_marked(): pass

def test_inside(): pytest.skip("not today")

@pytest.mark.xfail(strict=True)
def test_expected(): assert False

def test_good(rng): assert rng.random() == rng.random() or True
"""


def run_sample(directory: Path, **environment: str) -> str:
    (directory / "test_sample.py").write_text(SAMPLE)
    (directory / "test_module.py").write_text("import pytest\npytest.importorskip('no_such_module')\n")
    return run_pytest(directory, "--continue-on-collection-errors", **environment)


def run_pytest(directory: Path, *more: str, **environment: str) -> str:
    options = ["-p", "tests.support.policy", "-p", "no:cacheprovider", "-c", "/dev/null", f"--rootdir={directory}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *more, str(directory)],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=60,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin", **environment},
    )
    return done.stdout


@pytest.mark.parametrize("environment", [{"CI": "true"}, {"DEDUPFS_CI": "1"}])
def test_skips_fail_where_nothing_may_be_missing(environment: dict[str, str], tmp_path: Path) -> None:
    output = run_sample(tmp_path, DEDUPFS_SEED="17", **environment)
    assert "no such device" in output
    assert "not today" in output
    assert "no_such_module" in output
    assert "DEDUPFS_SEED=17" in output
    assert "1 error" in output
    assert "skipped," not in output.splitlines()[-1]


def test_skips_are_allowed_elsewhere(tmp_path: Path) -> None:
    assert "1 passed, 3 skipped, 1 xfailed" in run_sample(tmp_path).splitlines()[-1]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"CI": "true"}, True),
        ({"CI": "false"}, False),
        ({"DEDUPFS_CI": "1"}, True),
        ({"CI": "true", "DEDUPFS_CI": "0"}, False),
    ],
)
def test_what_decides(environment: dict[str, str], expected: bool) -> None:
    assert skipping_fails(environment) is expected


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_failure_may_name_any_file(workers: str, tmp_path: Path) -> None:
    (tmp_path / "test_name.py").write_text("def test_name(): assert 'caf\\udce9' == open.__name__\n")
    output = run_pytest(tmp_path, "-n", workers)
    assert "1 failed in" in output.splitlines()[-1]
