"""Which folders are installed: every package under mlx_resonance/, and convert/ as mlx_resonance.convert."""

from setuptools import find_packages, setup

# Everything else stands in pyproject.toml, where a package's place can be said (package-dir) but a search for packages
# and a name given by hand cannot be combined.
setup(
    packages=[
        *find_packages(include=["mlx_resonance", "mlx_resonance.*"]),
        "mlx_resonance.convert",
        *(f"mlx_resonance.convert.{name}" for name in find_packages("convert")),
    ]
)
