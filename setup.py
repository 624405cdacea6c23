"""The optional C library; everything else is in pyproject.toml.

It is called through ctypes and knows nothing of Python, so one wheel per platform serves every
Python. Without a compiler the install succeeds and torch computes instead.
"""

import importlib.util
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent
HOME = "gradcodec/native"

spec = importlib.util.spec_from_file_location("sources", ROOT / HOME / "sources.py")
assert spec is not None
assert spec.loader is not None
sources = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sources)


class Wheel(bdist_wheel):
    """Tagged by what is inside: for one platform with the library, for any without."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI and platform of the file's name."""
        built = any(Path(self.bdist_dir).glob(f"{HOME}/_library.*"))
        return "py3", "none", super().get_tag()[2] if built else "any"


setup(
    ext_modules=[
        Extension(
            "gradcodec.native._library",
            sources=[path.relative_to(ROOT).as_posix() for path in sources.units()],
            depends=[path.relative_to(ROOT).as_posix() for path in sources.headers()],
            define_macros=[("GRADCODEC_SOURCES", sources.digest())],
            extra_compile_args=sources.FLAGS,
            py_limited_api=True,  # for a file name without a version of Python
            optional=True,
        )
    ],
    cmdclass={"bdist_wheel": Wheel},
)
