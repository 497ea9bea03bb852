"""The metadata is in setup.cfg; this only puts recipes/ and slurm/ into the wheel, where the package finds them."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
SHIPPED = {"recipes": "_recipes", "slurm": "_slurm"}


class BuildWithShippedFiles(build_py):
    """build_py, and then a copy of the folders that a checkout has beside the package."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return  # a checkout has the folders themselves
        for source, target in SHIPPED.items():
            shutil.copytree(ROOT / source, Path(self.build_lib) / "vitdist" / target, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithShippedFiles})
