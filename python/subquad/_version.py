"""The version of the installed distribution."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("subquad")
except PackageNotFoundError:  # run from a tree that was never installed
    __version__ = "0+unknown"
