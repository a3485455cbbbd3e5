"""The server behind `python -m lcm_core serve`: a page that paints while you draw, and two web APIs."""
