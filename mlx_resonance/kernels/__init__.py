"""The rotary op: `ops.py` holds it in plain mlx.core."""
