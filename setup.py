"""Which folders are installed: every package under mlx_resonance/, and convert/ as mlx_resonance.convert."""

from setuptools import find_packages, setup

# Everything else is in pyproject.toml, which can give a package another folder (package-dir), but cannot combine a
# search for packages with a name of ours.
setup(
    packages=[
        *find_packages(include=["mlx_resonance", "mlx_resonance.*"]),
        "mlx_resonance.convert",
        *(f"mlx_resonance.convert.{name}" for name in find_packages("convert")),
    ]
)
