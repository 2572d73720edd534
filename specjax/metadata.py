"""What a run was made with: written into every output folder beside the resolved config."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import specjax

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "safetensors",
    "tokenizers",
    "transformers",
    "torch",
    "libtpu",
)
SOURCE_FOLDER = Path(__file__).resolve().parent.parent


def run_metadata() -> dict[str, Any]:
    """Versions of specjax, Python and the packages that shape a result, the source's git revision, and the devices.

    The revision is None outside a git checkout and ends in `-dirty` if tracked files differ from it. Devices are
    reported only in a process that has imported JAX: this function does not start it.
    """
    metadata: dict[str, Any] = {
        "specjax": specjax.__version__,
        "git_revision": _git_revision(SOURCE_FOLDER),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
    }
    jax = sys.modules.get("jax")
    if jax is not None:
        devices = jax.devices()
        metadata["devices"] = {
            "backend": jax.default_backend(),
            "kind": devices[0].device_kind,
            "count": len(devices),
            "processes": jax.process_count(),
        }
    return metadata


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_revision(folder: Path) -> str | None:
    # An installed copy may lie inside some other project's checkout: only the folder's own repository counts.
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None
