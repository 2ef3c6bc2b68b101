"""The compiled encoder under AddressSanitizer with UBSan, and ThreadSanitizer: `make sanitize`.

Compiles encoder.cc with tests/encoder_driver.cc, without Python, for every instruction set that
this processor has, and lets it compute random shapes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from flaxqa import native
from flaxqa.native import build

DRIVER = Path(__file__).with_name("encoder_driver.cc")
SANITIZERS = {
    "address,undefined": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python tests/sanitize.py", description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--shapes", type=int, default=60, help="of each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if (problem := native.library().problem) is not None:
        print(f"sanitize: {problem}", file=sys.stderr)
        return 2
    failed = 0
    for isa in native.library().instruction_sets:
        for name, flags in SANITIZERS.items():
            began = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                driver = Path(folder) / "driver"
                # Optimized, as it is what users run that is checked.
                build.run([
                    *build.compiler(), *build.FLAGS, *build.X86[isa], *flags, "-g", "-O1",
                    f"-I{build.FOLDER}", f"-DFLAXQA_ISA={isa}", str(build.FOLDER / "encoder.cc"),
                    str(DRIVER), "-pthread", "-o", str(driver),
                ])  # fmt: skip
                done = subprocess.run(
                    [driver, str(args.seed), str(args.shapes)], capture_output=True, text=True
                )
            seconds = time.monotonic() - began
            told = done.stdout.strip() if done.returncode == 0 else done.stderr[:4_000]
            print(f"{isa:12} {name:18} {seconds:5.1f} s  {told}", flush=True)
            failed += done.returncode != 0
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
