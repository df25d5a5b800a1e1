"""What is uploaded is complete: a wheel and an sdist, built here and unpacked where nothing of the
checkout can be imported; and an editable install, seen from the folder above. Installing a wheel is
unpacking it: no installer could touch the environment that runs the tests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", reason="builds packages with the setuptools installed here")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
TAKEN = (
    "chronos docs tests bench .ci README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md LICENSE"
    " NOTICE MANIFEST.in Makefile constraints.txt pyproject.toml setup.py"
).split()


def run(*command: object, cwd: Path) -> str:
    """A process that imports what is installed, and nothing of this checkout."""
    clean = {n: v for n, v in os.environ.items() if not n.startswith(("PYTHONPATH", "CHRONOS_"))}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources in a folder called `chronos`, as a clone may be."""
    folder = tmp_path_factory.mktemp("work") / "chronos"
    folder.mkdir()
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
    for name in TAKEN:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def built(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheels made of the clone and of the sdist, in a folder each."""
    folder = tmp_path_factory.mktemp("dist")
    build("sdist", clone, folder)
    build("wheel", clone, folder / "of-clone")
    [sdist] = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    build("wheel", folder / sdist.name.removesuffix(".tar.gz"), folder / "of-sdist")
    return folder


def build(what: str, source: Path, folder: Path) -> None:
    """As pip and build do, by setuptools' own hook."""
    hook = f"from setuptools import build_meta; build_meta.build_{what}({str(folder)!r})"
    folder.mkdir(exist_ok=True)
    run(sys.executable, "-c", hook, cwd=source)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment; a path file shows it what is installed here, and not Chronos."""
    folder = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    (site_of(folder) / "installed.pth").write_text(f"{Path(pytest.__file__).parents[1]}\n", "utf-8")
    return folder


def site_of(environment: Path) -> Path:
    [site] = environment.glob("lib/python3*/site-packages")
    return site


def install(fresh: Path, wheels: Path) -> Path:
    """Unpack the only wheel of a folder in the environment, in place of the one before; returns
    its Python."""
    site = site_of(fresh)
    for left in [*site.glob("chronos*"), *site.glob("__editable__*")]:
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    [wheel] = wheels.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    return fresh / "bin" / "python"


def test_the_sdist_has_what_it_takes_to_test_and_to_read(built: Path) -> None:
    [path] = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in (
        "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "Makefile", "constraints.txt", ".ci/run",
        "setup.py", "chronos/kernels/c/kernels.h", "chronos/kernels/c/avx512.c",
        "docs/recipes.md", "docs/img/forecast-gpt-oss-20b.png", "tests/conftest.py",
        "tests/golden/golden.safetensors", "tests/absent/sitecustomize.py", "bench/README.md",
        "chronos/assets/recipes/demo.toml", "chronos/assets/demo/tokenizer.json",
    ):  # fmt: skip
        assert name in names, name
    assert not [name for name in names if "__pycache__" in name]


def test_the_wheel_has_the_package_alone(built: Path) -> None:
    [path] = built.glob("of-clone/*.whl")
    names = zipfile.ZipFile(path).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"chronos", f"{'-'.join(path.name.split('-')[:2])}.dist-info"}
    for name in ("py.typed", "assets/recipes/demo.toml", "assets/demo/config.json"):
        assert f"chronos/{name}" in names


@pytest.mark.needs_backend
@pytest.mark.parametrize("wheel", ["of-clone", "of-sdist"])
def test_what_is_installed_does_what_the_readme_says(
    built: Path, fresh: Path, wheel: str, tmp_path: Path
) -> None:
    python = install(fresh, built / wheel)
    where = run(python, "-c", "import chronos; print(chronos.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(fresh)
    line = ["generate", "demo", "-p", "import ", "-n", "4", "--json"]
    assert '"text"' in run(python, "-m", "chronos", *line, cwd=tmp_path)
    # README's recipe, by its name; its 2,200 steps are cut down to one on its way in.
    code = (
        "import dataclasses, chronos.common.training.recipe as r; from chronos.cli.main import run;"
        "load = r.load_recipe;"
        "one = lambda *a: dataclasses.replace(load(*a), cadence=r.CadenceRecipe(steps=1));"
        "r.load_recipe = one;"
        "raise SystemExit(run('train pretrain -c demo -o run --data own.txt'.split()))"
    )
    (tmp_path / "own.txt").write_text("def add(a, b):\n    return a + b\n" * 200, "utf-8")
    made = run(python, "-c", code, cwd=tmp_path)
    assert (tmp_path / made.strip() / "model.safetensors").is_file()


def test_the_folder_above_a_clone_imports_the_clone(
    clone: Path, fresh: Path, tmp_path: Path
) -> None:
    """Beside a folder called `chronos`, Python would take that for an empty package."""
    build("editable", clone, tmp_path)
    python, above = install(fresh, tmp_path), clone.parent
    where = run(python, "-c", "import chronos; print(chronos.__file__)", cwd=above)
    assert Path(where.strip()) == clone / "chronos" / "__init__.py"
    assert run(python, "-m", "chronos", "--version", cwd=above).startswith("chronos 0.")


def test_doctor_finds_what_shares_the_import_name(built: Path, fresh: Path, tmp_path: Path) -> None:
    """By what installers leave: a package of another distribution in the same folder."""
    python = install(fresh, built / "of-clone")
    doctor = [python, "-m", "chronos", "doctor", "--json"]
    assert json.loads(run(*doctor, cwd=tmp_path))["import_name_shared_with"] == []
    other = site_of(fresh) / "chronos_forecasting-2.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: chronos-forecasting\nVersion: 2.0\n"
    )
    (other / "RECORD").write_text("chronos/__init__.py,,\nchronos/base.py,,\n")
    found = json.loads(run(*doctor, cwd=tmp_path))["import_name_shared_with"]
    shutil.rmtree(other)
    assert found == ["chronos-forecasting"]
