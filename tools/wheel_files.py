"""What a wheel holds beside the package's own files: the argument files of the families and the sample data.

They stand at the root of the repository, where users of a checkout look for them. The build copies them to
`finetune/shipped/` of the wheel; pyproject.toml names this class for that, and finetune/storage/shipped_files.py reads
them in either place.
"""

from __future__ import annotations

from pathlib import Path

from setuptools.command.build_py import build_py

SHIPPED = (
    "*/*_argument.json",
    "data/*.json",
    "data/preference/*.json",
    "data/conversations/*.json",
    "data/domain/*/*.json",
)
TARGET = Path("finetune") / "shipped"


class BuildWithShippedFiles(build_py):
    """Builds the package, then adds the files; an editable install needs no copy."""

    def run(self) -> None:
        """Runs the build."""
        super().run()
        if not self.editable_mode:
            for source, target in self._copies().items():
                self.mkpath(str(Path(target).parent))
                self.copy_file(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """The files that the build makes, as setuptools asks for them."""
        return [*super().get_outputs(include_bytecode), *self._copies().values()]

    def _copies(self) -> dict[str, str]:
        root = Path.cwd()  # a build runs in the folder of pyproject.toml
        found = (path.relative_to(root) for pattern in SHIPPED for path in sorted(root.glob(pattern)))
        return {str(path): str(Path(self.build_lib) / TARGET / path) for path in found}
