"""The API page: python docs/build.py OUTPUT renders the docstrings of the public names as HTML."""

import sys
from pathlib import Path

import mlx_resonance

import pdoc

MODULES = ("mlx_resonance", "mlx_resonance.convert", "mlx_resonance.finetuning")

for name in mlx_resonance.__all__:  # some are imported when they are first asked for, which pdoc does not
    setattr(mlx_resonance, name, getattr(mlx_resonance, name))
pdoc.render.configure(docformat="google")
pdoc.pdoc(*MODULES, output_directory=Path(sys.argv[1]))
page = (Path(sys.argv[1]) / "mlx_resonance.html").read_text()
missing = [name for name in mlx_resonance.__all__ if f'id="{name}"' not in page]
if missing:
    sys.exit(f"error: the API page has no {', '.join(missing)}")
