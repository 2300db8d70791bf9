"""Write deploy/image/*.txt: what the image installs, each file by its sha256. Needs uv and a package index.

    python scripts/lock_image.py

The CPU build of torch comes from an index of its own, and its file is written by hand: deploy/image/torch-cpu.txt.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

IMAGE = Path("deploy/image")
# What only torch asks for, and only in its CUDA build.
CUDA = re.compile(r"torch==|triton==|nvidia-|cuda-")
COMMAND = (
    "uv pip compile pyproject.toml deploy/image/build.in --extra postgres --extra otel "
    "--generate-hashes --no-header --no-annotate "
    "--python-version 3.11 --python-platform x86_64-manylinux_2_28 --quiet --output-file"
)
HEAD = "# Written by scripts/lock_image.py. Linux on x86_64, Python 3.11.\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "lock.txt"
        subprocess.run([*COMMAND.split(), str(whole)], check=True)
        entries = re.findall(r"^\S+==.*?(?=^\S|\Z)", whole.read_text(), re.MULTILINE | re.DOTALL)
    for name, wanted in (("torch-cuda", True), ("requirements", False)):
        chosen = [entry for entry in entries if bool(CUDA.match(entry)) is wanted]
        (IMAGE / f"{name}.txt").write_text(HEAD + "".join(chosen))


if __name__ == "__main__":
    main()
