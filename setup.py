"""Builds the C extension behind the fused CPU kernels; all else is in pyproject.toml.

The package works without it (`ebu_optim.kernels.active()` says so), therefore a missing compiler
is a warning, and the wheel is then a pure one, which `EBU_OPTIM_PURE=1` asks for outright.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError

SANITIZE = os.environ.get("EBU_OPTIM_SANITIZE", "")  # "address,undefined", see `make sanitize`
FLAGS = ["-std=gnu11", "-O3", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-psabi"]
if SANITIZE:
    FLAGS += ["-g", "-O1", f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all"]

CPU = Extension(
    "ebu_optim.kernels._cpu",
    ["ebu_optim/kernels/_cpu.c"],
    depends=["ebu_optim/kernels/_cpu_lanes.h"],
    py_limited_api=True,
    optional=True,
    extra_link_args=[f"-fsanitize={SANITIZE}"] if SANITIZE else [],
)


class Build(build_ext):
    """With OpenMP where it is GCC's."""

    def build_extension(self, ext: Extension) -> None:
        # Not linked to an OpenMP library: torch has loaded its own, whatever its file is called,
        # before `_cpu` is imported, and the names are found there. A second library would keep a
        # second set of threads. Clang's names (__kmpc_...) are not in the library of torch for
        # Linux; elsewhere names are looked up by library.
        if sys.platform == "linux":
            ext.extra_compile_args = [*FLAGS, "-fopenmp"]
            try:
                super().build_extension(ext)
                if b"__kmpc_" not in Path(self.get_ext_fullpath(ext.name)).read_bytes():
                    return
            except CCompilerError:
                pass  # the next attempt says what is wrong
            self.force = True
        ext.extra_compile_args = FLAGS
        super().build_extension(ext)

    def run(self) -> None:
        super().run()
        if not all(map(os.path.exists, self.get_outputs())):
            self.distribution.ext_modules = []  # no compiler: what is built is pure Python


class Wheel(bdist_wheel):
    """Tagged for every platform where it holds no extension."""

    def run(self) -> None:
        self.run_command("build")
        if not self.distribution.ext_modules:
            self.root_is_pure = True
            self.plat_name_supplied = False
        super().run()


def readme() -> str:
    """README.md for PyPI, where a link to a file of the repository would lead nowhere."""
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    text = re.sub(r"<!--.*?-->", "", text)
    for link, kind in {r"(!\[[^]]*\]\()": "raw", r"(\]\()": "blob"}.items():
        address = f"https://github.com/ebu-optim/ebu_optim/{kind}/main/"
        text = re.sub(link + "(?!https:|#)", rf"\g<1>{address}", text)
    return text


setup(
    long_description=readme(),
    long_description_content_type="text/markdown",
    ext_modules=[] if os.environ.get("EBU_OPTIM_PURE") == "1" else [CPU],
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
)
