"""A study in a database, by workers that are processes of their own: SQLite, and a PostgreSQL that
the test starts. What shows studies of Optuna reads ours.

CHRONOS_TEST_POSTGRES names a database (postgresql+pg8000://...) to write to instead.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

from chronos.testing.tiny import tiny_tokenizer
from chronos.tune import worker
from chronos.tune.report import status
from chronos.tune.settings import load_tuning
from chronos.tune.study import Study
from tests.unit.test_tune_study import RECIPE, ROOT, Planted

POSTGRES = "postgresql+pg8000"


def _program(name: str) -> str | None:
    """Debian has the server's programs beside no others."""
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return shutil.which(name, path=os.pathsep.join([os.environ["PATH"], *map(str, places)]))


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The URL of an empty PostgreSQL on a socket in a folder of its own."""
    pytest.importorskip("pg8000", reason="PostgreSQL needs its driver: pip install pg8000")
    if url := os.environ.get("CHRONOS_TEST_POSTGRES"):
        yield url
        return
    initdb, server = _program("initdb"), _program("postgres")
    if initdb is None or server is None:
        pytest.skip("no PostgreSQL here: apt-get install postgresql")
    user: dict[str, Any] = {}
    if os.geteuid() == 0:  # it refuses to run as root
        user = {"user": "nobody", "group": "nogroup", "extra_groups": []}
    with tempfile.TemporaryDirectory(prefix="chronos-pg-") as name:
        folder = Path(name)
        if user:
            shutil.chown(folder, user["user"], user["group"])
        quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": "/"} | user
        data = str(folder / "data")
        subprocess.run(
            [initdb, "-D", data, "-U", "chronos", "-A", "trust", "--no-sync"], check=True, **quiet
        )
        flags = ["-c", "listen_addresses=", "-c", f"unix_socket_directories={folder}"]
        process = subprocess.Popen([server, "-D", data, "-F", *flags], **quiet)
        try:
            yield f"{POSTGRES}://chronos@/postgres?unix_sock={folder}/.s.PGSQL.5432"
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: Any, tmp_path: Path) -> str:
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgres"))
    return f"sqlite:///{tmp_path}/study.db"


# Each works in a folder of its own, as on a machine of its own. `met` holds both up until both have
# a trial; `killed` ends in the middle of its second one.
WORKER = """
import os, signal, sys, time
from pathlib import Path
root, file, run, url, other, killed = sys.argv[1:]
sys.path[:0] = [root]
from chronos.tune import study, worker
from chronos.tune.settings import load_tuning
from tests.unit.test_tune_study import Planted
begun = set()
def at(folder, step):
    begun.add(folder.name)
    (Path(run) / "met").touch()
    end = time.monotonic() + 60
    while not (Path(other) / "met").exists():
        assert time.monotonic() < end, "the other worker never had a trial"
        time.sleep(0.01)
    if killed and len(begun) == 2 and step > 1:
        os.kill(os.getpid(), signal.SIGKILL)
class Long(Planted):  # all run to their ends
    def __call__(self, job, judge, progress, tick):
        return super().__call__(job, lambda found: judge(found) or True, progress, tick)
worker.start(load_tuning(file), run, study=url, run=Long(at=at))
"""


def test_two_processes_share_a_database_and_one_is_killed(url: str, tmp_path: Path) -> None:
    tiny_tokenizer().save(tmp_path / "tokenizer")
    file, folders = tmp_path / "study.toml", [tmp_path / "one", tmp_path / "two"]
    where = (tmp_path / "tokenizer").as_posix()
    file.write_text(RECIPE.format(tokenizer=where, trials=5, more=""), "utf-8")
    for folder in folders:
        folder.mkdir()

    def begin(own: int, other: int, killed: str = "") -> subprocess.Popen[str]:
        args = [str(ROOT), str(file), str(folders[own]), url, str(folders[other]), killed]
        command = [sys.executable, "-c", WORKER, *args]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    started = [begin(0, 1), begin(1, 0, "killed")]
    ended = [(process.communicate()[1], process.returncode) for process in started]
    assert ended[1][1] == -signal.SIGKILL, ended[1][0]
    assert ended[0][1] == 0, ended[0][0]
    # The one that is left, or who comes later, takes up what was killed.
    last = begin(0, 1)
    assert (last.communicate()[1], last.returncode) == ("", 0)
    command = [sys.executable, "-m", "chronos", "tune", "status", str(folders[0]), "--json"]
    found = json.loads(
        subprocess.run([*command, "--study", url], check=True, capture_output=True).stdout
    )
    assert sum(found["counts"].values()) == 5 and "running" not in found["counts"]
    assert len({json.dumps(row["params"], sort_keys=True) for row in found["trials"]}) == 5
    assert [row["own"] for row in found["trials"]].count(True) == 1
    again = [row for row in found["trials"] if row["folder"] != f"trials/{row['trial']:04d}"]
    assert len(again) == 1 and again[0]["rungs"][0]["step"] == 1  # judged before it was killed


def test_optuna_s_dashboard_reads_a_study(tmp_path: Path) -> None:
    dashboard = pytest.importorskip("optuna_dashboard", reason="pip install optuna-dashboard")
    tiny_tokenizer().save(tmp_path / "tokenizer")
    file, run = tmp_path / "study.toml", tmp_path / "run"
    where = (tmp_path / "tokenizer").as_posix()
    file.write_text(RECIPE.format(tokenizer=where, trials=4, more=""), "utf-8")
    worker.start(load_tuning(file), run, run=Planted())
    app = dashboard.wsgi(Study.of(run, None).study._storage)
    [known] = _asked(app, "/api/studies")["study_summaries"]
    assert (known["study_name"], known["directions"]) == ("chronos", ["minimize", "minimize"])
    shown = _asked(app, f"/api/studies/{known['study_id']}")
    assert len(shown["trials"]) == 4 and {trial["state"] for trial in shown["trials"]} <= {
        "Complete", "Pruned",
    }  # fmt: skip
    own = shown["trials"][0]
    found = status(Study.of(run, None))["trials"][0]
    assert own["values"] == [found["values"][name] for name in ("loss", "expert_bytes_per_token")]


def _asked(app: Any, path: str) -> Any:
    said: list[str] = []
    environ = {
        "REQUEST_METHOD": "GET", "PATH_INFO": path, "SERVER_NAME": "x", "SERVER_PORT": "1",
        "wsgi.input": io.BytesIO(), "wsgi.errors": sys.stderr, "wsgi.url_scheme": "http",
    }  # fmt: skip
    body = b"".join(app(environ, lambda status, headers, *more: said.append(status)))
    assert said == ["200 OK"], body[:200]
    return json.loads(body)
