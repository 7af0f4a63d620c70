"""The structs that mfusepy declares are those of libfuse's headers; what was never tried is refused; `scripts/libfuse`
builds what can be tried."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tools import attempt, tool

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "scripts" / "libfuse"

# Everything that dedupfs touches, by the structs' names in C.
FIELDS = {
    "fuse_file_info": ["flags", "fh"],
    "fuse_conn_info": ["max_write", "capable", "want"],
    "fuse_config": [
        *("entry_timeout", "negative_timeout", "attr_timeout", "hard_remove", "use_ino", "nullpath_ok"),
    ],
    "fuse_context": ["fuse", "uid", "gid", "pid", "umask"],
    "stat": [
        *("st_ino", "st_mode", "st_nlink", "st_uid", "st_gid", "st_rdev", "st_size", "st_blksize", "st_blocks"),
        *("st_atim", "st_mtim", "st_ctim"),
    ],
    "statvfs": [
        *("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail", "f_namemax"),
    ],
}
BITS = {"fuse_file_info": ["writepage", "direct_io", "keep_cache", "noflush"]}
SINCE_3_17 = {"fuse_file_info": ["backing_id"], "fuse_conn_info": ["max_backing_stack_depth"]}

# Prints {"struct.field": [first bit, bits]}, and the sizes of structs that libfuse is given or that something follows.
DECLARED = """\
import ctypes, json, mfusepy as fuse

structs = {name: getattr(fuse, name, None) or getattr(fuse, "c_" + name) for name in WANTED}
found = {}
for struct, fields in WANTED.items():
    for field in fields:
        declared = {"st_atim": "st_atimespec", "st_mtim": "st_mtimespec", "st_ctim": "st_ctimespec"}.get(field, field)
        if field == "backing_id":  # the second half of what is declared as one
            found[f"{struct}.{field}"] = [structs[struct].poll_events.offset * 8 + 32, 32]
            continue
        at = getattr(structs[struct], declared)
        bits, first = at.size >> 16, at.size & 0xFFFF  # of a bit field
        found[f"{struct}.{field}"] = [at.offset * 8 + first, bits] if bits else [at.offset * 8, at.size * 8]
operations = [field[0] for field in fuse.fuse_operations._fields_]
for field in operations:
    at = getattr(fuse.fuse_operations, field)
    found[f"fuse_operations.{field}"] = [at.offset * 8, at.size * 8]
found["fuse_context"] = ctypes.sizeof(fuse.fuse_context)
version = [fuse.fuse_version_major, fuse.fuse_version_minor]
print(json.dumps({"version": version, "found": found, "operations": operations}))
"""

IN_C = """\
#define FUSE_USE_VERSION 31
#include <fuse.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/statvfs.h>

