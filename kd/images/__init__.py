"""Images as they lie somewhere, and how they are held and decoded; kd/data.py makes the three splits of them."""
