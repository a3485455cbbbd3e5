"""Scores of pictures: Frechet distance, recall, alignment, and the networks that they are computed with."""