#define FIELD(s, f) \\
    printf(",\\"%s.%s\\": [%zu, %zu]", #s, #f, 8 * offsetof(struct s, f), 8 * sizeof(((struct s *)0)->f))
#define BIT(s, f) do { struct s value; memset(&value, 0, sizeof value); value.f = 1; bit(#s, #f, &value); } while (0)

static void bit(const char *s, const char *f, const void *value)
{
    const unsigned char *bytes = value;
    size_t first = 0;

    while (!(bytes[first / 8] >> first % 8 & 1))
        first++;
    printf(",\\"%s.%s\\": [%zu, 1]", s, f, first);
}

int main(void)
{
    printf("{\\"version\\": [%d, %d], \\"found\\": {", FUSE_MAJOR_VERSION, FUSE_MINOR_VERSION);
    printf("\\"fuse_context\\": %zu", sizeof(struct fuse_context));
    STATEMENTS
    printf("}}\\n");
    return 0;
}
"""


def _compile(directory: Path, name: str, code: str, *options: str) -> Path:
    source, target = directory / f"{name}.c", directory / name
    source.write_text(code)
    tool("cc", "-D_FILE_OFFSET_BITS=64", "-Wall", "-Werror", *options, "-o", target, source)
    return target


def _script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, *arguments],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def built() -> Path:
    done = _script()
    if done.returncode != 0:
        pytest.skip(f"libfuse could not be built: {done.stderr}")
    assert done.stdout.count("\n") == 1
    return Path(done.stdout.removesuffix("\n"))


@pytest.fixture(params=["system", "built"])
def library(request: pytest.FixtureRequest) -> tuple[str, Path]:
    """A library and the directory of its headers: the distribution's, and the one of scripts/libfuse."""
    if request.param == "built":
        path: Path = request.getfixturevalue("built")
        return str(path), path.parent / "include" / "fuse3"
    headers = Path("/usr/include/fuse3")
    if not headers.is_dir():
        pytest.skip("libfuse3-dev is not installed (scripts/setup --test)")
    return "libfuse3.so", headers


def test_structs_are_declared_as_the_headers_have_them(library: tuple[str, Path], tmp_path: Path) -> None:
    path, headers = library
    wanted = {struct: fields + BITS.get(struct, []) for struct, fields in FIELDS.items()}

    def declared() -> dict[str, object]:
        answer = tool(
            *(sys.executable, "-c", f"WANTED = {wanted!r}\n{DECLARED}"), environment={"FUSE_LIBRARY_PATH": path}
        )
        found: dict[str, object] = json.loads(answer)
        return found

    found = declared()
    operations = found["operations"]
    assert isinstance(operations, list)
    statements = [f"FIELD({struct}, {field});" for struct, fields in FIELDS.items() for field in fields]
    statements += [f"FIELD(fuse_operations, {field});" for field in operations]
    statements += [f"BIT({struct}, {field});" for struct, fields in BITS.items() for field in fields]
    if found["version"] >= [3, 17]:  # type: ignore[operator]
        for struct, fields in SINCE_3_17.items():
            wanted[struct] = wanted[struct] + fields
            statements += [f"FIELD({struct}, {field});" for field in fields]
        found = declared()
    program = _compile(tmp_path, "layout", IN_C.replace("STATEMENTS", "\n    ".join(statements)), f"-I{headers}")
    in_c = json.loads(tool(program))
    assert (found["version"], found["found"]) == (in_c["version"], in_c["found"])


STUB = """\
int fuse_version(void) { return VERSION; }
void fuse_get_context(void) {}
void fuse_main_real(void) {}
"""


@pytest.mark.parametrize("version", [29, 311, 319, 400])
def test_a_version_never_tried_is_refused(version: int, tmp_path: Path) -> None:
    """A stub, so that nothing but its version can be the reason; one that were let pass would end in a traceback."""
    stub = _compile(tmp_path, "stub.so", STUB.replace("VERSION", str(version)), "-shared", "-fPIC")
    _assert_refused(stub, tmp_path, "install one of 3.12 to 3.18" if version < 400 else "wrong major version")


@pytest.mark.parametrize("path", ["/nonexistent/libfuse3.so.4", "libc.so.6"])
def test_what_is_no_libfuse_is_refused(path: str, tmp_path: Path) -> None:
    _assert_refused(Path(path), tmp_path, "libfuse cannot be used: ")


def _assert_refused(library: Path, directory: Path, reason: str) -> None:
    source, mountpoint = directory / "source", directory / "mount"
    source.mkdir()
    mountpoint.mkdir()
    done = attempt(
        *(sys.executable, "-m", "dedupfs", "mount", source, mountpoint),
        environment={"FUSE_LIBRARY_PATH": str(library), "PYTHONPATH": str(REPOSITORY)},
    )
    answer = done.stderr.decode()
    assert (done.returncode, answer.count("\n")) == (69, 1), answer
    assert reason in answer
    assert not any(source.iterdir())


def test_a_machine_never_tried_is_refused(built: Path) -> None:
    """The machine is what the kernel says it is, so that another is only to be had by asking the check itself."""
    code = """\
from dedupfs import errors, libfuse
for machine, pointer_bytes in (("riscv64", 8), ("x86_64", 4), ("i686", 4)):
    try:
        libfuse._refuse_untried((3, 17), machine, pointer_bytes)
    except errors.Unavailable as problem:
        print(problem)
libfuse._refuse_untried((3, 17), "aarch64", 8)
"""
    answer = tool(
        *(sys.executable, "-c", code), environment={"FUSE_LIBRARY_PATH": str(built), "PYTHONPATH": str(REPOSITORY)}
    )
    assert answer.count(b"was never tried on") == 3


def test_what_is_built_is_not_built_again(built: Path) -> None:
    done = _script(DEBIAN_MIRROR="http://127.0.0.1:9/nothing")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{built}\n", "")


def test_building_says_what_is_missing(built: Path, tmp_path: Path) -> None:
    assert built.exists()  # so that all it takes is installed, but for the mirror
    done = _script("--prefix", str(tmp_path / "prefix"), DEBIAN_MIRROR="http://127.0.0.1:9/nothing")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("scripts/libfuse: fetching the source package failed, see above\n")
    done = _script("--example")
    assert (done.returncode, done.stderr) == (1, "scripts/libfuse: unknown argument '--example'; see --help\n")
