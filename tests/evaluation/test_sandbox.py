"""Programs that mean harm do none: they are ended, and nothing outside their own folder has changed."""

import os
import socket
import subprocess
import time
from pathlib import Path

import pytest

from specdecode.errors import ConfigError
from specdecode.evaluation.sandbox import Outcome, SandboxConfig, run_program

CONFIG = SandboxConfig(timeout_s=2, memory_mb=256, disk_mb=32, num_processes=8)


def run(program: str, **options: object) -> Outcome:
    return run_program(program, CONFIG.model_copy(update=options))


@pytest.mark.parametrize("isolation", ["namespaces", "limits"])
def test_a_program_passes_unless_it_fails(isolation: str) -> None:
    assert run("import tempfile; print(open(tempfile.mktemp(), 'w').write('x'))", isolation=isolation) == Outcome(
        True, False, "1\n"
    )
    failed = run("assert 1 == 2, 'no'", isolation=isolation)
    assert not failed.is_passed
    assert "AssertionError: no" in failed.output
    assert not run("import os; os._exit(3)", isolation=isolation).is_passed
    assert not run("import ctypes; ctypes.string_at(0)", isolation=isolation).is_passed
    assert not run("raise SystemExit", isolation=isolation).is_passed  # before what comes after it, such as tests


@pytest.mark.parametrize("isolation", ["namespaces", "limits"])
def test_an_endless_loop_is_ended(isolation: str) -> None:
    started = time.monotonic()
    assert run(
        "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass", isolation=isolation
    ) == Outcome(False, True, "")
    assert time.monotonic() - started < 10


def test_a_fork_bomb_is_bounded_and_leaves_nobody() -> None:
    assert "BlockingIOError" in run("import os\nwhile True: os.fork()").output
    assert run("import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(600)").is_passed
    left = subprocess.run(["pgrep", "-f", "program.py"], capture_output=True, check=False)
    assert left.stdout == b""


@pytest.mark.parametrize("isolation", ["namespaces", "limits"])
def test_a_memory_hog_gets_an_error(isolation: str) -> None:
    outcome = run("kept = []\nwhile True: kept.append(bytes(20_000_000))", timeout_s=20, isolation=isolation)
    assert "MemoryError" in outcome.output


def test_a_file_eraser_erases_nothing(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    kept = tmp_path / "kept"
    kept.write_text("kept")
    kept.chmod(0o666)
    program = f"""
import os, shutil
failed = []
for path in ({str(tmp_path)!r}, "/tmp", {str(Path.cwd())!r}, "/dev/shm"):
    try:
        shutil.rmtree(path)
    except OSError as error:
        failed.append(path)
for path in ({str(kept)!r}, {str(tmp_path / "new")!r}, "/dev/shm/new", "/etc/new"):
    try:
        open(path, "w").write("changed")
    except OSError as error:
        failed.append(path)
assert len(failed) == 8, failed
"""
    before = sorted(Path.cwd().iterdir())
    assert run(program).output == ""
    assert kept.read_text() == "kept"
    assert [*tmp_path.iterdir()] == [kept]
    assert sorted(Path.cwd().iterdir()) == before


def test_a_printer_of_gigabytes_fills_nothing() -> None:
    outcome = run("while True: print('x' * 1_000_000)", timeout_s=20)
    assert not outcome.is_passed
    assert not outcome.is_late
    assert len(outcome.output) <= 4096


def test_many_files_fill_nothing() -> None:
    outcome = run("for n in range(1000): open(f'{n}', 'wb').write(bytes(10_000_000))", timeout_s=20)
    assert not outcome.is_passed
    assert not outcome.is_late


def test_there_is_no_network() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        outcome = run(f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)")
    assert "OSError" in outcome.output
    assert not outcome.is_passed


def test_no_other_process_is_seen_and_no_privilege_is_left() -> None:
    program = f"""
import ctypes, os
for pid in range(2, 70000):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        continue
    except PermissionError:
        pass
    raise SystemExit(f"sees {{pid}}")
assert os.getpid() == 1 and os.getuid() != 0
libc = ctypes.CDLL(None)
assert libc.mount(b"none", b"/", None, ctypes.c_ulong(0x20 | 0x1000), None) == -1  # to be written again
assert {os.environ.get("HOME", "no home")!r} not in os.environ.values()
"""
    assert run(program, timeout_s=20).output == ""


def test_programs_do_not_see_each_other_s_files() -> None:
    assert run("open('left', 'w').write('x')").is_passed
    assert run("import os; assert not os.path.exists('left')").is_passed


def test_a_machine_without_namespaces_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The interpreter sees a jail whose namespaces are refused, as containers do."""
    from specdecode.evaluation import sandbox

    source = Path(sandbox._JAIL).read_text().replace("_libc.unshare(_APART", "(lambda *_: ctypes.set_errno(1) or -1)(_APART", 1)
    (tmp_path / "jail.py").write_text(source)
    monkeypatch.setattr(sandbox, "_JAIL", tmp_path / "jail.py")
    with pytest.raises(ConfigError, match="unshare: Operation not permitted: allow them, or set isolation: limits"):
        run("")
    assert run("", isolation="limits").is_passed


def test_a_jail_that_cannot_start_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from specdecode.evaluation import sandbox

    monkeypatch.setattr(sandbox, "_JAIL", tmp_path / "missing.py")
    with pytest.raises(ConfigError, match=r"sandbox: programs cannot be run: .*No such file"):
        run("")
