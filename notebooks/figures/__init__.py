"""The figures of the notebooks, in the style of `plots`; each function returns a figure for a cell to show."""

from .common import Live, Picture, figure_of

__all__ = ["Live", "Picture", "figure_of"]
