"""Makes `.venv` and puts pinned versions into it: `python tools/environment.py base [test hf eval lint]`.

Run by the Python that the environment is for. Where that Python already has a torch in range, the
environment looks through to its packages and only what is missing or out of range is installed: nothing is
downloaded where all is there, as on a GPU machine without internet. Elsewhere every version is the one in
`requirements/`. TORCH_INDEX_URL names one more index, to choose between PyTorch's CPU and CUDA builds.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venv"
PYTHON = FOLDER / "bin" / "python"
LINK = "machine.pth"  # in the environment's site-packages: where the machine's own packages lie
COMMAND = """import sys

from colossus.cli import main

if __name__ == "__main__":  # processes that the command starts import it once more
    sys.exit(main())
"""
INSTALL = ["install", "--quiet", "--disable-pip-version-check", "--prefer-binary", "--no-compile"]


def main(groups: list[str]) -> int:
    """Makes the environment if there is none, and installs `groups`. Returns an exit code."""
    if not PYTHON.exists():
        make()
    site = site_packages()
    shared = (site / LINK).exists()
    for group in groups:
        if not (install_missing(group) if shared else install_pinned(group)):
            print(f"error: {group}: not installed; pip says above what it could not get", file=sys.stderr)
            if not (shared and group in ("hf", "eval")):  # the few tests that need these are skipped
                return 3
    (site / "colossus.pth").write_text(f"{ROOT}\n")
    command = PYTHON.with_name("colossus")
    command.write_text(f"#!{PYTHON}\n{COMMAND}")
    command.chmod(0o755)
    return 0


def make() -> None:
    """An environment of this Python; one that looks through to its packages if torch is among them."""
    venv.create(FOLDER, symlinks=True, with_pip=False, clear=True)
    if torch_in_range(installed_torch()):
        # `--system-site-packages` would miss the packages of a Python that is itself an environment's.
        shared = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        (site_packages() / LINK).write_text("".join(f"import site; site.addsitedir({p!r})\n" for p in shared))
        print(f"using torch {installed_torch()} of {sys.executable}")
    if not has_pip() and importlib.util.find_spec("ensurepip"):
        subprocess.run([PYTHON, "-m", "ensurepip", "--default-pip"], stdout=subprocess.DEVNULL, check=True)


def installed_torch() -> str | None:
    """The version of this Python's torch, None where it has none."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def torch_in_range(version: str | None) -> bool:
    """Whether the project's range, `torch>=A,<=B`, takes in `version`; a build's suffix does not count."""
    bounds = re.search(r"^torch>=([\d.]+),<=([\d.]+)$", "\n".join(ranges("base")), re.MULTILINE)
    assert bounds is not None
    return version is not None and numbers(bounds[1]) <= numbers(version) <= numbers(bounds[2])


def numbers(version: str) -> tuple[int, ...]:
    """(2, 13, 0) of "2.13.0+cpu"; a pre-release counts as the release before it."""
    release = re.match(r"\d+(\.\d+)*", version)
    assert release is not None, version
    parts = [int(part) for part in release[0].split(".")]
    early = re.match(r"\.?(a|b|rc|dev)", version[release.end() :]) is not None
    return (*parts, *[0] * (3 - len(parts)), -1 if early else 0)


def ranges(group: str) -> list[str]:
    """The requirements of `group` as pyproject.toml states them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return list(project["dependencies"] if group == "base" else project["optional-dependencies"][group])


def pins(group: str) -> Path:
    """The file of exact versions of `group` and of all that it needs."""
    return ROOT / "requirements" / f"{group}.txt"


def install_pinned(group: str) -> bool:
    """Installs the exact versions of `group`."""
    return pip("-r", str(pins(group)), *extra_index())


def install_missing(group: str) -> bool:
    """Installs what of `group` is missing or out of range, in the pinned version; asks no index first."""
    if pip("--no-index", *ranges(group), quietly=True):
        return True
    present = {normal(d.metadata["Name"]) for d in importlib.metadata.distributions()}
    wanted = [pin for pin in pins(group).read_text().split() if normal(pin.split("==")[0]) not in present]
    constraints = FOLDER / f"{group}-missing.txt"
    constraints.write_text("\n".join(wanted) + "\n")
    return pip(*ranges(group), "-c", str(constraints), *extra_index())


def extra_index() -> list[str]:
    """pip's options for TORCH_INDEX_URL."""
    url = os.environ.get("TORCH_INDEX_URL", "")
    return ["--extra-index-url", url] if url else []


def pip(*arguments: str, quietly: bool = False) -> bool:
    """Runs the environment's pip, or this Python's for it where it has none. Whether it succeeded."""
    runner = (
        [str(PYTHON), "-m", "pip"] if has_pip() else [sys.executable, "-m", "pip", "--python", str(PYTHON)]
    )
    errors = subprocess.DEVNULL if quietly else None
    return (
        subprocess.run([*runner, *INSTALL, *arguments], cwd=ROOT, stderr=errors, check=False).returncode == 0
    )


def has_pip() -> bool:
    """Whether the environment can run a pip of its own, or of the Python that it looks through to."""
    shared = (site_packages() / LINK).exists() and importlib.util.find_spec("pip") is not None
    return shared or (site_packages() / "pip").is_dir()


def site_packages() -> Path:
    """Where the environment keeps its packages."""
    return next(FOLDER.glob("lib/python*/site-packages"))


def normal(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["base"]))
