"""Builds the compiled module with CMake; compilers, flags and CUDA are CMakeLists.txt's business.

BGKERNELS_NATIVE=AUTO (default) warns and installs without _C where it cannot be built, ON makes
that an error, OFF does not try. CMake reads BGKERNELS_CUDA=AUTO|ON|OFF, where ON is as strict.

BGKERNELS_TREE is the address of the source tree on the web, such as
https://host/owner/bgkernels/blob/v0.2.0; the README on a package index links to its files.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

NATIVE = os.environ.get("BGKERNELS_NATIVE", "").upper() or "AUTO"
CUDA = os.environ.get("BGKERNELS_CUDA", "").upper()
TREE = os.environ.get("BGKERNELS_TREE", "").rstrip("/")
REQUIRED = "ON" in (NATIVE, CUDA)
WARNING = "bgkernels installs without its compiled backend and runs on eager torch and Triton."


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        library.unlink(missing_ok=True)  # a failed build must not ship an older library
        try:
            self.cmake_as_far_as_possible(library.parent)
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"{error}\n{'' if REQUIRED else WARNING}") from error

    def cmake_as_far_as_possible(self, output: Path) -> None:
        try:
            self.cmake(output)
        except subprocess.CalledProcessError:
            if CUDA in ("ON", "OFF"):
                raise
            print("bgkernels: building again without CUDA", flush=True)
            os.environ["BGKERNELS_CUDA"] = "OFF"
            self.cmake(output)

    def cmake(self, output: Path) -> None:
        import pybind11

        # The tools of a virtual environment that is not activated are not on PATH.
        tools = os.environ.get("PATH", os.defpath) + os.pathsep + os.path.dirname(sys.executable)
        cmake = shutil.which("cmake", path=tools) or "cmake"
        options = {
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": output,
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        source, build = os.path.dirname(os.path.abspath(__file__)), os.path.abspath(self.build_temp)
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.run([cmake, "-S", source, "-B", build, *definitions], check=True)
        subprocess.run([cmake, "--build", build, "--parallel", "2"], check=True)


def description() -> str:
    """The README for a package index: its relative links become absolute, or plain text."""
    root = Path(__file__).resolve().parent

    def link(match: re.Match[str]) -> str:
        image, text, path = match.groups()
        if not TREE:
            return "" if image else text
        tree = TREE.replace("/blob/", "/raw/") if image else TREE
        return f"{image}[{text}]({tree}/{path})"

    relative = r"(!?)\[([^]]*)\]\((?!\w+://|#)([^)\s]+)\)"
    return re.sub(relative, link, (root / "README.md").read_text(encoding="utf-8"))


if NATIVE not in ("AUTO", "ON", "OFF"):
    raise SystemExit(f"BGKERNELS_NATIVE must be AUTO, ON or OFF, got {NATIVE!r}")
# An optional extension that raises CompileError is reported by setuptools as a warning.
extension = Extension("bgkernels.backends.native._C", sources=[], optional=not REQUIRED)
setup(
    ext_modules=[] if NATIVE == "OFF" else [extension],
    cmdclass={"build_ext": CMakeBuild},
    long_description=description(),
    long_description_content_type="text/markdown",
)
