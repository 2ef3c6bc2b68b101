"""Compiles the encoder for CPUs when the package is installed: a build hook of hatchling.

`python flaxqa/native/build.py` does it by hand. Where there is no C++ compiler the package is
installed without; XLA then computes on CPUs, slower.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path(__file__).resolve().parent
LIBRARY, RECORD = "encoder.so", "encoder.json"
INSIDE = ("eval", "configs")  # folders of the checkout that the package holds, by links
SOURCES = ("encoder.cc", "encoder.h", "ffi.cc")
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


def compiler() -> list[str]:
    """The C++ compiler: that of the environment variable CXX, or the first that is there.

    CXX may have options: "ccache g++", "g++ -m64".
    """
    try:
        named = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise CannotCompile(f"CXX is {os.environ['CXX']!r}: {error}") from error
    names = named[:1] or ["c++", "g++", "clang++"]
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        raise CannotCompile(f"there is no C++ compiler: {' or '.join(names)}")
    return [found, *named[1:]]


def headers() -> Path:
    """XLA's, which come with jaxlib; found without importing it."""
    spec = importlib.util.find_spec("jaxlib")
    places = spec.submodule_search_locations if spec is not None else None
    folder = Path(places[0]) / "include" if places else Path()
    if not (folder / "xla" / "ffi" / "api" / "ffi.h").is_file():
        raise CannotCompile("jaxlib, which has the headers, is not installed")
    return folder


def sources_sha256() -> str:
    """A hash of what the library is made of; `flaxqa.native` computes it, too."""
    content = b"".join((FOLDER / name).read_bytes() for name in SOURCES)
    return hashlib.sha256(content).hexdigest()


def build(target: Path = FOLDER) -> Path:
    """Compiles LIBRARY into a folder and returns it; without what the compiler does not know.

    RECORD beside it says what the library is, so that half of one, or an old one, is not loaded.

    Raises:
      CannotCompile: there is no compiler, or no jaxlib, or it fails, or the folder cannot be
        written; with what was said.
    """
    try:
        return build_in(target)
    except OSError as error:
        raise CannotCompile(str(error)) from error


def build_in(target: Path) -> Path:
    if sys.platform == "win32":
        raise CannotCompile("Windows is not known to work")
    command = [*compiler(), *FLAGS]
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
        library = Path(folder) / LIBRARY
        parts = map(str, [*objects.values(), ffi])
        run([*command, "-shared", *parts, "-o", str(library)])
        content = library.read_bytes()
    record = {
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "sources_sha256": sources_sha256(),
    }
    for name, data in ((LIBRARY, content), (RECORD, json.dumps(record).encode() + b"\n")):
        # Renamed into place: a process that has the old one open keeps it.
        new = target / f"{name}.new"
        new.write_bytes(data)
        new.replace(target / name)
    return target / LIBRARY


def run(command: list[str]) -> None:
    """Runs a compiler, whose last argument is the file that it makes.

    Raises:
      CannotCompile: it failed; with the end of what it said.
    """
    try:
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, errors="replace"
        )
    except OSError as error:
        raise CannotCompile(f"{command[0]} cannot be run: {error}") from error
    if done.returncode != 0:
        raise CannotCompile(f"{command[0]} failed: {done.stderr[-2000:]}")
    if not Path(command[-1]).is_file():
        raise CannotCompile(f"{command[0]} made nothing")


class NativeHook(BuildHookInterface):
    """Puts the library into the wheel, which is then one for this platform alone."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles beside the sources for an editable installation, elsewhere for a wheel."""
        for name in INSIDE:  # an sdist has no links
            if not (link := FOLDER.parent / name).is_symlink() and not link.exists():
                link.symlink_to(Path("..", name))
        self.folder = tempfile.TemporaryDirectory()
        editable = version == "editable"
        target = FOLDER if editable else Path(self.folder.name)
        try:
            build(target)
        except CannotCompile as error:
            kept = editable and (FOLDER / LIBRARY).exists()
            self.app.display_warning(
                f"without the compiled encoder, slower on CPUs: {error}"
                + (f"; {FOLDER / LIBRARY} stays as it was" if kept else "")
            )
            return
        if not editable:
            inside = FOLDER.relative_to(self.root)
            for name in (LIBRARY, RECORD):
                build_data["force_include"][str(target / name)] = str(inside / name)
        build_data["pure_python"] = False
        # The library does not use Python's interface: one wheel is for all versions of Python.
        build_data["tag"] = f"py3-none-{re.sub('[-.]', '_', sysconfig.get_platform())}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        self.folder.cleanup()


if __name__ == "__main__":
    try:
        print(build())
    except CannotCompile as problem:
        sys.exit(f"build: {problem}")
