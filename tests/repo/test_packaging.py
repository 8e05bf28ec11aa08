"""What a release is made of: metadata that agrees with itself, workflows, and the compiled file."""

from __future__ import annotations

import email
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import bgkernels as bg

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[2]
GITHUB = ROOT / ".github"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_the_file_for_citations_speaks_of_this_version() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert citation["version"] == bg.__version__
    assert citation["license"] == PROJECT["project"]["license"]


@pytest.mark.parametrize("tree", ["", "https://host/owner/bgkernels/blob/v1"])
def test_the_readme_on_a_package_index_has_no_relative_link(tree: str, tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    variables = os.environ | {"BGKERNELS_NATIVE": "OFF", "BGKERNELS_TREE": tree}
    build = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, env=variables)
    (written,) = tmp_path.glob("*/PKG-INFO")
    metadata = email.message_from_string(written.read_text(encoding="utf-8"))
    assert metadata["Description-Content-Type"] == "text/markdown"
    page = metadata.get_payload()
    links = re.findall(r"(!?)\[[^]]*\]\(([^)\s]+)\)", page)
    assert links and all("://" in target for _, target in links)
    assert bool(tree) == (("", f"{tree}/docs/faq.md") in links)
    assert bool(tree) == any(image and "/raw/v1/" in target for image, target in links)


def test_workflows_test_what_the_metadata_promises() -> None:
    """Each Python of the classifiers, from `requires-python` on, and the oldest torch."""
    project = PROJECT["project"]
    pairs = read(GITHUB / "workflows" / "test.yml")["jobs"]["versions"]["strategy"]["matrix"]
    pythons = {pair["python"] for pair in pairs["include"]}
    named = [re.fullmatch(r".* :: (3\.\d+)", text) for text in project["classifiers"]]
    assert pythons == {found[1] for found in named if found}
    assert f">={min(pythons, key=lambda p: int(p[2:]))}" == project["requires-python"]
    built = {f"cp{python.replace('.', '')}-*" for python in pythons}
    assert built == set(PROJECT["tool"]["cibuildwheel"]["build"])
    torches = {pair["torch"] for pair in pairs["include"]}
    (oldest,) = re.findall(r"torch>=([\d.]+)", " ".join(project["dependencies"]))
    assert f"{oldest}.0" in torches
    assert pinned("torch") in torches


def pinned(package: str) -> str:
    """Its version in `constraints.txt`."""
    (version,) = re.findall(rf"(?m)^{package}==([^;\s]+)", (ROOT / "constraints.txt").read_text())
    return version


def test_every_command_of_the_workflows_can_be_run_here() -> None:
    """``.ci/steps`` lists them, with the values of each matrix in place."""
    listed = [sys.executable, ROOT / ".ci" / "steps", "--list"]
    shown = subprocess.run(listed, check=True, capture_output=True, text=True).stdout
    assert "versions 3.10 2.8.0: pip install torch==2.8.0; " in shown and "${{" not in shown
    for path in WORKFLOWS:
        for name, job in read(path)["jobs"].items():
            assert f"{path.stem} {name}" in shown
            plain = [s["run"] for s in job["steps"] if "run" in s and "${{" not in s["run"]]
            assert all(command in shown for command in plain)


def test_the_wheel_has_what_is_not_python() -> None:
    """Each file of the package that is read when it runs matches a pattern of `package-data`."""
    package = ROOT / "bgkernels"
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["bgkernels"]
    shipped = {path for pattern in patterns for path in package.glob(pattern)}
    there = {
        path
        for path in package.rglob("*.*")
        if path.suffix not in (".py", ".pyc", ".pyi", ".so", ".pyd")
    }
    assert there == shipped


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflows_ask_for_no_more_than_they_need(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step), step
            assert "@" in step.get("uses", "@"), f"{step['uses']} names no version"


@pytest.mark.parametrize(
    "path", sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda p: p.stem
)
def test_templates_are_forms(path: Path) -> None:
    form = read(path)
    assert {"name", "description", "body"} <= form.keys()
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    for field in fields:
        assert field["attributes"]["label"], field


def test_the_compiled_module_knows_no_torch() -> None:
    """So one file serves every release of torch, and no CUDA runtime has to be found."""
    _C = pytest.importorskip("bgkernels.backends.native._C")
    compiled = Path(_C.__file__).read_bytes()
    assert not [name for name in (b"libtorch", b"libc10", b"libcudart.so") if name in compiled]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_torch_and_the_compiled_module_share_their_threads() -> None:
    """In a process of its own: other packages bring OpenMP runtimes too."""
    pytest.importorskip("bgkernels.backends.native._C")
    code = """if True:
        import bgkernels
        with open("/proc/self/maps") as maps:
            print(*{line.split()[-1] for line in maps if "libgomp" in line})"""
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)
    runtimes = shown.stdout.decode().split()
    assert len(runtimes) == 1, runtimes
