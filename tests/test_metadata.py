"""The record of what a run was made with."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import specjax
from specjax.metadata import run_metadata

IDENTITY = ["-c", "user.name=t", "-c", "user.email=t@example.org"]


def run_in(folder: Path) -> dict:
    """`run_metadata` of the copy of specjax in `folder`, in a process without JAX."""
    code = (
        "import json, sys; from specjax.metadata import run_metadata;"
        "print(json.dumps([run_metadata(), 'jax' in sys.modules]))"
    )
    output = subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, text=True).stdout
    metadata, jax_started = json.loads(output)
    assert not jax_started
    return metadata


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *IDENTITY, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_names_versions_and_devices():
    import jax

    metadata = run_metadata()
    assert metadata["specjax"] == specjax.__version__
    assert metadata["packages"]["jax"] == jax.__version__
    assert metadata["devices"] == {"backend": "cpu", "kind": "cpu", "count": 8, "processes": 1}
    assert json.loads(json.dumps(metadata)) == metadata


def test_revision_is_that_of_the_source_and_marks_changes(tmp_path):
    source = Path(specjax.__file__).parent
    package = tmp_path / "checkout" / "specjax"
    package.mkdir(parents=True)
    for name in ("__init__.py", "metadata.py"):
        shutil.copy(source / name, package)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "not ours")
    assert run_in(package.parent)["git_revision"] is None  # the folder above is some other project's repository

    git(package.parent, "init", "-q")
    git(package.parent, "add", "specjax")
    git(package.parent, "commit", "-q", "-m", "first")
    git(package.parent, "tag", "-a", "v1", "-m", "a release")
    revision = git(package.parent, "rev-parse", "HEAD")
    metadata = run_in(package.parent)
    assert metadata["git_revision"] == revision
    assert "devices" not in metadata

    with (package / "__init__.py").open("a") as file:
        file.write("# changed\n")
    assert run_in(package.parent)["git_revision"] == f"{revision}-dirty"
