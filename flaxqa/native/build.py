"""Compiles the encoder for CPUs when the package is installed: a build hook of hatchling.

`python flaxqa/native/build.py` does it by hand. Where there is no C++ compiler the package is
installed without; XLA then computes on CPUs, slower.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path(__file__).resolve().parent
LIBRARY = FOLDER / "encoder.so"
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall"]
X86 = {  # from the slowest to the fastest; each needs what flaxqa/native/ffi.cc asks the processor
    "portable": [],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "avx512bf16": ["-march=x86-64-v4", "-mavx512bf16", "-mprefer-vector-width=512"],
}
INSTRUCTION_SETS = X86 if platform.machine() in ("x86_64", "AMD64") else {"portable": []}


class CannotCompile(Exception):
    """Why the library cannot be made."""


def compiler() -> str:
    """The C++ compiler: that of the environment variable CXX, or the first that is there."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        raise CannotCompile(f"there is no C++ compiler: {' or '.join(names)}")
    return found


def headers() -> Path:
    """XLA's, which come with jaxlib; found without importing it."""
    spec = importlib.util.find_spec("jaxlib")
    places = spec.submodule_search_locations if spec is not None else None
    folder = Path(places[0]) / "include" if places else Path()
    if not (folder / "xla" / "ffi" / "api" / "ffi.h").is_file():
        raise CannotCompile("jaxlib, which has the headers, is not installed")
    return folder


def build() -> Path:
    """Compiles LIBRARY and returns it; an instruction set the compiler lacks is left out.

    Raises:
      CannotCompile: there is no compiler, or no jaxlib, or it fails; with what it said.
    """
    if sys.platform == "win32":
        raise CannotCompile("Windows is not known to work")
    command = [compiler(), *FLAGS]
    include = headers()
    with tempfile.TemporaryDirectory() as folder:

        def compiled(source: str, name: str, *options: str) -> Path:
            path = Path(folder) / f"{name}.o"
            run([*command, *options, "-c", str(FOLDER / source), "-o", str(path)])
            return path

        def encoder(isa: str) -> Path | CannotCompile:
            try:
                return compiled("encoder.cc", isa, f"-DFLAXQA_ISA={isa}", *INSTRUCTION_SETS[isa])
            except CannotCompile as error:
                return error

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            made = dict(zip(INSTRUCTION_SETS, pool.map(encoder, INSTRUCTION_SETS), strict=True))
        if isinstance(reason := made["portable"], CannotCompile):
            raise reason
        objects = {isa: path for isa, path in made.items() if isinstance(path, Path)}
        each = " ".join(f"do({isa})" for isa in objects)
        ffi = compiled("ffi.cc", "ffi", "-isystem", str(include), f"-DFLAXQA_EACH_ISA(do)={each}")
        library = Path(folder) / LIBRARY.name
        parts = map(str, [*objects.values(), ffi])
        run([*command, "-shared", *parts, "-o", str(library)])
        # Renamed into place: a process that has the old one open keeps it.
        new = LIBRARY.with_suffix(".new")
        shutil.copyfile(library, new)
        new.replace(LIBRARY)
    return LIBRARY


def run(command: list[str]) -> None:
    """Runs a compiler.

    Raises:
      CannotCompile: it failed; with the end of what it said.
    """
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603
    if done.returncode != 0:
        raise CannotCompile(f"{' '.join(command[:1])} failed: {done.stderr[-2000:]}")


class NativeHook(BuildHookInterface):
    """Puts the library into the wheel, which is then one for this platform alone."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        try:
            build()
        except CannotCompile as error:
            self.app.display_warning(f"without the compiled encoder, slower on CPUs: {error}")
            return
        build_data["artifacts"].append(str(LIBRARY.relative_to(self.root)))
        build_data["pure_python"] = False
        build_data["infer_tag"] = True


if __name__ == "__main__":
    try:
        print(build())
    except CannotCompile as problem:
        sys.exit(f"build: {problem}")
