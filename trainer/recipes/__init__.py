"""Whole models made from public data by one command."""
