"""Names the packages of the wheel; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["rayft", "rayft.*"]), "rayft.recipes", *find_packages("kernels")])
