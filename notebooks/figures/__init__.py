"""The figures of the notebooks, in the style of `plots`; each function returns a figure for a cell to show."""
