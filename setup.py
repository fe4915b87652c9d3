"""Which folders are the package. All else stands in pyproject.toml, where no folder from beside it can be named."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["lit_qlora", "lit_qlora.*"]), "lit_qlora.configs"],
    package_dir={"lit_qlora.configs": "configs"},
)
