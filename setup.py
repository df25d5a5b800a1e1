"""The one part of the package that is compiled; all else about it is in pyproject.toml.

Optional: where there is no compiler, or one that does not take these options, products are the
framework's. Called through ctypes, so Python's headers are not needed.
"""

from setuptools import Extension, setup

C = "chronos/kernels/c"
setup(
    ext_modules=[
        Extension(
            "chronos.kernels._native",
            [f"{C}/{n}.c" for n in ("avx2", "avx512", "decode", "neon", "pool", "wide")],
            depends=[f"{C}/{n}.h" for n in ("kernels", "order", "rows", "values", "wide_block")],
            # Values are rounded where their format rounds them: a product and a sum stay two steps.
            extra_compile_args=["-O3", "-std=gnu11", "-ffp-contract=off", "-pthread"],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]
)
