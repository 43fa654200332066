"""python .ci/contents.py REPO WHEEL SDIST: both hold what the repository tracks and nothing else."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

# What the sdist leaves out: the gate, and files of the repository host and of editors.
LEFT_OUT = (".ci/", ".github/", ".pre-commit-config.yaml")
METADATA = {"METADATA", "RECORD", "WHEEL", "licenses/LICENSE"}


def main(repo: str, wheel: str, sdist: str) -> None:
    """Compare, and end with the difference where there is one."""
    listed = subprocess.run(["git", "-C", repo, "ls-files"], capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    tracked = {name for name in listed if name}
    package = {name for name in tracked if name.startswith("gradroute/")}

    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = {name.partition(".dist-info/")[2] for name in names if ".dist-info/" in name}
    compare("wheel", {name for name in names if ".dist-info/" not in name}, package)
    compare("wheel's metadata", info, METADATA)

    with tarfile.open(sdist) as archive:
        members = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    compare("sdist", members - {"PKG-INFO"}, {name for name in tracked if not name.startswith(LEFT_OUT)})
    print(f"{Path(wheel).name}: {len(names)} files; {Path(sdist).name}: {len(members)} files")


def compare(what: str, found: set[str], expected: set[str]) -> None:
    """End the program if the two differ."""
    if found != expected:
        missing, unexpected = sorted(expected - found)[:10], sorted(found - expected)[:10]
        sys.exit(f"{what}: missing {missing}, unexpected {unexpected}")


if __name__ == "__main__":
    main(*sys.argv[1:])
