"""Gets transformers' own tests: the source distribution of the installed version, unpacked, with two stand-ins.

    python conformance/prepare.py FOLDER

`tests/test_modeling_common.py` imports two modules that the archive does not hold; empty mixins take their places.
"""

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers


STAND_INS = {
    "tests/__init__.py": "",
    "tests/generation/__init__.py": "",
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "tests/exporters/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
}


def main() -> None:
    folder = Path(sys.argv[1])
    name = f"transformers-{transformers.__version__}"
    if (folder / name / "tests" / "exporters").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        source = f"transformers=={transformers.__version__}"
        flags = ["--no-deps", "--no-binary", ":all:", "--dest", scratch]
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *flags, source], check=True)
        with tarfile.open(Path(scratch) / f"{name}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    for path, text in STAND_INS.items():
        place = folder / name / path
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text)


if __name__ == "__main__":
    main()
