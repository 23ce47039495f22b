"""Builds the compiled kernels, which are optional. Everything else is in pyproject.toml."""

import os
import runpy

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = os.path.dirname(os.path.abspath(__file__))
SOURCES = runpy.run_path(os.path.join(ROOT, "dist_export", "kernels", "sources.py"))
FILES = [os.path.relpath(path, ROOT) for path in SOURCES["list_sources"]()]


class BuildLibrary(build_ext):
    """Builds a shared library that ctypes loads. It has no part of Python in it."""

    def get_ext_filename(self, ext_name: str) -> str:
        """Return the name without the version of Python."""
        return os.path.join(*ext_name.split(".")) + ".so"


class TagWheel(bdist_wheel):
    """Names the wheel after what is in it: any Python, and the platform if the library was built."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return interpreter, ABI and platform."""
        build = self.get_finalized_command("build_ext")
        if not os.path.exists(build.get_ext_fullpath(build.extensions[0].name)):
            return "py3", "none", "any"
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "dist_export.kernels._compiled",
            sources=[path for path in FILES if path.endswith(".c")],
            depends=[path for path in FILES if path.endswith(".h")],
            define_macros=[("SOURCE_DIGEST", f'"{SOURCES["digest_sources"]()}"')],
            libraries=["m"],
            # no contraction: a product and a sum are rounded one after the other, as numpy does
            extra_compile_args=["-std=gnu11", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden"],
            optional=True,  # without a compiler, or where one of the options is unknown, numpy does the same
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": TagWheel},
)
