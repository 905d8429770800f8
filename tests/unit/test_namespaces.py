"""Running a command in a user and pid namespace of one's own, as an ordinary user would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from gpurestore import capabilities, namespaces
from gpurestore.capabilities import CAP
from gpurestore.errors import PrivilegeError

# Becomes an ordinary user for good, then runs the module's main: what a shell of such a user would do.
BECOME_ORDINARY = """
import os, sys
sys.path.insert(0, {root!r})
from gpurestore import namespaces
if os.geteuid() == 0:
    import ctypes
    libc = ctypes.CDLL(None)
    for capability in range(64):
        libc.prctl(24, capability, 0, 0, 0)
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    libc.prctl(4, 1, 0, 0, 0)  # dumpable, as after an exec
"""
ORDINARY = (
    BECOME_ORDINARY
    + """
sys.exit(namespaces.main(["--", *sys.argv[1:]]))
"""
)
ROOT = str(Path(__file__).resolve().parents[2])


def start(command: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", ORDINARY.format(root=ROOT), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
    )


def run(*command: str) -> subprocess.CompletedProcess[str]:
    process = start(command)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.fixture(scope="module", autouse=True)
def _allowed() -> None:
    done = run("true")
    if done.returncode != 0:
        pytest.skip(f"no user namespaces for ordinary users here: {done.stderr.strip()}")


def test_inside_the_user_keeps_its_number_and_has_all_capabilities_after_exec() -> None:
    done = run("sh", "-c", "id -u; grep -E 'Cap(Eff|Amb)' /proc/self/status; echo pid $$; ls -d /proc/[0-9]*")
    uid, effective, ambient, pid, *processes = done.stdout.splitlines()
    assert uid == str(os.geteuid() or 65534)
    mask = int(effective.split()[1], 16)
    assert mask >> CAP["CHECKPOINT_RESTORE"] & 1
    assert mask >> CAP["SYS_ADMIN"] & 1
    assert ambient.split()[1] == effective.split()[1]
    assert pid == "pid 2"
    assert processes == ["/proc/1", "/proc/2"]  # init and the shell, which looked before it started ls


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 42", 42), ("kill -KILL $$", 137)])
def test_the_exit_code_of_the_command_comes_out(script: str, code: int) -> None:
    assert run("sh", "-c", script).returncode == code


def test_a_command_that_is_not_there_is_127() -> None:
    done = run("/no/such/command")
    assert (done.returncode, done.stderr) == (
        127,
        "gpurestore: cannot run /no/such/command: No such file or directory\n",
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_reach_the_command(number: signal.Signals) -> None:
    name = number.name.removeprefix("SIG")
    process = start(["sh", "-c", f"trap 'echo got; exit 5' {name}; echo ready; while :; do sleep 0.02; done"])
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert (out, process.returncode) == ("got\n", 5)


def test_where_it_is_forbidden_the_caller_stays_as_it_is() -> None:
    # In a user namespace of its own the script may forbid itself any further one.
    script = BECOME_ORDINARY.format(root=ROOT) + (
        "import ctypes\n"
        "from gpurestore import errors\n"
        "ctypes.CDLL(None).unshare(0x10000000)\n"
        "open('/proc/sys/user/max_user_namespaces', 'w').write('0')\n"
        "before = [os.readlink('/proc/self/ns/' + n) for n in ('user', 'pid', 'mnt')]\n"
        "try: namespaces.run(['true'])\n"
        "except errors.PrivilegeError as error: print(error)\n"
        "print(before == [os.readlink('/proc/self/ns/' + n) for n in ('user', 'pid', 'mnt')])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == [
        "no user namespace for an ordinary user: No space left on device; user.max_user_namespaces is 0: as root, "
        "'sysctl -w user.max_user_namespaces=15000', or run as root",
        "True",
    ]


def test_init_reaps_orphans() -> None:
    # The inner shell ends before its child, which init then inherits and must reap.
    script = "sh -c 'sleep 0.05 & echo $!' > /tmp/.orphan.$$; read pid < /tmp/.orphan.$$; rm /tmp/.orphan.$$;"
    script += "while [ -e /proc/$pid ]; do sleep 0.02; done; echo gone"
    assert run("sh", "-c", script).stdout == "gone\n"


def test_what_the_command_leaves_behind_ends_with_it() -> None:
    process = start(["sh", "-c", "sleep 1000 & exit 3"])
    process.communicate(timeout=60)  # the pipe closes only when nobody holds it any more
    assert process.returncode == 3


def test_everything_ends_when_the_outermost_process_is_killed() -> None:
    process = start(["sh", "-c", "echo ready; sleep 1000"])
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.kill()
    out, _ = process.communicate(timeout=60)
    assert out == ""


def test_the_error_of_an_ordinary_user_names_the_right_and_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities, "effective", lambda: 0)
    with pytest.raises(PrivilegeError, match=r"CAP_CHECKPOINT_RESTORE.*python -m gpurestore\.namespaces"):
        namespaces.require_restore_rights()
    monkeypatch.setattr(capabilities, "effective", lambda: 1 << CAP["CHECKPOINT_RESTORE"])
    namespaces.require_restore_rights()


def test_a_forbidden_user_namespace_names_the_switch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(namespaces, "Path", lambda *parts: tmp_path.joinpath(*parts[1:]))
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "max_user_namespaces").write_text("0\n")
    assert namespaces._remedy() == "user.max_user_namespaces is 0: as root, 'sysctl -w user.max_user_namespaces=15000'"
    (tmp_path / "user" / "max_user_namespaces").write_text("7\n")
    assert "seccomp" in namespaces._remedy()
