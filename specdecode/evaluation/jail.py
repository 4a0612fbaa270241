"""One Python program in, what came of it out, where it can harm nothing: `python -I jail.py SETTINGS < program`. Linux only.

The program gets namespaces of its own (user, mount, process, network, IPC): no network, no other process, a file system that
cannot be written but for a folder in memory, and limits. It is run by `sandbox.py`, and imports the standard library alone.
"""

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import sys
from pathlib import Path
from typing import Any

_CLONE_NEWNS, _CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = (
    0x20000,
    0x8000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
_APART = _CLONE_NEWNS | _CLONE_NEWPID | _CLONE_NEWNET | _CLONE_NEWIPC
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x40000
_MOUNT_ATTR_RDONLY, _AT_RECURSIVE, _AT_FDCWD, _SYS_MOUNT_SETATTR = 0x1, 0x8000, -100, 442  # 442 on every architecture
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_NOBODY = 65534
_OUTPUT_LIMIT = 4096

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Runs the program on standard input, and prints what came of it as JSON."""
    settings = json.loads(sys.argv[1])
    program = sys.stdin.buffer.read()
    folder = Path(settings["folder"])
    interpreter = os.path.realpath(sys.executable)  # without the packages of an environment
    try:
        if settings["isolated"]:
            interpreter = _isolate(folder, settings["disk_mb"])
    except OSError as error:
        print(json.dumps({"refused": f"{error.filename or 'namespaces'}: {error.strerror}"}))
        return
    (folder / "program.py").write_bytes(program)
    print(json.dumps(_run(interpreter, folder, settings)))


def _isolate(folder: Path, disk_mb: int) -> str:
    """Leaves the namespaces that others are in; `folder` becomes memory that nobody else sees. Returns the interpreter."""
    interpreter, prefix = Path(sys.executable).resolve(), Path(sys.base_prefix).resolve()
    uid, gid = os.geteuid(), os.getegid()
    is_root = uid == 0
    _call("unshare", _libc.unshare(_APART | (0 if is_root else _CLONE_NEWUSER)))
    if not is_root:  # its own identity, which is no root's: the program has no capabilities, and cannot undo what follows
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    else:
        uid = gid = _NOBODY
    _mount(b"/", None, _MS_REC | _MS_PRIVATE)
    _make_read_only(b"/")
    _mount(
        os.fsencode(folder), b"tmpfs", _MS_NOSUID | _MS_NODEV, f"size={disk_mb}m,nr_inodes=4096,mode=700,uid={uid},gid={gid}"
    )
    if is_root:  # for limits of the number of processes, which do not hold for root; nobody may not see root's interpreter
        seen = folder / "python"
        seen.mkdir()
        _mount(os.fsencode(seen), None, _MS_BIND | _MS_REC, source=os.fsencode(prefix))
        _make_read_only(os.fsencode(seen))
        interpreter = seen / interpreter.relative_to(prefix)
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        _call("unshare", _libc.unshare(_CLONE_NEWUSER))  # where processes are counted apart from other programs'
    return str(interpreter)


def _mount(target: bytes, kind: bytes | None, flags: int, options: str = "", source: bytes = b"none") -> None:
    _call("mount", _libc.mount(source, target, kind, ctypes.c_ulong(flags), options.encode() or None))


def _make_read_only(path: bytes) -> None:
    """A mount and all below it."""
    wanted = (ctypes.c_uint64 * 4)(_MOUNT_ATTR_RDONLY, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(wanted))
    _call("mount_setattr", _libc.syscall(ctypes.c_long(_SYS_MOUNT_SETATTR), _AT_FDCWD, path, _AT_RECURSIVE, wanted, size))


def _call(name: str, result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)


def _run(interpreter: str, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Starts the program and waits for it. It is the first process of its namespace: with it all others end."""
    with (folder / "output").open("wb") as output:
        child = os.fork()
        if child == 0:
            _become_program(interpreter, folder, output.fileno(), settings)
    descriptor = os.pidfd_open(child)
    is_late = not select.select([descriptor], [], [], settings["timeout_s"])[0]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # and what it has left behind, where it has no namespace of its own
    _, status = os.waitpid(child, 0)
    with (folder / "output").open("rb") as output:
        output.seek(max(0, os.fstat(output.fileno()).st_size - _OUTPUT_LIMIT))
        told = output.read().decode(errors="replace")
    return {"is_late": is_late, "status": os.waitstatus_to_exitcode(status), "output": told}


def _become_program(interpreter: str, folder: Path, output: int, settings: dict[str, Any]) -> None:
    """In the child: limits, and the program in its place."""
    try:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        os.setsid()
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        megabyte = 1 << 20
        for limit, value in (
            (resource.RLIMIT_AS, settings["memory_mb"] * megabyte),
            (resource.RLIMIT_FSIZE, settings["disk_mb"] * megabyte // 2),
            (resource.RLIMIT_CPU, int(settings["timeout_s"]) + 1),
            (resource.RLIMIT_NPROC, settings["num_processes"]),
            (resource.RLIMIT_NOFILE, 64),
            (resource.RLIMIT_CORE, 0),
        ):
            resource.setrlimit(limit, (value, value))
        environment = {"PATH": os.defpath, "HOME": str(folder), "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
        os.execve(interpreter, [interpreter, "-I", "-B", "program.py"], environment)
    except OSError as error:
        os.write(2, f"cannot be started: {error}".encode())
    finally:
        os._exit(127)


if __name__ == "__main__":
    main()
