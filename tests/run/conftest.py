"""A model folder without weights, and the preview of what would be trained on it."""

import shutil

import pytest

from tests.conftest import FAST, run_entry, write_arguments


@pytest.fixture(scope="session")
def weightless(tiny_llama, tmp_path_factory):
    """A model folder with configuration and tokenizer alone."""
    folder = tmp_path_factory.mktemp("weightless") / "llama"
    shutil.copytree(tiny_llama, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.pdparams"))
    return folder


@pytest.fixture
def preview(weightless, small_data, tmp_path, capsys):
    def start(number=2, **settings):
        base = FAST | {
            "model_name_or_path": str(weightless),
            "dataset_name_or_path": str(small_data),
            "output_dir": str(tmp_path / "out"),
        }
        path = write_arguments(tmp_path / "arguments.json", **(base | settings))
        code = run_entry(path, "--preview", number)
        said = capsys.readouterr()
        return code, said.out, said.err

    return start
