"""Everything static is in pyproject.toml; compiled extensions will be declared here."""

from setuptools import setup

setup()
