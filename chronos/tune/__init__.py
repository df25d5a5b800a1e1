"""Searching for better recipes, and for the settings with which a machine runs a model fastest.

`chronos tune start` (`worker.start`) works on a study of a recipe: trials are trained by the loop
that `chronos train` uses, and judged by what a model is for. Needs the extra [tune].
"""
