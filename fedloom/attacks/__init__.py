"""Attacks as measurements of how much a model reveals, each compared with chance."""
