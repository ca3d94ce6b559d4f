"""Four real processes, two stages of two tensor-parallel ranks, write and read what one process would."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from finetune.checkpoints.folder import find_fault
from finetune.storage.checkpoints import Checkpoint, open_indexed
from tests.checkpoints.test_tensors_of_ranks import FAMILIES, write_tiny
from tests.distributed.processes import launch_script

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def test_stages_of_slices_write_whole_models(tmp_path):
    for name in FAMILIES:
        write_tiny(name, tmp_path / name)
    worker = Path(__file__).with_name("saving_worker.py")
    launch_script(worker, 4, [str(tmp_path), *FAMILIES], timeout=240).check()
    for name in FAMILIES:
        source, saved = Checkpoint(tmp_path / name), tmp_path / f"{name}-saved" / "checkpoint-1"
        assert find_fault(saved) is None
        written = Checkpoint(saved)
        extra = written.names.keys() - source.names.keys()
        # What one process writes as well: a buffer, and tied weights under the name that PaddleNLP looks for.
        assert all(key.endswith(("inv_freq", "lm_head.decoder_weight")) for key in extra), extra
        moments = open_indexed(saved, "optimizer.safetensors.index.json")
        for key in source.names:
            whole = np.asarray(source.read(key))
            np.testing.assert_array_equal(np.asarray(written.read(key)), whole, err_msg=key)
            np.testing.assert_allclose(moments.read(f"{key}/moment1_0"), 0.1 * whole, rtol=1e-5, atol=1e-6)
        assert len(list(saved.glob("model-*.safetensors"))) == 2
        shards = tmp_path / f"{name}-saved" / "checkpoint-2"
        assert len(list(shards.glob("model_state.tp0?_pp0?.pdparams"))) == 4
