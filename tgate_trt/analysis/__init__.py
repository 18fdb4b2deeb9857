"""Measures of pictures, and the analysis of a model over the steps of its pictures; nothing is downloaded."""
